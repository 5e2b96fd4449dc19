"""``alignclip.load``: every format with a file as its writer writes it, and a line for every file that is none."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from composer.utils import get_device
from huggingface_hub import constants, file_download
from huggingface_hub.utils import reset_sessions
from models import EVERYTHING, FIXTURES, MODELS, config_of, reference, small_batch, small_config
from omegaconf import OmegaConf
from PIL import Image
from runs import write_config, write_set
from s3 import S3Server
from safetensors.torch import save_file
from test_encoders import stock
from torch import Tensor

import alignclip
from alignclip.config import reading
from alignclip.config.schema import ModelConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.training.build import build_trainer
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.formats.release import our_names
from alignclip.weights.load import load_encoders
from alignclip.weights.start_from import load_pretrained

CAPTIONS = ["a red dot", "blue on the left!", ""]


def picture() -> Image.Image:
    return Image.effect_mandelbrot((70, 50), (-2, -1.5, 1, 1.5), 20).convert(
        "P"
    )  # not square, and not RGB


def features(model: CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    size = model.visual.image_size[0]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(tokens)


def assert_same(model: CLIP, other: CLIP, tokens: Tensor) -> None:
    for ours, theirs in zip(features(model, tokens), features(other, tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.logit_scale, other.logit_scale.reshape(1))


def widths_of_64(**shared: Any) -> ModelConfig:
    vision, text = {"width": 64, "head_width": 64}, {"width": 64, "heads": 1}
    return small_config(vision=vision, text=text, shared=shared)


def release_of(model: CLIP, theirs: Path = FIXTURES / "model_micro.pt") -> dict[str, Tensor]:
    """A model's weights under the release's names, which a fixture has."""
    weights = model.state_dict()
    names = torch.load(theirs, weights_only=True)["state_dict"]
    release = {name: weights[our_names(name)[0]] for name in names if our_names(name)}
    return release | {
        "logit_scale": weights["logit_scale"][0],
        "text.text_projection": torch.zeros_like(weights["text_projection"]),
    }


def write_export(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor], **preprocess: Any
) -> Path:
    """As ``open_clip.push_to_hf_hub.save_for_hf`` writes it."""
    folder.mkdir(parents=True)
    model_cfg = {
        "embed_dim": config.embed_dim,
        "vision_cfg": dataclasses.asdict(config.vision_cfg),
        "text_cfg": dataclasses.asdict(config.text_cfg),
    }
    text = json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    copies = {name: value.clone() for name, value in weights.items()}
    save_file(copies, folder / "open_clip_model.safetensors")
    return folder


# --- checkpoints of ours ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    """A run's save folder, and the model whose weights its latest checkpoint has: EMA's average."""
    folder = tmp_path_factory.mktemp("run")
    write_set(str(folder / "set"), 64)
    overrides = [
        "max_duration=3ba",
        "scheduler.t_warmup=1ba",
        "save_interval=2ba",
        "data.num_workers=0",
        "run_name=r",
    ]
    overrides += ["algorithms.EMA.half_life=2ba", "algorithms.EMA.update_interval=1ba"]
    config = reading.load(
        write_config(folder, str(folder / "set"), str(folder / "saved")), overrides
    )
    save_folder = SaveFolder(config)
    trainer = build_trainer(config, get_device("cpu"), save_folder)
    save_folder.write_config()
    trainer.fit()
    trainer.close()
    (ema,) = [
        algorithm for algorithm in trainer.state.algorithms if type(algorithm).__name__ == "EMA"
    ]
    encoders = trainer.state.model.encoders
    assert isinstance(encoders, CLIP)
    assert ema.ema_weights_active
    not_averaged = ema.ema_model.named_parameters_dict["encoders.visual.conv1.weight"]
    assert not torch.equal(encoders.visual.conv1.weight, not_averaged)
    return folder / "saved", encoders.eval()


@pytest.mark.parametrize("name", ["", "latest-rank0.pt", "ep0-ba3-rank0.pt", "latest", "ep0-ba3"])
def test_a_checkpoint_of_ours(run: tuple[Path, CLIP], name: str) -> None:
    folder, trained = run
    before = torch.random.get_rng_state()
    model, preprocess, tokenizer = alignclip.load(folder / name)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert_same(model, trained, tokenizer(CAPTIONS))
    assert model.visual.proj is model.text_projection
    assert len(list(model.parameters())) == len(list(trained.parameters()))
    assert torch.equal(
        preprocess(picture()), open_clip.image_transform(32, is_train=False)(picture())
    )
    assert tokenizer(CAPTIONS).shape == (3, 77)


def test_an_older_checkpoint_is_another_model(run: tuple[Path, CLIP]) -> None:
    folder, trained = run
    older = load_encoders(str(folder / "ep0-ba2-rank0.pt"))
    assert not torch.equal(older.visual.conv1.weight, trained.visual.conv1.weight)


def test_links_to_a_checkpoint(run: tuple[Path, CLIP], tmp_path: Path) -> None:
    folder, trained = run
    link = tmp_path / "best.pt"
    link.symlink_to(folder / "latest-rank0.pt")
    assert torch.equal(load_encoders(link).text_projection, trained.text_projection)
    # a bucket's folder, copied
    for name in ("config.yaml", "ep0-ba3-rank0.pt"):
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "latest-rank0.pt.symlink").write_text("runs/r/ep0-ba3-rank0.pt")
    assert torch.equal(load_encoders(tmp_path).text_projection, trained.text_projection)


def test_a_checkpoint_by_its_name(
    run: tuple[Path, CLIP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``RUN/best``, in the run's own folder ``best``, and in a folder that was copied from a bucket."""
    folder, trained = run
    copy = tmp_path / "runs" / "r"
    copy.mkdir(parents=True)
    for name in ("config.yaml", "ep0-ba3-rank0.pt"):
        shutil.copy(folder / name, copy / name)
    shutil.copy(folder / "ep0-ba3-rank0.pt", copy / "best-rank0.pt")
    (copy / "latest-rank0.pt.symlink").write_text("runs/r/ep0-ba3-rank0.pt", encoding="utf-8")
    for place in (copy / "best", copy / "latest"):
        assert torch.equal(load_encoders(str(place)).text_projection, trained.text_projection)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"no best-rank0\.pt in this folder; did you mean 'runs/r/best'\?"
    ):
        load_encoders("best")
    monkeypatch.chdir(copy)
    assert torch.equal(load_encoders("best").text_projection, trained.text_projection)
    with pytest.raises(UserError, match=r"no such file: .*; did you mean 'best'\?"):
        load_encoders(str(copy / "bets"))
    (copy / "best").mkdir()  # a folder of that name is what was meant
    with pytest.raises(UserError, match=r"the folder .*best has neither"):
        load_encoders(str(copy / "best"))


