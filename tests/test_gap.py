"""The gap's figures on spaces whose answers are known, and against double loops."""

import math
import sys

import numpy as np
import pytest
import torch
from evaluations import normal, unit

from alignclip.errors import UserError
from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.geometry import (
    close_gap,
    effective_rank,
    linear_separability,
    pair_cosines,
    spectrum,
)
from alignclip.evaluation.retrieval import recall


def random_pairs(count=37, width=6):
    images, texts = normal(2, count, width)
    return images + 0.3, texts


def test_equal_modalities_have_no_gap():
    images, _ = random_pairs()
    gap = modality_gap(images, images)
    assert gap["alignment_score"] == pytest.approx(1)
    assert gap["centroid_distance"] == pytest.approx(0, abs=1e-12)
    assert gap["centroid_angle"] == pytest.approx(0, abs=1e-9)
    assert gap["uniformity_image"] == gap["uniformity_text"] == gap["uniformity_cross"]
    assert gap["rmg"] == pytest.approx(0, abs=1e-12)
    assert gap["linear_separability"] == 0.5
    assert gap["effective_rank_image"] == gap["effective_rank_text"]


def test_modalities_in_two_points():
    images, texts = torch.tensor([[1.0, 0.0]] * 5), torch.tensor([[0.0, 2.0]] * 5)
    gap = modality_gap(images, texts)
    assert gap["alignment_score"] == 0
    assert gap["centroid_distance"] == pytest.approx(math.sqrt(2))
    assert gap["centroid_angle"] == pytest.approx(90)
    assert gap["uniformity_image"] == pytest.approx(0, abs=1e-6)
    assert gap["uniformity_cross"] == pytest.approx(-4)  # exp(-2 · 2) everywhere
    assert gap["linear_separability"] == 1
    assert gap["rmg"] == pytest.approx(1)  # nothing within a modality
    assert gap["effective_rank_image"] == gap["effective_rank_text"] == 0
    assert math.isnan(modality_gap(images, images)["rmg"])
    assert modality_gap(images, -images)["centroid_angle"] == pytest.approx(180)
    assert modality_gap(images, -images)["uniformity_cross"] == pytest.approx(-8)


@pytest.mark.parametrize("block", [1, 10, 1024])
def test_equals_numpys_whole_matrices(block):
    images, texts = random_pairs()
    v, t = unit(images), unit(texts)
    wrong = ~np.eye(37, dtype=bool)

    def squares(x, y):  # of distances between each x and another pair's y
        return ((x[:, None] - y) ** 2).sum(-1)[wrong]

    def uniformity(x, y):
        return math.log(np.mean(np.exp(-2 * squares(x, y))))

    def within(x):
        return np.mean(squares(x, x)) / 4  # a cosine distance is half of the square, and rmg halves

    def rank(x):
        # singular values of the centred features: their squares are the covariance's eigenvalues
        shares = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
        shares = shares / shares.sum()
        return np.exp(-np.sum(shares * np.log(shares)))

    cosines, means = (v * t).sum(1), (v.mean(0), t.mean(0))
    pairs, apart = np.mean(1 - cosines) / 2, np.mean((v @ t.T)[wrong])
    cosine = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    expected = {
        "alignment_score": np.mean(cosines),
        "wrong_pairs_cosine": apart,
        "margin": np.mean(cosines) - apart,
        "alignment_std": np.std(cosines),
        **{f"alignment_q{q}": np.quantile(cosines, int(q) / 100) for q in ("05", "50", "95")},
        "centroid_distance": np.linalg.norm(means[0] - means[1]),
        "centroid_angle": math.degrees(math.acos(cosine)),
        "uniformity_image": uniformity(v, v),
        "uniformity_text": uniformity(t, t),
        "uniformity_cross": uniformity(v, t),
        "rmg": pairs / (pairs + (within(v) + within(t)) / 2),
        "effective_rank_image": rank(v),
        "effective_rank_text": rank(t),
    }
    assert abs(within(v) - within(t)) > 0.01
    found = modality_gap(images, texts, block=block, separability=False)
    assert found == pytest.approx(expected, rel=1e-5)
    # an angle that acos would lose
    direction, turned = (
        torch.tensor([[math.cos(a), math.sin(a)]] * 4, dtype=torch.double) for a in (0, 1e-4)
    )
    angle = modality_gap(direction, turned)["centroid_angle"]
    assert angle == pytest.approx(math.degrees(1e-4), rel=1e-3)


