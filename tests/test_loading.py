"""``alignclip.load``: every format with a file as its writer writes it, and a line for every file
that is none."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants, snapshot_download
from models import (
    EVERYTHING,
    FIXTURES,
    config_of,
    drawn,
    picture,
    reference,
    refused,
    release_of,
    small_batch,
    small_config,
    stock,
    widths_of_64,
    write_export,
    write_model_yaml,
    write_run,
)
from omegaconf import OmegaConf
from own_hub import cut_off, reset_sessions
from s3 import S3Server
from small_runs import EMA, trained
from torch import Tensor

import alignclip
from alignclip.config import reading
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.weights.load import load_encoders
from alignclip.weights.start_from import load_pretrained

CAPTIONS = ["a red dot", "blue on the left!", ""]
LAST = "ep0-ba3-rank0.pt"


def features(model: CLIP, tokens: Tensor) -> tuple[Tensor, Tensor]:
    size = model.visual.image_size[0]
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.encode_image(images), model.encode_text(tokens)


def assert_same(model: CLIP, other: CLIP, tokens: Tensor) -> None:
    for ours, theirs in zip(features(model, tokens), features(other, tokens), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(model.logit_scale, other.logit_scale.reshape(1))


def assert_loaded(place: object, model: CLIP) -> None:
    assert torch.equal(load_encoders(str(place)).text_projection, model.text_projection)


def assert_refused(cases: dict[Any, str]) -> None:
    for place, words in cases.items():
        with refused(words):
            alignclip.load(place)


# --- checkpoints of ours ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    """A run's save folder, and the model whose weights its latest checkpoint has: EMA's average."""
    folder = tmp_path_factory.mktemp("run")
    state = trained(folder, "save_interval=2ba", *EMA).state
    (ema,) = [one for one in state.algorithms if type(one).__name__ == "EMA"]
    encoders = state.model.encoders
    assert isinstance(encoders, CLIP)
    assert ema.ema_weights_active
    not_averaged = ema.ema_model.named_parameters_dict["encoders.visual.conv1.weight"]
    assert not torch.equal(encoders.visual.conv1.weight, not_averaged)
    return folder / "saved", encoders.eval()


@pytest.mark.parametrize("name", ["", "latest-rank0.pt", LAST, "latest", "ep0-ba3"])
def test_a_checkpoint_of_ours(run: tuple[Path, CLIP], name: str) -> None:
    folder, model_of_run = run
    before = torch.random.get_rng_state()
    model, preprocess, tokenizer = alignclip.load(folder / name)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert_same(model, model_of_run, tokenizer(CAPTIONS))
    assert model.visual.proj is model.text_projection
    assert len(list(model.parameters())) == len(list(model_of_run.parameters()))
    expected = open_clip.image_transform(32, is_train=False)(picture())
    assert torch.equal(preprocess(picture()), expected)
    assert tokenizer(CAPTIONS).shape == (3, 77)
    older = load_encoders(str(folder / "ep0-ba2-rank0.pt"))
    assert not torch.equal(older.visual.conv1.weight, model.visual.conv1.weight)


def test_links_and_names_of_checkpoints(
    run: tuple[Path, CLIP], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``RUN/best``, in the run's own folder ``best``, and in a folder copied from a bucket."""
    folder, model = run
    (tmp_path / "link.pt").symlink_to(folder / "latest-rank0.pt")
    copy = tmp_path / "runs" / "r"
    copy.mkdir(parents=True)
    for name in ("config.yaml", LAST):
        shutil.copy(folder / name, copy / name)
    shutil.copy(folder / LAST, copy / "best-rank0.pt")
    (copy / "latest-rank0.pt.symlink").write_text("runs/r/ep0-ba3-rank0.pt", encoding="utf-8")
    for place in (tmp_path / "link.pt", copy, copy / "best", copy / "latest"):
        assert_loaded(place, model)
    monkeypatch.chdir(tmp_path)
    assert_refused({"best": r"no best-rank0\.pt in this folder; did you mean 'runs/r/best'\?"})
    monkeypatch.chdir(copy)
    assert_loaded("best", model)
    assert_refused({copy / "bets": r"no such file: .*; did you mean 'best'\?"})
    (copy / "best").mkdir()  # a folder of that name is what was meant
    assert_refused({copy / "best": r"the folder .*best has neither"})


