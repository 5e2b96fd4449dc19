"""Zero-shot classification: a classifier made of prompts, and its accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.data.templates import fill_template
from alignclip.evaluation.ranking import best_ranks, score_blocks

Template = str | Callable[[str], str]


def build_classifier(
    encode: Callable[[list[str]], Tensor], classnames: Sequence[str], templates: Sequence[Template]
) -> Tensor:
    """Make one vector a class: the mean of its prompts' normalised features, normalised again.

    The same as open_clip's ``build_zero_shot_classifier`` (``open_clip/zero_shot_classifier.py``,
    after CLIP, https://arxiv.org/abs/2103.00020, section 3.1.4), but the prompts of all classes are
    encoded together. For a set with some of the classes, such as the 200 of ImageNet-A, pass
    ``classifier[subset]`` on: the scores are then restricted as that set's authors do it, and
    targets are positions in the subset.

    Args:
        encode: n texts -> [n, d] L2-normalised features,
            :meth:`alignclip.evaluation.encoding.Encoder.texts`.
        classnames: C names.
        templates: clip_benchmark's ``"a photo of a {c}."``, open_clip's ``"a photo of a {}."``, or
            callables.

    Returns:
        [C, d], L2-normalised rows in fp32, where the features are.

    Raises:
        UserError: a template without a place for the class name, or with another placeholder.
    """
    features = encode([_fill(template, name) for name in classnames for template in templates])
    return F.normalize(features.view(len(classnames), len(templates), -1).mean(1), dim=-1)


def _fill(template: Template, name: str) -> str:
    return fill_template(template, name) if isinstance(template, str) else template(name)


@torch.no_grad()
def accuracy(
    image_features: Tensor, classifier: Tensor, targets: Tensor, block: int = 1024
) -> dict[str, float]:
    """Measure zero-shot accuracy by cosine similarity, as clip_benchmark defines it.

    Source: https://github.com/LAION-AI/CLIP_benchmark, ``metrics/zeroshot_classification.py``. Ties
    follow the rule of :func:`alignclip.evaluation.ranking.best_ranks`: features that have all
    collapsed into one score chance.

    Args:
        image_features: [N, d], need not be normalised.
        classifier: [C, d], from :func:`build_classifier`, on the same device; need not be
            normalised.
        targets: [N] integers in [0, C).
        block: rows of the similarity matrix held at a time.

    Returns:
        In [0, 1]: ``acc1``; ``acc5``, the fraction of images whose class is among the five most
        similar, or among all where there are fewer (clip_benchmark: NaN);
        ``mean_per_class_recall``, the mean over the classes that occur in ``targets`` of the
        fraction of their images that ``acc1`` counts (scikit-learn's ``balanced_accuracy_score``);
        ``top_class_share``, the share of the images that get the class predicted most often: near
        1, the classifier has one answer for all.

    Raises:
        ValueError: a target out of range.
    """
    if targets.min() < 0 or targets.max() >= len(classifier):
        found = f"[{targets.min()}, {targets.max()}]"
        raise ValueError(f"targets lie in {found}, but there are {len(classifier)} classes")
    images, classes = (F.normalize(one.float(), dim=-1) for one in (image_features, classifier))
    targets = targets.to(images.device).long()
    ranks, predicted = [], []
    for scores, right in score_blocks(images, classes, targets[:, None], block):
        ranks.append(best_ranks(scores, right))
        predicted.append(scores.argmax(1))
    return accuracy_of_ranks(torch.cat(ranks), targets, torch.cat(predicted))


def accuracy_of_ranks(ranks: Tensor, targets: Tensor, predicted: Tensor) -> dict[str, float]:
    """Compute :func:`accuracy` of the targets' ranks, targets and first classes, [N] each."""
    # on the CPU: a weighted bincount on a GPU is not deterministic
    ranks, targets = ranks.cpu(), targets.cpu()
    right = (ranks == 0).double()
    samples = targets.bincount()
    recall = targets.bincount(weights=right)[samples > 0] / samples[samples > 0]
    return {
        "acc1": right.mean().item(),
        "acc5": (ranks < 5).double().mean().item(),
        "mean_per_class_recall": recall.mean().item(),
        "top_class_share": predicted.cpu().bincount().max().item() / len(predicted),
    }


def accuracy_chance(targets: Tensor) -> dict[str, float]:
    """Accuracies of a classifier that says the most frequent classes of every image.

    That is more than guessing among all classes gets, where the classes are not of one size.

    Args:
        targets: [N] integers ≥ 0.

    Returns:
        In [0, 1]: ``acc1``, ``acc5``, ``mean_per_class_recall``; ``top_class_share``, the true
        share of that class.
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
