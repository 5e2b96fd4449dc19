"""The encoders against the published code's features and gradients, and against stock open_clip."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import open_clip
import pytest
import torch
from models import (
    EVERYTHING,
    FIXTURES,
    MODELS,
    load_published,
    reference,
    refused,
    small_batch,
    small_config,
    stock,
)

from alignclip.config.schema import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.losses import AlignCLIPLoss
from alignclip.model.encoders import build_encoders
from alignclip.weights.formats.release import our_names, renamed

# --- the published code ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_published_features(name: str) -> None:
    published = reference(name)
    model = load_published(published)
    with torch.no_grad():
        for features, key in (
            (model.encode_image(published["image"]), "image_features_raw"),
            (model.encode_text(published["tokens"]), "text_features_raw"),
            (model.encode_image(published["image"], normalize=True), "image_features"),
            (model.encode_text(published["tokens"], normalize=True), "text_features"),
        ):
            torch.testing.assert_close(features, published[key], rtol=1e-5, atol=2e-6)
        image, text = model.double().encode(published["image"].double(), published["tokens"])
    torch.testing.assert_close(image, published["image_features_f64"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(text, published["text_features_f64"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["clip", "align"])
def test_published_losses_and_gradients(name: str, kind: str) -> None:
    published = reference(name)
    model = load_published(published)
    image, text = model.encode(published["image"], published["tokens"])
    loss = AlignCLIPLoss(beta=0.0 if kind == "clip" else 0.5)
    losses = loss(image, text, model.logit_scale.exp(), published["semantic"])
    losses["total"].backward()
    # the published AlignCLIP loss is twice ours
    half = 1.0 if kind == "clip" else 0.5
    if kind == "clip":
        theirs = {"total": published["clip_loss"]}
    else:
        theirs = {key: half * value for key, value in published["align_losses"].items()}
        theirs = {
            "total": theirs["total_loss"],
            "contrastive": theirs["clip_loss"],
            "separation": theirs["inModality_loss"] / loss.beta,
        }
    for key, value in theirs.items():
        torch.testing.assert_close(losses[key].detach(), value, rtol=1e-6, atol=0)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    checked = set()
    for key, grad in published[f"{kind}_grads"].items():
        if grad is None:  # text.text_projection, unused by them
            continue
        parameter = parameters[our_names(key)[0]]
        expected = torch.zeros_like(parameter)
        if isinstance(grad, dict):  # an embedding's rows that are not zero
            expected[grad["rows"]] = grad["values"]
        else:
            expected += grad
        assert parameter.grad is not None
        error = (parameter.grad - half * expected).norm() / (half * expected).norm()
        assert error < 1e-5, f"{key}: {error:.1e}"
        checked.add(id(parameter))
    assert checked == {id(parameter) for parameter in model.parameters()}


def test_released_vit_b_16_has_our_names_and_shapes() -> None:
    """Shapes of the authors' ViT-B-16 file: 768 wide, embedding 768, everything shared."""
    release = json.loads((FIXTURES / "vitb16_state_dict_shapes.json").read_text())
    text, shared = TextConfig(width=768, heads=12), SharedConfig(**EVERYTHING)
    with torch.device("meta"):
        model = build_encoders(ModelConfig(768, text_cfg=text, shared=shared))
    ours = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert (ours.pop("logit_scale"), release.pop("logit_scale")) == ([1], [])
    assert ours == renamed(release)


def test_initialisation_is_the_published_one() -> None:
    """Same distributions, other draws: means and deviations within 4 standard errors of a
    difference of two samples.
    """
    published = json.loads((FIXTURES / "tiny64_init_stats_seed0.json").read_text())
    torch.manual_seed(1)
    config = ModelConfig(
        192,
        VisionConfig(image_size=64, patch_size=8, width=192, layers=4),
        TextConfig(width=192, heads=3, layers=4),
        SharedConfig(**EVERYTHING),
    )
    parameters = dict(build_encoders(config).named_parameters(remove_duplicate=False))
    for name, stats in published.items():
        values = parameters[our_names(name)[0]].detach()
        n, std = values.numel(), stats["std"]
        if std == 0:
            assert torch.all(values == stats["mean"]), name
            continue
        assert abs(float(values.mean()) - stats["mean"]) < 4 * std * math.sqrt(2 / n), name
        assert abs(float(values.std()) / std - 1) < 4 / math.sqrt(n), name


# --- open_clip ------------------------------------------------------------------------------------


def test_unshared_initialisation_is_open_clips() -> None:
    config = small_config()
    torch.manual_seed(3)
    ours = build_encoders(config).state_dict()
    torch.manual_seed(3)
    theirs = stock(config).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].reshape(value.shape), value), name


def test_partial_sharing_keeps_the_rest_as_open_clip_initialises_it() -> None:
    config = small_config(shared={"blocks": 1, "projection": True}, vision={"layers": 2})
    torch.manual_seed(3)
    model = build_encoders(config)
    torch.manual_seed(3)
    theirs = stock(config).state_dict()
    vision, text = model.visual.transformer.resblocks, model.transformer.resblocks
    assert vision[1] is text[2]
    assert model.visual.proj is model.text_projection
    assert model.visual.ln_post is not model.ln_final
    for name, value in model.state_dict().items():
        shared = name.startswith("visual.transformer.resblocks.1.") or name == "visual.proj"
        if shared:
            name = name.replace("visual.transformer.resblocks.1.", "transformer.resblocks.2.")
            name = name.replace("visual.proj", "text_projection")
        assert torch.equal(value.reshape(theirs[name].shape), theirs[name]), name