def test_a_checkpoint_in_a_bucket(run: tuple[Path, CLIP], s3: S3Server) -> None:
    folder, trained = run
    bucket = s3.bucket()
    name, prefix = bucket.removeprefix("s3://"), "runs/r"
    for file in ("config.yaml", "ep0-ba3-rank0.pt"):
        s3.client.upload_file(str(folder / file), name, f"{prefix}/{file}")
    # what Composer writes instead of a link
    s3.client.put_object(
        Bucket=name, Key=f"{prefix}/latest-rank0.pt.symlink", Body=b"runs/r/ep0-ba3-rank0.pt"
    )
    for path in ("ep0-ba3-rank0.pt", "latest-rank0.pt", "", "ep0-ba3", "latest", "latest/"):
        assert torch.equal(
            load_encoders(f"{bucket}/{prefix}/{path}").text_projection, trained.text_projection
        )
    for path, words in {
        f"{bucket}/{prefix}/ep9-ba9-rank0.pt": "no ep9-ba9-rank0.pt at",
        f"{bucket}/nothing": "no latest-rank0.pt at",
        f"{bucket}/{prefix}/best": f"no latest-rank0.pt at .*, and no best-rank0.pt at {bucket}/{prefix};",
        f"{bucket.replace('s3://', 's3:/')}/{prefix}": "one slash; did you mean 's3://",
        "sss://bucket/x.pt": "can't read sss://bucket/x.pt",
    }.items():
        with pytest.raises(UserError, match=words):
            alignclip.load(path)
    s3.client.put_object(
        Bucket=name, Key=f"{prefix}/latest-rank0.pt.symlink", Body=b"runs/r/ep7-ba7"
    )
    with pytest.raises(UserError, match=r"points to s3://.*/runs/r/ep7-ba7, which is not there"):
        alignclip.load(f"{bucket}/{prefix}")


