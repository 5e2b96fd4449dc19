"""The modality gap in figures: alignment, distance, uniformity, rank."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from alignclip.evaluation.geometry import (
    NO_VARIANCE,
    effective_rank,
    linear_separability,
    unit_pairs,
    wrong_pairs_cosine,
)


@torch.no_grad()
def modality_gap(
    image_features: Tensor,
    text_features: Tensor,
    block: int = 1024,
    separability: bool = True,
    progress: bool = False,
) -> dict[str, float]:
    """Measure the modality gap of N image–text pairs; row i of both is pair i.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [N, d], on the same device.
        block: rows of a similarity matrix held at a time.
        separability: whether to fit the classifier of ``linear_separability``, which needs
            scikit-learn.
        progress: show a bar for each uniformity, which takes N² similarities.

    Returns:
        - ``alignment_score``: mean cosine similarity of the pairs, in [−1, 1], 1 is best
          (AlignCLIP, https://arxiv.org/abs/2406.17639); ``alignment_std`` and ``alignment_q05``,
          ``q50``, ``q95``: its distribution over the pairs, standard deviation and quantiles. Alone
          it proves nothing: features that have all collapsed into one point have 1.
        - ``wrong_pairs_cosine``: mean cosine of all N (N − 1) wrong pairs, each image with every
          other image's text, in [−1, 1]; ``margin``: ``alignment_score`` less that, in [−2, 2].
          Near 0 pairs are no closer than wrong ones.
        - ``centroid_distance``: ‖mean image − mean text‖ on the unit sphere, in [0, 2], 0 is no gap
          (Liang et al. 2022, https://arxiv.org/abs/2203.02053).
        - ``centroid_angle``: the angle between the two means in degrees, in [0, 180]; NaN where a
          mean is zero.
        - ``uniformity_image``, ``uniformity_text``: log of the mean of exp(−2‖x − y‖²) over all x ≠
          y of a modality, in [−8, 0], lower is more uniform (Wang & Isola 2020,
          https://arxiv.org/abs/2005.10242).
        - ``uniformity_cross``: the same between each image and the texts of the other pairs.
        - ``rmg``: the relative modality gap, in [0, 1], 0 is no gap; NaN where all features are one
          point (Schrodi et al. 2025, https://arxiv.org/abs/2404.07983). Take one caption an image:
          copies of an image would count as distances of 0 within a modality.
        - ``effective_rank_image``, ``effective_rank_text``: how many axes a modality's variance is
          spread over, in [1, min(d, N − 1)], :func:`alignclip.evaluation.geometry.effective_rank`.
        - ``linear_separability``: how well a plane tells images from texts, in [0, 1], 0.5 is not
          at all, :func:`alignclip.evaluation.geometry.linear_separability`.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: fewer than two pairs.
    """
    images, texts = unit_pairs(image_features, text_features)
    with torch.autocast(images.device.type, enabled=False):
        gap = {
            **pair_figures(images, texts),
            **_uniformities(images.float(), texts.float(), block, progress),
            "rmg": _relative_modality_gap(images, texts),
            "effective_rank_image": effective_rank(images),
            "effective_rank_text": effective_rank(texts),
        }
    if separability:
        gap["linear_separability"] = linear_separability(images, texts)
    return gap


def pair_figures(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Measure the cosines of pairs of unit vectors, and the distance of the two means."""
    image_mean, text_mean = images.mean(0), texts.mean(0)
    cosines = (images * texts).sum(-1)
    of_pairs = cosines.cpu().numpy()  # torch.quantile takes 16 million values at the most
    mean, wrong = cosines.mean(), wrong_pairs_cosine(images, texts)
    return {
        "alignment_score": mean.item(),
        "wrong_pairs_cosine": wrong.item(),
        "margin": (mean - wrong).item(),
        "alignment_std": cosines.std(correction=0).item(),
        **{f"alignment_q{q:02}": float(np.percentile(of_pairs, q)) for q in (5, 50, 95)},
        "centroid_distance": (image_mean - text_mean).norm().item(),
        "centroid_angle": _angle(image_mean, text_mean),
    }


def _uniformities(images: Tensor, texts: Tensor, block: int, progress: bool) -> dict[str, float]:
    """Measure within the modalities and across, in fp32: that is all a kernel's logarithm needs."""
    sides = {"image": (images, images), "text": (texts, texts), "cross": (images, texts)}
    return {
        f"uniformity_{name}": _uniformity(*side, block, progress) for name, side in sides.items()
    }


def _angle(a: Tensor, b: Tensor) -> float:
    """Return the degrees between two vectors."""
    # atan2 of the half-angle form: acos loses half of the digits near 0, where a small gap is
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * torch.atan2((a - b).norm(), (a + b).norm()).item())


def _uniformity(x: Tensor, y: Tensor, block: int, progress: bool) -> float:
    """Compute log mean exp(−2‖x_i − y_j‖²) over i ≠ j, where ‖x − y‖² = 2 − 2 x·y: unit vectors."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in tqdm(
        range(0, len(x), block), desc="uniformity", unit="block", leave=False, disable=not progress
    ):
        kernel = (4 * (x[start : start + block] @ y.T - 1)).exp()
        kernel.diagonal(start).zero_()
        total += kernel.sum(dtype=torch.float64)
    return math.log(total.item() / (len(x) * (len(x) - 1)))


def _relative_modality_gap(images: Tensor, texts: Tensor) -> float:
    """Relate the distance of pairs to itself plus the mean distance within a modality.

    Distances are d(x, y) = (1 − cos(x, y)) / 2.

    Source: Schrodi et al. 2025, https://arxiv.org/abs/2404.07983, and their code, ``compute_rmg``
    in ``analysis/gap_precompute.py`` of https://github.com/lmb-freiburg/two-effects-one-trigger.
    """

    def within(x: Tensor) -> Tensor:
        # Σ_{i≠j} x_i·x_j = ‖Σ x_i‖² − Σ ‖x_i‖², without the N×N matrix
        cosines = (x.sum(0).square().sum() - x.square().sum()) / (len(x) * (len(x) - 1))
        return ((1 - cosines) / 2).clamp(min=0)

    pairs = ((1 - (images * texts).sum(-1).mean()) / 2).clamp(min=0)
    total = pairs + (within(images) + within(texts)) / 2
    return (pairs / total).item() if total > NO_VARIANCE else math.nan
