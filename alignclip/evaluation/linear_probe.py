"""Linear probe: logistic regression on frozen image features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from alignclip.evaluation.packages import check_two_features, library
from alignclip.evaluation.ranking import best_ranks
from alignclip.evaluation.zero_shot import accuracy_of_ranks

# Numbers in the features. Of a smaller set's products, threads cost more than they bring, the more
# so where others use the cores
FEW_NUMBERS = 2**21
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
    max_iter: int = 1000,
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
        max_iter: iterations of a fit.
        progress: show a progress bar over the fits.

    Returns:
        The figures of :func:`alignclip.evaluation.zero_shot.accuracy` on the test set, and ``C``.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: shapes that don't fit, features not finite, fewer than two classes, a class with
            a single training sample, a test class that has none, a fraction or strengths out of
            range.
    """
    _check_targets_of_both(train_features, train_targets, test_features, test_targets)
    _check_options(validation_fraction, strengths)
    x, x_test = (_unit(one) for one in (train_features, test_features))
    mean = x.mean(dim=0)
    variance = (x - mean).square().mean().item() or 1.0  # all alike: there is nothing to scale
    x, x_test = ((one - mean) / variance**0.5 for one in (x, x_test))
    # targets as positions in the sorted classes, which is how scikit-learn orders its scores
    classes, y = train_targets.cpu().unique(return_inverse=True)
    y_test = torch.searchsorted(classes, test_targets.cpu())
    held_out = min(max(round(validation_fraction * len(y)), len(classes)), len(y) - len(classes))
    split = library("sklearn.model_selection").train_test_split(
        x.numpy(), y.numpy(), test_size=held_out, stratify=y.numpy(), random_state=seed
    )
    probe = library("sklearn.linear_model").LogisticRegression(max_iter=max_iter)
    fits = len(strengths) + 1
    with (
        library("threadpoolctl").threadpool_limits(1 if x.numel() < FEW_NUMBERS else None),
        tqdm(total=fits, desc="linear probe", unit="fit", disable=not progress) as bar,
    ):
        best = _best_strength(probe, split, sorted(strengths), variance, bar)
        probe.set_params(C=best * variance, warm_start=False).fit(x.numpy(), y.numpy())
        bar.update()
    scores = torch.as_tensor(probe.decision_function(x_test.numpy()))
    if len(classes) == 2:  # a single column, the second class's
        scores = torch.stack([-scores, scores], dim=1)
    found = accuracy_of_ranks(best_ranks(scores, y_test[:, None]), y_test, scores.argmax(1))
    return {**found, "C": best}


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.detach().double().cpu(), dim=-1)


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


def _check_options(fraction: float, strengths: Sequence[float]) -> None:
    if not 0 < fraction < 1 or not strengths or min(strengths) <= 0:
        found = f"{fraction} and {strengths}"
        raise ValueError(f"a fraction in (0, 1) and strengths above 0, not {found}")


def _check_targets_of_both(
    train_features: Tensor, train_targets: Tensor, test_features: Tensor, test_targets: Tensor
) -> None:
    check_two_features(train_features, test_features)
    for features, targets in ((train_features, train_targets), (test_features, test_targets)):
        if targets.shape != features.shape[:1] or targets.is_floating_point() or not len(targets):
            found = f"{targets.dtype} {list(targets.shape)}"
            raise ValueError(f"targets must be {len(features)} integers, not {found}")
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