def test_an_export_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    source = build_encoders(small_config(shared=EVERYTHING)).eval()
    bucket = s3.bucket()
    for file in write_export(tmp_path / "export", small_config(), source.state_dict()).iterdir():
        s3.client.upload_file(str(file), bucket.removeprefix("s3://"), f"export/{file.name}")
    assert_same(load_encoders(f"{bucket}/export"), source, small_batch()[1])


def test_only_the_model_section_of_the_configuration_matters(
    run: tuple[Path, CLIP], tmp_path: Path
) -> None:
    """A run that another version of this package has started, with keys that are gone or refused now."""
    folder, _ = run
    path = tmp_path / "ep0-ba3-rank0.pt"
    path.symlink_to(folder / "ep0-ba3-rank0.pt")
    text = (folder / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(f"{text}\nscale_schedule_ratio: 1.0\ngone: 2\n")
    load_encoders(path)
    for changed, words in {
        text.replace("patch_size: 8", "patch_size: 16"): [
            "is not the model that its config.yaml describes",
            "visual.conv1.weight is [32, 3, 8, 8], not [32, 3, 16, 16]",
        ],
        text.replace("layers: 2", "layers: 3"): ["it lacks", " and 21 more"],
        text.replace("layers: 2", "layers: 1"): ["it has", " and 21 more in addition"],
        text.replace("width: 32", "width: 34"): ["model.vision_cfg.width=34 is no multiple"],
        text.replace("head_width: 16", "head_width: 0"): [
            "model.vision_cfg.head_width must be positive, not 0"
        ],
        text.replace("patch_size: 8", "patch_seize: 8"): ["no model can be read", "patch_seize"],
        "model: [": ["no model can be read from the config.yaml"],
    }.items():
        (tmp_path / "config.yaml").write_text(changed)
        with pytest.raises(UserError) as error:
            alignclip.load(path)
        for word in words:
            assert word in one_line(error.value)


def test_a_configuration_instead_of_the_file(run: tuple[Path, CLIP], tmp_path: Path) -> None:
    folder, trained = run
    shutil.copy(folder / "ep0-ba3-rank0.pt", tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"no config\.yaml beside it; copy it"):
        alignclip.load(tmp_path / "model.pt")
    config = reading.load(folder / "config.yaml").model
    model = load_encoders(tmp_path / "model.pt", config=config)
    assert torch.equal(model.text_projection, trained.text_projection)


# --- releases of the authors' -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_release_gives_the_published_features(name: str) -> None:
    published = reference(name)
    config = config_of(published["config"], **EVERYTHING)
    model, preprocess, tokenizer = alignclip.load(FIXTURES / f"model_{name}.pt", config=config)
    assert model.visual.proj is model.text_projection
    with torch.no_grad():
        image = model.encode_image(published["image"], normalize=True)
        text = model.encode_text(published["tokens"], normalize=True)
    torch.testing.assert_close(image, published["image_features"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(text, published["text_features"], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(model.logit_scale.detach().exp()[0], published["logit_scale"])
    assert preprocess(picture()).shape == (3, 32, 32)
    if name == "micro":
        assert torch.equal(tokenizer(published["captions"]), published["tokens"])


def test_the_sizes_of_a_release_are_read_off_its_shapes(tmp_path: Path) -> None:
    """As the published loop saves it, of several processes."""
    source = build_encoders(widths_of_64(**EVERYTHING))
    wrapped = {f"module.{name}": value for name, value in release_of(source).items()}
    torch.save(
        {"epoch": 30, "name": "x", "state_dict": wrapped, "optimizer": {}}, tmp_path / "epoch_30.pt"
    )
    model, _, tokenizer = alignclip.load(tmp_path / "epoch_30.pt")
    assert_same(model, source.eval(), small_batch()[1])
    assert tokenizer(CAPTIONS).shape == (3, 12)
    # bare, in half precision
    torch.save(
        {name: value.half() for name, value in release_of(source).items()}, tmp_path / "half.pt"
    )
    half = load_encoders(tmp_path / "half.pt")
    assert half.text_projection.dtype == torch.float32
    assert torch.equal(half.text_projection, source.text_projection.half().float())


def test_a_configuration_beside_a_release_says_more_than_its_shapes(tmp_path: Path) -> None:
    """Heads of 16 and of 32 have the same shapes as one of 64, and compute something else."""
    torch.manual_seed(0)
    source = build_encoders(widths_of_64(**EVERYTHING))
    torch.save({"state_dict": release_of(source)}, tmp_path / "release.pt")
    tokens = small_batch()[1]
    inferred = features(load_encoders(tmp_path / "release.pt"), tokens)
    config = widths_of_64(**EVERYTHING)
    config.vision_cfg.head_width, config.text_cfg.heads = 16, 4
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml({"model": OmegaConf.structured(config)})
    )
    found = load_encoders(tmp_path / "release.pt")
    expected = build_encoders(config)
    expected.load_state_dict(source.state_dict())
    assert_same(found, expected.eval(), tokens)
    assert not torch.allclose(features(found, tokens)[0], inferred[0], atol=1e-4)
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"no model can be read from the config\.yaml beside it"):
        alignclip.load(tmp_path / "release.pt")


def test_wrong_releases(tmp_path: Path) -> None:
    release = release_of(build_encoders(widths_of_64(**EVERYTHING)))
    path = tmp_path / "release.pt"

    def complaint(changed: dict[str, Tensor]) -> str:
        torch.save(changed, path)
        with pytest.raises(UserError) as error:
            alignclip.load(path)
        return one_line(error.value)

    def without(*names: str) -> dict[str, Tensor]:
        return {name: value for name, value in release.items() if name not in names}

    assert "no 'visual.conv1.weight' of 4 dimensions" in complaint(without("visual.conv1.weight"))
    assert "it lacks visual.ln_pre.bias" in complaint(without("visual.ln_pre.bias"))
    blocks = [name for name in release if name.startswith("transformer.resblocks.2.ln")]
    assert " and 5 more" in complaint(without(*blocks))
    assert "it has visual.extra in addition" in complaint(
        release | {"visual.extra": torch.zeros(1)}
    )
    assert "ln_final.bias is [63], not [64]" in complaint(
        release | {"ln_post.bias": torch.zeros(63)}
    )
    assert "logit_scale is [2], not [1]" in complaint(release | {"logit_scale": torch.zeros(2)})
    assert "no 'text_projection' of 2 dimensions" in complaint(
        release | {"projection": torch.zeros(64)}
    )
    with pytest.raises(UserError, match=r"width of 32 is no multiple of 64.*ModelConfig"):
        alignclip.load(FIXTURES / "model_nano.pt")


# --- exports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shared", [{}, {"blocks": 2, "ln_final": True}, EVERYTHING], ids=["none", "some", "all"]
)
def test_an_export_is_what_open_clip_makes_of_it(tmp_path: Path, shared: dict[str, Any]) -> None:
    torch.manual_seed(0)
    source = build_encoders(small_config(shared=shared, text={"vocab_size": 49408}))
    for parameter in (
        source.parameters()
    ):  # as if trained: at the start LayerNorms are equal without being shared
        torch.nn.init.normal_(parameter, std=0.1)
    config = small_config(text={"vocab_size": 49408})
    mean, std = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]
    weights = source.state_dict() | {"logit_scale": source.logit_scale.detach()[0]}
    folder = write_export(
        tmp_path / "export", config, weights, mean=mean, std=std, resize_mode="squash"
    )
    model, preprocess, tokenizer = alignclip.load(folder)
    theirs, their_preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert torch.equal(tokenizer(CAPTIONS), tokens)
    assert torch.equal(preprocess(picture()), their_preprocess(picture()))
    for ours, expected in zip(features(model, tokens), features(theirs, tokens), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert_same(model, source.eval(), tokens)
    assert len(list(model.parameters())) == len(list(source.parameters()))
    with pytest.raises(UserError, match="asks for other pixels"):
        load_encoders(folder)


def test_where_an_export_may_lie(tmp_path: Path) -> None:
    source = stock(small_config())
    folder = write_export(tmp_path / "export", small_config(), source.state_dict())
    torch.save(source.state_dict(), folder / "epoch_1.pt")
    torch.save({"epoch": 1, "state_dict": source.state_dict()}, folder / "epoch_2.pt")
    tokens = small_batch()[1]
    for path in (f"local-dir:{folder}", folder / "open_clip_model.safetensors", folder / "epoch_1.pt",
                 folder / "epoch_2.pt"):  # fmt: skip
        images, texts = features(load_encoders(path), tokens)
        assert torch.equal(images, features(load_encoders(folder), tokens)[0])
        assert texts.shape == (8, 16)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"no open_clip_model\.safetensors or open_clip_pytorch_model\.bin"
    ):
        alignclip.load(folder)
    (folder / "epoch_1.pt").rename(folder / "open_clip_pytorch_model.bin")
    load_encoders(folder)
    with pytest.raises(UserError, match=r"no open_clip_config\.json with a model_cfg beside it"):
        alignclip.load(shutil.copy(folder / "open_clip_pytorch_model.bin", tmp_path / "alone.pt"))
    load_encoders(tmp_path / "alone.pt", config=small_config())


