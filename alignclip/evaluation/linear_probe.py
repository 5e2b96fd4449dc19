"""Linear probe: logistic regression on frozen image features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from alignclip.evaluation.packages import library
from alignclip.evaluation.ranking import best_ranks
from alignclip.evaluation.zero_shot import accuracy_of_ranks

# Numbers in the features. Of a smaller set's products, threads cost more than they bring, the more
# so where others use the cores
FEW_NUMBERS = 2**21
MOST_ITERATIONS = 1000  # of a fit
STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 7))


def linear_probe(
    train_features: Tensor,
    train_targets: Tensor,
    test_features: Tensor,
    test_targets: Tensor,
    *,
    seed: int = 0,
    validation_fraction: float = 0.1,
    strengths: Sequence[float] = STRENGTHS,
    progress: bool = True,
) -> dict[str, float]:
    """Fit L2-regularised logistic regression on training features, and measure it on test features.

    The protocol of CLIP (https://arxiv.org/abs/2103.00020, appendix A.3): scikit-learn's L-BFGS
    with up to 1,000 iterations; the strength with the best accuracy on a held-out, stratified part
    of the training set, of equal ones the strongest regularisation; then a fit to the whole
    training set. Two differences: the grid has one value a decade (CLIP: eight, around the peak),
    and features are normalised, as in clip_benchmark. They are centred and scaled, and C with them:
    the same problem (the intercept bears no penalty), but one that L-BFGS solves for the features
    of a collapsed model, too, all of which point one way. Needs 16·N·d bytes.

    Args:
        train_features: [N, d], need not be normalised.
        train_targets: [N] integers; any labels, they need not be consecutive.
        test_features: [M, d].
        test_targets: [M] integers, among the training set's.
        seed: of the split into training and validation part.
        validation_fraction: the part held out, in (0, 1); at least one sample a class in number.
        strengths: values of C to try: the weight of the loss, summed over samples, against
            ½‖weights‖².
        progress: show a progress bar over the fits.

    Returns:
        The figures of :func:`alignclip.evaluation.zero_shot.accuracy` on the test set, and ``C``.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: fewer than two classes, a class with a single training sample, a test class that
            has none.
    """
    _check_classes(train_targets, test_targets)
    x, x_test, variance = _scaled(train_features, test_features)
    # targets as positions in the sorted classes, which is how scikit-learn orders its scores
    classes, y = train_targets.cpu().unique(return_inverse=True)
    y_test = torch.searchsorted(classes, test_targets.cpu())
    held_out = min(max(round(validation_fraction * len(y)), len(classes)), len(y) - len(classes))
    split = library("sklearn.model_selection").train_test_split(
        x.numpy(), y.numpy(), test_size=held_out, stratify=y.numpy(), random_state=seed
    )
    probe = library("sklearn.linear_model").LogisticRegression(max_iter=MOST_ITERATIONS)
    fits, threads = len(strengths) + 1, 1 if x.numel() < FEW_NUMBERS else None
    with (
        library("threadpoolctl").threadpool_limits(threads),
        tqdm(total=fits, desc="linear probe", unit="fit", disable=not progress) as bar,
    ):
        best = _best_strength(probe, split, sorted(strengths), variance, bar)
        probe.set_params(C=best * variance, warm_start=False).fit(x.numpy(), y.numpy())
        bar.update()
    return {**_accuracy(probe, x_test, y_test), "C": best}


def _scaled(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor, float]:
    """Normalise features, centre and scale them by the training set's, and return its variance."""
    x, x_test = (F.normalize(one.detach().double().cpu(), dim=-1) for one in (train, test))
    mean = x.mean(dim=0)
    variance = (x - mean).square().mean().item() or 1.0  # all alike: there is nothing to scale
    return (x - mean) / variance**0.5, (x_test - mean) / variance**0.5, variance


def _best_strength(
    probe: Any, split: Any, strengths: Sequence[float], variance: float, bar: tqdm
) -> float:
    """Return the strength that is best on the held-out part; of equal ones the strongest.

    Args:
        probe: scikit-learn's regression.
        split: features to fit and held out, and targets to fit and held out.
        strengths: values of C in ascending order.
        variance: of the features before they were scaled, which C is scaled with.
        bar: gets a step for each fit.
    """
    x_fit, x_held, y_fit, y_held = split
    accuracies = []
    probe.set_params(warm_start=True)  # each fit starts at the last solution
    for strength in strengths:
        with warnings.catch_warnings():
            # the weakest regularisations need not converge; only the final fit's warning matters
            warnings.simplefilter("ignore", library("sklearn.exceptions").ConvergenceWarning)
            probe.set_params(C=strength * variance).fit(x_fit, y_fit)
        accuracies.append(float(probe.score(x_held, y_held)))
        bar.set_postfix(C=f"{strength:g}", held_out_acc1=f"{accuracies[-1]:.4f}")
        bar.update()
    return strengths[accuracies.index(max(accuracies))]


def _accuracy(probe: Any, features: Tensor, targets: Tensor) -> dict[str, float]:
    """Measure a fitted probe; targets are positions in its classes."""
    scores = torch.as_tensor(probe.decision_function(features.numpy()))
    if scores.ndim == 1:  # of two classes, the second one's
        scores = torch.stack([-scores, scores], dim=1)
    return accuracy_of_ranks(best_ranks(scores, targets[:, None]), targets, scores.argmax(1))


def _check_classes(train_targets: Tensor, test_targets: Tensor) -> None:
    classes, counts = train_targets.cpu().unique(return_counts=True)
    if len(classes) < 2:
        raise ValueError("the training set has a single class")
    if len(single := classes[counts == 1]):
        some = f"{single[:5].tolist()}{' …' if len(single) > 5 else ''}"
        raise ValueError(
            f"{len(single)} of {len(classes)} classes have a single training sample, which can't "
            f"be both fitted and held out: {some}"
        )
    unknown = sorted(set(test_targets.tolist()) - set(classes.tolist()))
    if unknown:
        raise ValueError(
            f"{len(unknown)} classes of the test set are not in the training set: {unknown[:5]}"
        )
