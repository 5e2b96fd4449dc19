"""Retrieval: does an image find its texts, and a text its image?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric

if TYPE_CHECKING:
    from alignclip.evaluation.evaluator import Evaluator, TaskResult

COLUMN = "caption"
FOUND = {"image": "texts whose image", "text": "images one of whose texts"}
METRICS = {
    f"{found}_retrieval_recall@{k}": Metric(
        "higher",
        f"{whose} is among the {k} nearest",
        watch=k == 5,
        chart="score" if k == 5 else None,
    )
    for found, whose in FOUND.items()
    for k in (1, 5, 10)
}


@dataclass
class Settings:
    """The task has no keys of its own."""


def run(evaluator: Evaluator) -> TaskResult:
    """Rank all texts for each image, and all images for each text."""
    from alignclip.evaluation.retrieval import recall, recall_chance

    images, texts, owner = evaluator.pairs()
    return evaluator.result(
        lambda: recall(images, texts, owner, progress=evaluator.encoder.progress),
        recall_chance(owner),
    )