def test_exports_that_are_not_our_model(tmp_path: Path) -> None:
    source = build_encoders(small_config())
    folder = write_export(tmp_path / "export", small_config(), source.state_dict())
    path = folder / "open_clip_config.json"
    right = json.loads(path.read_text())["model_cfg"]

    def complaint(**changed: Any) -> str:
        path.write_text(json.dumps({"model_cfg": right | changed}))
        with pytest.raises(UserError) as error:
            alignclip.load(folder)
        return one_line(error.value)

    # what is open_clip's default may be spelled out
    spelled_out = {
        "quick_gelu": None,
        "custom_text": True,  # a text tower under names of its own
        "vision_cfg": right["vision_cfg"] | {"pool_type": "tok", "qk_norm": False},
    }
    path.write_text(json.dumps({"model_cfg": right | spelled_out, "preprocess_cfg": None}))
    load_encoders(folder)
    assert "don't have its model_cfg's multimodal_cfg; load it with open_clip" in complaint(
        multimodal_cfg={"width": 8}
    )
    text = right["text_cfg"] | {"hf_model_name": "x", "pool_type": "last"}
    assert "text_cfg.hf_model_name, text_cfg.pool_type" in complaint(text_cfg=text)
    assert "could not be converted" in complaint(embed_dim="many")
    vision = right["vision_cfg"] | {"width": 48}
    assert "visual.class_embedding is [32], not [48]" in complaint(vision_cfg=vision)
    assert "vision_cfg.width=32 is no multiple" in complaint(
        vision_cfg=right["vision_cfg"] | {"head_width": 24}
    )
    assert "its vision_cfg is a str, not a section" in complaint(vision_cfg="ViT-B-16")
    assert "its text_cfg is a list, not a section" in complaint(text_cfg=[right["text_cfg"]])
    negative = right["vision_cfg"] | {"image_size": -32}
    assert "model.vision_cfg.image_size must be positive, not -32" in complaint(vision_cfg=negative)
    for text in ("{", "[" * 100_000, '{"a":' * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="is not JSON") as error:
            alignclip.load(folder)
        one_line(error.value)
    for wrong in (
        {"mean": "x"},
        {"mean": [0.5, 0.5]},
        {"std": []},
        {"std": 0},
        {"mode": "L"},
        {"resize_mode": "no"},
        [1],
        3,
    ):
        path.write_text(json.dumps({"model_cfg": right, "preprocess_cfg": wrong}))
        with pytest.raises(UserError, match="its images can't be prepared as it says") as error:
            alignclip.load(folder)
        one_line(error.value)
    path.write_text(json.dumps({"model_cfg": right, "preprocess_cfg": {"mean": 0.5, "std": 0.25}}))
    _, preprocess, _ = alignclip.load(folder)
    _, theirs = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    assert torch.equal(preprocess(picture()), theirs(picture()))
    with pytest.raises(UserError, match="are one and the same there, but differ"):
        alignclip.load(folder, config=small_config(shared=EVERYTHING))


