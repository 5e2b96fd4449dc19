"""The features that a loss term reads: this rank's rows, and the columns of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor

from alignclip.ranks import rank, world_size


@dataclass(frozen=True)
class GlobalFeatures:
    """Features of a global batch of N pairs on W ranks, as one rank sees them; n = N/W.

    Each rank computes the loss of its own rows against all columns and takes the mean over its
    rows. The mean over ranks is then the loss of the global batch. The gather passes gradients
    back, so gradients averaged over ranks are those of one process with all N pairs.

    Attributes:
        image: ``[n, d]``, this rank's, L2-normalised.
        text: ``[n, d]``, this rank's, L2-normalised; row i belongs to row i of the images.
        all_image: ``[N, d]``, of all ranks.
        all_text: ``[N, d]``, of all ranks.
        scale: the logit scale s, ``[1]`` or ``[]``.
        rows: this rank's among all ranks' rows.
        own: ``[n]``, the column of each row's own sample.
        group: the ranks; the default group when None.
    """

    image: Tensor
    text: Tensor
    all_image: Tensor
    all_text: Tensor
    scale: Tensor
    rows: slice
    own: Tensor
    group: dist.ProcessGroup | None

    @cached_property
    def scaled_image(self) -> Tensor:
        """``[n, d]``, this rank's image features times the logit scale.

        Scaling features rather than similarities saves autograd an n × N matrix.
        """
        return self.scale * self.image

    @cached_property
    def scaled_text(self) -> Tensor:
        """``[n, d]``, this rank's text features times the logit scale."""
        return self.scale * self.text


def gather_features(
    image: Tensor, text: Tensor, scale: Tensor, group: dist.ProcessGroup | None
) -> GlobalFeatures:
    """Gather both modalities of all ranks in one collective that gradients flow back through."""
    all_image, all_text = image, text
    if world_size(group) > 1:
        # an explicit group: the collective's own default would be looked up at import time
        pairs = torch.cat(
            dist_nn.all_gather(torch.cat([image, text], dim=1), group or dist.group.WORLD)
        )
        all_image, all_text = pairs.tensor_split(2, dim=1)
    first = rank(group) * len(image)
    own = torch.arange(len(image), device=image.device) + first
    rows = slice(first, first + len(image))
    return GlobalFeatures(image, text, all_image, all_text, scale, rows, own, group)
