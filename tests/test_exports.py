"""``convert/checkpoint.py``: exports that stock open_clip, transformers and clip_benchmark take, and the way back."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import io
import json
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from clip_benchmark.models import load_clip
from composer.utils import get_device
from huggingface_hub import ModelCard
from models import EVERYTHING, FIXTURES, MODELS, config_of, reference, small_config
from omegaconf import OmegaConf
from PIL import Image
from runs import write_config, write_set
from s3 import S3Server
from safetensors.torch import load_file, save_file
from tarballs import write_tar
from test_loading import picture, release_of, widths_of_64
from torch import Tensor

import alignclip
from alignclip.config import reading
from alignclip.config.schema import ModelConfig, SharedConfig
from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.zero_shot import accuracy, build_classifier
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.storage.clouds import S3
from alignclip.training.build import build_trainer
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.export_command import Options, convert, main
from alignclip.weights.formats import FORMATS, hugging_face_settings
from alignclip.weights.formats.release import our_names
from alignclip.weights.licenses import forbids_derivatives, license_of, named_license

ROOT = Path(__file__).parent.parent
CLOSE = {"rtol": 0, "atol": 1e-5}
TEXTS = ["a red dot", "blue on the left!", "", "A  Photo of   naïve café", "x " * 90]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The save folder of a model that was trained here, everything shared."""
    folder = tmp_path_factory.mktemp("run")
    write_set(str(folder / "set"), 64)
    overrides = [
        "max_duration=3ba",
        "scheduler.t_warmup=1ba",
        "data.num_workers=0",
        "run_name=r",
        "optimizer.lr=0.01",
    ]
    config = reading.load(
        write_config(folder, str(folder / "set"), str(folder / "saved")), overrides
    )
    save_folder = SaveFolder(config)
    trainer = build_trainer(config, get_device("cpu"), save_folder)
    save_folder.write_config()
    trainer.fit()
    trainer.close()
    return folder / "saved"


@pytest.fixture(scope="module")
def features(run: Path) -> tuple[Tensor, Tensor]:
    """What the trained model makes of two pictures and the texts."""
    model, preprocess, tokenizer = alignclip.load(run)
    pixels = torch.stack([preprocess(one) for one in pictures()])
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(tokenizer(TEXTS))


def pictures() -> list[Image.Image]:
    """None with a palette: open_clip scales these before it converts them, transformers after."""
    return [picture().convert("RGB"), picture().convert("L").rotate(90, expand=True)]


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for to in ("open_clip", "huggingface", "release", "composer"):
        assert (
            convert(Options(str(run), to, str(folder / to), license="mit", onnx=to == "open_clip"))
            < 1e-5
        )
    return {path.name: path for path in folder.iterdir()}


def drawn(config: ModelConfig) -> CLIP:
    """Random weights, none at its initial 0 or 1."""
    torch.manual_seed(0)
    model = build_encoders(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def write_checkpoint(folder: Path, config: ModelConfig, model: CLIP | None = None) -> Path:
    """As a run leaves it."""
    weights = (model or drawn(config)).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": {f"encoders.{name}": value for name, value in weights.items()}}
    torch.save({"state": state}, folder / "latest-rank0.pt")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml({"model": OmegaConf.structured(config)}))
    return folder


# --- a model trained here, elsewhere ----------------------------------------------------------------------------------


def test_stock_open_clip(exported: dict[str, Path], features: tuple[Tensor, Tensor]) -> None:
    name = f"local-dir:{exported['open_clip']}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    assert type(model) is open_clip.CLIP
    assert model.visual.transformer.resblocks[0] is not model.transformer.resblocks[0]
    pixels = torch.stack([preprocess(one) for one in pictures()])
    tokens = open_clip.get_tokenizer(name)(TEXTS)
    with torch.no_grad():
        found = model.eval().encode_image(pixels), model.encode_text(tokens)
    for ours, theirs in zip(features, found, strict=True):
        torch.testing.assert_close(theirs, ours, **CLOSE)
    assert model.logit_scale.shape == ()


