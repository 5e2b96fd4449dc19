"""Out-of-distribution detection by the confidence of a zero-shot classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.evaluation.packages import library


@torch.no_grad()
def max_softmax(
    image_features: Tensor, classifier: Tensor, logit_scale: Tensor | float, block: int = 1024
) -> Tensor:
    """Compute the maximum softmax probability of each image: the confidence in its class.

    Source: Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136.

    Args:
        image_features: [N, d], need not be normalised.
        classifier: [C, d], from :func:`alignclip.evaluation.zero_shot.build_classifier`, on the
            same device.
        logit_scale: the exponentiated scale, a number, [] or [1].
        block: rows of logits held at a time.

    Returns:
        [N] probabilities in (0, 1], in fp64: in fp32, all that are above 1 − 6e-8 would be tied.
    """
    images = F.normalize(image_features.double(), dim=-1)
    classes = F.normalize(classifier.double(), dim=-1) * logit_scale
    with torch.autocast(images.device.type, enabled=False):
        blocks = [(rows @ classes.T).softmax(1).amax(1) for rows in images.split(block)]
    return torch.cat(blocks)


def out_of_distribution(in_scores: Tensor, out_scores: Tensor) -> dict[str, float]:
    """Measure how well a confidence tells samples of unknown classes (out) from known ones (in).

    The positive class is *out*, detected by a low confidence, as for ImageNet-O
    (https://arxiv.org/abs/1907.07174, code: https://github.com/hendrycks/natural-adv-examples,
    ``get_measures(-confidence_out, -confidence_in)``). Its published figures take the softmax over,
    and the *in* images from, the 200 classes that ImageNet-O is made for.

    Args:
        in_scores: [N], e.g. :func:`max_softmax` of images with known classes.
        out_scores: [M], of images with unknown classes.

    Returns:
        - ``auroc``: the probability that an *out* sample has a lower confidence than an *in*
          sample, ties counting half, in [0, 1]; 0.5 is chance; the same whichever class is
          positive.
        - ``aupr``: average precision of detecting *out*, in [0, 1]; chance is M / (N + M).
        - ``fpr95``: the fraction of *in* samples that are taken for *out* at the strictest
          threshold that finds at least 95 % of *out*, in [0, 1], 0 is best (the code above: at the
          recall nearest to 95 %).

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: one of the two has no samples.
    """
    if not len(in_scores) or not len(out_scores):
        raise ValueError(f"{len(in_scores)} images of known classes, {len(out_scores)} outliers")
    scores = -torch.cat([in_scores, out_scores]).double().cpu()
    metrics, is_out = library("sklearn.metrics"), torch.arange(len(scores)) >= len(in_scores)
    # with drop_intermediate, the first threshold beyond 95 % could be one of those left out
    false_positives, true_positives, _ = metrics.roc_curve(is_out, scores, drop_intermediate=False)
    return {
        "auroc": float(metrics.roc_auc_score(is_out, scores)),
        "aupr": float(metrics.average_precision_score(is_out, scores)),
        "fpr95": float(false_positives[true_positives >= 0.95].min()),
    }


def detection_chance(known: int, outliers: int) -> dict[str, float]:
    """Return the figures of a confidence that is the same, or drawn at random, for all images.

    Args:
        known: images of known classes.
        outliers: images of unknown classes.
    """
    return {"auroc": 0.5, "aupr": outliers / (known + outliers), "fpr95": 0.95}
