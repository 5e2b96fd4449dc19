"""CLIP's contrastive loss (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alignclip.losses.features import GlobalFeatures
from alignclip.losses.precision import matmul_transposed
from alignclip.losses.tiles import IMAGE, TEXT, needs_tiles, tiled_cross_entropy


def contrastive_loss(features: GlobalFeatures) -> Tensor:
    """Compute ½ [CE(s · v tᵀ) + CE(s · t vᵀ)] of this rank's rows: a scalar []."""
    if needs_tiles(features):
        return tiled_cross_entropy(features, [(IMAGE, TEXT)])
    image, text, own = features.scaled_image, features.scaled_text, features.own
    return (
        F.cross_entropy(matmul_transposed(image, features.all_text), own)
        + F.cross_entropy(matmul_transposed(text, features.all_image), own)
    ) / 2
