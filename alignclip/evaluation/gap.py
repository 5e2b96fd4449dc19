"""How images and texts lie in the shared embedding space: alignment, the gap between them, uniformity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def modality_gap(image_features: Tensor, text_features: Tensor, block: int = 1024) -> dict[str, float]:
    """The modality gap of N image–text pairs; row i of both is pair i.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [N, d], on the same device.
        block: rows of a similarity matrix held at a time.

    Returns:
        - ``alignment_score``: mean cosine similarity of the pairs, in [−1, 1], 1 is best
          (AlignCLIP, https://arxiv.org/abs/2406.17639).
        - ``centroid_distance``: ‖mean image − mean text‖ on the unit sphere, in [0, 2], 0 is no gap
          (Liang et al. 2022, https://arxiv.org/abs/2203.02053).
        - ``centroid_angle``: the angle between the two means in degrees, in [0, 180]; NaN where a mean is zero.
        - ``uniformity_image``, ``uniformity_text``: log of the mean of exp(−2‖x − y‖²) over all x ≠ y of a modality,
          in [−8, 0], lower is more uniform (Wang & Isola 2020, https://arxiv.org/abs/2005.10242).
        - ``uniformity_cross``: the same between each image and the texts of the other pairs.

    Raises:
        ValueError: shapes that differ, fewer than two pairs, a block below 1, features that are not finite.
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"features must be two of [N, d], not {list(image_features.shape)} and {list(text_features.shape)}"
        )
    if len(image_features) < 2 or block < 1:
        raise ValueError(f"two pairs and a block of 1 at least, not {len(image_features)} and {block}")
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    with torch.autocast(images.device.type, enabled=False):
        image_mean, text_mean = images.double().mean(0), texts.double().mean(0)
        return {
            "alignment_score": (images.double() * texts.double()).sum(-1).mean().item(),
            "centroid_distance": (image_mean - text_mean).norm().item(),
            "centroid_angle": _angle(image_mean, text_mean),
            "uniformity_image": _uniformity(images, images, block),
            "uniformity_text": _uniformity(texts, texts, block),
            "uniformity_cross": _uniformity(images, texts, block),
        }


def _angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two vectors."""
    # atan2 of the half-angle form: acos loses half of the digits near 0, where a small gap is
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * torch.atan2((a - b).norm(), (a + b).norm()).item())


def _uniformity(x: Tensor, y: Tensor, block: int) -> float:
    """Log mean exp(−2‖x_i − y_j‖²) over i ≠ j, for unit vectors: there ‖x − y‖² = 2 − 2 x·y."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), block):
        kernel = (4 * (x[start : start + block] @ y.T - 1)).exp()
        kernel.diagonal(start).zero_()
        total += kernel.sum(dtype=torch.float64)
    return math.log(total.item() / (len(x) * (len(x) - 1)))
