"""The captions' sentence embeddings, by which the separation loss weighs similarities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alignclip.ranks import gather


@dataclass(frozen=True)
class CaptionFeatures:
    """Sentence embeddings of unit length.

    Attributes:
        everyone: ``[N, e]``, of all ranks' captions.
    """

    everyone: Tensor

    def dissimilarity(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Compute 1 − S, where S are cosine similarities of captions: ``[rows, columns]``."""
        return (self.everyone[rows] @ self.everyone[columns].T).neg_().add_(1)


@torch.no_grad()
def gather_captions(semantic: Tensor, group: dist.ProcessGroup | None) -> CaptionFeatures:
    """Gather the ``[n, e]`` sentence embeddings of all ranks, normalised."""
    return CaptionFeatures(gather(F.normalize(semantic, dim=1), group).flatten(0, 1))