@pytest.mark.parametrize(
    "shared", [{}, {"blocks": 2, "ln_final": True}, EVERYTHING], ids=["none", "some", "all"]
)
def test_stock_open_clip_loads_the_state_dict(shared: dict[str, Any]) -> None:
    config = small_config(shared=shared)
    model = build_encoders(config)
    plain = stock(config)
    plain.load_state_dict(model.state_dict())
    images, tokens = small_batch()
    tokens[0] = torch.tensor(
        [62, *range(10), 63]
    )  # as long as the context, so both compute the same positions
    with torch.no_grad():
        image, text, scale = plain(images, tokens)
        assert torch.equal(model.encode_image(images, normalize=True), image)
        assert torch.equal(model.encode_text(tokens, normalize=True), text)
        assert torch.equal(model.logit_scale.exp()[0], scale)


def test_tokenizer_is_the_published_one() -> None:
    published = json.loads((FIXTURES / "tokens.json").read_text())
    tokens = open_clip.tokenize(published["captions"])
    assert tokens.tolist() == published["tokens"]


# --- sharing --------------------------------------------------------------------------------------


def test_parameter_count_follows_sharing() -> None:
    def count(**shared: Any) -> int:
        return len(list(build_encoders(small_config(shared=shared)).parameters()))

    nothing = count()
    assert count(blocks=1) == nothing - 12
    assert count(blocks=-1) == nothing - 36
    assert count(ln_final=True) == nothing - 2
    assert count(projection=True) == nothing - 1
    assert count(**EVERYTHING) == nothing - 39


def test_ties_survive_copying_loading_and_casting() -> None:
    model = build_encoders(small_config(shared=EVERYTHING))
    other = build_encoders(small_config(shared=EVERYTHING))
    copied = copy.deepcopy(model).double()
    copied.load_state_dict(other.state_dict())
    assert len(list(copied.parameters())) == len(list(model.parameters()))
    assert copied.visual.proj is copied.text_projection
    assert copied.visual.ln_post is copied.ln_final
    for vision, text in zip(
        copied.visual.transformer.resblocks, copied.transformer.resblocks, strict=True
    ):
        assert vision is text
    assert torch.equal(copied.visual.proj, other.text_projection.double())
    assert copied.visual.proj is not model.visual.proj


def test_logit_scale_has_one_dimension_and_its_start() -> None:
    assert build_encoders(small_config()).logit_scale.tolist() == pytest.approx(
        [math.log(1 / 0.07)]
    )
    assert build_encoders(small_config(init_logit_scale=1.5)).logit_scale.tolist() == [1.5]


RESNET, TINY_VIT = "resnet18", "vit_tiny_patch16_224"


@pytest.mark.parametrize(
    ("changes", "mentions"),
    [
        ({"vision": {"image_size": 100}}, ["image_size=100", "patch_size=16", "96 or 112"]),
        ({"vision": {"image_size": 8}}, ["image_size=8", "nearest are 16"]),
        ({"vision": {"head_width": 24}}, ["vision_cfg.width=32", "head_width=24"]),
        ({"text": {"heads": 3}}, ["text_cfg.width=32", "text_cfg.heads=3"]),
        (
            {"shared": {"blocks": -1}, "vision": {"layers": 2}},
            ["vision_cfg.layers=2", "text_cfg.layers=3"],
        ),
        ({"shared": {"blocks": 4}}, ["blocks=4", "vision_cfg.layers=3"]),
        ({"shared": {"blocks": -2}}, ["blocks=-2"]),
        (
            {"shared": {"blocks": 1}, "text": {"heads": 4}},
            ["width/head_width=2", "text_cfg.heads=4"],
        ),
        (
            {"shared": {"blocks": 1}, "text": {"mlp_ratio": 2.0}},
            ["mlp_ratio=4.0", "mlp_ratio=2.0"],
        ),
        *[
            (
                {"shared": shared, "text": {"width": 64}},
                ["vision_cfg.width=32", "text_cfg.width=64"],
            )
            for shared in ({"blocks": 1}, {"ln_final": True}, {"projection": True})
        ],
        (
            {"shared": {"projection": True}, "vision": {"timm_model_name": RESNET}},
            ["timm_model_name=resnet18", "projection=false"],
        ),
        ({"vision": {"timm_model_name": "resnet81"}}, ["'resnet81'", "did you mean 'resnet"]),
        ({"vision": {"timm_model_name": TINY_VIT}}, ["image_size=32", "takes 224"]),
        ({"vision": {"timm_model_name": RESNET, "timm_proj": "liner"}}, [RESNET]),
        (
            {"vision": {"timm_model_name": RESNET, "timm_pool": "avg"}, "encode_chunk_size": 2},
            ["encode_chunk_size=2", RESNET, "batch norm"],
        ),
    ],
)
def test_impossible_sizes_name_keys_and_values(
    changes: dict[str, Any], mentions: list[str]
) -> None:
    with refused("model") as error:
        build_encoders(small_config(**copy.deepcopy(changes)))
    for words in mentions:
        assert words in str(error.value)


def test_timm_tower() -> None:
    model = build_encoders(small_config(vision={"timm_model_name": "resnet18"}))
    images, tokens = small_batch(4)
    image, text = model.encode(images, tokens)
    assert image.shape == text.shape == (4, 16)
