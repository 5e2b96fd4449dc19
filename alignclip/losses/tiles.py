"""Cross-entropies of large batches, tile by tile: the N × N matrices are never whole.

The first pass over the tiles sums exponentials. The second pass computes the tiles again, and adds
up the gradients of the features. Logits have two uses each, so that few products of matrices are
needed:

- v tᵀ has the logits of CE(s · v tᵀ) in its rows, and those of CE(s · t vᵀ) in its columns. Both
  take 4 products together: the logits twice, and two gradients. Each alone takes 3.
- v vᵀ, t tᵀ and S are symmetric, and half of their tiles are enough. v vᵀ takes 2 products instead
  of 3, and S takes 1 for both sides.

A rank computes tiles of its own rows. The ranks tell each other the sums of their columns.

The positives L_ii are apart from the tiles: the loss of row i is log(1 + Σ_j≠i exp(L_ij − L_ii)),
which is exact near zero, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isqrt

import torch
from torch import Tensor

from alignclip.losses.captions import CaptionFeatures
from alignclip.losses.features import GlobalFeatures
from alignclip.losses.known_gradients import with_gradients
from alignclip.losses.sums import Sums
from alignclip.ranks import gather

# Numbers of a tile. Ranks need the same tiles, so the sizes are not those of the machine's memory.
# On a CPU, 2**16 to 2**21 are equally fast (benchmarks/loss.py --tile). The size for a GPU is an
# estimate: 4,096 rows and columns occupy all multiprocessors, and are 64 MiB of fp32.
CPU_TILE, GPU_TILE = 2**20, 2**24
IMAGE, TEXT = 0, 1
ModalityPair = tuple[int, int]  # the modalities of a matrix's rows and columns


def needs_tiles(features: GlobalFeatures) -> bool:
    """Say whether a rank's logits are more than a tile."""
    return len(features.image) * len(features.all_image) > numbers_of_a_tile(features)


def tiled_cross_entropy(
    features: GlobalFeatures, pairs: list[ModalityPair], captions: CaptionFeatures | None = None
) -> Tensor:
    """Compute half the sum of cross-entropies, mean over this rank's rows: a scalar [].

    All ranks must call it.

    Args:
        features: of the global batch.
        pairs: the modalities x and y of s · x yᵀ. ``[(IMAGE, TEXT)]`` has two cross-entropies: of
            its rows and of its columns. ``(IMAGE, IMAGE)`` and ``(TEXT, TEXT)`` have one each, and
            may stand together.
        captions: where given, the similarities are weighted by 1 − S, and the diagonal is replaced
            by s · v_i · t_i. The captions get no gradient.
    """
    own = (features.image, features.text, features.scale)
    needs = [torch.is_grad_enabled() and one.requires_grad for one in own]
    with torch.no_grad():
        tiles = _Tiles(features, pairs, captions)
        negatives = tiles.sum_negatives()
        loss = tiles.loss(negatives)
        if not any(needs):
            return loss
        gradients = tiles.gradients(negatives, needs)
    # a rank's gradients are those of its tiles; the gather sums them over ranks
    return with_gradients(loss, (features.all_image, features.all_text, features.scale), gradients)


def numbers_of_a_tile(features: GlobalFeatures) -> int:
    """Return how many numbers a tile has on the features' device, rows times columns."""
    return CPU_TILE if features.image.device.type == "cpu" else GPU_TILE


@dataclass(frozen=True)
class _Tile:
    """A part of the logits s · x yᵀ.

    Attributes:
        x: the modality of the rows.
        y: the modality of the columns.
        rows: their samples.
        columns: their samples.
        weights: 1 − S, ``[rows, columns]``; None where the similarities are not weighted.
    """

    x: int
    y: int
    rows: slice
    columns: slice
    weights: Tensor | None

    @property
    def is_its_own_mirror(self) -> bool:
        """Say whether the softmaxes of the columns are those of the rows."""
        return self.x == self.y and self.rows == self.columns


