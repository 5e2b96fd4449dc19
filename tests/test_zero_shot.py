"""Zero-shot classifiers against open_clip's builder; accuracy against brute force, scikit-learn and clip_benchmark."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from models import EVERYTHING, small_config
from open_clip.tokenizer import SimpleTokenizer

from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.zero_shot import accuracy, accuracy_chance, build_classifier
from alignclip.model.encoders import build_encoders

CLASSES = [
    "dog",
    "great white shark",
    "tench",
    "a very long name of a class with many words",
    "crane",
    "crane",
    "é",
]
TEMPLATES = [
    "a photo of a {}.",
    "{}",
    "one of the many, many blurry photos of a small {} in the rain.",
]


def small_model(shared=EVERYTHING):
    torch.manual_seed(0)
    text = {"context_length": 32, "vocab_size": 49408}
    return build_encoders(small_config(shared=shared, text=text)).eval(), SimpleTokenizer(
        context_length=32
    )


def texts_of(model, batch_size=256, progress=False):
    return Encoder(model, torch.device("cpu"), batch_size=batch_size, progress=progress).texts


# --- classifiers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 256])
@pytest.mark.parametrize("shared", [{}, EVERYTHING], ids=["none", "all"])
def test_equals_open_clips_builder(shared, batch_size):
    model, tokenizer = small_model(shared)
    expected = open_clip.build_zero_shot_classifier(
        model, tokenizer, CLASSES, TEMPLATES, num_classes_per_batch=2
    )
    found = build_classifier(texts_of(model, batch_size), CLASSES, TEMPLATES)
    torch.testing.assert_close(found, expected.T, rtol=0, atol=1e-5)
    assert (found[4] == found[5]).all()
    assert (found[0] - found[1]).abs().max() > 0.01


def test_templates_of_clip_benchmark_and_callables_of_open_clip_are_the_same():
    model, _ = small_model()
    forms = [TEMPLATES, [t.replace("{}", "{c}") for t in TEMPLATES], [t.format for t in TEMPLATES]]
    first, *others = (build_classifier(texts_of(model), CLASSES, form) for form in forms)
    for other in others:
        assert torch.equal(first, other)


def test_a_class_is_the_mean_of_its_normalised_prompts():
    model, tokenizer = small_model()
    with torch.no_grad():
        prompts = F.normalize(
            model.encode_text(tokenizer([t.format("tench") for t in TEMPLATES])), dim=-1
        )
        model.text_projection.mul_(10)  # the lengths of features don't matter
    found = build_classifier(texts_of(model), ["dog", "tench"], TEMPLATES)
    torch.testing.assert_close(found[1], F.normalize(prompts.mean(0), dim=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))


def test_progress_goes_to_the_number_of_batches(capsys):
    model, _ = small_model()
    build_classifier(texts_of(model), CLASSES, TEMPLATES)
    assert capsys.readouterr().err == ""
    build_classifier(texts_of(model, 5, progress=True), CLASSES, TEMPLATES)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo.", "'a photo.' has no place for the class name: write {c}"),
        ("a photo of a {classname}.", "KeyError('classname')"),
        ("a photo of a {c} and a {}, {}.", "IndexError"),
        ("a photo of a {c.", "ValueError"),
    ],
)
def test_a_bad_template_is_one_line(template, message):
    with pytest.raises(UserError) as error:
        build_classifier(texts_of(small_model()[0]), ["dog"], [template])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("classes", "templates"), [([], ["{c}"]), (["dog"], []), ("dog", ["{c}"]), (["dog"], "{c}")]
)
def test_no_classes_or_a_single_string_are_errors(classes, templates):
    with pytest.raises(ValueError, match="lists with at least one"):
        build_classifier(texts_of(small_model()[0]), classes, templates)


# --- accuracy -----------------------------------------------------------------------------------------------------


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
    images, classes = rng.choice([-0.5, 0.5], size=(90, 4)), rng.choice([-0.5, 0.5], size=(30, 4))
    targets = rng.choice(
        20, size=90, p=np.arange(1, 21) / 210
    )  # unequal, and some classes never occur
    expected = brute_force(images, classes, targets)
    assert 0 < expected["acc1"] < expected["acc5"] < 1
    assert expected["mean_per_class_recall"] != pytest.approx(expected["acc1"], abs=1e-3)
    assert accuracy(
        *map(torch.from_numpy, (images, classes, targets)), block=block
    ) == pytest.approx(expected)


def unequal_classes():
    """150 images of 12 unequal classes, one of which has none."""
    generator = torch.Generator().manual_seed(0)
    classes = F.normalize(torch.randn(12, 16, generator=generator), dim=-1)
    targets = torch.multinomial(torch.arange(12.0), 150, replacement=True, generator=generator)
    images = F.normalize(classes[targets] + 0.5 * torch.randn(150, 16, generator=generator), dim=-1)
    return images, classes, targets


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_mean_per_class_recall_is_scikit_learns_balanced_accuracy():
    metrics = pytest.importorskip("sklearn.metrics")
    images, classes, targets = unequal_classes()
    scores = images @ classes.T
    found = accuracy(images, classes, targets)
    balanced = metrics.balanced_accuracy_score(targets, scores.argmax(1))
    assert 0.2 < balanced < 0.95
    assert abs(balanced - found["acc1"]) > 1e-3
    assert found["mean_per_class_recall"] == pytest.approx(balanced)
    top = metrics.top_k_accuracy_score(targets, scores, k=5, labels=range(12))
    assert found["acc5"] == pytest.approx(top)


def test_equals_clip_benchmark():
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    images, classes, targets = unequal_classes()
    acc1, acc5 = theirs.accuracy(100 * images @ classes.T, targets, topk=(1, 5))
    found = accuracy(images, classes, targets)
    assert (found["acc1"], found["acc5"]) == pytest.approx((acc1, acc5))


def test_lengths_and_the_type_of_targets_do_not_matter():
    images, classes, targets = unequal_classes()
    lengths = torch.arange(1, 13)[:, None] / 4
    assert accuracy(images * 7, classes * lengths, targets.int()) == accuracy(
        images, classes, targets
    )


def test_a_subset_of_the_classes_is_a_smaller_classifier():
    images, classes, targets = unequal_classes()
    subset = torch.tensor([2, 3, 5, 11])
    among = torch.isin(targets, subset)
    found = accuracy(images[among], classes[subset], torch.searchsorted(subset, targets[among]))
    best = subset[(images[among] @ classes[subset].T).argmax(1)]
    assert found["acc1"] == pytest.approx((best == targets[among]).double().mean().item())
    assert found["acc1"] > accuracy(images[among], classes, targets[among])["acc1"]
    assert found["acc5"] == 1  # there are but four


def test_collapsed_features_score_chance():
    targets = torch.arange(8).repeat(3)
    found = accuracy(torch.full((24, 4), 0.5), torch.full((8, 4), 0.5), targets)
    chance = {"acc1": 1 / 8, "acc5": 5 / 8, "mean_per_class_recall": 1 / 8}
    assert found == pytest.approx(chance | {"top_class_share": 1.0})
    assert accuracy_chance(targets) == pytest.approx(chance | {"top_class_share": 1 / 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, c, y: (v, c[:, :3], y), "features must be"),
        (lambda v, c, y: (v[0], c, y), "features must be"),
        (lambda v, c, y: (v, c, y[:5]), "targets must be 6 integers"),
        (lambda v, c, y: (v, c, y.float()), "targets must be 6 integers, not torch.float32"),
        (lambda v, c, y: (v[:0], c, y[:0]), "targets must be some"),
        (lambda v, c, y: (v, c, y + 1), r"lie in \[1, 4\], but there are 4"),
        (lambda v, c, y: (v, c, y - 1), r"lie in \[-1, 2\]"),
        (lambda v, c, y: (v / 0, c, y), "NaN or infinity"),
        (lambda v, c, y: (v, c * torch.nan, y), "NaN or infinity"),
    ],
)
def test_bad_input_is_an_error(change, message):
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        accuracy(*change(features, features[:4], torch.arange(6) % 4))
