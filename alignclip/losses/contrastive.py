"""CLIP's contrastive loss (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alignclip.losses.features import GlobalFeatures
from alignclip.losses.precision import matmul_transposed


def contrastive_loss(features: GlobalFeatures) -> Tensor:
    """Compute ½ [CE(s · v tᵀ) + CE(s · t vᵀ)] of this rank's rows: a scalar []."""
    own = features.own
    return (
        F.cross_entropy(matmul_transposed(features.scaled_image, features.all_text), own)
        + F.cross_entropy(matmul_transposed(features.scaled_text, features.all_image), own)
    ) / 2