def test_stock_transformers(exported: dict[str, Path], features: tuple[Tensor, Tensor]) -> None:
    folder = exported["huggingface"]
    model = transformers.AutoModel.from_pretrained(folder).eval()
    assert type(model) is transformers.CLIPModel
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor) is transformers.CLIPProcessor
    words = processor(text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    pixels = processor(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        found = model.get_image_features(**pixels), model.get_text_features(**words)
    for ours, theirs in zip(features, found, strict=True):
        torch.testing.assert_close(theirs, ours, **CLOSE)


def test_its_tokenizer_is_clips(exported: dict[str, Path]) -> None:
    """On all captions of the published fixture but those with HTML entities, which only open_clip resolves."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported["huggingface"])
    published = json.loads((FIXTURES / "tokens.json").read_text())
    captions = [one for one in published["captions"] if "&" not in one]
    assert len(captions) > 5
    theirs = tokenizer(captions, truncation=True)["input_ids"]
    for ours, found in zip(
        open_clip.get_tokenizer("ViT-B-16")(captions).tolist(), theirs, strict=True
    ):
        assert ours[: len(found)] == found
        assert not any(ours[len(found) :])


def test_onnx_runtime(
    exported: dict[str, Path], features: tuple[Tensor, Tensor], run: Path
) -> None:
    _, preprocess, tokenizer = alignclip.load(run)
    pixels = torch.stack([preprocess(one) for one in pictures()])
    feeds = {"image": pixels, "text": tokenizer(TEXTS)}
    for ours, (name, tensor) in zip(features, feeds.items(), strict=True):
        session = onnxruntime.InferenceSession(str(exported["open_clip"] / f"{name}_encoder.onnx"))
        for rows in (slice(None), slice(1)):  # any number of them
            (found,) = session.run(None, {name: tensor[rows].numpy()})
            torch.testing.assert_close(torch.from_numpy(found), ours[rows], **CLOSE)


def test_clip_benchmark_loads_it(
    exported: dict[str, Path], features: tuple[Tensor, Tensor]
) -> None:
    name = f"local-dir:{exported['open_clip']}"
    model, preprocess, tokenizer = load_clip(
        "open_clip", name, pretrained="", cache_dir=None, device="cpu"
    )
    pixels = torch.stack([preprocess(one) for one in pictures()])
    with torch.no_grad():
        found = model.eval().encode_image(pixels), model.encode_text(tokenizer(TEXTS))
    for ours, theirs in zip(features, found, strict=True):
        torch.testing.assert_close(theirs, ours, **CLOSE)


@pytest.mark.slow
def test_clip_benchmarks_command_evaluates_it(
    exported: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    """Zero-shot on a set in clip_benchmark's own layout, with the accuracy that we find."""
    classes, templates = ["red", "blue", "a dot on the left"], ["a {}", "the {} on it"]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    members, images = [], []
    for i, label in enumerate(labels):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
        members += [(f"{i:04}.png", file.getvalue()), (f"{i:04}.cls", str(label).encode())]
    write_tar(tmp_path / "set" / "test" / "0.tar", members)
    (tmp_path / "set" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "set" / "classnames.txt").write_text("\n".join(classes))
    prompts = "\n".join(template.replace("{}", "{c}") for template in templates)
    (tmp_path / "set" / "zeroshot_classification_templates.txt").write_text(prompts)
    command = [Path(sys.executable).with_name("clip_benchmark"), "eval", "--dataset", "wds/mine"]
    command += [
        "--dataset_root",
        tmp_path / "set",
        "--model",
        f"local-dir:{exported['open_clip']}",
        "--pretrained",
        "",
    ]
    command += [
        "--output",
        tmp_path / "result.json",
        "--num_workers",
        "0",
        "--no_amp",
        "--batch_size",
        "32",
    ]
    subprocess.run([*map(str, command)], check=True, timeout=200, cwd=tmp_path, capture_output=True)
    theirs = json.loads((tmp_path / "result.json").read_text())["metrics"]

    model, preprocess, _ = alignclip.load(run)
    encoder = Encoder(model, torch.device("cpu"), progress=False)
    classifier = build_classifier(encoder.texts, classes, templates)
    with torch.no_grad():
        encoded = F.normalize(
            model.encode_image(torch.stack([preprocess(image) for image in images])), dim=-1
        )
    ours = accuracy(encoded, classifier, torch.from_numpy(labels))
    assert theirs["acc1"] == pytest.approx(ours["acc1"], abs=1e-6)
    assert theirs["mean_per_class_recall"] == pytest.approx(ours["mean_per_class_recall"], abs=1e-6)


def test_every_export_loads_here(
    exported: dict[str, Path], run: Path, features: tuple[Tensor, Tensor]
) -> None:
    """The release, too, whose heads of 16 are not the published 64: shapes don't tell, its config.yaml does."""
    trained, _, _ = alignclip.load(run)
    sources = [exported[name] for name in ("open_clip", "huggingface")]
    sources += [exported["composer"] / "model.pt", exported["release"] / "release.pt"]
    for path in sources:
        model, preprocess, tokenizer = alignclip.load(path)
        assert model.state_dict().keys() == trained.state_dict().keys()
        for name, value in trained.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), (path, name)
        assert model.visual.proj is model.text_projection
        with torch.no_grad():
            pixels = torch.stack([preprocess(one) for one in pictures()])
            torch.testing.assert_close(model.encode_image(pixels), features[0], **CLOSE)
            torch.testing.assert_close(model.encode_text(tokenizer(TEXTS)), features[1], **CLOSE)


def test_a_run_starts_from_the_exported_checkpoint(
    exported: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    overrides = [
        f"load_path={exported['composer'] / 'model.pt'}",
        "load_weights_only=true",
        "data.num_workers=0",
    ]
    config = reading.load(write_config(tmp_path, str(run.parent / "set")), overrides)
    trainer = build_trainer(config, get_device("cpu"), None)
    trained = alignclip.load(run)[0].state_dict()
    encoders = trainer.state.model.encoders
    assert isinstance(encoders, CLIP)
    for name, value in encoders.state_dict().items():
        assert torch.equal(value, trained[name]), name
    trainer.close()


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "composer"])
@pytest.mark.parametrize(
    "shared", [{}, {"blocks": 1}, {"blocks": 2, "ln_final": True}, {"projection": True}], ids=str
)
def test_all_ways_of_sharing(tmp_path: Path, to: str, shared: dict[str, Any]) -> None:
    config = small_config(
        shared=shared, text={"vocab_size": 70, "layers": 4}, vision={"mlp_ratio": 4.0}
    )
    source = write_checkpoint(tmp_path / "run", config)
    assert convert(Options(str(source), to, str(tmp_path / "out"))) < 1e-5
    found = alignclip.load(tmp_path / "out" / ("model.pt" if to == "composer" else ""))[0]
    for name, value in drawn(config).state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert len(list(found.parameters())) == len(list(drawn(config).parameters()))


