"""What features that say nothing would score: the number that each metric has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_chance(image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall@k of a ranking that is drawn at random, for :func:`alignclip.evaluation.retrieval.recall`.

    Args:
        image_of_text: [M] integers, the row of the image that a text belongs to.
        ks: the cut-offs.

    Returns:
        ``image_retrieval_recall@k`` and ``text_retrieval_recall@k`` for each k, in [0, 1].
    """
    texts_of_image = image_of_text.cpu().bincount()
    texts_of_image = texts_of_image[texts_of_image > 0].double()
    images, texts = len(texts_of_image), len(image_of_text)
    chance = {f"image_retrieval_recall@{k}": min(k, images) / images for k in ks}
    for k in ks:
        # none of k texts drawn without replacement is one of the image's
        missed = torch.ones_like(texts_of_image)
        for drawn in range(min(k, texts)):
            missed *= ((texts - texts_of_image - drawn) / (texts - drawn)).clamp(min=0)
        chance[f"text_retrieval_recall@{k}"] = (1 - missed).mean().item()
    return chance


def accuracy_chance(targets: Tensor) -> dict[str, float]:
    """Accuracies of a classifier that says the most frequent classes of every image.

    That is more than guessing among all classes gets, where the classes are not of one size.

    Args:
        targets: [N] integers ≥ 0.

    Returns:
        In [0, 1]: ``acc1``, ``acc5``, ``mean_per_class_recall``; ``top_class_share``, the true share of that class.
    """
    counts = targets.cpu().bincount()
    shares = counts[counts > 0].double().sort(descending=True).values / len(targets)
    top = shares[0].item()
    return {
        "acc1": top,
        "acc5": shares[:5].sum().item(),
        "mean_per_class_recall": 1 / len(shares),
        "top_class_share": top,
    }


def detection_chance(known: int, outliers: int) -> dict[str, float]:
    """Of a confidence that is the same, or drawn at random, for ``known`` images and ``outliers``."""
    return {"auroc": 0.5, "aupr": outliers / (known + outliers), "fpr95": 0.95}
