"""Floating-point operations of a training step, from the sizes of encoders and loss.

Only products count: matrix products, convolutions, attention. A product of what is trained takes
two more products in the backward pass. Chunks that are encoded again don't count again: MFU, model
FLOPs utilization, compares the operations that the model needs with what the device can do
(https://arxiv.org/abs/2204.02311, appendix B).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alignclip.errors import one_line
from alignclip.losses import AlignCLIPLoss
from alignclip.model.encoders import CLIP

PRODUCT = 2  # operations of a product: multiply, add
SAMPLES = 2  # that a timm tower is counted with: a BatchNorm refuses one


@dataclass(frozen=True)
class PairFlops:
    """Operations of a pair's forward and backward pass through the encoders.

    Attributes:
        image: of the image.
        text: of a caption of l tokens: ``text[0] + text[1] · l + text[2] · l²``.
    """

    image: float
    text: tuple[float, float, float]

    def at(self, length: int) -> float:
        """Return the operations of a pair whose caption has so many tokens."""
        once, by_token, by_square = self.text
        return self.image + once + by_token * length + by_square * length**2


def count_pair(encoders: CLIP) -> PairFlops | None:
    """Count the operations of a pair; what is locked has no gradients to count.

    Call this before FSDP wraps the encoders.

    Returns:
        None where timm's tower can't be counted.
    """
    visual = encoders.visual
    image = _vit(visual) if hasattr(visual, "transformer") else _timm(visual)
    if image is None:
        return None
    below = _is_trained([encoders.token_embedding.weight, encoders.positional_embedding])
    once, by_token, by_square, below = _blocks(encoders.transformer, below)
    below |= _is_trained(encoders.ln_final.parameters())
    once += _weight(encoders.text_projection, below)
    return PairFlops(image, (once, by_token, by_square))


def loss_flops(criterion: AlignCLIPLoss, rows: int, columns: int, width: int, semantic: int) -> int:
    """Count the operations of a rank's part of the loss with its gradients by both modalities.

    Further terms are not counted: they have no products as large as these.

    Args:
        criterion: the loss.
        rows: samples of the rank.
        columns: samples of all ranks.
        width: numbers of a feature.
        semantic: numbers of a caption embedding; 0 without such.
    """
    sides = (criterion.separate_image + criterion.separate_text) if criterion.beta else 0
    weights = semantic if sides and criterion.rescale else 0  # no gradient flows into these
    return PRODUCT * rows * columns * (3 * width * (2 + sides) + weights)


def _vit(visual: Any) -> float:
    """Count an image through open_clip's vision transformer."""
    pixels, dropout = visual.conv1.weight, visual.patch_dropout
    patches = visual.grid_size[0] * visual.grid_size[1]
    kept = max(1, int(patches * (1 - getattr(dropout, "prob", 0.0))))
    conv = patches * _weight(pixels, is_below=False)
    first = [pixels, visual.class_embedding, visual.positional_embedding]
    below = _is_trained([*first, *visual.ln_pre.parameters()])
    once, by_token, by_square, below = _blocks(visual.transformer, below)
    below |= _is_trained(visual.ln_post.parameters())
    tokens = 1 + kept
    projection = _weight(visual.proj, below)
    return conv + once + by_token * tokens + by_square * tokens**2 + projection


def _blocks(transformer: Any, is_below: bool) -> tuple[float, float, float, bool]:
    """Count transformer blocks: by a sample, by a token, and by a pair of tokens.

    Behind its attention, the last block computes the pooled token alone.

    Args:
        transformer: with its blocks, from below.
        is_below: whether anything below is trained, so that gradients flow through all blocks.

    Returns:
        the counts, and whether anything is trained up to here.
    """
    once = by_token = by_square = 0.0
    for block in transformer.resblocks:
        is_below |= _is_trained(block.parameters())
        for weight in (one for one in block.parameters() if one.ndim > 1):
            is_of_one = (
                block is transformer.resblocks[-1] and weight is not block.attn.in_proj_weight
            )
            once += is_of_one * _weight(weight, is_below)
            by_token += (not is_of_one) * _weight(weight, is_below)
        # queries with keys, and weights with values
        by_square += 2 * PRODUCT * transformer.width * (3 if is_below else 1)
    return once, by_token, by_square, is_below


def _weight(weight: Tensor, is_below: bool) -> float:
    """Count a product with a weight: forward, its gradient, the gradient of its input."""
    return PRODUCT * weight.numel() * (1 + weight.requires_grad + is_below)


def _is_trained(parameters: Iterable[Tensor]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)


def _timm(visual: Any) -> float | None:
    """Count an image through timm's tower on tensors without numbers, which takes no memory."""
    twins: dict[int, Tensor] = {id(buffer): buffer.to("meta") for buffer in visual.buffers()}
    for parameter in visual.parameters():
        empty = torch.empty_like(parameter, device="meta")
        twins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    twin = copy.deepcopy(visual, twins)
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    pixels = torch.empty(SAMPLES, 3, *size, device="meta")
    try:
        # dropouts of the tower draw from the global generator, which the run goes on with
        with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
            features = twin(pixels)
            if features.requires_grad:
                features.sum().backward()
    except Exception as error:  # a tower that looks at numbers raises anything
        logging.getLogger(__name__).info(f"timm's tower can't be counted: {one_line(error)}")
        return None
    return counter.get_total_flops() / SAMPLES
