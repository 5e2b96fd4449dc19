"""Encoders, losses and gradients on the device beside fp64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import torch
from gpu_work import Failed, Work, batch_of
from loss import written_out
from torch import Tensor, nn

from alignclip.config.schema import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.data.transforms import normalize
from alignclip.losses import AlignCLIPLoss
from alignclip.model.encoders import build_encoders

SHARING = {
    "nothing shared": SharedConfig(),
    "half shared": SharedConfig(1, True, True),
    "all shared": SharedConfig(-1, True, True),
}
BATCH, CHUNK, SIDE, LENGTH = 64, 16, 64, 32
EXACT, BF16_FEATURES, BF16_GRADIENTS = 1e-5, 2e-2, 5e-2  # the largest differences


def exactness(work: Work) -> str:
    """Compare with fp64; fail where a difference is too large."""
    torch.backends.cudnn.allow_tf32 = False  # convolutions
    torch.set_float32_matmul_precision("highest")
    bad, worst = [], 0.0
    for name, difference, most in [
        *_encoder_differences(work),
        *_loss_differences(work),
        *_tile_differences(work),
    ]:
        print(f"{name:60}{difference:10.1e}, at most {most:.0e}")
        worst = max(worst, difference / most)
        bad += [f"{name} {difference:.1e} > {most:.0e}"] if not difference <= most else []
    if bad:
        raise Failed("; ".join(bad))
    return f"all within their limits, the worst at {worst:.0%} of its own"


Difference = tuple[str, float, float]  # what, how large, at most


def _encoder_differences(work: Work) -> Iterator[Difference]:
    """Compare features and gradients of each way of sharing."""
    for name, shared in SHARING.items():
        vision = VisionConfig(image_size=SIDE, patch_size=16, width=64, layers=2, head_width=32)
        text = TextConfig(context_length=LENGTH, width=64, heads=2, layers=2)
        torch.manual_seed(0)
        model = build_encoders(ModelConfig(64, vision, text, shared))
        exact = _outcome(copy.deepcopy(model).double(), work, "cpu", torch.float64)
        model.to(work.device)
        plain = _outcome(model, work, work.device.type, torch.float32)
        chunks = _outcome(model, work, work.device.type, torch.float32, CHUNK)
        yield f"{name}: features, fp32", _furthest(plain[0], exact[0]), EXACT
        yield f"{name}: gradients, fp32", _relative(plain[1], exact[1]), EXACT
        yield f"{name}: gradients in chunks beside whole", _relative(chunks[1], plain[1]), EXACT
        bf16 = _outcome(model, work, work.device.type, torch.bfloat16)
        yield f"{name}: features, bf16", _furthest(bf16[0], exact[0]), BF16_FEATURES
        yield f"{name}: gradients, bf16", _relative(bf16[1], exact[1]), BF16_GRADIENTS


def _outcome(
    model: nn.Module, work: Work, device: str, dtype: torch.dtype, chunk_size: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the features of a batch, and all gradients of its loss, in fp64 on the CPU."""
    batch = batch_of(work, BATCH, SIDE, LENGTH)
    text_ids, semantic = batch["text"].to(device), batch["semantic"].to(device)
    model.zero_grad()
    images = normalize(batch["image"].to(device))
    with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.bfloat16):
        pixels = images.double() if dtype is torch.float64 else images
        image, text, scale = model(pixels, text_ids, chunk_size=chunk_size)
        AlignCLIPLoss()(image, text, scale, semantic)["total"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return _exact([image, text]), _exact(gradients)


def _loss_differences(work: Work) -> Iterator[Difference]:
    """Compare the loss of equal features, under autocast on the device."""
    inputs = _features(512)
    for rescale in (True, False):
        loss = AlignCLIPLoss(rescale=rescale)
        exact = _loss_and_gradients(loss, inputs, "cpu", torch.float64)
        found = _loss_and_gradients(loss, inputs, work.device.type, torch.float32)
        name = f"loss under autocast, rescale={rescale}".lower()
        yield f"{name}: value", _relative(found[:1], exact[:1]), EXACT
        yield f"{name}: gradients", _relative(found[1:], exact[1:]), EXACT


def _tile_differences(work: Work) -> Iterator[Difference]:
    """Compare the loss in blocks with the formulas written out in fp64 on the device."""
    inputs, device = _features(work.sizes.tiled), work.device.type
    found = _loss_and_gradients(AlignCLIPLoss(), inputs, device, torch.float32)
    with torch.device(device):
        exact = _loss_and_gradients(written_out, inputs, device, torch.float64)
    name = f"loss of {work.sizes.tiled:,} pairs"
    yield f"{name}: value", _relative(found[:1], exact[:1]), EXACT
    yield f"{name}: gradients", _relative(found[1:], exact[1:]), EXACT


def _features(count: int) -> list[Tensor]:
    """Draw features of unit length, a scale and embeddings, in fp32."""
    generator = torch.Generator().manual_seed(0)
    image, text, semantic = (torch.randn(count, 768, generator=generator) for _ in range(3))
    unit = torch.nn.functional.normalize
    return [unit(image, dim=1), unit(text + image, dim=1), torch.tensor([14.0]), semantic]


def _loss_and_gradients(
    loss: Callable[..., Tensor | dict[str, Tensor]],
    inputs: list[Tensor],
    device: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return a loss, and its gradients by features and scale, in fp64 on the CPU."""
    moved = [tensor.to(device, dtype, copy=True) for tensor in inputs]
    for tensor in moved[:3]:
        tensor.requires_grad_()
    with torch.autocast(device, torch.bfloat16, enabled=dtype is torch.float32):
        found = loss(*moved)
        value = found["total"] if isinstance(found, dict) else found
    value.backward()
    return _exact([value, *(tensor.grad for tensor in moved[:3] if tensor.grad is not None)])


def _exact(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().cpu() for tensor in tensors]


def _furthest(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference of a number."""
    return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))


def _relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return the length of the difference, as a share of the length of all numbers together."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
    whole = sum(float(b.square().sum()) for b in exact)
    return (difference / whole) ** 0.5