# --- the Hugging Face Hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Hub on this machine: its repositories are the folders ``org/name`` of the path given."""
    root = tmp_path / "hub"

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            parts = self.path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                folder = root / "/".join(parts[2:4])
                files = [
                    path.relative_to(folder).as_posix()
                    for path in folder.rglob("*")
                    if path.is_file()
                ]
                listing = {
                    "id": "/".join(parts[2:4]),
                    "siblings": [{"rfilename": file} for file in sorted(files)],
                }
                self.reply(
                    json.dumps(listing).encode() if folder.is_dir() else None, "RepoNotFound"
                )
            else:
                file = root / "/".join(parts[:2] + parts[4:])
                missing = (
                    "EntryNotFound" if (root / "/".join(parts[:2])).is_dir() else "RepoNotFound"
                )
                self.reply(file.read_bytes() if file.is_file() else None, missing)

        def reply(self, body: bytes | None, error: str) -> None:
            self.send_response(200 if body is not None else 404)
            for name, value in {"ETag": f'"{hash(body)}"', "X-Repo-Commit": "0" * 40}.items():
                self.send_header(name, value)
            if body is None:
                self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    reset_sessions()
    yield root
    server.shutdown()
    server.server_close()
    reset_sessions()


def test_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_encoders(widths_of_64(**EVERYTHING)).eval()
    tokens = small_batch()[1]
    write_export(hub / "org" / "export", widths_of_64(), source.state_dict())
    torch.save(source.state_dict(), hub / "org" / "export" / "open_clip_pytorch_model.bin")
    (hub / "org" / "release").mkdir()
    torch.save({"state_dict": release_of(source)}, hub / "org" / "release" / "alignclip.pt")
    shutil.copytree(hub / "org" / "release", hub / "org" / "several" / "cc12m")
    (hub / "org" / "several" / "other.pt").write_text("")
    there = ("hf-hub:org/export", "hf-hub:org/release", "hf-hub:org/several/cc12m/alignclip.pt")
    for place in there:
        assert_same(load_encoders(place), source, tokens)
    refused = {
        "hf-hub:org/several": r"several models: cc12m/alignclip\.pt, other\.pt; name one, e\.g\. hf-hub:org/sev",
        "hf-hub:org/release/nothing.pt": "is not there; did you mean|is not there; valid: alignclip.pt",
        "hf-hub:org/nothing": "no such repository, or a private one",
        "hf-hub:org": "write hf-hub:ORG/NAME",
        "hf-hub:org/na me": "Repo id must",
    }
    for place, words in refused.items():
        with pytest.raises(UserError, match=words) as error:
            alignclip.load(place)
        one_line(error.value)
    # without a network: what was loaded before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    for place in there:
        assert_same(load_encoders(place), source, tokens)
    for place, words in {
        "hf-hub:org/nothing": r"not in the local cache, and huggingface\.co can't be reached",
        "hf-hub:org/release/nothing.pt": "is not in the local cache; valid: alignclip.pt",
    }.items():
        with pytest.raises(UserError, match=words):
            alignclip.load(place)