def test_a_timm_tower(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "image_size": 160}
    source = write_checkpoint(
        tmp_path / "run", small_config(vision=vision, text={"vocab_size": 70})
    )
    assert convert(Options(str(source), "open_clip", str(tmp_path / "out"))) < 1e-5
    with pytest.raises(UserError, match="can't hold the timm tower test_vit"):
        convert(Options(str(source), "huggingface", str(tmp_path / "hf")))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "composer"])
def test_a_vocabulary_larger_than_clips(tmp_path: Path, to: str) -> None:
    """Captions end where CLIP's tokenizer ends them, which is not at the vocabulary's last id."""
    config = small_config(text={"vocab_size": 49500})
    source = write_checkpoint(tmp_path / "run", config)
    assert convert(Options(str(source), to, str(tmp_path / "out"))) < 1e-5
    model, _, tokenizer = alignclip.load(
        tmp_path / "out" / ("model.pt" if to == "composer" else "")
    )
    expected = drawn(config).encode_text(tokenizer(TEXTS)).detach()
    torch.testing.assert_close(model.encode_text(tokenizer(TEXTS)).detach(), expected, **CLOSE)
    if to == "huggingface":
        theirs = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
        words = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")(
            text=TEXTS, return_tensors="pt", padding=True, truncation=True
        )
        torch.testing.assert_close(theirs.get_text_features(**words).detach(), expected, **CLOSE)
        end = [theirs.config.text_config.eos_token_id, theirs.config.text_config.bos_token_id]
        assert end == [49407, 49406]


def test_the_check_reads_real_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that reads them otherwise is refused, whatever it makes of random ids."""
    source = write_checkpoint(tmp_path / "run", small_config(text={"vocab_size": 49500}))
    written = hugging_face_settings.their_config

    def as_it_was(config: ModelConfig) -> dict[str, Any]:
        found = written(config)
        return found | {
            "text_config": found["text_config"] | {"eos_token_id": config.text_cfg.vocab_size - 1}
        }

    monkeypatch.setattr(hugging_face_settings, "their_config", as_it_was)
    with pytest.raises(UserError, match="--to huggingface: read again, the features differ by"):
        convert(Options(str(source), "huggingface", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_quick_gelu(tmp_path: Path) -> None:
    """As OpenAI's models have it, there and back through all that can say so; the others refuse."""
    config = small_config(text={"vocab_size": 70}, quick_gelu=True)
    place: Path = write_checkpoint(tmp_path / "run", config)
    for to in ("open_clip", "huggingface", "composer"):
        assert convert(Options(str(place), to, str(tmp_path / to), onnx=True)) < 1e-5
        place = tmp_path / to / ("model.pt" if to == "composer" else "")
        model, _, _ = alignclip.load(place)
        images, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[68, 1, 69], [68, 69, 0]])
        with torch.no_grad():
            assert torch.equal(model.encode_image(images), drawn(config).encode_image(images))
            assert torch.equal(model.encode_text(tokens), drawn(config).encode_text(tokens))
            plain = drawn(small_config(text={"vocab_size": 70}))
            assert not torch.allclose(
                model.encode_image(images), plain.encode_image(images), atol=1e-3
            )
    assert (
        json.loads((tmp_path / "open_clip" / "open_clip_config.json").read_text())["model_cfg"][
            "quick_gelu"
        ]
        is True
    )
    assert (
        transformers.CLIPModel.from_pretrained(
            tmp_path / "huggingface"
        ).config.text_config.hidden_act
        == "quick_gelu"
    )
    shared = write_checkpoint(
        tmp_path / "shared", dataclasses.replace(config, shared=SharedConfig(**EVERYTHING))
    )
    with pytest.raises(UserError, match=r"can't hold model\.quick_gelu"):
        convert(Options(str(shared), "release", str(tmp_path / "release")))


