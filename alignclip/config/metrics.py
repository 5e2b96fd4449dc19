"""What an evaluation measures: the metrics of each task, which way each is better, and which ones to watch.

The one table of metrics: the printed table's arrows, ``results.json``, ``keep_best`` and the plots all ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neither"]
ARROWS: dict[Better, str] = {"higher": "↑", "lower": "↓", "neither": " "}
MODES: dict[Better, str | None] = {
    "higher": "max",
    "lower": "min",
    "neither": None,
}  # of ``keep_best``


@dataclass(frozen=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        better: which way is better; ``neither`` where the figure describes and doesn't judge.
        meaning: what the figure is, in a few words.
    """

    better: Better
    meaning: str


def _recalls(prefix: str = "", after: str = "") -> dict[str, Metric]:
    """Recall at 1, 5 and 10 in both directions."""
    directions = {"image": "texts whose image", "text": "images one of whose texts"}
    return {
        f"{prefix}{found}_retrieval_recall@{k}": Metric(
            "higher", f"{whose} is among the {k} nearest{after}"
        )
        for found, whose in directions.items()
        for k in (1, 5, 10)
    }


_ACCURACY = {
    "acc1": Metric("higher", "images whose class comes first"),
    "acc5": Metric("higher", "images whose class is among the first five"),
    "mean_per_class_recall": Metric("higher", "acc1, each class counting alike"),
}
_PREDICTED = {
    "top_class_share": Metric("neither", "images that get the class predicted most often")
}
_GEOMETRY = {
    "alignment_score": Metric("higher", "mean cosine of pairs"),
    "wrong_pairs_cosine": Metric(
        "lower", "mean cosine of wrong pairs: each image with every other image's text"
    ),
    "margin": Metric(
        "higher", "alignment_score less wrong_pairs_cosine; near 0: pairs are no closer than others"
    ),
    "alignment_std": Metric("neither", "spread of the pairs' cosines"),
    **{
        f"alignment_q{q}": Metric("higher", f"quantile {q} % of the pairs' cosines")
        for q in ("05", "50", "95")
    },
    "centroid_distance": Metric("lower", "the modality gap: distance of the two means"),
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
}
TASKS: dict[str, dict[str, Metric]] = {
    "zero_shot": _ACCURACY | _PREDICTED,
    "out_of_distribution": {
        "auroc": Metric("higher", "how well confidence tells known classes from outliers"),
        "aupr": Metric("higher", "average precision of finding the outliers"),
        "fpr95": Metric(
            "lower", "known images taken for outliers where 95 % of the outliers are found"
        ),
        **_ACCURACY,
        **_PREDICTED,
    },
    "linear_probe": {
        **_ACCURACY,
        **_PREDICTED,
        "C": Metric("neither", "the strength chosen on a part of train"),
    },
    "retrieval": _recalls(),
    "gap": {
        **_GEOMETRY,
        **_recalls(),
        **_recalls("closed_", " once the two means are moved together"),
    },
    "sts": {"spearman": Metric("higher", "rank correlation with people's scores")},
}
ALL: dict[str, Metric] = {
    name: metric for metrics in TASKS.values() for name, metric in metrics.items()
}
# The figures that tell whether a model works; the others say how.
WATCH = frozenset({
    "margin", "centroid_distance", "image_retrieval_recall@5", "text_retrieval_recall@5", "mean_per_class_recall",
    "auroc", "spearman",
})  # fmt: skip


def better(name: str) -> Better:
    """Which way a metric is better; ``neither`` for one that is not known here."""
    return ALL[name].better if name in ALL else "neither"
