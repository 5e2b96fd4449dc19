"""The ceilings of one GPU, and the loss alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from gpu_work import SEMANTIC, Work

from alignclip.losses.captions import CaptionFeatures
from alignclip.losses.contrastive import contrastive_loss
from alignclip.losses.features import GlobalFeatures
from alignclip.losses.precision import full_precision
from alignclip.losses.separation import separation_loss


def ceilings(work: Work) -> str:
    """Measure a product of bf16 matrices and a copy on the device."""
    side, device = work.sizes.product, work.device
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(work.sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    products = work.seconds_of(lambda: a @ b, *work.sizes.steps)
    copies = work.seconds_of(lambda: target.copy_(source), *work.sizes.steps)
    flops, moved = 2 * side**3 / 1e12, 2 * work.sizes.copied / 1e12  # read and written
    product = work.figures.add("product/rate", [flops / s for s in products], "TFLOP/s", "higher")
    copied = work.figures.add("copy/rate", [moved / s for s in copies], "TB/s", "higher")
    return f"bf16 product of {side:,}³ {product:,.3g} TFLOP/s, copy {copied:.3g} TB/s"


def loss_alone(work: Work) -> str:
    """Measure the loss of one rank's rows among all ranks' columns, forward and backward."""
    rows, columns = work.sizes.loss
    image, text, semantic = (
        F.normalize(torch.randn(columns, SEMANTIC, device=work.device), dim=1) for _ in range(3)
    )
    scale = torch.tensor([14.0], device=work.device)
    for tensor in (image, text, scale):
        tensor.requires_grad_()

    def work_once() -> None:
        image.grad = text.grad = scale.grad = None
        own = torch.arange(rows, device=work.device)
        mine = slice(0, rows)
        features = GlobalFeatures(image[mine], text[mine], image, text, scale, mine, own, None)
        captions = CaptionFeatures(semantic)
        with full_precision(work.device.type):
            loss = contrastive_loss(features) + separation_loss(features, captions, True, True) / 2
            loss.backward()

    work.seconds_of(work_once, 1, 1)
    work.peak()
    before = torch.cuda.memory_allocated() / 2**30 if work.is_cuda else 0.0
    seconds = work.seconds_of(work_once, *work.sizes.steps)
    time = work.figures.add("loss/time", [1000 * s for s in seconds], "ms", "lower")
    said = f"{rows:,} × {columns:,}: {time:,.1f} ms"
    if work.is_cuda:
        memory = work.figures.add("loss/memory", [work.peak() - before], "GiB", "lower")
        matrix = rows * columns * 4 / 2**30
        said += f", {memory:.2f} GiB above the features (a matrix is {matrix:.2f} GiB)"
    return said
