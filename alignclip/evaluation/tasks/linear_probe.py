"""Linear probe: how well does a linear classifier tell the classes by the image features alone?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric
from alignclip.config.schema import SetConfig
from alignclip.errors import UserError
from alignclip.evaluation.tasks import zero_shot

if TYPE_CHECKING:
    from alignclip.evaluation.evaluator import Evaluator, TaskResult

COLUMN = "label"
METRICS = zero_shot.METRICS | {"C": Metric("neither", "the strength chosen on a part of train")}


@dataclass
class Settings:
    """The keys of the task alone."""

    train: SetConfig  # what the classifier is fitted to


def prepare(evaluator: Evaluator) -> None:
    """See that the labels of both sets mean the same.

    Raises:
        UserError: the classes differ; says how.
    """
    train, test = evaluator.classes["train"][0], evaluator.classes[""][0]
    if train == test:
        return
    how = f"{len(train)} and {len(test)}"
    for label, (one, other) in enumerate(zip(train, test, strict=False)):
        if one != other:
            how = f"label {label} is '{one}' and '{other}'"
            break
    where = f"evaluators.{evaluator.name}"
    raise UserError(f"{where}: train and test set have different classes ({how})")


def run(evaluator: Evaluator) -> TaskResult:
    """Fit logistic regression to the training set's features, and measure it on the set's."""
    from alignclip.evaluation.linear_probe import linear_probe
    from alignclip.evaluation.zero_shot import accuracy_chance

    train, fitted = evaluator.labelled_images("train")
    test, targets = evaluator.labelled_images()
    return evaluator.result(
        lambda: linear_probe(train, fitted, test, targets, progress=evaluator.encoder.progress),
        accuracy_chance(targets),
    )