@pytest.mark.slow
def test_a_checkpoint_in_a_bucket(run: tuple[Path, CLIP], s3: S3Server) -> None:
    folder, model = run
    bucket = s3.bucket()
    name, place = bucket.removeprefix("s3://"), f"{bucket}/runs/r"

    def link(key: bytes) -> None:
        """What Composer writes instead of a link."""
        s3.client.put_object(Bucket=name, Key="runs/r/latest-rank0.pt.symlink", Body=key)

    for file in ("config.yaml", LAST):
        s3.client.upload_file(str(folder / file), name, f"runs/r/{file}")
    link(b"runs/r/ep0-ba3-rank0.pt")
    for path in (LAST, "latest-rank0.pt", "", "ep0-ba3", "latest", "latest/"):
        assert_loaded(f"{place}/{path}", model)
    assert_refused(
        {
            f"{place}/ep9-ba9-rank0.pt": "no ep9-ba9-rank0.pt at",
            f"{bucket}/nothing": "no latest-rank0.pt at",
            f"{place}/best": f"no latest-rank0.pt at .*, and no best-rank0.pt at {place};",
            f"s3:/{name}/runs/r": "one slash; did you mean 's3://",
            "sss://bucket/x.pt": "can't read sss://bucket/x.pt",
        }
    )
    link(b"runs/r/ep7-ba7")
    assert_refused({place: r"points to s3://.*/runs/r/ep7-ba7, which is not there"})


def test_only_the_model_section_of_the_configuration_matters(
    run: tuple[Path, CLIP], tmp_path: Path
) -> None:
    """A run of another version of this package, with keys that are gone or refused now."""
    folder, model = run
    path, yaml = tmp_path / LAST, tmp_path / "config.yaml"
    path.symlink_to(folder / LAST)
    text = (folder / "config.yaml").read_text()
    yaml.write_text(f"{text}\nscale_schedule_ratio: 1.0\ngone: 2\n")
    load_encoders(path)
    for old, new, words in (
        (
            "patch_size: 8",
            "patch_size: 16",
            r"is not the model that its config.yaml describes.*"
            r"visual.conv1.weight is \[32, 3, 8, 8\], not \[32, 3, 16, 16\]",
        ),
        ("layers: 2", "layers: 3", "it lacks .* and 21 more"),
        ("layers: 2", "layers: 1", "it has .* and 21 more in addition"),
        ("width: 32", "width: 34", "model.vision_cfg.width=34 is no multiple"),
        ("head_width: 16", "head_width: 0", "model.vision_cfg.head_width must be positive, not 0"),
        ("patch_size: 8", "patch_seize: 8", "no model can be read.*patch_seize"),
        (text, "model: [", "no model can be read from the config.yaml"),
    ):
        yaml.write_text(text.replace(old, new))
        assert_refused({path: words})
    # a configuration instead of the file
    shutil.copy(folder / LAST, tmp_path / "model.pt")
    yaml.unlink()
    assert_refused({tmp_path / "model.pt": r"no config\.yaml beside it; copy it"})
    config = reading.load(folder / "config.yaml").model
    found = load_encoders(tmp_path / "model.pt", config=config)
    assert torch.equal(found.text_projection, model.text_projection)


# --- releases of the authors ------------------------------------------------------------------


def test_the_sizes_of_a_release_are_read_off_its_shapes(tmp_path: Path) -> None:
    """As the published loop saves it, of several processes; and bare, in half precision."""
    source, path = drawn(widths_of_64(**EVERYTHING)), tmp_path / "epoch_30.pt"
    wrapped = {f"module.{name}": value for name, value in release_of(source).items()}
    torch.save({"epoch": 30, "name": "x", "state_dict": wrapped, "optimizer": {}}, path)
    model, _, tokenizer = alignclip.load(path)
    assert_same(model, source, small_batch()[1])
    assert tokenizer(CAPTIONS).shape == (3, 12)
    torch.save({name: value.half() for name, value in release_of(source).items()}, path)
    half = load_encoders(path).text_projection
    assert half.dtype == torch.float32
    assert torch.equal(half, source.text_projection.half().float())