def test_stock_quick_gelu_models(tmp_path: Path) -> None:
    """open_clip's own, and transformers' default, give the same features here."""
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    images, tokens = (
        torch.randn(2, 3, 32, 32),
        torch.tensor([[62, 1, 63, *[0] * 9], [62, 5, 5, 63, *[0] * 8]]),
    )
    theirs = open_clip.CLIP(16, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    (tmp_path / "open_clip").mkdir()
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    (tmp_path / "open_clip" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg})
    )
    save_file(theirs.state_dict(), tmp_path / "open_clip" / "open_clip_model.safetensors")
    model, _, _ = alignclip.load(tmp_path / "open_clip")
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), **CLOSE)
        torch.testing.assert_close(model.encode_text(tokens), theirs.encode_text(tokens), **CLOSE)
    hub = clip_model(hidden_act="quick_gelu", vision={"patch_size": 16})
    hub.save_pretrained(tmp_path / "hub")
    model, _, _ = alignclip.load(tmp_path / "hub")
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(images), hub.get_image_features(images), **CLOSE
        )
        torch.testing.assert_close(
            model.encode_text(tokens), hub.get_text_features(tokens), **CLOSE
        )


def test_mlps_of_any_width(tmp_path: Path) -> None:
    """Of a width that comes out one less when it is divided by the model's and multiplied again."""
    assert int(112 * (115 / 112)) == 114
    both = {"hidden_size": 112, "intermediate_size": 115}
    clip_model(vision=both, text=both).save_pretrained(tmp_path / "theirs")
    model, _, _ = alignclip.load(tmp_path / "theirs")
    assert model.transformer.resblocks[0].mlp.c_fc.out_features == 115
    assert convert(Options(str(tmp_path / "theirs"), "huggingface", str(tmp_path / "out"))) < 1e-5


# --- the authors' format ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_authors_file_there_and_back(name: str, tmp_path: Path) -> None:
    """Directly, and through every other format: equal tensor for tensor, the one that nobody uses included."""
    published = reference(name)
    config = tmp_path / "model.yaml"  # its heads are 16 wide, which shapes don't tell
    model_config = config_of(published["config"], **EVERYTHING)
    config.write_text(OmegaConf.to_yaml({"model": OmegaConf.structured(model_config)}))
    source = tmp_path / "published.pt"
    torch.save({"state_dict": published["state_dict"]}, source)

    model, _, _ = alignclip.load(source, config=model_config)
    with torch.no_grad():
        found = (
            model.encode_image(published["image"], normalize=True),
            model.encode_text(published["tokens"], normalize=True),
        )
    torch.testing.assert_close(found[0], published["image_features"], **CLOSE)
    torch.testing.assert_close(found[1], published["text_features"], **CLOSE)

    place, given = source, str(config)
    for to in ("release", "composer", "open_clip", "huggingface", "release"):
        out = tmp_path / f"{place.name}-{to}"
        convert(
            Options(str(place), to, str(out), model_config=given if place.suffix == ".pt" else None)
        )
        place = {"release": out / "release.pt", "composer": out / "model.pt"}.get(to, out)
        if to == "release":
            written = torch.load(place, weights_only=True)["state_dict"]
            assert written.keys() == published["state_dict"].keys()
            for key, value in published["state_dict"].items():
                assert written[key].dtype == value.dtype
                assert written[key].shape == value.shape
                assert torch.equal(written[key], value), key


def test_a_release_of_a_model_of_ours(exported: dict[str, Path]) -> None:
    written = torch.load(exported["release"] / "release.pt", weights_only=True)["state_dict"]
    assert written.keys() >= {
        "projection",
        "ln_post.weight",
        "text.text_projection",
        "visual.conv1.weight",
    }
    assert not written["text.text_projection"].any()
    assert all(our_names(name) or name == "text.text_projection" for name in written)


