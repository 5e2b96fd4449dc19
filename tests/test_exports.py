"""``convert/checkpoint.py``: exports that stock libraries take, and the way back."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import transformers
from clip_benchmark.models import load_clip
from composer.utils import get_device
from huggingface_hub import ModelCard
from models import (
    EVERYTHING,
    FIXTURES,
    MODELS,
    assert_equal_weights,
    config_of,
    drawn,
    picture,
    reference,
    refused,
    release_of,
    small_config,
    widths_of_64,
    write_model_yaml,
    write_run,
)
from PIL import Image
from processes import python
from runs import write_config, write_set
from s3 import S3Server
from safetensors.torch import load_file, save_file
from small_runs import trained
from torch import Tensor

import alignclip
from alignclip.config import reading
from alignclip.config.schema import ModelConfig
from alignclip.model.encoders import CLIP
from alignclip.storage.clouds import S3
from alignclip.training.build import build_trainer
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.export_command import ExportOptions, main, run_export
from alignclip.weights.formats import FORMATS, format_named, hugging_face_settings
from alignclip.weights.licenses import forbids_derivatives, license_of, named_license

ROOT = Path(__file__).parent.parent
CLOSE = {"rtol": 0, "atol": 1e-5}
# the published captions without HTML entities, which open_clip alone resolves
PUBLISHED = json.loads((FIXTURES / "tokens.json").read_text())["captions"]
TEXTS = ["", "A  Photo of   naïve café", "x " * 90, *(one for one in PUBLISHED if "&" not in one)]
QUICK = ["max_duration=1ba", "scheduler.t_warmup=0ba", "data.num_workers=0", "run_name=r"]
Features = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trained(folder)
    return folder / "saved"


@pytest.fixture(scope="module")
def features(run: Path) -> Features:
    """What the trained model makes of two pictures and the texts."""
    return features_by(*alignclip.load(run))


def pictures() -> list[Image.Image]:
    """None with a palette: open_clip scales these before it converts them, transformers after."""
    return [picture().convert("RGB"), picture().convert("L").rotate(90, expand=True)]


def features_by(model: Any, preprocess: Any, tokenizer: Any) -> Features:
    pixels = torch.stack([preprocess(one) for one in pictures()])
    with torch.no_grad():
        return model.eval().encode_image(pixels), model.encode_text(tokenizer(TEXTS))


def assert_close(found: Features, expected: Features) -> None:
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(theirs, ours, **CLOSE)


def file_of(to: str, out: Path) -> Path:
    """What is loaded of an export."""
    return out / {"release": "release.pt", "composer": "model.pt"}.get(to, "")


def export(source: object, to: str, out: object, **options: Any) -> float:
    return run_export(ExportOptions(str(source), to, str(out), **options))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    for to in FORMATS:
        assert export(run, to, folder / to, license="mit", onnx=to == "open_clip") < 1e-5
    return {to: folder / to for to in FORMATS}


# --- a model trained here, elsewhere ----------------------------------------------------------


def by_open_clip(folders: dict[str, Path]) -> Features:
    name = f"local-dir:{folders['open_clip']}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    assert type(model) is open_clip.CLIP
    assert model.visual.transformer.resblocks[0] is not model.transformer.resblocks[0]
    assert model.logit_scale.shape == ()
    return features_by(model, preprocess, open_clip.get_tokenizer(name))


def by_clip_benchmark(folders: dict[str, Path]) -> Features:
    name = f"local-dir:{folders['open_clip']}"
    return features_by(*load_clip("open_clip", name, pretrained="", cache_dir=None, device="cpu"))


def pooled(*outputs: Any) -> Features:
    """The features of two outputs; up to transformers 4 they are the features."""
    image, text = (getattr(one, "pooler_output", one) for one in outputs)
    return image, text


def by_transformers(folders: dict[str, Path]) -> Features:
    model = transformers.AutoModel.from_pretrained(folders["huggingface"]).eval()
    # transformers 5 resizes with torchvision by default, up to 1 of 255 off
    processor = transformers.AutoProcessor.from_pretrained(folders["huggingface"], backend="pil")
    assert type(model) is transformers.CLIPModel
    assert type(processor) is transformers.CLIPProcessor
    words = processor(text=TEXTS, return_tensors="pt", padding=True, truncation=True)
    pixels = processor(images=pictures(), return_tensors="pt")
    with torch.no_grad():
        return pooled(model.get_image_features(**pixels), model.get_text_features(**words))


def by_onnx(folders: dict[str, Path]) -> Features:
    _, preprocess, tokenizer = alignclip.load(folders["open_clip"])
    feeds = {
        "image": torch.stack([preprocess(one) for one in pictures()]),
        "text": tokenizer(TEXTS),
    }
    found = []
    for name, tensor in feeds.items():
        graph = str(folders["open_clip"] / f"{name}_encoder.onnx")
        session = onnxruntime.InferenceSession(graph)
        whole, first = (session.run(None, {name: rows.numpy()})[0] for rows in (tensor, tensor[:1]))
        np.testing.assert_allclose(first, whole[:1], **CLOSE)  # any number of rows
        found.append(torch.from_numpy(whole))
    return found[0], found[1]


@pytest.mark.parametrize("library", [by_open_clip, by_clip_benchmark, by_transformers, by_onnx])
def test_stock_libraries_compute_the_same(
    exported: dict[str, Path], features: Features, library: Callable[..., Features]
) -> None:
    assert_close(library(exported), features)


@pytest.mark.parametrize("to", FORMATS)
def test_every_export_loads_here(
    exported: dict[str, Path], run: Path, features: Features, to: str
) -> None:
    """The release, too, whose heads of 16 are not the published 64: its config.yaml tells."""
    expected = alignclip.load(run)[0].state_dict()
    model, preprocess, tokenizer = alignclip.load(file_of(to, exported[to]))
    assert model.state_dict().keys() == expected.keys()
    assert_equal_weights(model, expected)
    assert model.visual.proj is model.text_projection
    assert_close(features_by(model, preprocess, tokenizer), features)


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
    assert isinstance(trainer.state.model.encoders, CLIP)
    assert_equal_weights(trainer.state.model.encoders, alignclip.load(run)[0].state_dict())
    trainer.close()


WORDS = {"vocab_size": 70}
CONFIGS = {
    "shares nothing": small_config(text=WORDS | {"layers": 4}, vision={"mlp_ratio": 4.0}),
    "a block": small_config(text=WORDS | {"layers": 4}, shared={"blocks": 1}),
    "blocks and norm": small_config(text=WORDS, shared={"blocks": 2, "ln_final": True}),
    "the projection": small_config(text=WORDS, shared={"projection": True}),
    "quick_gelu": small_config(text=WORDS, quick_gelu=True),
    # captions end where CLIP's tokenizer ends them, which is not at the vocabulary's last id
    "a vocabulary larger than CLIP's": small_config(text={"vocab_size": 49500}),
}


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "composer"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_of_all_kinds(tmp_path: Path, to: str, name: str) -> None:
    config = CONFIGS[name]
    source, out = write_run(tmp_path / "run", config), tmp_path / "out"
    assert export(source, to, out, onnx=name == "quick_gelu") < 1e-5
    model, _, tokenizer = alignclip.load(file_of(to, out))
    expected = drawn(config)
    assert_equal_weights(model, expected.state_dict())
    assert len(list(model.parameters())) == len(list(expected.parameters()))
    images, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[68, 1, 69], [68, 69, 0]])
    if config.text_cfg.vocab_size > 49407:
        tokens = tokenizer(TEXTS)
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), expected.encode_image(images))
        assert torch.equal(model.encode_text(tokens), expected.encode_text(tokens))


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    vision = {"timm_model_name": "test_vit", "image_size": 160}
    quick = small_config(shared=EVERYTHING, quick_gelu=True)
    refusals = [
        ("huggingface", small_config(vision=vision, text=WORDS), "can't hold the timm tower test_"),
        ("release", small_config(shared={"blocks": 3}), "for models that share everything"),
        ("release", quick, r"can't hold model\.quick_ge"),
    ]
    for i, (to, config, words) in enumerate(refusals):
        source = write_run(tmp_path / str(i), config)
        with refused(words):
            export(source, to, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]
    assert export(tmp_path / "0", "open_clip", tmp_path / "out") < 1e-5


# --- the authors' format ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_authors_file_there_and_back(name: str, tmp_path: Path) -> None:
    """Directly, and through every other format: equal tensor for tensor, the unused one
    included.
    """
    published = reference(name)
    config = config_of(published["config"], **EVERYTHING)
    # its heads are 16 wide, which shapes don't tell
    given: str | None = str(write_model_yaml(tmp_path / "model.yaml", config))
    place = tmp_path / "published.pt"
    torch.save({"state_dict": published["state_dict"]}, place)
    for to in ("release", "composer", "open_clip", "huggingface", "release"):
        out = tmp_path / f"{place.name}-{to}"
        export(place, to, out, model_config=given)
        place, given = file_of(to, out), None
        if to == "release":
            written = torch.load(place, weights_only=True)["state_dict"]
            assert written.keys() == published["state_dict"].keys()
            for key, value in published["state_dict"].items():
                assert written[key].dtype == value.dtype
                assert torch.equal(written[key], value), key


def test_a_release_of_a_model_of_ours(exported: dict[str, Path]) -> None:
    written = torch.load(exported["release"] / "release.pt", weights_only=True)["state_dict"]
    assert written.keys() >= {"projection", "ln_post.weight", "visual.conv1.weight"}
    assert not written["text.text_projection"].any()


# --- Hugging Face's ---------------------------------------------------------------------------


def clip_model(**changes: Any) -> transformers.CLIPModel:
    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    both |= {"num_attention_heads": 2, "hidden_act": changes.pop("hidden_act", "gelu")}
    both |= {"projection_dim": 16}
    words = {"vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 63}
    vision = both | {"image_size": 32, "patch_size": 8} | changes.pop("vision", {})
    text = both | words | changes.pop("text", {})
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=16, **changes
    )
    return transformers.CLIPModel(config).eval()


# an MLP's width that comes out one less when it is divided and multiplied by the model's
ODD = {"hidden_size": 112, "intermediate_size": 115}
assert int(112 * (115 / 112)) == 114


@pytest.mark.parametrize(
    ("vision", "text"), [({"hidden_size": 48, "num_hidden_layers": 3}, {}), (ODD, ODD)]
)
def test_a_clip_model_of_transformers_loads_here(
    tmp_path: Path, vision: dict[str, int], text: dict[str, int]
) -> None:
    theirs = clip_model(vision=vision, text=text)
    source = tmp_path / "theirs"
    theirs.save_pretrained(source)
    transformers.CLIPImageProcessor(image_mean=[0.5] * 3).save_pretrained(source)
    model, preprocess, _ = alignclip.load(source)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(0, 62, (3, 12))
    tokens[:, 5] = 63
    with torch.no_grad():
        expected = pooled(theirs.get_image_features(images), theirs.get_text_features(tokens))
        assert_close((model.encode_image(images), model.encode_text(tokens)), expected)
    white = preprocess(Image.new("RGB", (32, 32), "white"))
    assert float(white[0, 0, 0]) == pytest.approx(0.5 / 0.26862954)
    export(source, "huggingface", tmp_path / "ours")
    again = load_file(tmp_path / "ours" / "model.safetensors")
    for name, value in theirs.state_dict().items():
        assert torch.equal(again[name], value), name
    with refused("can't hold that this model's images are prepared otherwise"):
        export(source, "composer", tmp_path / "composer")


K_PROJECTION = "text_model.encoder.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (
            "vision",
            {"hidden_act": "quick_gelu"},
            "its towers' hidden_act are quick_gelu and gelu, and",
        ),
        ("text", {"layer_norm_eps": 1e-6}, "text_config.layer_norm_eps is 1e-06"),
        ("text", {"eos_token_id": 7}, "eos_token_id is 7, and our encoders end texts at 63"),
        (
            "text",
            {"eos_token_id": 49407},
            "eos_token_id is 49407, and our encoders end texts at 63",
        ),
        ("vision", {"image_size": 64}, "positional_embedding is"),
        ("vision", {"hidden_size": 48}, "is .*, not "),
        ("text", {"num_attention_heads": 0}, "model.text_cfg|impossible|no model"),
        ("", {"model_type": "siglip"}, "model_type is 'siglip', not 'clip'"),
        ("", {"vision_config": 3}, "vision_config is no section"),
        ("", {"projection_dim": "many"}, "sizes are impossible"),
        ("tensors", {K_PROJECTION: None}, "it lacks transformer.*in_proj_weight"),
        ("tensors", {"extra": torch.zeros(1)}, "it has extra in addition"),
        ("tensors", {"logit_scale": torch.zeros(2)}, r"logit_scale is \[2\], not \[1\]"),
    ],
)
def test_clip_models_that_are_not_ours(
    tmp_path: Path, part: str, change: dict[str, Any], words: str
) -> None:
    clip_model().save_pretrained(tmp_path)
    if part == "tensors":
        tensors = load_file(tmp_path / "model.safetensors") | change
        kept = {name: value for name, value in tensors.items() if value is not None}
        save_file(kept, tmp_path / "model.safetensors")
    else:
        settings = json.loads((tmp_path / "config.json").read_text())
        (settings[f"{part}_config"] if part else settings).update(change)
        (tmp_path / "config.json").write_text(json.dumps(settings))
    with refused(words):
        alignclip.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with refused(r"no config\.json lies beside it"):
        alignclip.load(tmp_path / "model.safetensors")


# --- images -----------------------------------------------------------------------------------


def with_pixels(folder: Path, **pixels: Any) -> str:
    """An export of open_clip's whose images are prepared in a way of its own."""
    run, source = write_run(folder / "run", small_config()), folder / "source"
    export(run, "open_clip", source)
    path = source / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preprocess_cfg": pixels}))
    return str(source)


