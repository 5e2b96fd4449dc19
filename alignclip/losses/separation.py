"""AlignCLIP's separation loss (https://arxiv.org/abs/2406.17639, section 4.2)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from alignclip.losses.features import GlobalFeatures, gather_without_gradient
from alignclip.losses.precision import matmul_transposed


def separation_loss(
    features: GlobalFeatures,
    dissimilarity: Tensor | None,
    separate_image: bool,
    separate_text: bool,
) -> Tensor:
    """Compute L_sep of this rank's rows: a scalar [].

    Args:
        features: of the global batch.
        dissimilarity: 1 − S, ``[n, N]``. None: the similarities are not weighted, and each sample's
            positive is the sample itself.
        separate_image: whether images are pushed apart.
        separate_text: whether texts are pushed apart.
    """
    positives = (
        None if dissimilarity is None else (features.scaled_image * features.text).sum(dim=1)
    )
    loss = features.image.new_zeros(())
    sides = [
        (separate_image, features.scaled_image, features.all_image),
        (separate_text, features.scaled_text, features.all_text),
    ]
    for is_separated, scaled, everyone in sides:
        if not is_separated:
            continue
        logits = matmul_transposed(scaled, everyone)
        if dissimilarity is not None and positives is not None:
            # in place: nothing upstream saved the product; the weights are the only further matrix
            logits.mul_(dissimilarity)
            logits[torch.arange(len(scaled), device=scaled.device), features.own] = positives
        loss = loss + F.cross_entropy(logits, features.own) / 2
    return loss


@torch.no_grad()
def caption_dissimilarity(semantic: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Compute 1 − S from this rank's ``[n, e]`` sentence embeddings, of any length: ``[n, N]``.

    S are the cosine similarities of the rank's captions with all captions.
    """
    semantic = F.normalize(semantic, dim=1).contiguous()
    return (semantic @ gather_without_gradient(semantic, group).T).neg_().add_(1)
