"""Blocks without copies, the last one for one token a sample: open_clip's features, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import EVERYTHING, small_batch, small_config, stock
from processes import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from alignclip.model import blocks
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.training.composer_patches import average_fsdp_gradients_on_gloo


@pytest.fixture(autouse=True)
def no_batch_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 0)


SHARED: dict[str, dict[str, Any]] = {"none": {}, "some": {"blocks": 1}, "all": EVERYTHING}


def models(shared: str, dtype: torch.dtype = torch.float64) -> tuple[CLIP, nn.Module]:
    """Our model and a stock one of the same weights; a stock one shares nothing."""
    torch.manual_seed(0)
    config = small_config(shared=SHARED[shared])
    ours, theirs = build_encoders(config).to(dtype), stock(config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def padded(tokens: Tensor) -> Tensor:
    """Tokens of which one text is as long as the context: ours trims to it."""
    tokens[0] = torch.tensor([62, *range(10), 63])
    return tokens


def gradients(model: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum that every feature has another weight in, by all names of a parameter."""
    image, text, _ = model(images, tokens)
    weights = torch.linspace(-1, 1, image.numel(), dtype=image.dtype).view_as(image)
    (image * weights + text * weights.flip(0)).sum().backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("shared", SHARED)
def test_features_and_gradients_are_open_clips(shared: str) -> None:
    ours, theirs = models(shared)
    images, tokens = small_batch()
    images, tokens = images.double(), padded(tokens)
    for mine, stock_ones in zip(ours(images, tokens), theirs(images, tokens), strict=True):
        torch.testing.assert_close(mine.squeeze(), stock_ones.squeeze(), rtol=1e-12, atol=1e-13)
    found, expected = gradients(ours, images, tokens), gradients(theirs, images, tokens)
    sums: dict[int, Tensor] = {}  # over the names of a shared parameter
    parameters = dict(ours.named_parameters(remove_duplicate=False))
    for name, gradient in expected.items():
        key = id(parameters[name])
        sums[key] = sums.get(key, torch.zeros_like(gradient)) + gradient
    for name, gradient in found.items():
        expected_one = sums[id(parameters[name])]
        torch.testing.assert_close(gradient, expected_one, rtol=1e-9, atol=1e-12, msg=name)
    assert {id(parameters[name]) for name in found} == sums.keys()


def sharded(chunk_size: int) -> dict[str, Tensor]:
    """Gradients under FSDP2, each rank with half of the batch and with every block a unit."""
    blocks.SMALL = 0
    average_fsdp_gradients_on_gloo()
    ours, _ = models("all")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*ours.transformer.resblocks, ours):
        fully_shard(module, mesh=mesh)
    units = [module for module in ours.modules() if isinstance(module, FSDPModule)]
    for unit in units if chunk_size else []:  # as ReshardAfterBackward does
        unit.set_reshard_after_backward(False)
    images, tokens = small_batch()
    mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    image, text, _ = ours(images[mine].double(), padded(tokens)[mine], chunk_size)
    (image.square() * text).sum().backward()
    for unit in units:
        unit.reshard()
    gradients = ((name, p.grad) for name, p in ours.named_parameters())
    return {name: one.full_tensor() for name, one in gradients if isinstance(one, DTensor)}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("chunk_size", [0, 1])
def test_gradients_under_fsdp2(chunk_size: int) -> None:
    ours, _ = models("all")
    images, tokens = small_batch()
    image, text, _ = ours(images.double(), padded(tokens))
    (image.square() * text).sum().backward()
    for found in run(2, sharded, chunk_size):
        for name, parameter in ours.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad / 2, msg=name)


@pytest.mark.parametrize("length", [3, 12])
def test_the_causal_flag_is_the_mask(length: int) -> None:
    """In fp32, where the two kernels round differently."""
    ours, _ = models("none", torch.float32)
    x = torch.randn(4, length, 32)
    (block, *_) = ours.transformer.resblocks
    masked = block(x, attn_mask=ours.attn_mask[:length, :length])
    torch.testing.assert_close(block(x, is_causal=True), masked, rtol=1e-6, atol=1e-6)


def test_the_last_block_computes_one_token_a_sample() -> None:
    ours, _ = models("all", torch.float32)
    rows: list[int] = []
    for block in ours.transformer.resblocks:
        block.mlp.register_forward_pre_hook(
            lambda _, inputs: rows.append(inputs[0][..., 0].numel())
        )
    images, tokens = small_batch(8)
    ours.encode(images, tokens)
    length = int(tokens.argmax(dim=1).max()) + 1
    assert rows == [8 * 5, 8 * 5, 8, 8 * length, 8 * length, 8]


