"""Sums of exponentials of logits, which neither overflow nor vanish."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from alignclip.ranks import gather


@dataclass(frozen=True)
class Sums:
    """Sums of exponentials, of each image and each text: total · exp(largest).

    Attributes:
        largest: ``[2, N]``, a row for images, and a row for texts.
        total: ``[2, N]``; 0 where nothing was added.
    """

    largest: Tensor
    total: Tensor

    def add(self, side: int, where: slice, logits: Tensor, dim: int) -> None:
        """Add a tile's exponentials along ``dim``."""
        before = self.largest[side, where]
        largest = torch.maximum(before, logits.amax(dim))
        added = (logits - largest.unsqueeze(dim)).exp_().sum(dim)
        self.total[side, where] = self.total[side, where] * (before - largest).exp_() + added
        self.largest[side, where] = largest

    def and_exp(self, logits: Tensor) -> Sums:
        """Compute the sums with one exponential more in each."""
        largest = torch.maximum(self.largest, logits)
        total = self.total * (self.largest - largest).exp_() + (logits - largest).exp_()
        return Sums(largest, total)

    def log_of_ratio(self, logits: Tensor) -> Tensor:
        """Compute the logarithms of the sums divided by exp(``logits``)."""
        return self.largest - logits + self.total.log()

    def softmax(self, side: int, where: slice, logits: Tensor, dim: int) -> Tensor:
        """Divide a tile's exponentials by the sums along ``dim``."""
        # not exp(logits − logarithm of the sum), whose rounding is alike in a whole row
        largest, total = (one[side, where].unsqueeze(dim) for one in (self.largest, self.total))
        return (logits - largest).exp_().mul_(total.reciprocal())

    def of_all_ranks(self, group: dist.ProcessGroup | None) -> Sums:
        """Add the sums of all ranks."""
        both = gather(torch.stack([self.largest, self.total]), group)
        largest_of_each, totals = both.unbind(dim=1)
        largest = largest_of_each.amax(dim=0)
        return Sums(largest, ((largest_of_each - largest).exp_() * totals).sum(dim=0))