def test_a_hub_that_does_not_answer(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for place in ("hf-hub:org/name", "hf-hub:org/name/model.pt"):
        with pytest.raises(UserError, match=r"huggingface\.co can't be reached"):
            alignclip.load(place)


# --- files that are none ------------------------------------------------------------------------------------------


def one_line(error: UserError) -> str:
    assert "\n" not in str(error)
    return str(error)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["checkpoint", "state dict", "bare", "pickle", "safetensors"])
def test_no_code_of_a_file_runs(run: tuple[Path, CLIP], tmp_path: Path, kind: str) -> None:
    folder, trained = run
    payload = Payload(tmp_path / "made")
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "checkpoint":
        shutil.copy(folder / "config.yaml", tmp_path)
        content = torch.load(folder / "latest-rank0.pt", weights_only=False)
        content["state"]["callbacks"] = payload
    else:
        content = (
            {"state_dict": trained.state_dict(), "x": payload} if kind == "state dict" else payload
        )
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(UserError) as error:
        alignclip.load(path)
    assert "not a safetensors file" in one_line(
        error.value
    ) or "mkdir', which could run code" in str(error.value)
    assert not (tmp_path / "made").exists()
    with suppress(RuntimeError):  # what follows the payload is no checkpoint
        torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists(), "the payload is none"