class _Tiles:
    """This rank's tiles of the logits, and what they add up to.

    ``[2, N]`` is a row for images, and a row for texts.
    """

    def __init__(
        self, features: GlobalFeatures, pairs: list[ModalityPair], captions: CaptionFeatures | None
    ) -> None:
        self._both, self._scale = (features.all_image, features.all_text), features.scale
        self._pairs, self._captions, self._group = pairs, captions, features.group
        self._own, self._count = features.rows, len(features.image)
        longest = isqrt(numbers_of_a_tile(features))
        self._blocks = _blocks_of_rows(len(features.all_image), self._count, longest)
        self._is_symmetric = pairs[0][0] == pairs[0][1]
        # the modality of an image's positive, and that of a text's
        is_itself = self._is_symmetric and captions is None
        self._partners = (IMAGE, TEXT) if is_itself else (TEXT, IMAGE)
        cosines = [(self._both[a] * self._both[b]).sum(dim=1) for a, b in enumerate(self._partners)]
        self._cosines = torch.stack(cosines)  # of samples and their positives, [2, N]
        self._positives = self._scale * self._cosines

    def sum_negatives(self) -> Sums:
        """Sum exp(L_ij) over j ≠ i."""
        nothing = torch.zeros_like(self._cosines)
        sums = Sums(nothing - torch.finfo(nothing.dtype).max, nothing)
        for tile in self._tiles():
            logits = self._logits(tile)
            sums.add(tile.x, tile.rows, logits, dim=1)
            if not tile.is_its_own_mirror:
                sums.add(tile.y, tile.columns, logits, dim=0)
        return sums.of_all_ranks(self._group)

    def loss(self, negatives: Sums) -> Tensor:
        """Compute the loss of this rank's rows."""
        # a positive that is not finite makes NaN of the 1 in log(1 + …)
        zeros = self._positives - self._positives
        losses = torch.logaddexp(negatives.log_of_ratio(self._positives), zeros)
        return losses[:, self._own].sum() / (2 * self._count)

    def gradients(self, negatives: Sums, needs: list[bool]) -> list[Tensor | None]:
        """Compute the gradients of the loss by images ``[N, d]``, texts ``[N, d]`` and the scale.

        Args:
            negatives: of :meth:`sum_negatives`.
            needs: which of the three are needed. The others are None.
        """
        sums = negatives.and_exp(self._positives)
        by_both = [torch.zeros_like(one) for one in self._both]
        expected = torch.zeros_like(self._cosines)  # Σ_j≠i P_ij L_ij
        for tile in self._tiles():
            logits = self._logits(tile)
            by_logits = sums.softmax(tile.x, tile.rows, logits, dim=1)
            by_columns = sums.softmax(tile.y, tile.columns, logits, dim=0)
            if needs[2]:
                expected[tile.x, tile.rows] += (by_logits * logits).sum(dim=1)
                if not tile.is_its_own_mirror:
                    expected[tile.y, tile.columns] += (by_columns * logits).sum(dim=0)
            by_logits.add_(by_columns)
            if tile.weights is not None:
                by_logits.mul_(tile.weights)
            if needs[tile.x]:
                by_rows = by_both[tile.x][tile.rows]
                by_rows.addmm_(by_logits, self._both[tile.y][tile.columns])
            if needs[tile.y] and not tile.is_its_own_mirror:
                by_columns = by_both[tile.y][tile.columns]
                by_columns.addmm_(by_logits.T, self._both[tile.x][tile.rows])
        own = self._own
        by_positives = torch.sigmoid(negatives.log_of_ratio(self._positives)).neg_()[:, own]
        for here, there in enumerate(self._partners):
            by_cosines = by_positives[here, :, None]
            by_both[here][own] += by_cosines * self._both[there][own]
            by_both[there][own] += by_cosines * self._both[here][own]
        expected = gather(expected, self._group).sum(dim=0)[:, own] / self._scale
        by_scale = (expected + by_positives * self._cosines[:, own]).sum().view_as(self._scale)
        mean = 0.5 / self._count
        gradients = [*(one.mul_(self._scale * mean) for one in by_both), by_scale * mean]
        return [one if need else None for one, need in zip(gradients, needs, strict=True)]

    def _tiles(self) -> Iterator[_Tile]:
        """Yield the tiles of this rank's rows.

        Of two tiles that mirror one another in a symmetric matrix, one is computed. The colours of
        a chessboard say which one: so ranks have equally many.
        """
        for a, rows in enumerate(self._blocks):
            if not self._own.start <= rows.start < self._own.stop:
                continue
            for b, columns in enumerate(self._blocks):
                if self._is_symmetric and a != b and (a < b) == ((a + b) % 2 == 0):
                    continue
                weights = None
                if self._captions is not None:
                    weights = self._captions.dissimilarity(rows, columns)
                for x, y in self._pairs:
                    yield _Tile(x, y, rows, columns, weights)

    def _logits(self, tile: _Tile) -> Tensor:
        """Compute the logits of a tile; those of the diagonal are as good as −∞."""
        rows = self._scale * self._both[tile.x][tile.rows]
        logits = rows @ self._both[tile.y][tile.columns].T
        if tile.weights is not None:
            logits.mul_(tile.weights)
        if tile.rows == tile.columns:
            logits.fill_diagonal_(-torch.finfo(logits.dtype).max)  # −∞ · 0 would be NaN
        return logits


def _blocks_of_rows(total: int, count: int, longest: int) -> list[slice]:
    """Cut the rows of each rank into an even number of blocks: then ranks have equal work.

    Args:
        total: rows of all ranks.
        count: rows of a rank.
        longest: the most rows of a block.
    """
    length = ceil(count / (2 * ceil(count / (2 * longest))))
    return [
        slice(start, min(start + length, first + count))
        for first in range(0, total, count)
        for start in range(first, first + count, length)
    ]