def test_a_configuration_beside_a_release_says_more_than_its_shapes(tmp_path: Path) -> None:
    """Heads of 16 and of 32 have the same shapes as one of 64, and compute something else."""
    config = widths_of_64(**EVERYTHING)
    source, path, yaml = drawn(config), tmp_path / "release.pt", tmp_path / "config.yaml"
    torch.save({"state_dict": release_of(source)}, path)
    tokens = small_batch()[1]
    inferred = features(load_encoders(path), tokens)
    config.vision_cfg.head_width, config.text_cfg.heads = 16, 4
    write_model_yaml(yaml, config)
    found, expected = load_encoders(path), build_encoders(config)
    expected.load_state_dict(source.state_dict())
    assert_same(found, expected.eval(), tokens)
    assert not torch.allclose(features(found, tokens)[0], inferred[0], atol=1e-4)
    yaml.write_text("model: [")
    assert_refused({path: r"no model can be read from the config\.yaml beside it"})


@pytest.mark.parametrize(
    ("lacking", "added", "words"),
    [
        ("visual.conv1.weight", {}, "no 'visual.conv1.weight' of 4 dimensions"),
        ("visual.ln_pre.bias", {}, "it lacks visual.ln_pre.bias"),
        ("transformer.resblocks.2.ln", {}, " and 5 more"),
        (" ", {"visual.extra": torch.zeros(1)}, "it has visual.extra in addition"),
        (" ", {"ln_post.bias": torch.zeros(63)}, r"ln_final.bias is \[63\], not \[64\]"),
        (" ", {"logit_scale": torch.zeros(2)}, r"logit_scale is \[2\], not \[1\]"),
        (" ", {"projection": torch.zeros(64)}, "no 'text_projection' of 2 dimensions"),
    ],
)
def test_wrong_releases(tmp_path: Path, lacking: str, added: dict[str, Tensor], words: str) -> None:
    release = release_of(drawn(widths_of_64(**EVERYTHING))) | added
    kept = {name: value for name, value in release.items() if not name.startswith(lacking)}
    torch.save(kept, tmp_path / "release.pt")
    narrow = r"width of 32 is no multiple of 64.*ModelConfig"
    assert_refused({tmp_path / "release.pt": words, FIXTURES / "model_nano.pt": narrow})