def test_files_that_are_no_models(run: tuple[Path, CLIP], tmp_path: Path) -> None:
    folder, trained = run
    export = write_export(
        tmp_path / "export", small_config(), build_encoders(small_config()).state_dict()
    )
    whole = (export / "open_clip_model.safetensors").read_bytes()
    cut = export / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    cut_checkpoint = tmp_path / "cut.pt"
    cut_checkpoint.write_bytes((folder / "latest-rank0.pt").read_bytes()[:100_000])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty.pt").write_text("")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": 1, "b": 2, "c": 3, "d": 4}, tmp_path / "dict.pt")
    torch.save(
        {"state": {"model": {"backbone.weight": torch.zeros(1)}}, "rng": []}, tmp_path / "other.pt"
    )
    torch.save(
        {"state": {"model": {"encoders.x": torch.zeros(1)}}, "rng": []}, tmp_path / "near.pt"
    )
    torch.save(trained, tmp_path / "module.pt")
    sharded = tmp_path / "ep1-ba5"
    sharded.mkdir()
    (sharded / ".metadata").write_text("")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "nothing").mkdir()
    refused = {
        cut: "cut.safetensors is not a safetensors file, or only a part of one",
        cut_checkpoint: "cut.pt is not a PyTorch checkpoint, or only a part of one",
        tmp_path / "text.pt": "is not a PyTorch checkpoint",
        tmp_path / "empty.pt": "is not a PyTorch checkpoint",
        tmp_path / "list.pt": "holds a list, not a model's weights",
        tmp_path / "dict.pt": "is not a model's weights; it holds a, b, c and 1 more",
        tmp_path / "other.pt": "is a Composer checkpoint, but not of a model of ours",
        tmp_path / "near.pt": "no config.yaml beside it",
        tmp_path / "module.pt": "CLIP', which could run code",
        sharded: "is a sharded checkpoint",
        tmp_path / "dangling.pt": "gone.pt, which is not there",
        tmp_path / "lits.pt": "no such file: .*; did you mean 'list.pt'",
        tmp_path / "nowhere" / "x.pt": "no such file: .*; no weights lie there",
        tmp_path
        / "nothing": "neither a latest-rank0.pt nor an export's open_clip_config.json; its weights: none",
        tmp_path: "neither a latest-rank0.pt nor an export's open_clip_config.json; its weights: cut.pt, .* more",
        folder.parent: "did you mean '.*saved'?",
        "some/name": "did you mean 'hf-hub:some/name'",
        "x" * 5000: "can't read x*: File name too long",
    }
    for path, words in refused.items():
        with pytest.raises(UserError, match=words) as error:
            alignclip.load(path)
        one_line(error.value)