def test_only_what_shares_everything_is_a_release(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "run", small_config(shared={"blocks": 3}))
    with pytest.raises(UserError, match="for models that share everything"):
        convert(Options(str(source), "release", str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# --- Hugging Face's -----------------------------------------------------------------------------------------------


def clip_model(**changes: Any) -> transformers.CLIPModel:
    torch.manual_seed(0)
    both = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    both |= {"hidden_act": changes.pop("hidden_act", "gelu"), "projection_dim": 16}
    vision = both | {"image_size": 32, "patch_size": 8} | changes.pop("vision", {})
    text = (
        both
        | {"vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 63}
        | changes.pop("text", {})
    )
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=16, **changes
    )
    return transformers.CLIPModel(config).eval()


def test_a_clip_model_of_transformers_loads_here(tmp_path: Path) -> None:
    theirs = clip_model(vision={"hidden_size": 48, "num_hidden_layers": 3})
    theirs.save_pretrained(tmp_path / "theirs")
    transformers.CLIPImageProcessor(image_mean=[0.5] * 3).save_pretrained(tmp_path / "theirs")
    model, preprocess, _ = alignclip.load(tmp_path / "theirs")
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(0, 62, (3, 12))
    tokens[:, 5] = 63
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(images), theirs.get_image_features(images), **CLOSE
        )
        torch.testing.assert_close(
            model.encode_text(tokens), theirs.get_text_features(tokens), **CLOSE
        )
    white = preprocess(Image.new("RGB", (32, 32), "white"))
    assert float(white[0, 0, 0]) == pytest.approx(0.5 / 0.26862954)
    convert(Options(str(tmp_path / "theirs"), "huggingface", str(tmp_path / "ours")))
    again = load_file(tmp_path / "ours" / "model.safetensors")
    for name, value in theirs.state_dict().items():
        assert torch.equal(again[name], value), name
    # what can't say how images are prepared, refuses
    with pytest.raises(
        UserError, match="can't hold that this model's images are prepared otherwise"
    ):
        convert(Options(str(tmp_path / "theirs"), "composer", str(tmp_path / "composer")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"vision": {"hidden_act": "quick_gelu"}},
            "its towers' hidden_act are quick_gelu and gelu, and our encoders have gelu or quick_gelu in both",
        ),
        ({"text": {"layer_norm_eps": 1e-6}}, "text_config.layer_norm_eps is 1e-06"),
        ({"text": {"eos_token_id": 7}}, "eos_token_id is 7, and our encoders end texts at 63"),
        (
            {"text": {"eos_token_id": 49407}},
            "eos_token_id is 49407, and our encoders end texts at 63",
        ),
    ],
)
def test_clip_models_that_are_not_ours(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    clip_model(**change).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        alignclip.load(tmp_path)


def test_broken_clip_models(tmp_path: Path) -> None:
    clip_model().save_pretrained(tmp_path)
    weights, config = (
        load_file(tmp_path / "model.safetensors"),
        json.loads((tmp_path / "config.json").read_text()),
    )
    one = "text_model.encoder.layers.0.self_attn.k_proj.weight"
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (
            {name: value for name, value in weights.items() if name != one},
            config,
            "it lacks transformer.*in_proj_weight",
        ),
        (weights | {"extra": torch.zeros(1)}, config, "it has extra in addition"),
        (weights | {"logit_scale": torch.zeros(2)}, config, r"logit_scale is \[2\], not \[1\]"),
        (
            weights,
            config | {"vision_config": config["vision_config"] | {"image_size": 64}},
            "positional_embedding is",
        ),
        (
            weights,
            config | {"vision_config": config["vision_config"] | {"hidden_size": 48}},
            "is .*, not ",
        ),
        (
            weights,
            config | {"text_config": config["text_config"] | {"num_attention_heads": 0}},
            "model.text_cfg|impossible|no model",
        ),
        (weights, config | {"model_type": "siglip"}, "model_type is 'siglip', not 'clip'"),
        (weights, config | {"vision_config": 3}, "vision_config is no section"),
        (weights, config | {"projection_dim": "many"}, "sizes are impossible"),
    ]
    for tensors, settings, words in cases:
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=words) as error:
            alignclip.load(tmp_path)
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json lies beside it"):
        alignclip.load(tmp_path / "model.safetensors")


# --- images ---------------------------------------------------------------------------------------------------------


def with_pixels(folder: Path, **pixels: Any) -> Path:
    """An export of open_clip's whose images are prepared in a way of its own."""
    convert(
        Options(
            str(write_checkpoint(folder / "run", small_config())),
            "open_clip",
            str(folder / "source"),
        )
    )
    path = folder / "source" / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess_cfg": pixels}))
    return folder / "source"


