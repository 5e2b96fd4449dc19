"""The encoders against the published code's features and gradients, stock open_clip, and themselves in chunks."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from release_format import our_names, renamed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from alignclip.config import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.encoders import CLIP, build_encoders, clamp_logit_scale_
from alignclip.errors import UserError
from alignclip.losses import AlignCLIPLoss

FIXTURES = Path(__file__).parent / "fixtures"
EVERYTHING = {"blocks": -1, "ln_final": True, "projection": True}
MODELS = ["nano", "micro"]


def config_of(published: dict[str, Any], **shared: Any) -> ModelConfig:
    return ModelConfig(
        published["embed_dim"],
        VisionConfig(**published["vision_cfg"]),
        TextConfig(**published["text_cfg"]),
        SharedConfig(**shared),
    )


def reference(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(FIXTURES / f"model_{name}.pt", weights_only=True)
    return loaded


def load_published(published: dict[str, Any]) -> CLIP:
    model = build_encoders(config_of(published["config"], **EVERYTHING))
    weights = renamed(published["state_dict"])
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    model.load_state_dict(weights)
    return model


def small_config(**changes: Any) -> ModelConfig:
    """Towers that can share everything: 32 wide, 3 layers, 2 heads."""
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3}
    vision |= changes.pop("vision", {})
    text |= changes.pop("text", {})
    shared = SharedConfig(**changes.pop("shared", {}))
    return ModelConfig(16, VisionConfig(**vision), TextConfig(**text), shared, **changes)


def small_batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(n, 12, dtype=torch.long)
    for i in range(n):
        length = 2 + i % 7
        tokens[i, :length] = torch.randint(0, 62, (length,), generator=generator)  # id 0 is a token like any other
        tokens[i, 0], tokens[i, length] = 62, 63
    return torch.randn(n, 3, 32, 32, generator=generator), tokens


# --- the published code -------------------------------------------------------------------------------------------


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
    config = ModelConfig(768, text_cfg=TextConfig(width=768, heads=12), shared=SharedConfig(**EVERYTHING))
    with torch.device("meta"):
        ours = {name: list(value.shape) for name, value in build_encoders(config).state_dict().items()}
    assert ours.pop("logit_scale") == [1]
    assert release.pop("logit_scale") == []
    assert ours == renamed(release)


def test_initialisation_is_the_published_one() -> None:
    """Same distributions, other draws: means and deviations within 4 standard errors of a difference of two samples."""
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


# --- open_clip ----------------------------------------------------------------------------------------------------


def stock(config: ModelConfig) -> open_clip.CLIP:
    return open_clip.CLIP(config.embed_dim, vars(config.vision_cfg).copy(), vars(config.text_cfg).copy())


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


@pytest.mark.parametrize("shared", [{}, {"blocks": 2, "ln_final": True}, EVERYTHING], ids=["none", "some", "all"])
def test_stock_open_clip_loads_the_state_dict(shared: dict[str, Any]) -> None:
    config = small_config(shared=shared)
    model = build_encoders(config)
    plain = stock(config)
    plain.load_state_dict(model.state_dict())
    images, tokens = small_batch()
    tokens[0] = torch.tensor([62, *range(10), 63])  # as long as the context, so both compute the same positions
    with torch.no_grad():
        image, text, scale = plain(images, tokens)
        assert torch.equal(model.encode_image(images, normalize=True), image)
        assert torch.equal(model.encode_text(tokens, normalize=True), text)
        assert torch.equal(model.logit_scale.exp()[0], scale)


def test_tokenizer_is_the_published_one() -> None:
    published = json.loads((FIXTURES / "tokens.json").read_text())
    tokens = open_clip.tokenize(published["captions"])
    assert tokens.tolist() == published["tokens"]


# --- sharing ------------------------------------------------------------------------------------------------------


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
    for vision, text in zip(copied.visual.transformer.resblocks, copied.transformer.resblocks, strict=True):
        assert vision is text
    assert torch.equal(copied.visual.proj, other.text_projection.double())
    assert copied.visual.proj is not model.visual.proj


def test_logit_scale_has_one_dimension_and_its_start() -> None:
    assert build_encoders(small_config()).logit_scale.tolist() == pytest.approx([math.log(1 / 0.07)])
    assert build_encoders(small_config(init_logit_scale=1.5)).logit_scale.tolist() == [1.5]


@pytest.mark.parametrize(
    ("config", "mentions"),
    [
        (small_config(vision={"image_size": 100}), ["image_size=100", "patch_size=16", "96 or 112"]),
        (small_config(vision={"image_size": 8}), ["image_size=8", "nearest are 16"]),
        (small_config(vision={"head_width": 24}), ["vision_cfg.width=32", "head_width=24"]),
        (small_config(text={"heads": 3}), ["text_cfg.width=32", "text_cfg.heads=3"]),
        (
            small_config(shared={"blocks": -1}, vision={"layers": 2}),
            ["vision_cfg.layers=2", "text_cfg.layers=3"],
        ),
        (small_config(shared={"blocks": 4}), ["blocks=4", "vision_cfg.layers=3"]),
        (small_config(shared={"blocks": -2}), ["blocks=-2"]),
        (small_config(shared={"blocks": 1}, text={"heads": 4}), ["width/head_width=2", "text_cfg.heads=4"]),
        (small_config(shared={"blocks": 1}, text={"mlp_ratio": 2.0}), ["mlp_ratio=4.0", "mlp_ratio=2.0"]),
        *[
            (small_config(shared=shared, text={"width": 64}), ["vision_cfg.width=32", "text_cfg.width=64"])
            for shared in ({"blocks": 1}, {"ln_final": True}, {"projection": True})
        ],
        (
            small_config(shared={"projection": True}, vision={"timm_model_name": "resnet18"}),
            ["timm_model_name=resnet18", "projection=false"],
        ),
        (small_config(vision={"timm_model_name": "resnet81"}), ["'resnet81'", "did you mean 'resnet"]),
        (
            small_config(vision={"timm_model_name": "vit_tiny_patch16_224"}),
            ["image_size=32", "takes 224"],
        ),
        (small_config(vision={"timm_model_name": "resnet18", "timm_proj": "liner"}), ["resnet18"]),
        (
            small_config(vision={"timm_model_name": "resnet18", "timm_pool": "avg"}, encode_chunk_size=2),
            ["encode_chunk_size=2", "resnet18", "batch norm"],
        ),
    ],
)
def test_impossible_sizes_name_keys_and_values(config: ModelConfig, mentions: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_encoders(config)
    for words in mentions:
        assert words in str(error.value)


def test_timm_tower() -> None:
    model = build_encoders(small_config(vision={"timm_model_name": "resnet18"}))
    images, tokens = small_batch(4)
    image, text = model.encode(images, tokens)
    assert image.shape == text.shape == (4, 16)


# --- text length --------------------------------------------------------------------------------------------------


def untrimmed(model: CLIP, tokens: Tensor) -> Tensor:
    features: Tensor = open_clip.CLIP.encode_text(model, tokens, normalize=True)
    return features


@pytest.mark.parametrize("name", MODELS)
def test_trimmed_text_has_the_features_of_untrimmed(name: str) -> None:
    published = reference(name)
    model = load_published(published)
    tokens = published["tokens"][:3]  # the short captions
    lengths: list[int] = []
    handle = model.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        trimmed = model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(trimmed, untrimmed(model, tokens), rtol=0, atol=1e-6)
        end = int(tokens.argmax(dim=1).max()) + 1
        assert end < tokens.shape[1]
        assert torch.equal(model.encode_text(tokens[:, :end], normalize=True), trimmed)
    assert lengths == [end, model.context_length, end]
    handle.remove()


def test_trimming_does_not_count_zeros() -> None:
    """Id 0 inside of a caption is a token, and what stands behind the end of text is no part of it, zero or not."""
    model = build_encoders(small_config())
    tokens = torch.tensor([[62, 0, 0, 0, 5, 0, 63, 0, 0, 0, 0, 0], [62, 7, 63, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    other_padding = tokens.clone()
    other_padding[0, 7:] = 9
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(tokens, normalize=True), untrimmed(model, tokens))
        assert torch.equal(model.encode_text(tokens), model.encode_text(other_padding))


def test_too_long_text_is_refused_and_too_much_padding_is_not() -> None:
    model = build_encoders(small_config())
    tokens = torch.zeros(2, 20, dtype=torch.long)
    tokens[:, 5] = 63
    assert torch.equal(model.encode_text(tokens), model.encode_text(tokens[:, :12]))
    tokens[1, 5], tokens[1, 15] = 1, 63
    with pytest.raises(ValueError, match="16 tokens, but context_length is 12"):
        model.encode_text(tokens)


# --- chunks -------------------------------------------------------------------------------------------------------


def loss_and_gradients(model: CLIP, chunk_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    images, tokens = small_batch()
    torch.manual_seed(7)  # of patch dropout
    image, text = model.encode(images, tokens, chunk_size)
    loss = AlignCLIPLoss()(image, text, model.logit_scale.exp(), images.flatten(1)[:, :20])["total"]
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert float((ours[name] - value).norm() / value.norm()) < 1e-5, name


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
def test_chunks_have_the_gradients_of_the_batch(chunk_size: int) -> None:
    torch.manual_seed(0)
    model = build_encoders(small_config(shared=EVERYTHING))
    loss, expected = loss_and_gradients(model, 0)
    chunked_loss, chunked = loss_and_gradients(model, chunk_size)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    assert len(expected) == len(list(model.parameters()))
    assert_same_gradients(chunked, expected)


def test_chunks_of_text_share_one_length() -> None:
    model = build_encoders(small_config())
    images, tokens = small_batch()
    lengths: list[int] = []
    model.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    model.encode(images, tokens, 2)
    assert lengths == [9] * 4  # the longest caption's, though the first two chunks hold only shorter ones


def test_recomputed_chunks_drop_the_same_patches() -> None:
    """The reference: chunks of the same draws, kept rather than recomputed."""
    torch.manual_seed(0)
    model = build_encoders(small_config(vision={"patch_dropout": 0.5, "patch_size": 4}))
    images, tokens = small_batch()
    features = []
    for chunked in (True, False):
        model.zero_grad()
        torch.manual_seed(7)
        if chunked:
            image, text = model.encode(images, tokens, 2)
        else:
            image = torch.cat([model.encode_image(chunk, normalize=True) for chunk in images.split(2)])
            text = model.encode_text(tokens, normalize=True)
        AlignCLIPLoss(beta=0)(image, text, model.logit_scale.exp())["total"].backward()
        features.append((image.detach(), gradients(model)))
    assert torch.equal(features[0][0], features[1][0])
    assert_same_gradients(features[0][1], features[1][1])


def test_chunks_keep_no_activations_and_are_not_recomputed_without_gradients() -> None:
    model = build_encoders(small_config())
    images, tokens = small_batch()

    def saved_numbers(chunk_size: int) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.encode(images, tokens, chunk_size)
        return sum(saved.values())

    assert saved_numbers(2) < saved_numbers(0) / 20
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for chunked, whole in zip(model.encode(images, tokens, 3), model.encode(images, tokens), strict=True):
            torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)


def test_features_are_normalised_in_fp32_under_autocast() -> None:
    model = build_encoders(small_config())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for features in model.encode(*small_batch()):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


class Step(nn.Module):
    """Encoding and loss inside one forward, as DDP needs it."""

    def __init__(self, chunk_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoders = build_encoders(small_config(shared=EVERYTHING))
        self.loss, self.chunk_size = AlignCLIPLoss(), chunk_size

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        image, text = self.encoders.encode(images, tokens, self.chunk_size)
        total: Tensor = self.loss(image, text, self.encoders.logit_scale.exp(), images.flatten(1)[:, :20])["total"]
        return total


def distributed_gradients() -> dict[str, Any]:
    """DDP's gradients with and without chunks, and what FSDP2 makes of a logit scale beyond its bound."""
    images, tokens = small_batch()
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    found: dict[str, Any] = {}
    for chunk_size in (0, 2):
        step = Step(chunk_size)
        ddp = DistributedDataParallel(step)  # gradients are averaged as long as it lives
        loss = ddp(images[mine], tokens[mine])
        loss.backward()
        found[f"loss {chunk_size}"] = loss.detach()
        found[f"gradients {chunk_size}"] = gradients(step.encoders)
    model = build_encoders(small_config(init_logit_scale=9.0))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    clamp_logit_scale_(model)
    found["logit_scale"] = model.logit_scale.full_tensor().tolist()
    return found


