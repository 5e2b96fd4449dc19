"""Zero-shot classifiers against open_clip's builder.

Accuracy against brute force, scikit-learn and clip_benchmark.
"""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from evaluations import encoder_of, normal, small_model

from alignclip.errors import UserError
from alignclip.evaluation.zero_shot import accuracy, accuracy_chance, build_classifier

CLASSES = [
    "dog", "great white shark", "tench", "a very long name of a class with many words", "crane",
    "crane", "é",
]  # fmt: skip
TEMPLATES = [
    "a photo of a {}.", "{}", "one of the many, many blurry photos of a small {} in the rain.",
]  # fmt: skip


# --- classifiers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_equals_open_clips_builder(batch_size, capsys):
    encoder = encoder_of(small_model().eval(), batch_size, progress=batch_size == 4)
    expected = open_clip.build_zero_shot_classifier(
        encoder.model, encoder.tokenizer, CLASSES, TEMPLATES, num_classes_per_batch=2
    )
    found = build_classifier(encoder.texts, CLASSES, TEMPLATES)
    torch.testing.assert_close(found, expected.T, rtol=0, atol=1e-5)
    assert (found[4] == found[5]).all()
    assert (found[0] - found[1]).abs().max() > 0.01
    said = capsys.readouterr().err  # 21 prompts
    assert "6/6" in said if encoder.progress else said == ""


def test_templates_of_clip_benchmark_and_callables_of_open_clip_are_the_same():
    texts = encoder_of(small_model()).texts
    forms = [TEMPLATES, [t.replace("{}", "{c}") for t in TEMPLATES], [t.format for t in TEMPLATES]]
    first, *others = (build_classifier(texts, CLASSES, form) for form in forms)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo.", "'a photo.' has no place for the class name: write {c}"),
        ("a photo of a {classname}.", "a place for 'classname'; the class name's place is {c}"),
        ("a photo of a {c.", "expected '}' before end of string"),
        ("{c:>3000000000}", "a place for 'c'"),
        ("{c.__class__}", "a place for 'c.__class__'"),
        ("{c!r}", "a place for 'c'"),
        ("{0[0]}", "a place for '0[0]'"),
    ],
)
def test_a_bad_template_is_one_line(template, message):
    with pytest.raises(UserError) as error:
        build_classifier(encoder_of(small_model()).texts, ["dog"], [template])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- accuracy -------------------------------------------------------------------------------------


def brute_force(images, classes, targets):
    """Sort every row by (similarity, index)."""
    scores = images @ classes.T
    orders = [sorted(range(len(classes)), key=lambda c: (-row[c], c)) for row in scores]
    right = np.array([order[0] == target for order, target in zip(orders, targets, strict=True)])
    first = [order[0] for order in orders]
    return {
        "top_class_share": max(first.count(c) for c in first) / len(first),
        "acc1": right.mean(),
        "acc5": np.mean(
            [target in order[:5] for order, target in zip(orders, targets, strict=True)]
        ),
        "mean_per_class_recall": np.mean([right[targets == c].mean() for c in np.unique(targets)]),
    }


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_equals_brute_force_under_ties(block):
    rng = np.random.default_rng(0)
    # rows of ±0.5 are of norm 1, with exact similarities, of which there are only five
    images, classes = (rng.choice([-0.5, 0.5], size=(count, 4)) for count in (90, 30))
    unequal = np.arange(1, 21) / 210  # and some classes never occur
    targets = rng.choice(20, size=90, p=unequal)
    expected = brute_force(images, classes, targets)
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    assert expected["mean_per_class_recall"] != pytest.approx(expected["acc1"], abs=1e-3)
    # neither the lengths of features nor the integers of targets matter
    given = map(torch.from_numpy, (2 * images, classes / 4, targets.astype(np.int32)))
    assert accuracy(*given, block=block) == pytest.approx(expected)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_equals_scikit_learn_and_clip_benchmark(monkeypatch):
    from clip_benchmark.metrics import zeroshot_classification
    from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

    classes = F.normalize(normal(12, 16), dim=-1)
    unequal = torch.arange(12.0)  # the first class has no images
    targets = torch.multinomial(unequal, 150, True, generator=torch.Generator().manual_seed(0))
    images = F.normalize(classes[targets] + 0.5 * normal(150, 16, seed=1), dim=-1)
    scores = images @ classes.T
    found = accuracy(images, classes, targets)
    balanced = balanced_accuracy_score(targets, scores.argmax(1))
    assert 0.2 < balanced < 0.95
    assert abs(balanced - found["acc1"]) > 1e-3
    assert found["mean_per_class_recall"] == pytest.approx(balanced)
    top = top_k_accuracy_score(targets, scores, k=5, labels=range(12))
    assert found["acc5"] == pytest.approx(top)
    # they turn an array of one number into a float, which NumPy 2.4 refuses
    monkeypatch.setattr(zeroshot_classification, "float", np.ndarray.item, raising=False)
    theirs = zeroshot_classification.accuracy(100 * scores, targets, topk=(1, 5))
    assert (found["acc1"], found["acc5"]) == pytest.approx(tuple(theirs))


def test_collapsed_features_score_chance():
    targets = torch.arange(8).repeat(3)
    found = accuracy(torch.full((24, 4), 0.5), torch.full((8, 4), 0.5), targets)
    chance = {"acc1": 1 / 8, "acc5": 5 / 8, "mean_per_class_recall": 1 / 8}
    assert found == pytest.approx(chance | {"top_class_share": 1.0})
    assert accuracy_chance(targets) == pytest.approx(chance | {"top_class_share": 1 / 8})


@pytest.mark.parametrize(
    ("shift", "message"), [(1, r"\[1, 4\], but there are 4"), (-1, r"\[-1, 2\]")]
)
def test_a_target_that_is_no_class_is_an_error(shift, message):
    with pytest.raises(ValueError, match=f"lie in {message}"):
        accuracy(normal(6, 5), normal(4, 5), torch.arange(6) % 4 + shift)