@pytest.mark.parametrize(
    "pixels",
    [
        {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "interpolation": "bilinear",
            "resize_mode": "shortest",
        },
        {"mean": 0.5, "std": 0.25, "interpolation": "bicubic", "resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 128, "interpolation": "bilinear"},
    ],
    ids=lambda pixels: str(pixels["resize_mode"]),
)
def test_how_images_are_prepared_is_kept(tmp_path: Path, pixels: dict[str, Any]) -> None:
    """From open_clip to Hugging Face and back; what the other side can't do is refused."""
    source = with_pixels(tmp_path, **pixels)
    wide = pictures()[0].resize((97, 33))
    ours = alignclip.load(source)[1](wide)
    convert(Options(str(source), "open_clip", str(tmp_path / "again")))
    written = json.loads((tmp_path / "again" / "open_clip_config.json").read_text())[
        "preprocess_cfg"
    ]
    assert written.keys() == {"mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'again'}")
    assert torch.equal(theirs(wide), ours)
    if pixels["resize_mode"] == "longest":
        with pytest.raises(UserError, match="can't resize as this model wants it: longest"):
            convert(Options(str(source), "huggingface", str(tmp_path / "hub")))
        return
    convert(Options(str(source), "huggingface", str(tmp_path / "hub")))
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "hub")
    found = processor(images=wide, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)
    convert(Options(str(tmp_path / "hub"), "open_clip", str(tmp_path / "back")))
    assert torch.equal(alignclip.load(tmp_path / "back")[1](wide), ours)


def test_an_export_whose_pixels_differ_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = with_pixels(tmp_path, interpolation="bilinear")
    settings = hugging_face_settings.processor_settings
    monkeypatch.setattr(
        hugging_face_settings,
        "processor_settings",
        lambda *given: settings(*given) | {"resample": 3},
    )
    with pytest.raises(
        UserError, match=r"prepares images otherwise: pixels differ by \d+\.\d of 255 levels"
    ):
        convert(Options(str(source), "huggingface", str(tmp_path / "hub")))
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
        ({"resample": 1}, "resample is 1, neither 2 nor 3"),
        ({"resample": [3]}, r"resample is \[3\]"),
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"size": {"shortest_edge": 40}}, "are not one square"),
        ({"size": {"height": 32, "width": 40}, "do_center_crop": False}, "are not one square"),
        (
            {"image_processor_type": "ViTImageProcessor"},
            "prepared by a ViTImageProcessor; did you mean",
        ),
        ({"image_mean": [0.5, 0.5]}, "mean has 2 numbers, not 3"),
    ],
)
def test_processors_that_open_clip_has_not(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    clip_model().save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(
        tmp_path
    )
    alignclip.load(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=words) as error:
        alignclip.load(tmp_path)
    assert "\n" not in str(error.value)


# --- what is written, and what is not ---------------------------------------------------------------------------------


def test_into_a_bucket(
    exported: dict[str, Path], s3: S3Server, features: tuple[Tensor, Tensor]
) -> None:
    url = f"{s3.bucket()}/exports/first"
    convert(Options(str(exported["composer"] / "model.pt"), "open_clip", url))
    model, _, tokenizer = alignclip.load(url)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokenizer(TEXTS)), features[1], **CLOSE)
    with pytest.raises(
        UserError, match=r"holds files already \(README.md, open_clip_config.json, open"
    ):
        convert(Options(str(exported["open_clip"]), "open_clip", url))
    # stock open_clip reads no bucket
    card = (
        s3.client.get_object(Bucket=url.split("/")[2], Key="exports/first/README.md")["Body"]
        .read()
        .decode()
    )
    assert f'alignclip.load("{url}")' in card
    assert "local-dir:" not in card
    assert "library_name: open_clip" in card