MEANS = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.mark.parametrize(
    "pixels",
    [
        MEANS | {"interpolation": "bilinear", "resize_mode": "shortest"},
        {"mean": 0.5, "std": 0.25, "interpolation": "bicubic", "resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 128, "interpolation": "bilinear"},
    ],
    ids=lambda pixels: str(pixels["resize_mode"]),
)
def test_how_images_are_prepared_is_kept(tmp_path: Path, pixels: dict[str, Any]) -> None:
    """From open_clip to Hugging Face and back; what the other side can't do is refused."""
    source, again, hub = with_pixels(tmp_path, **pixels), tmp_path / "again", tmp_path / "hub"
    wide = pictures()[0].resize((97, 33))
    ours = alignclip.load(source)[1](wide)
    export(source, "open_clip", again)
    written = json.loads((again / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert written.keys() == {"mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
    _, _, theirs = open_clip.create_model_and_transforms(f"local-dir:{again}")
    assert torch.equal(theirs(wide), ours)
    if pixels["resize_mode"] == "longest":
        with refused("can't resize as this model wants it: longest"):
            export(source, "huggingface", hub)
        return
    export(source, "huggingface", hub)
    processor = transformers.AutoImageProcessor.from_pretrained(hub, use_fast=False)  # PIL's
    found = processor(images=wide, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, ours, **CLOSE)
    export(hub, "open_clip", tmp_path / "back")
    assert torch.equal(alignclip.load(tmp_path / "back")[1](wide), ours)
    # transformers 4 reads one file, and transformers 5 writes and prefers another one
    (hub / "preprocessor_config.json").rename(tmp_path / "settings.json")
    nested = json.loads((tmp_path / "settings.json").read_text())
    (hub / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert torch.equal(alignclip.load(hub)[1](wide), ours)


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
        ({"image_processor_type": "ViTImageProcessor"}, "by a ViTImageProcessor; did you mean"),
        ({"image_mean": [0.5, 0.5]}, "mean has 2 numbers, not 3"),
    ],
)
def test_processors_that_open_clip_has_not(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    clip_model().save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    processor.save_pretrained(tmp_path)
    alignclip.load(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with refused(words):
        alignclip.load(tmp_path)


# --- what is written, and what is not ---------------------------------------------------------


def test_an_export_that_reads_texts_or_pixels_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real captions are compared, and a picture: random ids and noise alone would not tell."""
    large = str(write_run(tmp_path / "run", small_config(text={"vocab_size": 49500})))
    bilinear = with_pixels(tmp_path / "pixels", interpolation="bilinear")
    config, pixels = hugging_face_settings.their_config, hugging_face_settings.processor_settings

    def another_end(given: ModelConfig) -> dict[str, Any]:
        found = config(given)
        end = {"eos_token_id": given.text_cfg.vocab_size - 1}
        return found | {"text_config": found["text_config"] | end}

    for source, function, wrong, words in (
        (
            large,
            "their_config",
            another_end,
            "--to huggingface: read again, the features differ by",
        ),
        (
            bilinear,
            "processor_settings",
            lambda *given: pixels(*given) | {"resample": 3},
            r"prepares images otherwise: pixels differ by \d+\.\d of 255 levels",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(hugging_face_settings, function, wrong)
            with refused(words):
                export(source, "huggingface", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_into_a_bucket(exported: dict[str, Path], s3: S3Server, features: Features) -> None:
    url = f"{s3.bucket()}/exports/first"
    export(exported["composer"] / "model.pt", "open_clip", url)
    assert_close(features_by(*alignclip.load(url)), features)
    with refused(r"holds files already \(README.md, open_clip_config.json, open"):
        export(exported["open_clip"], "open_clip", url)
    # stock open_clip reads no bucket
    found = s3.client.get_object(Bucket=url.split("/")[2], Key="exports/first/README.md")
    card = found["Body"].read().decode()
    assert f'alignclip.load("{url}")' in card
    assert "local-dir:" not in card
    assert "library_name: open_clip" in card


@pytest.mark.slow
def test_an_upload_that_breaks_leaves_nothing(
    exported: dict[str, Path], s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What says that a model is there comes last; after the error the same command works."""
    url, order = f"{s3.bucket()}/exports/second", []
    upload = S3._put

    def breaks(self: S3, path: Path, name: str) -> None:
        order.append(name)
        if name == "config.json":
            raise ValueError("the network is gone")
        upload(self, path, name)

    arguments = exported["composer"] / "model.pt", "huggingface", url
    with monkeypatch.context() as patch:
        patch.setattr(S3, "_put", breaks)
        with refused(r"cannot write to s3://.*: the network is gone$"):
            export(*arguments)
    assert order[-1] == "config.json"
    assert {"model.safetensors", "vocab.json", "tokenizer_config.json", "README.md"} <= set(order)
    assert not s3.client.list_objects_v2(Bucket=url.split("/")[2]).get("Contents")
    export(*arguments)
    alignclip.load(url)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line of a command that fails."""
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, arguments)])
    loading, line = [line for line in capsys.readouterr().err.splitlines() if line]
    assert loading == "loading PyTorch …"
    return line


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk(
    exported: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """One line from whichever library notices, and nothing left."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    out, source = tmp_path / "out" / to, exported["composer"] / "model.pt"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        line = failed(capsys, source, "--to", to, "--out", out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert line.startswith(f"error: cannot write {out}: "), line
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "composer"])
def test_an_export_that_differs_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    """Features that are no numbers differ from all: nobody can see that they are the same."""
    config = small_config(text=WORDS)
    model = drawn(config)
    with torch.no_grad():
        model.visual.proj.fill_(3e38)  # finite; NaN is refused where weights are read
    source = write_run(tmp_path / "run", config, model)
    line = failed(capsys, source, "--to", to, "--out", tmp_path / "exports" / to)
    assert line.startswith(f"error: --to {to}: read again, the features differ by inf")
    assert not list((tmp_path / "exports").iterdir())


def test_what_is_there_stays(exported: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for out, words in (
        (tmp_path / "out", "is there already; choose another or remove it"),
        ("s3:/bucket/x", "one slash"),
    ):
        with refused(words):
            export(exported["open_clip"], "composer", out)


# --- cards and licences -----------------------------------------------------------------------


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_card(run: Path, tmp_path: Path) -> None:
    metrics = {"coco": {"image_retrieval_recall@5": 0.5}, "gap": {"rmg": 0.25}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"results": {"model": metrics}}))
    export(run, "open_clip", tmp_path / "out", metrics=str(file), license="apache-2.0")
    card = card_of(tmp_path / "out")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "open_clip"
    for text in (
        "\n# r\n",
        "| coco: image_retrieval_recall@5 | 0.5000 |",
        "| shared between the towers | everything |",
        "| max_duration | 3ba |",
        "| data: e | not published |",
        f"alignclip {importlib.metadata.version('alignclip')}",
    ):
        assert text in card.text


def test_licences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release = tmp_path / "AlignCLIP.pt"
    torch.save(release_of(drawn(widths_of_64(**EVERYTHING))), release)
    published = "cc-by-nc-nd-4.0"

    def check(source: Path, out: str, name: str | None, words: str, license: str = "") -> None:
        more = ["--license", license] if license else []
        main([str(source), "--to", "open_clip", "--out", str(tmp_path / out), *more])
        assert card_of(tmp_path / out).data.to_dict().get("license") == name
        assert words in capsys.readouterr().err

    check(release, "first", published, f"licence: {published} forbids passing on derivatives")
    # from there on it is carried
    check(tmp_path / "first", "second", published, "forbids passing on")
    arguments = [tmp_path / "second", "--to", "open_clip", "--out", tmp_path / "third"]
    line = failed(capsys, *arguments, "--license", "mit")
    assert "which its derivatives can't leave" in line
    assert not (tmp_path / "third").exists()
    # who has trained such a file can say so
    own = f"their weights are {published}: --license mit is for weights that you trained yourself"
    check(release, "own", "mit", own, "mit")
    # a README.md of a repository that the file was put into is no licence
    (tmp_path / "README.md").write_text("# AlignCLIP\n")
    check(release, "beside", published, "")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    check(release, "named", "mit", "")
    told = "says mit; the export says apache-2.0"
    check(tmp_path / "own", "other", "apache-2.0", told, "apache-2.0")
    run = write_run(tmp_path / "run", small_config())
    check(run, "none", None, "no licence: nobody else may use the model")


@pytest.mark.parametrize(
    ("card", "name", "forbidden"),
    [
        ("---\nlicense: mit\n---\n", "mit", False),
        ("---\nlicense: cc-by-nc-nd-4.0\n---\n", "cc-by-nc-nd-4.0", True),
        ("\ufeff---\nlicense: CC BY NC ND 4.0\n---\n", "CC BY NC ND 4.0", True),
        ("\n\n---\r\nlicense: cc-by-nd-4.0\r\n---\r\n", "cc-by-nd-4.0", True),
        ("---\nlicense: other\nlicense_name: cc-by-nc-nd-4.0\n---\n", "cc-by-nc-nd-4.0", True),
        ("---\nlicense: other\n---\n", "other", False),
        ("---\nlicense:\n- apache-2.0\n- cc-by-nd-3.0\n---\n", "apache-2.0, cc-by-nd-3.0", True),
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
    assert license_of(card, format_named("open_clip")) == name
    assert license_of(card, format_named("release")) == (name or "cc-by-nc-nd-4.0")
    assert forbids_derivatives(name or "") == forbidden


@pytest.mark.slow
def test_the_licence_of_what_a_run_started_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the authors' weights over a run of one's own to an export: nobody has to remember it."""
    release, out = tmp_path / "AlignCLIP.pt", tmp_path / "out"
    wide = ["model.vision_cfg.width=64", "model.vision_cfg.head_width=64"]
    wide += ["model.text_cfg.width=64", "model.text_cfg.heads=1"]
    wide += ["model.vision_cfg.layers=3", "model.text_cfg.layers=3"]
    yaml = write_config(tmp_path, str(tmp_path / "set"))
    torch.save(release_of(drawn(reading.load(yaml, [*QUICK, *wide]).model)), release)
    trained(tmp_path, *wide, f"pretrained={release}")
    told = "licence: cc-by-nc-nd-4.0, which holds for what is trained from it, too"
    assert told in capsys.readouterr().out
    main([str(tmp_path / "saved"), "--to", "huggingface", "--out", str(out)])
    assert "forbids passing on derivatives" in capsys.readouterr().err
    assert card_of(out).data.license == "cc-by-nc-nd-4.0"
    with refused("which its derivatives can't leave"):
        other = str(tmp_path / "other")
        export(tmp_path / "saved", "open_clip", other, license="mit")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_licence_of_what_a_run_loaded(tmp_path: Path, s3: S3Server, place: str) -> None:
    """With ``load_path``, too, which Composer reads and no card."""
    write_set(str(tmp_path / "set"), 64)
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "saved"))
    source = write_run(tmp_path / "source", reading.load(yaml, QUICK).model)
    (source / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n")
    path = str(source / "latest-rank0.pt")
    if place == "s3":
        path = f"{s3.bucket()}/source/latest-rank0.pt"
        for file in source.iterdir():
            s3.client.upload_file(str(file), path.split("/")[2], f"source/{file.name}")
    config = reading.load(yaml, [*QUICK, f"load_path={path}", "load_weights_only=true"])
    folder = SaveFolder(config)
    folder.open()
    build_trainer(config, get_device("cpu"), folder).close()
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "license: cc-by-nc-nd-4.0" in card
    assert f"Started from `{path}`" in card


def test_the_command(exported: dict[str, Path], tmp_path: Path) -> None:
    def command(*arguments: Any) -> subprocess.CompletedProcess[str]:
        return python(*arguments, cwd=tmp_path)

    script, source = ROOT / "convert" / "checkpoint.py", exported["composer"] / "model.pt"
    done = command(script, source, "--to=open_clip", "--out=out/mine", "--license=mit")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "loading PyTorch …\n"
    found, _, *usage = done.stdout.splitlines()
    assert found.startswith("out/mine: read again, the features differ by at most ")
    assert command("-c", textwrap.dedent("\n".join(usage))).returncode == 0
    out = tmp_path / "out" / "mine"
    card = (out / "README.md").read_text()
    assert all(line.strip().replace("out/mine", "mine") in card for line in usage)
    names = ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
