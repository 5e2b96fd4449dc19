"""AlignCLIP's separation loss (https://arxiv.org/abs/2406.17639, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.losses.captions import CaptionFeatures
from alignclip.losses.features import GlobalFeatures
from alignclip.losses.precision import matmul_transposed
from alignclip.losses.tiles import IMAGE, TEXT, needs_tiles, tiled_cross_entropy


def separation_loss(
    features: GlobalFeatures,
    captions: CaptionFeatures | None,
    separate_image: bool,
    separate_text: bool,
) -> Tensor:
    """Compute L_sep of this rank's rows: a scalar [].

    Args:
        features: of the global batch.
        captions: of the global batch, for the weights 1 − S. None: the similarities are not
            weighted, and each sample's positive is the sample itself.
        separate_image: whether images are pushed apart.
        separate_text: whether texts are pushed apart.
    """
    separated = [side for side, on in ((IMAGE, separate_image), (TEXT, separate_text)) if on]
    if needs_tiles(features):
        return tiled_cross_entropy(features, [(side, side) for side in separated], captions)
    dissimilarity = positives = None
    if captions is not None:
        dissimilarity = captions.dissimilarity(features.rows)
        positives = (features.scaled_image * features.text).sum(dim=1)
    loss = features.image.new_zeros(())
    for side in separated:
        scaled = (features.scaled_image, features.scaled_text)[side]
        logits = matmul_transposed(scaled, (features.all_image, features.all_text)[side])
        if dissimilarity is not None and positives is not None:
            # in place: nothing upstream saved the product; the weights are the only further matrix
            logits.mul_(dissimilarity)
            logits[torch.arange(len(scaled), device=scaled.device), features.own] = positives
        loss = loss + F.cross_entropy(logits, features.own) / 2
    return loss
