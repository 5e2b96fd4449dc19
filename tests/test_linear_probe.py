"""The linear probe against fits by scikit-learn alone, and that the test set has no say in the
strength.
"""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import normal, unit

from alignclip.errors import UserError
from alignclip.evaluation.linear_probe import STRENGTHS, library, linear_probe

linear_model = pytest.importorskip("sklearn.linear_model")
GRID = (1e-2, 1.0, 100.0, 1e4)


def blobs(classes=4, count=160, noise=1.4, seed=0):
    """Features and targets of training and test set, half each; classes are unequal."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=generator)
    targets = torch.multinomial(
        torch.arange(2.0, 2 + classes), 2 * count, replacement=True, generator=generator
    )
    features = centres[targets] + noise * torch.randn(2 * count, 8, generator=generator)
    return features[:count], targets[:count], features[count:], targets[count:]


def brute_force(x, y, x_test, y_test, strengths, seed, fraction):
    """A fresh fit for every strength by another solver, to the last digit."""
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
    from sklearn.model_selection import train_test_split

    x, x_test = unit(x), unit(x_test)
    a, b, ya, yb = train_test_split(
        x, y.numpy(), test_size=fraction, stratify=y.numpy(), random_state=seed
    )
    exactly = {"solver": "newton-cg", "tol": 1e-10, "max_iter": 10_000}
    scores = [
        linear_model.LogisticRegression(C=c, **exactly).fit(a, ya).score(b, yb) for c in strengths
    ]
    best = strengths[int(np.argmax(scores))]
    probe = linear_model.LogisticRegression(C=best, **exactly).fit(x, y.numpy())
    found = {"acc1": probe.score(x_test, y_test.numpy()), "C": best}
    found["mean_per_class_recall"] = balanced_accuracy_score(y_test.numpy(), probe.predict(x_test))
    predicted = np.unique(probe.predict(x_test), return_counts=True)[1]
    found["top_class_share"] = predicted.max() / len(x_test)
    found["acc5"] = 1.0
    if len(probe.classes_) > 5:
        scores = probe.decision_function(x_test)
        found["acc5"] = top_k_accuracy_score(y_test.numpy(), scores, k=5, labels=probe.classes_)
    return found


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (4, 0), (4, 1), (9, 2)])
def test_equals_brute_force_over_the_same_grid(classes, seed):
    x, y, x_test, y_test = blobs(classes, seed=seed)
    labels = 7 * torch.arange(classes) - 9  # need be neither from 0 on nor consecutive
    data = (x, labels[y], x_test, labels[y_test])
    expected = brute_force(*data, GRID, seed, 0.25)
    assert 0.3 < expected["acc1"] < 0.95
    found = linear_probe(*data, seed=seed, validation_fraction=0.25, strengths=GRID, progress=False)
    assert found == pytest.approx(expected)


def test_the_order_of_strengths_does_not_matter_and_equals_choose_the_strongest():
    data = blobs(noise=0.01)  # every strength of the grid is perfect on it
    assert linear_probe(*data, strengths=(1e4, 10.0, 100.0), progress=False)["C"] == 10


def test_the_test_set_has_no_say_in_the_strength(monkeypatch):
    x, y, x_test, y_test = blobs()
    fitted = []
    original = linear_model.LogisticRegression.fit

    def spy(self, features, targets):
        fitted.append((self.C, features, targets))
        return original(self, features, targets)

    monkeypatch.setattr(linear_model.LogisticRegression, "fit", spy)
    chosen = {linear_probe(x, y, x_test, y_test, strengths=GRID, progress=False)["C"]}
    for labels in (y_test.flip(0), torch.zeros_like(y_test)):
        chosen.add(linear_probe(x, y, -x_test, labels, strengths=GRID, progress=False)["C"])
    assert len(chosen) == 1
    normalised = unit(x)
    assert [c / normalised.var(axis=0).mean() for c, _, _ in fitted[:5]] == pytest.approx(
        [*GRID, *chosen]
    )
    # 144 of the 160 while choosing, all of them in the end, and none of them is of the test set
    assert [len(targets) for _, _, targets in fitted[:5]] == [144, 144, 144, 144, 160]
    known = (normalised - normalised.mean(axis=0)) / normalised.var(axis=0).mean() ** 0.5
    assert all(
        np.abs(known - row).max(axis=1).min() < 1e-9
        for _, features, _ in fitted
        for row in features
    )
    # stratified: nine tenths of each class
    for label, count in zip(*np.unique(y.numpy(), return_counts=True), strict=True):
        assert abs((fitted[0][2] == label).sum() - 0.9 * count) <= 1


def test_reproducible_and_the_seed_changes_the_split():
    data = blobs(noise=3)
    runs = [
        linear_probe(*data, seed=seed, strengths=GRID, progress=False)
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert runs[0] == runs[1]
    assert len({run["C"] for run in runs}) > 1


def test_features_that_all_point_one_way_are_fitted_to_the_end():
    """As a collapsed model's do: scikit-learn stops early on them as they are, at its default
    tolerance.
    """
    x, y, x_test, y_test = blobs(classes=6, count=600, noise=0.5)
    x, x_test = (v * 1.5 ** -torch.arange(8) + 100 for v in (x, x_test))
    assert F.cosine_similarity(x[:1], x).min() > 0.999
    expected = brute_force(x, y, x_test, y_test, [1e5], 0, 0.1)["acc1"]
    a, b = unit(x), unit(x_test)
    as_they_are = linear_model.LogisticRegression(C=1e5, max_iter=1000).fit(a, y.numpy())
    assert as_they_are.score(b, y_test.numpy()) < expected - 0.1
    found = linear_probe(x, y, x_test, y_test, strengths=[1e5], progress=False)
    assert found["acc1"] == pytest.approx(expected, abs=0.005)


def test_few_samples_a_class_are_enough():
    """A tenth of ten samples could not hold all five classes."""
    y = torch.arange(5).repeat(2)
    x = torch.eye(5)[y] + 0.01 * normal(10, 5)
    found = linear_probe(x, y, x, y, progress=False)
    assert found["acc1"] == found["acc5"] == found["mean_per_class_recall"] == 1
    assert found["C"] in STRENGTHS
    assert pytest.approx([10.0**power for power in range(-6, 7)]) == STRENGTHS


def test_progress_goes_to_the_number_of_fits(capsys):
    linear_probe(*blobs(), strengths=GRID)
    err = capsys.readouterr().err
    assert "5/5" in err
    assert "held_out_acc1" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, xt, yt: (x, y * 0, xt, yt * 0), "a single class"),
        (
            lambda x, y, xt, yt: (x, y.index_fill(0, torch.tensor([5]), 77), xt, yt),
            r"1 of 5 classes.*\[77\]",
        ),
        (
            lambda x, y, xt, yt: (x, torch.arange(160), xt, yt),
            r"160 of 160 classes have a single.*\[0, 1, 2, 3, 4\] …",
        ),
        (lambda x, y, xt, yt: (x, y, xt, yt + 2), r"2 classes of the test set.*\[4, 5\]"),
    ],
)
def test_bad_input_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        linear_probe(*change(*blobs()), progress=False)


def test_a_missing_library_is_one_line_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r"scikit-learn: pip install 'alignclip\[evaluate\]'"):
        linear_probe(*blobs())
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(UserError, match="SciPy"):
        library("scipy.stats")