def special(value: Tensor) -> dict[str, Tensor]:
    """A weight in every way that torch can save it, but for the one in which models are saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CSR and nested tensors, which are in beta
        return {
            "sparse": value.to_sparse(),
            "compressed": value.to_sparse_csr(),
            "meta": value.to("meta"),
            "quantized": torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([value, value]),
            "expanded": torch.zeros(1).expand(value.shape),
            "overlapping": torch.zeros(sum(value.shape)).as_strided(value.shape, (1, 1)),
            "int8": value.to(torch.int8),
            "complex": value.to(torch.complex64),
        }


@pytest.mark.parametrize("how", list(special(torch.zeros(2, 2))))
def test_tensors_that_are_no_weights(tmp_path: Path, how: str) -> None:
    """In a run's checkpoint, and as what a new run would start from."""
    config = small_config()
    model = build_encoders(config)
    weights = {f"encoders.{name}": value for name, value in model.state_dict().items()}
    name = "encoders.transformer.resblocks.0.mlp.c_fc.weight"
    torch.save(
        {"state": {"model": weights | {name: special(weights[name])[how]}}},
        tmp_path / "latest-rank0.pt",
    )
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml({"model": OmegaConf.structured(config)})
    )
    with pytest.raises(UserError) as error:
        alignclip.load(tmp_path)
    assert "c_fc.weight" in one_line(error.value) or "which could run code" in str(error.value)
    before = model.transformer.resblocks[0].mlp.c_fc.weight.detach().clone()
    try:
        report = load_pretrained(model, str(tmp_path), "text", config)
    except UserError as refused:
        one_line(refused)
    else:
        assert how in ("int8", "complex")
        assert "of another shape: transformer.resblocks.0" in report.text
    assert torch.equal(model.transformer.resblocks[0].mlp.c_fc.weight, before)


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    """Of a model of 100 TB by its configuration, by a tensor that is one number, by a file that unpacks to a GB."""
    config = small_config()
    weights = {
        f"encoders.{name}": value for name, value in build_encoders(config).state_dict().items()
    }
    whole = tmp_path / "latest-rank0.pt"
    torch.save({"state": {"model": weights}}, whole)
    for settings, words in (
        (
            {"text_cfg": {**vars(config.text_cfg), "vocab_size": 10**12}},
            "token_embedding.weight is",
        ),
        ({"text_cfg": {**vars(config.text_cfg), "layers": 10**9}}, "1000000000 layers, but it has"),
        ({"embed_dim": 10**11}, "is .*, not "),
        (
            {"vision_cfg": {**vars(config.vision_cfg), "image_size": 16 * 10**5}},
            "visual.positional_embedding is",
        ),
        ({"vision_cfg": {**vars(config.vision_cfg), "mlp_ratio": 1e12}}, "is .*, not "),
    ):
        merged = OmegaConf.merge(OmegaConf.structured(config), settings)
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"model": merged}))
        with pytest.raises(UserError, match=words) as error:
            alignclip.load(tmp_path)
        one_line(error.value)
    (tmp_path / "config.yaml").write_text(
        OmegaConf.to_yaml({"model": OmegaConf.structured(config)})
    )
    alignclip.load(tmp_path)
    packed = tmp_path / "packed.pt"
    with (
        zipfile.ZipFile(whole) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    assert packed.stat().st_size < whole.stat().st_size
    with pytest.raises(UserError, match="it is a compressed archive"):
        alignclip.load(packed)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe\x00\x01", b"runs/", b"a\x00b", b"x" * 5000]
)
def test_links_that_are_none(tmp_path: Path, content: bytes, s3: S3Server) -> None:
    (tmp_path / "latest-rank0.pt.symlink").write_bytes(content)
    bucket = s3.bucket()
    s3.client.put_object(
        Bucket=bucket.removeprefix("s3://"), Key="r/latest-rank0.pt.symlink", Body=content
    )
    for place in (tmp_path, f"{bucket}/r"):
        with pytest.raises(UserError, match="is no link to a checkpoint") as error:
            alignclip.load(place)
        one_line(error.value)


def test_devices() -> None:
    with pytest.raises(UserError, match="device=gpu can't be used on this machine"):
        alignclip.load(FIXTURES / "model_nano.pt", "gpu")
    model, _, _ = alignclip.load(
        FIXTURES / "model_nano.pt", "meta", config=config_of(reference("nano")["config"])
    )
    assert model.logit_scale.device.type == "meta"


@pytest.mark.gpu
def test_on_a_gpu(run: tuple[Path, CLIP]) -> None:
    model, _, tokenizer = alignclip.load(run[0], "cuda")
    assert model.encode_text(tokenizer(CAPTIONS).cuda()).device.type == "cuda"


def test_what_is_imported_when() -> None:
    """``import alignclip`` nothing; ``alignclip.load`` of a local file neither Composer nor Streaming."""
    code = (
        "import sys, alignclip; assert not {'torch', 'open_clip', 'composer'} & set(sys.modules);"
        "assert alignclip.load; assert not {'composer', 'streaming'} & set(sys.modules);"
        "alignclip.lead"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'alignclip' has no attribute 'lead'" in done.stderr, done.stderr


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_similarity(batch_size: int) -> None:
    """Cosines of all with all, whatever the batch; tokens padded to any length."""
    torch.manual_seed(0)
    model = build_encoders(small_config(shared=EVERYTHING)).eval()
    images, tokens = small_batch(8)
    with torch.no_grad():
        image = torch.nn.functional.normalize(model.encode_image(images), dim=-1)
        text = torch.nn.functional.normalize(model.encode_text(tokens[:5]), dim=-1)
    found = model.similarity(images, tokens[:5], batch_size)
    assert found.shape == (8, 5)
    torch.testing.assert_close(found, image @ text.T, rtol=0, atol=1e-6)
    assert not found.requires_grad
