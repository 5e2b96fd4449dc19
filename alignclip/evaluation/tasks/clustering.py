"""Clustering: do k-means clusters of images, and of images with texts, match the classes?

A gap between the modalities leaves the ranking of neighbours nearly as it is, and splits clusters
of both modalities in two: clustering gains from a small gap where retrieval does not (Grassucci et
al. 2026, https://arxiv.org/abs/2601.18525). The protocol is the one of their code,
``compute_clustering_metrics`` in ``metrics.py`` of https://github.com/ispamm/ModGap: scikit-learn's
k-means over images and texts stacked, a text for each image, both with the image's label; V-measure
and adjusted Rand index against the labels. Three differences: the text is the mean of the class's
prompts (their caption says more than the class), there are as many clusters as classes (they: 10),
and the best of ``n_init`` starts counts (they: one).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric
from alignclip.config.setting import setting

if TYPE_CHECKING:
    from torch import Tensor

    from alignclip.evaluation.evaluator import Evaluator, TaskResult

COLUMN = "label"
METRICS = {
    "v_measure": Metric(
        "higher", "V-measure of clusters of images against their classes", chart="score"
    ),
    "ari": Metric("higher", "adjusted Rand index of the same clusters"),
    "v_measure_with_texts": Metric(
        "higher",
        "V-measure of clusters of images and their classes' texts",
        watch=True,
        chart="score",
    ),
    "ari_with_texts": Metric("higher", "adjusted Rand index of the same clusters"),
}


@dataclass
class Settings:
    """The keys of the task alone, as scikit-learn's ``KMeans`` names them."""

    n_init: int = setting(10, at_least=1)  # k-means runs, of which the tightest counts
    random_state: int = setting(0, at_least=0)


def run(evaluator: Evaluator) -> TaskResult:
    """Cluster the images, and the images together with the text of each one's class."""
    import torch

    texts = evaluator.classifier()
    images, labels = evaluator.labelled_images()
    settings: Settings = evaluator.settings

    def compute() -> dict[str, float]:
        both = torch.cat([images, texts[labels.to(texts.device)]])
        together = cluster(both, labels.repeat(2), settings)
        return cluster(images, labels, settings) | {
            f"{name}_with_texts": value for name, value in together.items()
        }

    return evaluator.result(compute, clustering_chance(labels))


def cluster(features: Tensor, labels: Tensor, settings: Settings) -> dict[str, float]:
    """Cluster features by k-means into as many clusters as there are labels, and compare the two.

    Args:
        features: [N, d].
        labels: [N] integers.
        settings: of k-means.

    Returns:
        ``v_measure`` in [0, 1] and ``ari`` in [−0.5, 1], 1 where clusters are the classes.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: features that are not finite.
    """
    from alignclip.evaluation.packages import library

    count = len(labels.unique())
    k_means = library("sklearn.cluster").KMeans(
        count, n_init=settings.n_init, random_state=settings.random_state
    )
    clusters = k_means.fit_predict(features.double().cpu().numpy())
    metrics, classes = library("sklearn.metrics"), labels.cpu().numpy()
    return {
        "v_measure": float(metrics.v_measure_score(classes, clusters)),
        "ari": float(metrics.adjusted_rand_score(classes, clusters)),
    }


def clustering_chance(labels: Tensor) -> dict[str, float]:
    """Return what clusters drawn at random score, as large as the classes.

    The adjusted Rand index is 0 then by its definition. V-measure is above 0, the more so the
    smaller the classes are; a draw with a fixed seed says how much.
    """
    import torch

    from alignclip.evaluation.packages import library

    chance: dict[str, float] = {}
    for name, targets in (("", labels), ("_with_texts", labels.repeat(2))):
        drawn = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]
        v_measure = library("sklearn.metrics").v_measure_score(targets.numpy(), drawn.numpy())
        chance |= {f"v_measure{name}": float(v_measure), f"ari{name}": 0.0}
    return chance
