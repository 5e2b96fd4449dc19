"""Cross-entropies of large batches, a block of rows at a time: the n × N matrices are never whole.

A block has all columns. So the softmax of its rows, and with it the gradient, is known before the
next block begins. The forward pass adds up the gradients of the features; no logits are kept, and
none are computed twice. The backward pass only multiplies by the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignclip.losses.captions import CaptionFeatures
from alignclip.losses.features import GlobalFeatures

# Numbers of a block of logits. On a CPU 16 MiB of fp32 were the fastest (benchmarks/loss.py). The
# size for a GPU is an estimate.
CPU_TILE, GPU_TILE = 2**22, 2**25
IMAGE, TEXT = 0, 1
Side = tuple[int, int]  # the modalities of a matrix's rows and columns


def needs_tiles(features: GlobalFeatures) -> bool:
    """Say whether a matrix of logits is larger than a block."""
    return len(features.own) > _rows_of_a_block(features.all_image)


def tiled_cross_entropy(
    features: GlobalFeatures, sides: list[Side], captions: CaptionFeatures | None = None
) -> Tensor:
    """Compute half the sum over sides of CE(s · x yᵀ), mean over this rank's rows: a scalar [].

    Args:
        features: of the global batch.
        sides: the modalities x and y of each matrix.
        captions: where given, the similarities are weighted by 1 − S, and the diagonal is replaced
            by s · v_i · t_i. The captions get no gradient.
    """
    pair = (features.all_image, features.all_text, features.scale)
    is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in pair)
    loss = _TiledCrossEntropy.apply(*pair, features, sides, captions, is_differentiated)
    assert isinstance(loss, Tensor)
    return loss


def _rows_of_a_block(columns: Tensor) -> int:
    return max(1, (CPU_TILE if columns.device.type == "cpu" else GPU_TILE) // len(columns))


class _TiledCrossEntropy(torch.autograd.Function):
    """The loss, and its gradients by all ranks' features and by the scale.

    The gradient of this rank's rows is added to the gradient of the rows' own columns: the gather
    passes both back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        features: GlobalFeatures,
        sides: list[Side],
        captions: CaptionFeatures | None,
        is_differentiated: bool,
    ) -> Tensor:
        tiles = _Tiles(image, text, scale, is_differentiated)
        count = len(features.own)
        rows = _rows_of_a_block(image)
        for start in range(0, count, rows):
            block = slice(start, min(start + rows, count))
            weights = None if captions is None else captions.dissimilarity(block)
            for side in sides:
                tiles.add(side, features.first + start, block.stop - start, weights)
        mean = 0.5 / count
        if is_differentiated:
            ctx.save_for_backward(*(gradient.mul_(mean) for gradient in tiles.gradients))
        return tiles.loss * mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*(grad * gradient for gradient in ctx.saved_tensors), None, None, None, None)


class _Tiles:
    """The sums over blocks of rows: of the cross-entropies, and of their gradients.

    Attributes:
        loss: the sum of all rows' cross-entropies, a scalar [].
        gradients: of ``loss`` by the images ``[N, d]``, the texts ``[N, d]`` and the scale.
    """

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, is_differentiated: bool) -> None:
        self.features, self.scale = (image, text), scale
        self.loss = image.new_zeros(())
        self.gradients: list[Tensor] = []
        if is_differentiated:
            self.gradients = [torch.zeros_like(one) for one in (image, text, scale)]

    def add(self, side: Side, first: int, count: int, weights: Tensor | None) -> None:
        """Add a block of rows, ``first`` to ``first + count`` of all.

        Args:
            side: the modalities of rows and columns.
            first: the block's first row among all ranks' rows.
            count: rows of the block.
            weights: ``[count, N]``, 1 − S; None where the similarities are not weighted.
        """
        rows = slice(first, first + count)
        x, columns = self.features[side[0]][rows], self.features[side[1]]
        at = torch.arange(count, device=x.device), torch.arange(first, rows.stop, device=x.device)
        scaled = self.scale * x
        logits = scaled @ columns.T
        if weights is not None:
            logits.mul_(weights)
            logits[at] = self._counterparts(rows).mul_(self.scale)
        positives = logits[at]
        largest = logits.amax(dim=1, keepdim=True)
        sums = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
        # by rows: sums over rows of each would differ little, and be large
        self.loss += ((sums.log() + largest).squeeze(1) - positives).sum()
        if self.gradients:
            by_logits = logits.div_(sums)  # the softmax
            by_logits[at] -= 1
            self._add_gradients(side, rows, at, by_logits, weights)

    def _counterparts(self, rows: slice) -> Tensor:
        """Compute v_i · t_i of some rows: ``[count]``."""
        image, text = self.features
        return (image[rows] * text[rows]).sum(dim=1)

    def _add_gradients(
        self,
        side: Side,
        rows: slice,
        at: tuple[Tensor, Tensor],
        by_logits: Tensor,
        weights: Tensor | None,
    ) -> None:
        """Add the gradients of a block from the gradient by its logits, ``[count, N]``."""
        by_scale = self.gradients[2]
        if weights is not None:
            by_positives = by_logits[at]
            by_scale += (by_positives * self._counterparts(rows)).sum()
            scaled = (self.scale * by_positives)[:, None]
            for here, counterpart in ((0, 1), (1, 0)):
                self.gradients[here][rows] += scaled * self.features[counterpart][rows]
            by_logits.mul_(weights)
            by_logits[at] = 0
        x, columns = self.features[side[0]][rows], self.features[side[1]]
        by_scaled_rows = by_logits @ columns
        by_scale += (by_scaled_rows * x).sum()
        self.gradients[side[1]].addmm_(by_logits.T, self.scale * x)
        self.gradients[side[0]][rows] += by_scaled_rows.mul_(self.scale)
