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
        own: ``[n, e]``, of this rank's captions.
        everyone: ``[N, e]``, of all ranks' captions.
    """

    own: Tensor
    everyone: Tensor

    def dissimilarity(self, rows: slice = slice(None)) -> Tensor:
        """Compute 1 − S for some of this rank's rows: ``[rows, N]``.

        S are the cosine similarities of the rows' captions with all captions.
        """
        return (self.own[rows] @ self.everyone.T).neg_().add_(1)


@torch.no_grad()
def gather_captions(semantic: Tensor, group: dist.ProcessGroup | None) -> CaptionFeatures:
    """Gather the ``[n, e]`` sentence embeddings of all ranks, normalised."""
    own = F.normalize(semantic, dim=1)
    return CaptionFeatures(own, gather(own, group).flatten(0, 1))
