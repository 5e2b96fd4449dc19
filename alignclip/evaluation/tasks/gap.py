"""Modality gap: how far apart do images and texts lie, and has the space collapsed?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric
from alignclip.evaluation.tasks import retrieval

if TYPE_CHECKING:
    from alignclip.evaluation.evaluator import Evaluator, TaskResult

COLUMN = "caption"
ONCE_CLOSED = " once the two means are moved together"
METRICS = {
    "alignment_score": Metric("higher", "mean cosine of pairs", chart="gap"),
    "wrong_pairs_cosine": Metric(
        "lower", "mean cosine of wrong pairs: each image with every other image's text"
    ),
    "margin": Metric(
        "higher",
        "alignment_score less wrong_pairs_cosine; near 0: pairs are no closer than others",
        watch=True,
        chart="gap",
    ),
    "alignment_std": Metric("neither", "spread of the pairs' cosines"),
    **{
        f"alignment_q{q}": Metric("higher", f"quantile {q} % of the pairs' cosines")
        for q in ("05", "50", "95")
    },
    "centroid_distance": Metric(
        "lower", "the modality gap: distance of the two means", watch=True, chart="gap"
    ),
    "centroid_angle": Metric("lower", "angle between the two means, in degrees"),
    "rmg": Metric(
        "lower", "relative modality gap: distance of pairs against distances within a modality"
    ),
    "linear_separability": Metric(
        "lower", "how well a plane tells images from texts; 0.5 is not at all"
    ),
    "uniformity_image": Metric("lower", "how evenly images fill the sphere"),
    "uniformity_text": Metric("lower", "how evenly texts fill the sphere"),
    "uniformity_cross": Metric("lower", "how evenly images lie around other images' texts"),
    "effective_rank_image": Metric(
        "higher", "axes that the images' variance is spread over; near 1: collapsed"
    ),
    "effective_rank_text": Metric(
        "higher", "axes that the texts' variance is spread over; near 1: collapsed"
    ),
    **retrieval.METRICS,
    **{
        f"closed_{name}": Metric("higher", metric.meaning + ONCE_CLOSED)
        for name, metric in retrieval.METRICS.items()
    },
}


@dataclass
class Settings:
    """The task has no keys of its own."""


def run(evaluator: Evaluator) -> TaskResult:
    """Measure the geometry of images and their first captions, and retrieval over all captions.

    Retrieval is measured as it is, since a gap may close by a collapse, and once more after the
    two means are moved together.
    """
    import torch

    from alignclip.evaluation.gap import modality_gap
    from alignclip.evaluation.geometry import close_gap
    from alignclip.evaluation.retrieval import recall, recall_chance

    images, texts, owner = evaluator.pairs()
    first = texts[torch.searchsorted(owner, torch.arange(len(images))).to(texts.device)]
    progress = evaluator.encoder.progress

    def closed(recalls: dict[str, float]) -> dict[str, float]:
        return {f"closed_{name}": value for name, value in recalls.items()}

    def compute() -> dict[str, float]:
        return {
            **modality_gap(images, first, progress=progress),
            **recall(images, texts, owner, progress=progress),
            **closed(recall(*close_gap(images, texts), owner, progress=progress)),
        }

    chance = recall_chance(owner)
    chance = {"linear_separability": 0.5, **chance, **closed(chance)}
    return evaluator.result(compute, chance, (images, first))