@pytest.mark.world_size(2)
def test_two_ranks_have_the_gradients_of_one_process() -> None:
    ranks = run(2, distributed_gradients)
    single = Step(0)
    loss = single(*small_batch())
    loss.backward()
    expected = gradients(single.encoders)
    for chunk_size in (0, 2):
        mean = (ranks[0][f"loss {chunk_size}"] + ranks[1][f"loss {chunk_size}"]) / 2
        torch.testing.assert_close(mean, loss.detach(), rtol=1e-6, atol=0)
        for rank in ranks:
            assert_same_gradients(rank[f"gradients {chunk_size}"], expected)
    assert ranks[0]["logit_scale"] == ranks[1]["logit_scale"] == pytest.approx([math.log(100)])


def test_clamp_logit_scale() -> None:
    model = build_encoders(small_config())
    for value, clamped in ((-1.0, 0.0), (2.5, 2.5), (7.0, math.log(100))):
        with torch.no_grad():
            model.logit_scale.fill_(value)
        clamp_logit_scale_(model)
        assert model.logit_scale.tolist() == pytest.approx([clamped])
        assert model.logit_scale.requires_grad


def test_normalisation_is_l2() -> None:
    model = build_encoders(small_config())
    images, tokens = small_batch()
    with torch.no_grad():
        image, text = model.encode(images, tokens)
        assert torch.allclose(image, F.normalize(model.encode_image(images), dim=1))
        assert torch.allclose(text, F.normalize(model.encode_text(tokens), dim=1))