def test_one_point_but_for_rounding_is_one_point():
    lengths = torch.rand(30, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    point = lengths * torch.tensor([0.1, 0.7, -0.3])
    assert 0 < unit(point).var(0).sum() < 1e-12
    gap = modality_gap(point, point.flip(0))
    assert math.isnan(gap["rmg"])
    assert gap["effective_rank_image"] == 0


# --- can images and texts be told apart? ----------------------------------------------------------


def clouds(shift, count=300, width=16):
    """Pairs that differ by noise, and by a shift in one direction."""
    images = normal(count, width)
    texts = images + 0.3 * normal(count, width, seed=1)
    return images, texts + shift * torch.eye(width)[0]


def test_separability_grows_with_the_gap():
    found = [linear_separability(*clouds(shift)) for shift in (0, 1, 2, 20)]
    assert found[0] == pytest.approx(0.5, abs=0.08)
    assert found[0] < found[1] < found[2] < found[3]
    images, texts = clouds(6)
    assert linear_separability(images - 6 * torch.eye(16)[0], texts) == 1


def test_separability_is_of_pairs_the_classifier_has_not_seen():
    """In a space wider than there are pairs, a plane separates everything that it was fitted to."""
    images, texts = normal(2, 60, 200)
    assert linear_separability(images, texts) == pytest.approx(0.5, abs=0.15)
    # nor has it seen their partners: those of the same pair lie on the same side
    assert linear_separability(images, images + 0.01 * texts) == pytest.approx(0.5, abs=0.15)


def test_separability_equals_scikit_learns_pipeline_over_splits():
    """Its mean and spread over splits.

    In a space where the gap is in the axis of least variance.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scale = torch.tensor([0.01] + [1.0] * 15)
    images, texts = (features * scale for features in clouds(1.5))
    v, t = unit(images), unit(texts)
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        train, test = np.split(rng.permutation(300), 2)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(np.concatenate([v[train], t[train]]), np.repeat([0, 1], 150))
        found.append(probe.score(np.concatenate([v[test], t[test]]), np.repeat([0, 1], 150)))
    ours = [linear_separability(images, texts, seed=seed) for seed in range(20)]
    assert 0.7 < np.mean(found) < 0.95
    assert np.mean(ours) == pytest.approx(np.mean(found), abs=0.01)
    assert np.std(ours) == pytest.approx(np.std(found), abs=0.01)
    assert ours[0] == linear_separability(images, texts)
    assert len(set(ours)) > 5


def test_without_scikit_learn_all_but_separability_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert "rmg" in modality_gap(*random_pairs(), separability=False)
    with pytest.raises(UserError, match=r"alignclip\[evaluate\]"):
        modality_gap(*random_pairs())


# --- how many axes? -------------------------------------------------------------------------------


def test_the_spectrum_is_that_of_numpys_covariance():
    images, _ = random_pairs()
    expected = np.sort(np.linalg.eigvals(np.cov(unit(images).T)).real)[::-1]
    found = spectrum(images)
    assert found.shape == (6,)
    assert found.sum().item() == pytest.approx(1)
    assert found.numpy() == pytest.approx(expected / expected.sum())


def test_effective_rank_counts_axes():
    axes = torch.cat([torch.eye(8), -torch.eye(8)])
    assert effective_rank(axes) == pytest.approx(8)
    assert effective_rank(axes[[0, 1, 8, 9]]) == pytest.approx(2)
    assert effective_rank(axes[:2]) == pytest.approx(1)
    assert (
        effective_rank(torch.rand(20, 1).repeat(1, 8) + 0.1) == 0
    )  # one direction: one point of the sphere
    assert spectrum(torch.full((5, 3), 0.3)).tolist() == [0, 0, 0]
    # a mean far from the origin is no axis
    assert effective_rank(
        torch.tensor([[1, 0.1, 0], [1, -0.1, 0], [1, 0, 0.1], [1, 0, -0.1]])
    ) == pytest.approx(2)


# --- pairs and non-pairs --------------------------------------------------------------------------


def test_a_gap_closed_by_hand():
    images, texts = clouds(3)
    images = images - 3 * torch.eye(16)[0]
    before = modality_gap(images, texts)
    moved = close_gap(images, texts)
    after = modality_gap(*moved)
    assert before["centroid_distance"] > 0.5
    assert after["centroid_distance"] < 0.1 * before["centroid_distance"]
    assert after["alignment_score"] > before["alignment_score"]
    assert recall(*moved, torch.arange(300))["image_retrieval_recall@1"] > 0.5
    v, t = unit(images), unit(texts)
    half = (v.mean(0) - t.mean(0)) / 2
    for found, expected in zip(moved, (v - half, t + half), strict=True):
        assert found.dtype == torch.float32
        assert found.numpy() == pytest.approx(unit(torch.from_numpy(expected)), abs=1e-6)
    # no gap stays as it is
    rough = images.bfloat16()
    for same in close_gap(rough, rough):
        assert same.numpy() == pytest.approx(unit(rough), abs=1e-6)


def test_cosines_of_pairs_and_of_a_sample_of_non_pairs():
    images, texts = random_pairs()
    v, t = unit(images), unit(texts)
    pairs, non_pairs = pair_cosines(images, texts, count=20_000)
    assert pairs.numpy() == pytest.approx((v * t).sum(1))
    assert non_pairs.shape == (20_000,)
    everything = v @ t.T
    off = everything[~np.eye(37, dtype=bool)]
    # each of them is one of the 37 · 36, all of which are drawn, about equally often
    values, counts = np.unique(non_pairs.numpy().round(9), return_counts=True)
    assert values == pytest.approx(np.unique(off.round(9)), abs=2e-9)
    assert counts.max() < 45
    assert not set(pairs.numpy().round(9)) & set(values)


def test_the_sample_of_non_pairs_is_the_seeds():
    same, other = (pair_cosines(*random_pairs(), count=50, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(same, pair_cosines(*random_pairs(), count=50)[1])
    assert not torch.equal(same, other)


@pytest.mark.parametrize("function", [modality_gap, linear_separability, pair_cosines])
def test_one_pair_is_an_error(function):
    with pytest.raises(ValueError, match="two pairs at least, not 1"):
        function(torch.ones(1, 3), torch.ones(1, 3))
