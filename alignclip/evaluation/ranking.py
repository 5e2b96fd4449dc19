"""The rank of what is right among all items, with one rule for ties."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SUMMED = 16  # rows whose ranks are counted at a time


def score_blocks(
    queries: Tensor, items: Tensor, positives: Tensor, block: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield cosines of ``block`` queries at a time with all items, and these queries' positives.

    Args:
        queries: [N, d] of unit length.
        items: [M, d] of unit length, on the same device.
        positives: [N, any], on the same device. A task without positives passes the numbers of the
            rows, ``torch.arange(N)``, and gets each block's numbers with the block.
        block: rows of the similarity matrix held at a time.
    """
    with torch.autocast(items.device.type, enabled=False):
        for rows, mine in zip(queries.split(block), positives.split(block), strict=True):
            yield rows @ items.T, mine


def best_ranks(scores: Tensor, positives: Tensor) -> Tensor:
    """Rank the best-ranked of each row's positives, from 0.

    An item's rank is the number of items with a greater score plus the number with an equal one and
    a lower index. Scores that are all the same therefore rank as chance does.

    Args:
        scores: [N, M].
        positives: [N, any] columns of ``scores``, one at least a row, filled up with -1.

    Returns:
        [N] ranks.
    """
    own = scores.gather(1, positives.clamp_min(0)).masked_fill(positives < 0, -torch.inf)
    best = own.amax(1, keepdim=True)
    first = positives.masked_fill(own < best, scores.shape[1]).amin(1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < first
    ahead = (scores > best) | ((scores == best) & earlier)
    # a sum copies what it sums into integers of eight bytes: a few rows at a time
    return torch.cat([rows.sum(1) for rows in ahead.split(SUMMED)])
