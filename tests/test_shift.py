"""Out-of-distribution detection against definitions written out, ties included."""

import numpy as np
import pytest
import torch
from evaluations import normal, unit

from alignclip.evaluation.shift import detection_chance, max_softmax, out_of_distribution

pytest.importorskip("sklearn.metrics")


def brute_force(inside, outside):
    """Every threshold in turn: what has at most that confidence is taken for out."""
    inside, outside = np.asarray(inside), np.asarray(outside)
    precision, recall, false_positives = [], [], []
    for threshold in np.unique(np.concatenate([inside, outside])):
        hits, errors = (outside <= threshold).sum(), (inside <= threshold).sum()
        precision.append(hits / (hits + errors))
        recall.append(hits / len(outside))
        false_positives.append(errors / len(inside))
    difference = inside[:, None] - outside
    return {
        "auroc": np.mean((difference > 0) + (difference == 0) / 2),
        "aupr": np.sum(np.diff(recall, prepend=0) * precision),
        "fpr95": min(f for f, r in zip(false_positives, recall, strict=True) if r >= 0.95),
    }


@pytest.mark.parametrize("levels", [3, 10, 10_000], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize(("n_in", "n_out"), [(50, 20), (13, 61), (1, 1), (100, 19)])
def test_equals_brute_force(levels, n_in, n_out):
    rng = np.random.default_rng(levels + n_in)
    inside = (rng.beta(4, 2, n_in) * levels).round() / levels
    outside = (rng.beta(2, 3, n_out) * levels).round() / levels
    found = out_of_distribution(torch.from_numpy(inside), torch.from_numpy(outside))
    assert found == pytest.approx(brute_force(inside, outside))


def test_nineteen_of_twenty_are_95_percent():
    inside = torch.tensor([0.5, 1.0])
    outside = torch.cat([torch.linspace(0.1, 0.4, 19), torch.tensor([0.9])])
    assert out_of_distribution(inside, outside)["fpr95"] == 0
    # 18 of 19 are not
    assert out_of_distribution(inside, outside[1:])["fpr95"] == 0.5
    # a threshold within a straight part of the ROC curve counts, too
    same = torch.linspace(0, 1, 40)
    assert out_of_distribution(same, same)["fpr95"] == 0.95


def test_chance_is_what_confidences_drawn_at_random_score():
    scores = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    found = out_of_distribution(scores[:3000], scores[3000:])
    assert found == pytest.approx(detection_chance(3000, 1000), abs=0.04)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_max_softmax_is_the_largest_probability(block):
    images, classes = normal(20, 6), normal(9, 6, seed=1)
    logits = 12.5 * unit(images) @ unit(classes).T
    expected = np.exp(logits.max(1)) / np.exp(logits).sum(1)
    for scale in (12.5, torch.tensor(12.5), torch.tensor([12.5])):
        found = max_softmax(images, classes, scale, block=block)
        assert found.numpy() == pytest.approx(expected, rel=1e-5)


def test_high_confidences_are_not_tied():
    angle = torch.linspace(-0.1, 0, 50)
    images = torch.stack([angle.cos(), angle.sin()], dim=1)
    confidence = max_softmax(images, torch.tensor([[1.0, 0.0], [0.8, 0.6]]), 100)
    assert (confidence > 1 - 6e-8).all()
    assert (confidence.diff() < 0).all()


@pytest.mark.parametrize(("inside", "outside"), [(3, 0), (0, 3)])
def test_no_images_are_an_error(inside, outside):
    with pytest.raises(ValueError, match=f"^{inside} images of known classes, {outside} outliers"):
        out_of_distribution(torch.ones(inside), torch.ones(outside))