# --- exports ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [{}, {"blocks": 2, "ln_final": True}, EVERYTHING], ids=str)
def test_an_export_is_what_open_clip_makes_of_it(tmp_path: Path, shared: dict[str, Any]) -> None:
    source = drawn(small_config(shared=shared, text={"vocab_size": 49408}))
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.8, 0.7], "resize_mode": "squash"}
    weights = source.state_dict() | {"logit_scale": source.logit_scale.detach()[0]}
    config = small_config(text={"vocab_size": 49408})
    folder = write_export(tmp_path / "export", config, weights, **pixels)
    model, preprocess, tokenizer = alignclip.load(folder)
    theirs, their_preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert torch.equal(tokenizer(CAPTIONS), tokens)
    assert torch.equal(preprocess(picture()), their_preprocess(picture()))
    for ours, expected in zip(features(model, tokens), features(theirs, tokens), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert_same(model, source, tokens)
    assert len(list(model.parameters())) == len(list(source.parameters()))
    with refused("asks for other pixels"):
        load_encoders(folder)


def test_where_an_export_may_lie(tmp_path: Path) -> None:
    source = stock(small_config())
    folder = write_export(tmp_path / "export", small_config(), source.state_dict())
    safe, alone = folder / "open_clip_model.safetensors", tmp_path / "alone.pt"
    torch.save(source.state_dict(), alone)
    expected = load_encoders(folder)
    link = tmp_path / "link.safetensors"
    link.symlink_to(safe)
    for path in (f"local-dir:{folder}", safe, link):
        assert_same(load_encoders(path), expected, small_batch()[1])
    safe.unlink()
    assert_refused({folder: r"no open_clip_model\.safetensors or open_clip_pytorch_model\.bin"})
    shutil.copy(alone, folder / "open_clip_pytorch_model.bin")
    load_encoders(folder)
    assert_refused({alone: r"no open_clip_config\.json with a model_cfg beside it"})
    load_encoders(alone, config=small_config())


def test_exports_that_are_not_our_model(tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", small_config(), drawn(small_config()).state_dict())
    path = folder / "open_clip_config.json"
    right = json.loads(path.read_text())["model_cfg"]
    vision, text = right["vision_cfg"], right["text_cfg"]

    def write(preprocess: Any = None, **changed: Any) -> None:
        settings = {"model_cfg": right | changed, "preprocess_cfg": preprocess}
        path.write_text(json.dumps(settings))

    # what is open_clip's default may be spelled out; a text tower may have names of its own
    write(quick_gelu=None, custom_text=True, vision_cfg=vision | {"pool_type": "tok"})
    load_encoders(folder)
    foreign = text | {"hf_model_name": "x", "pool_type": "last"}
    for key, value, words in (
        ("multimodal_cfg", {"width": 8}, "don't have its model_cfg's multimodal_cfg; load it wi"),
        ("text_cfg", foreign, "text_cfg.hf_model_name, text_cfg.pool_type"),
        ("embed_dim", "many", "could not be converted"),
        ("vision_cfg", vision | {"width": 48}, r"visual.class_embedding is \[32\], not \[48\]"),
        ("vision_cfg", vision | {"head_width": 24}, "vision_cfg.width=32 is no multiple"),
        ("vision_cfg", "ViT-B-16", "its vision_cfg is a str, not a section"),
        ("text_cfg", [text], "its text_cfg is a list, not a section"),
        ("vision_cfg", vision | {"image_size": -32}, "vision_cfg.image_size must be positive, not"),
    ):
        write(**{key: value})
        assert_refused({folder: words})
    for broken in ("{", "[" * 100_000, '{"a":' * 100_000):
        path.write_text(broken)
        assert_refused({folder: "is not JSON"})
    means: list[Any] = [{"mean": "x"}, {"mean": [0.5, 0.5]}]
    for wrong in (*means, {"std": []}, {"std": 0}, {"mode": "L"}, {"resize_mode": "no"}, [1], 3):
        write(preprocess=wrong)
        assert_refused({folder: "its images can't be prepared as it says"})
    write(preprocess={"mean": 0.5, "std": 0.25})
    _, preprocess, _ = alignclip.load(folder)
    _, theirs = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    assert torch.equal(preprocess(picture()), theirs(picture()))
    with refused("are one and the same there, but differ"):
        alignclip.load(folder, config=small_config(shared=EVERYTHING))


# --- the Hugging Face Hub ---------------------------------------------------------------------


def test_the_hub(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = drawn(widths_of_64(**EVERYTHING))
    tokens, org = small_batch()[1], hub / "org"
    write_export(org / "export", widths_of_64(), source.state_dict())
    torch.save(source.state_dict(), org / "export" / "open_clip_pytorch_model.bin")
    (org / "release").mkdir()
    torch.save({"state_dict": release_of(source)}, org / "release" / "alignclip.pt")
    shutil.copytree(org / "release", org / "several" / "cc12m")
    (org / "several" / "other.pt").write_text("")
    there = ("hf-hub:org/export", "hf-hub:org/release", "hf-hub:org/several/cc12m/alignclip.pt")
    for place in there:
        assert_same(load_encoders(place), source, tokens)
    assert_refused(
        {
            "hf-hub:org/several": r"several models: cc12m/alignclip\.pt, other\.pt; name one, e\.g",
            "hf-hub:org/release/nothing.pt": "is not there; (did you mean|valid: alignclip.pt)",
            "hf-hub:org/nothing": "no such repository, or a private one",
            "hf-hub:org": "write hf-hub:ORG/NAME",
            "hf-hub:org/na me": "Repo id must",
        }
    )
    # without a network: what was loaded before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reset_sessions()
    for place in there:
        assert_same(load_encoders(place), source, tokens)
    unreachable = r"not in the local cache, and huggingface\.co can't be reached"
    cached = "is not in the local cache; valid: alignclip.pt"
    assert_refused({"hf-hub:org/nothing": unreachable, "hf-hub:org/release/nothing.pt": cached})


def test_a_hub_that_does_not_answer(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(monkeypatch)
    places = ("hf-hub:org/name", "hf-hub:org/name/model.pt")
    assert_refused(dict.fromkeys(places, r"huggingface\.co can't be reached"))


def test_files_of_a_repository_are_found_without_the_others(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody downloaded them, and not the whole repository; then the Hub went away."""
    source = drawn(widths_of_64(**EVERYTHING))
    (hub / "org" / "several" / "cc12m").mkdir(parents=True)
    torch.save({"state_dict": release_of(source)}, hub / "org/several/cc12m/alignclip.pt")
    (hub / "org/several/other.pt").write_text("")
    snapshot_download("org/several", allow_patterns="cc12m/*")
    cut_off(monkeypatch)
    assert_same(load_encoders("hf-hub:org/several"), source, small_batch()[1])
    assert_refused({"hf-hub:org/several/other.pt": "not in the local cache; .*alignclip.pt"})


# --- files that are none ----------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["checkpoint", "state dict", "bare", "pickle", "safetensors"])
def test_no_code_of_a_file_runs(run: tuple[Path, CLIP], tmp_path: Path, kind: str) -> None:
    folder, model = run
    made = tmp_path / "made"
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    content: Any = Payload(made)
    if kind == "checkpoint":
        shutil.copy(folder / "config.yaml", tmp_path)
        whole = torch.load(folder / "latest-rank0.pt", weights_only=False)
        whole["state"]["callbacks"], content = content, whole
    elif kind == "state dict":
        content = {"state_dict": model.state_dict(), "x": content}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    assert_refused({path: "not a safetensors file|mkdir', which could run code"})
    assert not made.exists()
    # what follows the payload is no checkpoint; newer versions of torch go by a file's name, too
    with suppress(RuntimeError), path.open("rb") as file:
        torch.load(file, weights_only=False)
    assert made.exists(), "the payload is none"


def test_files_that_are_no_models(run: tuple[Path, CLIP], tmp_path: Path) -> None:
    folder, _ = run
    export = write_export(tmp_path / "export", small_config(), drawn(small_config()).state_dict())
    whole = (export / "open_clip_model.safetensors").read_bytes()
    cut = export / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pt").write_bytes((folder / "latest-rank0.pt").read_bytes()[:100_000])
    other = {"state": {"model": {"backbone.weight": torch.zeros(1)}}, "rng": []}
    near = {"state": {"model": {"encoders.x": torch.zeros(1)}}, "rng": []}
    numbers = dict.fromkeys("abcd", 1)
    contents = {"list": [1, 2], "dict": numbers, "other": other, "near": near}
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    sharded = tmp_path / "ep1-ba5"
    sharded.mkdir()
    (sharded / ".metadata").write_text("")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "gone.pt")
    (tmp_path / "nothing").mkdir()
    no_folder = "neither a latest-rank0.pt nor an export's open_clip_config.json; its weights:"
    files = {
        "cut.pt": "cut.pt is not a PyTorch checkpoint, or only a part of one",
        "list.pt": "holds a list, not a model's weights",
        "dict.pt": "is not a model's weights; it holds a, b, c and 1 more",
        "other.pt": "is a Composer checkpoint, but not of a model of ours",
        "near.pt": "no config.yaml beside it",
        "dangling.pt": "gone.pt, which is not there",
        "lits.pt": "no such file: .*; did you mean 'list.pt'",
        "nowhere/x.pt": "no such file: .*; no weights lie there",
        "nothing": f"{no_folder} none",
        "": f"{no_folder} cut.pt, .* more",
    }
    assert_refused({tmp_path / name: words for name, words in files.items()})
    assert_refused(
        {
            cut: "cut.safetensors is not a safetensors file, or only a part of one",
            sharded: "is a sharded checkpoint",
            folder.parent: "did you mean '.*saved'?",
            "some/name": "did you mean 'hf-hub:some/name'",
            "x" * 5000: "can't read x*: File name too long",
        }
    )


SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {  # ways to save a tensor that is no weight
    "sparse": lambda value: value.to_sparse(),
    "compressed": lambda value: value.to_sparse_csr(),
    "meta": lambda value: value.to("meta"),
    "quantized": lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
    "nested": lambda value: torch.nested.nested_tensor([value, value]),
    "expanded": lambda value: torch.zeros(1).expand(value.shape),
    "overlapping": lambda value: torch.zeros(sum(value.shape)).as_strided(value.shape, (1, 1)),
    "int8": lambda value: value.to(torch.int8),
    "complex": lambda value: value.to(torch.complex64),
}


@pytest.mark.parametrize("how", SPECIAL)
def test_tensors_that_are_no_weights(tmp_path: Path, how: str) -> None:
    """In a run's checkpoint, and as what a new run would start from."""
    config = small_config()
    model = drawn(config)
    weight = model.transformer.resblocks[0].mlp.c_fc.weight
    write_run(tmp_path, config, model)
    content = torch.load(tmp_path / "latest-rank0.pt", weights_only=True)
    name = "encoders.transformer.resblocks.0.mlp.c_fc.weight"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CSR and nested tensors, which are in beta
        content["state"]["model"][name] = SPECIAL[how](weight.detach())
        torch.save(content, tmp_path / "latest-rank0.pt")
    assert_refused({tmp_path: "c_fc.weight|which could run code"})
    before = weight.detach().clone()
    if how in ("int8", "complex"):
        report = load_pretrained(model, str(tmp_path), "text", config)
        assert "of another shape: transformer.resblocks.0" in report.text
    else:
        with refused("pretrained: "):
            load_pretrained(model, str(tmp_path), "text", config)
    assert torch.equal(weight, before)


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    """Of a model of 100 TB by its configuration, and of a file that unpacks to any size."""
    config = small_config()
    whole, packed = write_run(tmp_path, config) / "latest-rank0.pt", tmp_path / "packed.pt"
    for key, value, words in (
        ("text_cfg.vocab_size", 10**12, "token_embedding.weight is"),
        ("text_cfg.layers", 10**9, "1000000000 layers, but it has"),
        ("embed_dim", 10**11, "is .*, not "),
        ("vision_cfg.image_size", 16 * 10**5, "visual.positional_embedding is"),
        ("vision_cfg.mlp_ratio", 1e12, "is .*, not "),
    ):
        changed = OmegaConf.structured(config)
        OmegaConf.update(changed, key, value)
        (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml({"model": changed}))
        assert_refused({tmp_path: words})
    write_model_yaml(tmp_path / "config.yaml", config)
    alignclip.load(tmp_path)
    with (
        zipfile.ZipFile(whole) as archive,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for entry in archive.infolist():
            other.writestr(entry.filename, archive.read(entry))
    assert packed.stat().st_size < whole.stat().st_size
    assert_refused({packed: "it is a compressed archive"})


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe\x00\x01", b"runs/", b"a\x00b", b"x" * 5000]
)
def test_links_that_are_none(tmp_path: Path, content: bytes, s3: S3Server) -> None:
    name = "latest-rank0.pt.symlink"
    (tmp_path / name).write_bytes(content)
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key=f"r/{name}", Body=content)
    assert_refused(dict.fromkeys((tmp_path, f"{bucket}/r"), "is no link to a checkpoint"))


def test_devices() -> None:
    nano, config = FIXTURES / "model_nano.pt", config_of(reference("nano")["config"])
    with refused("device=gpu can't be used on this machine"):
        alignclip.load(nano, "gpu")
    assert alignclip.load(nano, "meta", config=config)[0].logit_scale.device.type == "meta"


@pytest.mark.gpu
def test_on_a_gpu(run: tuple[Path, CLIP]) -> None:
    model, _, tokenizer = alignclip.load(run[0], "cuda")
    assert model.encode_text(tokenizer(CAPTIONS).cuda()).device.type == "cuda"


@pytest.mark.slow
def test_what_is_imported_when() -> None:
    """``import alignclip`` nothing; ``alignclip.load`` neither Composer nor Streaming."""
    code = (
        "import sys, alignclip; assert not {'torch', 'open_clip', 'composer'} & set(sys.modules);"
        "assert alignclip.load; assert not {'composer', 'streaming'} & set(sys.modules);"
        "alignclip.lead"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'alignclip' has no attribute 'lead'" in done.stderr, done.stderr


@pytest.mark.parametrize("batch_size", [3, 256])
def test_similarity(batch_size: int) -> None:
    """Cosines of all with all, whatever the batch; tokens padded to any length."""
    model = drawn(small_config(shared=EVERYTHING))
    images, tokens = small_batch(8)
    with torch.no_grad():
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens[:5], normalize=True)
    found = model.similarity(images, tokens[:5], batch_size)
    assert found.shape == (8, 5)
    torch.testing.assert_close(found, image @ text.T, rtol=0, atol=1e-6)
    assert not found.requires_grad
