"""Zero-shot classification: is the prompt of an image's class the nearest prompt?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric

if TYPE_CHECKING:
    from alignclip.evaluation.evaluator import Evaluator, TaskResult

COLUMN = "label"
METRICS = {
    "acc1": Metric("higher", "images whose class comes first", chart="score"),
    "acc5": Metric("higher", "images whose class is among the first five"),
    "mean_per_class_recall": Metric(
        "higher", "acc1, each class counting alike", watch=True, chart="score"
    ),
    "top_class_share": Metric("neither", "images that get the class predicted most often"),
}


@dataclass
class Settings:
    """The task has no keys of its own."""


def run(evaluator: Evaluator) -> TaskResult:
    """Compare the images with a classifier made of prompts."""
    from alignclip.evaluation.zero_shot import accuracy, accuracy_chance

    classifier = evaluator.classifier()
    images, targets = evaluator.labelled_images()
    return evaluator.result(lambda: accuracy(images, classifier, targets), accuracy_chance(targets))