def test_patch_dropout_and_a_timm_tower() -> None:
    images, tokens = small_batch(8)
    for vision in ({"patch_dropout": 0.5}, {"timm_model_name": "resnet18"}):
        model = build_encoders(small_config(vision=vision))
        features = model.encode(images, tokens)
        assert [one.shape for one in features] == [(8, 16)] * 2


def test_a_small_batch_is_open_clips_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    ours, theirs = models("none", torch.float32)
    images, tokens = small_batch()
    tokens = padded(tokens)
    with torch.no_grad():
        for mine, expected in zip(ours(images, tokens), theirs(images, tokens), strict=True):
            assert torch.equal(mine.squeeze(), expected.squeeze())


def test_what_a_user_changes_runs_as_open_clips() -> None:
    """Another pooling, tokens besides, recomputed blocks, an attention of the user's own."""
    ours, theirs = models("none")
    images, tokens = small_batch()
    images = images.double()

    def assert_same() -> None:
        for mine, stock_ones in zip(ours.visual(images), theirs.visual(images), strict=True):
            torch.testing.assert_close(mine, stock_ones)

    for name, value in {"proj": None, "pool_type": "avg", "output_tokens": True}.items():
        setattr(ours.visual, name, value)
        setattr(theirs.visual, name, value)
        assert_same()
    runs: list[int] = []
    first = ours.transformer.resblocks[0]
    hook = first.register_forward_pre_hook(lambda *_: runs.append(1))
    ours.set_grad_checkpointing(True)
    ours.encode_text(tokens).sum().backward()
    assert len(runs) == 2
    hook.remove()
    ours.set_grad_checkpointing(False)

    class Louder(nn.MultiheadAttention):
        def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, None]:
            return 2 * super().forward(*inputs, **named)[0], None

    plain = ours.encode_text(tokens)
    first.attn.__class__ = Louder
    assert not torch.allclose(ours.encode_text(tokens), plain)


def test_a_traced_text_tower_takes_any_number_of_texts() -> None:
    ours, _ = models("none")
    _, tokens = small_batch()
    exported = torch.export.export(
        TextTower(ours),
        (tokens[:4],),
        dynamic_shapes=({0: torch.export.Dim("texts", min=2, max=4096)},),
    )
    torch.testing.assert_close(exported.module()(tokens[:3]), TextTower(ours)(tokens[:3]))


class TextTower(nn.Module):
    """The texts' encoder of a CLIP, without trimming, whose length depends on the texts."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model._encode_trimmed_text(tokens)


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_patches_by_a_product_are_those_of_the_convolution(size: tuple[int, int]) -> None:
    """Values and gradients, in fp64; pixels that fill no patch are left out."""
    torch.manual_seed(0)
    patches = models("none")[0].visual.conv1
    assert type(patches) is blocks.PatchEmbedding
    pixels = torch.rand(2, 3, *size, dtype=torch.float64, requires_grad=True)
    outcomes = []
    for compute in (patches.forward, patches.by_product):
        found = compute(pixels)
        weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
        gradients = torch.autograd.grad((found * weights).sum(), [pixels, patches.weight])
        outcomes.append([found, *gradients])
    for ours, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_norm_in_bf16_is_the_norm_of_its_tokens(device: str) -> None:
    """Values and gradients are those in fp32, rounded to bf16."""
    torch.manual_seed(0)
    norm = models("none", torch.float32)[0].ln_final.to(device)
    assert type(norm) is blocks.Norm
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = torch.randn(4, 7, norm.weight.numel(), device=device).bfloat16().requires_grad_()

    def outcome(autocast: bool) -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            found = norm(x if autocast else x.float())
        gradients = torch.autograd.grad((found * weights).sum(), [x, norm.weight, norm.bias])
        return [found, *gradients]

    weights = torch.randn(x.shape, device=device)
    found, expected = outcome(True), outcome(False)
    assert found[0].dtype == torch.bfloat16
    for ours, exact in zip(found, expected, strict=True):
        error = (ours.float() - exact.float()).norm() / exact.float().norm()
        assert error < 1e-2  # bf16 has 8 bits
    assert norm(x.float()).dtype == torch.float32
