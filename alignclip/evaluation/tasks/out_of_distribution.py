"""Out-of-distribution detection: does the model trust images of unknown classes less?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric
from alignclip.config.schema import SetConfig
from alignclip.evaluation.tasks import zero_shot

if TYPE_CHECKING:
    from alignclip.evaluation.evaluator import Evaluator, TaskResult

COLUMN = "label"
METRICS = {
    "auroc": Metric(
        "higher",
        "how well confidence tells known classes from outliers",
        watch=True,
        chart="score",
    ),
    "aupr": Metric("higher", "average precision of finding the outliers"),
    "fpr95": Metric(
        "lower", "known images taken for outliers where 95 % of the outliers are found"
    ),
    **zero_shot.METRICS,
}


@dataclass
class Settings:
    """The keys of the task alone."""

    outliers: SetConfig  # images of other classes, e.g. ImageNet-O


def run(evaluator: Evaluator) -> TaskResult:
    """Measure known classes against unknown ones, and a classifier of the outliers' own labels.

    Where the outliers' classes are some of the set's, as ImageNet-O's are of ImageNet's, the set is
    cut down to these classes, as ImageNet-O's authors do it.
    """
    import torch

    from alignclip.evaluation.shift import detection_chance, max_softmax, out_of_distribution
    from alignclip.evaluation.zero_shot import accuracy, accuracy_chance

    classifier, own = evaluator.classifier(), evaluator.classifier("outliers")
    inside, labels = evaluator.labelled_images()
    outside, targets = evaluator.labelled_images("outliers")
    names, other = evaluator.classes[""][0], evaluator.classes["outliers"][0]
    if set(other) < set(names):
        kept = [names.index(name) for name in other]
        classifier = classifier[kept]
        inside = inside[torch.isin(labels, torch.tensor(kept)).to(inside.device)]
    scale = evaluator.encoder.logit_scale

    def compute() -> dict[str, float]:
        scores = [max_softmax(images, classifier, scale) for images in (inside, outside)]
        return out_of_distribution(*scores) | accuracy(outside, own, targets)

    chance = detection_chance(len(inside), len(outside)) | accuracy_chance(targets)
    return evaluator.result(compute, chance)