def test_an_upload_that_breaks_leaves_nothing(
    exported: dict[str, Path], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says that a model is there comes last, so that nobody loads a half of it; then the same command works."""
    url, order = f"{s3.bucket()}/exports/second", []
    upload = S3._put

    def breaks(self: S3, path: Path, name: str) -> None:
        order.append(name)
        if name == "config.json":
            raise ValueError("the network is gone")
        upload(self, path, name)

    options = Options(str(exported["composer"] / "model.pt"), "huggingface", url)
    with monkeypatch.context() as patch:
        patch.setattr(S3, "_put", breaks)
        with pytest.raises(UserError, match=r"cannot write to s3://.*: the network is gone$"):
            convert(options)
    assert order[-1] == "config.json"
    assert {"model.safetensors", "vocab.json", "tokenizer_config.json", "README.md"} <= set(order)
    bucket = url.split("/")[2]
    assert not s3.client.list_objects_v2(Bucket=bucket).get("Contents")
    convert(options)
    alignclip.load(url)


def test_a_full_disk(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line from whichever library notices, and nothing left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for to in ("open_clip", "huggingface", "release", "composer"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(SystemExit, match="2"):
                main(
                    [
                        str(exported["composer"] / "model.pt"),
                        "--to",
                        to,
                        "--out",
                        str(tmp_path / "out" / to),
                    ]
                )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        loading, line = [line for line in capsys.readouterr().err.splitlines() if line]
        assert loading == "loading PyTorch …"
        assert line.startswith(f"error: cannot write {tmp_path / 'out' / to}: "), line
        assert not list((tmp_path / "out").iterdir())


def test_an_export_that_differs_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Features that are no numbers are such ones: whatever is read again can't be seen to be the same."""
    config = small_config(text={"vocab_size": 70})
    model = drawn(config)
    with torch.no_grad():
        model.visual.proj.fill_(3e38)  # finite; NaN is refused where weights are read
    source = write_checkpoint(tmp_path / "run", config, model)
    for to in ("open_clip", "huggingface", "composer"):
        with pytest.raises(SystemExit, match="2"):
            main([str(source), "--to", to, "--out", str(tmp_path / "exports" / to)])
        loading, line = capsys.readouterr().err.splitlines()
        assert loading == "loading PyTorch …"
        assert line.startswith(f"error: --to {to}: read again, the features differ by inf")
        assert not list((tmp_path / "exports").iterdir())


def test_what_is_there_stays(exported: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is there already; choose another or remove it"):
        convert(Options(str(exported["open_clip"]), "composer", str(tmp_path / "out")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        convert(Options(str(exported["open_clip"]), "composer", str(tmp_path / "file" / "out")))
    with pytest.raises(UserError, match="one slash"):
        convert(Options(str(exported["open_clip"]), "composer", "s3:/bucket/x"))


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_card(run: Path, tmp_path: Path) -> None:
    results = {
        "results": {"model": {"coco": {"image_retrieval_recall@5": 0.5}, "gap": {"rmg": 0.25}}}
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    options = Options(
        str(run), "open_clip", str(tmp_path / "out"), metrics=str(tmp_path / "results.json")
    )
    convert(dataclasses.replace(options, license="apache-2.0"))
    card = card_of(tmp_path / "out")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "open_clip"
    assert "\n# r\n" in card.text
    for row in (
        "| coco: image_retrieval_recall@5 | 0.5000 |",
        "| shared between the towers | everything |",
    ):
        assert row in card.text
    assert "| max_duration | 3ba |" in card.text
    assert "| data: e | not published |" in card.text
    assert f"alignclip {importlib.metadata.version('alignclip')}" in card.text
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no results\.json"):
        convert(dataclasses.replace(options, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_licences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "AlignCLIP.pt"
    torch.save(release_of(drawn(widths_of_64(**EVERYTHING))), release)

    def licensed(source: Path, out: str, *more: str) -> tuple[str | None, str]:
        main([str(source), "--to", "open_clip", "--out", str(tmp_path / out), *more])
        return card_of(tmp_path / out).data.to_dict().get("license"), capsys.readouterr().err

    name, said = licensed(release, "first")
    assert name == "cc-by-nc-nd-4.0"
    assert "licence: cc-by-nc-nd-4.0 forbids passing on derivatives" in said
    # from there on it is carried
    name, said = licensed(tmp_path / "first", "second")
    assert name == "cc-by-nc-nd-4.0"
    assert "forbids passing on" in said
    with pytest.raises(SystemExit):
        licensed(tmp_path / "second", "third", "--license", "mit")
    assert "which its derivatives can't leave" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()
    # who has trained such a file can say so
    name, said = licensed(release, "own", "--license", "mit")
    assert name == "mit"
    assert (
        "their weights are cc-by-nc-nd-4.0: --license mit is for weights that you trained yourself"
        in said
    )
    # a README.md of a repository that the file was put into is no licence
    (tmp_path / "README.md").write_text("# AlignCLIP\n")
    name, said = licensed(release, "beside")
    assert name == "cc-by-nc-nd-4.0"
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    name, said = licensed(release, "named")
    assert name == "mit"
    name, said = licensed(tmp_path / "own", "other", "--license", "apache-2.0")
    assert name == "apache-2.0"
    assert "says mit; the export says apache-2.0" in said
    name, said = licensed(write_checkpoint(tmp_path / "run", small_config()), "none")
    assert name is None
    assert "no licence: nobody else may use the model" in said


@pytest.mark.parametrize(
    ("card", "name", "forbidden"),
    [
        ("---\nlicense: mit\n---\n", "mit", False),
        ("---\nlicense: cc-by-nc-nd-4.0\n---\n", "cc-by-nc-nd-4.0", True),
        ("\ufeff---\nlicense: CC BY NC ND 4.0\n---\n", "CC BY NC ND 4.0", True),
        ("\n\n---\r\nlicense: cc-by-nd-4.0\r\n---\r\n", "cc-by-nd-4.0", True),
        ("---\nlicense: other\nlicense_name: cc-by-nc-nd-4.0\n---\n", "cc-by-nc-nd-4.0", True),
        ("---\nlicense: other\n---\n", "other", False),
        (
            "---\nlicense:\n- apache-2.0\n- cc-by-nc-nd-3.0\n---\n",
            "apache-2.0, cc-by-nc-nd-3.0",
            True,
        ),
        ("---\nlicense: attribution-noderivatives\n---\n", "attribution-noderivatives", True),
        ("---\nlicense: bsd-standard\n---\n", "bsd-standard", False),
        ("---\nlicense: 3\n---\n", None, False),
        ("---\nlicense: [\n---\n", None, False),
        ("---\ntags: [x]\n---\n", None, False),
        ("# mine\n", None, False),
        (None, None, False),
    ],
)
def test_what_a_card_says(card: str | None, name: str | None, forbidden: bool) -> None:
    assert named_license(card) == name
    assert license_of(card, FORMATS["open_clip"]) == name
    assert license_of(card, FORMATS["release"]) == (name or "cc-by-nc-nd-4.0")
    assert forbids_derivatives(name or "") == forbidden


def test_the_licence_of_what_a_run_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the authors' weights over a run of one's own to an export: nobody has to remember it."""
    release = tmp_path / "AlignCLIP.pt"
    write_set(str(tmp_path / "set"), 64)
    overrides = ["max_duration=1ba", "scheduler.t_warmup=0ba", "data.num_workers=0", "run_name=r"]
    overrides += [
        f"pretrained={release}",
        "model.vision_cfg.width=64",
        "model.vision_cfg.head_width=64",
    ]
    overrides += ["model.text_cfg.width=64", "model.text_cfg.heads=1", "model.vision_cfg.layers=3"]
    overrides += ["model.text_cfg.layers=3"]
    config = reading.load(
        write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "saved")), overrides
    )
    torch.save(release_of(drawn(config.model)), release)
    folder = SaveFolder(config)
    trainer = build_trainer(config, get_device("cpu"), folder)
    folder.write_config()
    trainer.fit()
    trainer.close()
    assert (
        "licence: cc-by-nc-nd-4.0, which holds for what is trained from it, too"
        in capsys.readouterr().out
    )
    main([str(tmp_path / "saved"), "--to", "huggingface", "--out", str(tmp_path / "out")])
    assert "forbids passing on derivatives" in capsys.readouterr().err
    assert card_of(tmp_path / "out").data.license == "cc-by-nc-nd-4.0"
    with pytest.raises(UserError, match="which its derivatives can't leave"):
        convert(
            Options(str(tmp_path / "saved"), "open_clip", str(tmp_path / "other"), license="mit")
        )


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_licence_of_what_a_run_loaded(tmp_path: Path, s3: S3Server, place: str) -> None:
    """With ``load_path``, too, which Composer reads and no card."""
    write_set(str(tmp_path / "set"), 64)
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "saved"))
    overrides = ["max_duration=1ba", "scheduler.t_warmup=0ba", "data.num_workers=0", "run_name=r"]
    source = write_checkpoint(tmp_path / "source", reading.load(yaml, overrides).model)
    (source / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    path = str(source / "latest-rank0.pt")
    if place == "s3":
        path = f"{s3.bucket()}/source/latest-rank0.pt"
        for file in source.iterdir():
            s3.client.upload_file(str(file), path.split("/")[2], f"source/{file.name}")
    config = reading.load(yaml, [*overrides, f"load_path={path}", "load_weights_only=true"])
    folder = SaveFolder(config)
    folder.open()
    build_trainer(config, get_device("cpu"), folder).close()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "license: cc-by-nc-nd-4.0" in card
    assert f"Started from `{path}`" in card


def test_the_command(exported: dict[str, Path], tmp_path: Path) -> None:
    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, ROOT / "convert" / "checkpoint.py", *arguments]
        return subprocess.run(
            [*map(str, line)], text=True, capture_output=True, timeout=200, cwd=tmp_path
        )

    done = command(
        exported["composer"] / "model.pt",
        "--to",
        "open_clip",
        "--out",
        "out/mine",
        "--license",
        "mit",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loading PyTorch …\n"
    found, _, *usage = done.stdout.splitlines()
    assert found.startswith("out/mine: read again, the features differ by at most ")
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent("\n".join(usage))], cwd=tmp_path, timeout=200
    )
    assert ran.returncode == 0
    card = (tmp_path / "out" / "mine" / "README.md").read_text()
    assert all(line.strip().replace("out/mine", "mine") in card for line in usage)
    assert sorted(path.name for path in (tmp_path / "out" / "mine").iterdir()) == [
        "README.md",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    wrong = command("nowhere.pt", "--to", "open_clip", "--out", "out/other")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: source: no such file: nowhere.pt; no weights lie there\n"
    assert "examples:" in command("--help").stdout
