"""Out-of-distribution detection against definitions written out, ties included."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alignclip.evaluation.shift import max_softmax, out_of_distribution

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


def test_perfect_reversed_and_no_separation():
    low, high = torch.linspace(0.1, 0.3, 30), torch.linspace(0.6, 0.9, 50)
    assert out_of_distribution(high, low) == pytest.approx({"auroc": 1, "aupr": 1, "fpr95": 0})
    reverse = out_of_distribution(low, high)
    assert (reverse["auroc"], reverse["fpr95"]) == (0, 1)
    same = torch.full((30,), 0.5)
    assert out_of_distribution(same, torch.full((10,), 0.5)) == {
        "auroc": 0.5,
        "aupr": 0.25,
        "fpr95": 1,
    }


def test_chance():
    generator = torch.Generator().manual_seed(0)
    found = out_of_distribution(
        torch.rand(3000, generator=generator), torch.rand(1000, generator=generator)
    )
    assert found == pytest.approx({"auroc": 0.5, "aupr": 0.25, "fpr95": 0.95}, abs=0.04)


def test_out_is_the_positive_class():
    inside, outside = torch.tensor([0.9, 0.8, 0.2, 0.7]), torch.tensor([0.1])
    assert out_of_distribution(inside, outside)["aupr"] == 1
    # one of three has less confidence than the single out sample: precision 1/2 where it is found
    assert out_of_distribution(inside, torch.tensor([0.3]))["aupr"] == 0.5
    assert out_of_distribution(inside, torch.tensor([0.3]))["auroc"] == 0.75


def test_nineteen_of_twenty_are_95_percent():
    inside = torch.tensor([0.5, 1.0])
    outside = torch.cat([torch.linspace(0.1, 0.4, 19), torch.tensor([0.9])])
    assert out_of_distribution(inside, outside)["fpr95"] == 0
    # 18 of 19 are not
    assert out_of_distribution(inside, outside[1:])["fpr95"] == 0.5
    # a threshold within a straight part of the ROC curve counts, too
    same = torch.linspace(0, 1, 40)
    assert out_of_distribution(same, same)["fpr95"] == 0.95


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_max_softmax_is_the_largest_probability(block):
    generator = torch.Generator().manual_seed(0)
    images, classes = (
        torch.randn(20, 6, generator=generator),
        torch.randn(9, 6, generator=generator),
    )
    logits = 12.5 * F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).T
    expected = np.exp(logits.numpy().max(1)) / np.exp(logits.numpy()).sum(1)
    for scale in (12.5, torch.tensor(12.5), torch.tensor([12.5])):
        found = max_softmax(images, classes, scale, block=block)
        assert found.shape == (20,)
        assert found.numpy() == pytest.approx(expected, rel=1e-5)


def test_high_confidences_are_not_tied():
    angle = torch.linspace(-0.1, 0, 50)
    images = torch.stack([angle.cos(), angle.sin()], dim=1)
    confidence = max_softmax(images, torch.tensor([[1.0, 0.0], [0.8, 0.6]]), 100)
    assert (confidence > 1 - 6e-8).all()
    assert (confidence.diff() < 0).all()


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.ones(3, 2), torch.ones(3), "scores must be"),
        (torch.ones(3), torch.ones(0), "scores must be"),
        (torch.ones(0), torch.ones(3), "scores must be"),
        (torch.ones(3), torch.ones(3) * torch.nan, "NaN"),
    ],
)
def test_bad_scores_are_errors(inside, outside, message):
    with pytest.raises(ValueError, match=message):
        out_of_distribution(inside, outside)


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (torch.ones(3, 2), torch.ones(3, 4), "features must be"),
        (torch.ones(3), torch.ones(3), "features must be"),
        (torch.ones(3, 2), torch.ones(0, 2), "some classes"),
        (torch.ones(3, 2) * torch.inf, torch.ones(3, 2), "NaN or infinity"),
    ],
)
def test_bad_features_are_errors(images, classes, message):
    with pytest.raises(ValueError, match=message):
        max_softmax(images, classes, 100)
