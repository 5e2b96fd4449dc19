"""What is said of an evaluation: figures of runs that were measured, and of spaces whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.retrieval import recall, recall_chance
from alignclip.evaluation.verdict import judge
from alignclip.evaluation.zero_shot import accuracy, accuracy_chance

NAMES = (
    "alignment_score", "margin", "centroid_distance", "effective_rank_image", "effective_rank_text",
    "image_retrieval_recall@5", "text_retrieval_recall@5",
)  # fmt: skip
# Of AlignCLIP on 3,500 emoji at batch 80 and on the quickstart's scenes, evaluated on 286 and on 600 pairs
COLLAPSED = [
    (286, (0.9937, 0.0009, 0.0390, 1.72, 5.36, 0.0210, 0.0350)),
    (286, (0.9639, 0.0246, 0.1049, 1.28, 2.34, 0.0245, 0.0245)),
    (286, (0.8607, 0.0926, 0.2075, 2.69, 3.17, 0.0559, 0.0420)),
    (600, (0.9460, 0.0110, 0.1785, 1.44, 25.5, 0.0133, 0.0217)),
    (600, (0.9535, 0.3166, 0.1578, 1.10, 1.78, 0.0283, 0.0217)),
]
WORKING = [
    (600, (0.9294, 0.8162, 0.0887, 3.08, 3.47, 0.1617, 0.1783)),
    (600, (0.9232, 0.9124, 0.0685, 9.70, 10.0, 0.9517, 0.9250)),
]


def figures(count: int, values: tuple[float, ...]) -> tuple[dict[str, float], dict[str, float]]:
    return dict(zip(NAMES, values, strict=True)), recall_chance(torch.arange(count))


@pytest.mark.parametrize(("count", "values"), COLLAPSED)
def test_a_closed_gap_without_retrieval_is_a_collapse(
    count: int, values: tuple[float, ...]
) -> None:
    verdict = judge(*figures(count, values))
    assert verdict is not None
    assert verdict.collapsed
    assert not verdict.success
    assert verdict.text.startswith("COLLAPSED: the gap is closed (")
    assert "but retrieval is near chance" in verdict.text


@pytest.mark.parametrize(("count", "values"), WORKING)
def test_a_closed_gap_with_retrieval_is_a_success(count: int, values: tuple[float, ...]) -> None:
    verdict = judge(*figures(count, values))
    assert verdict is not None
    assert (verdict.success, verdict.collapsed) == (True, False)
    assert "the gap is closed" in verdict.text
    assert "retrieval works" in verdict.text


def space(
    mean: float, noise: float, gap: float, count: int = 400, width: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs around one direction: how much of it there is, what a pair doesn't share, what modalities don't."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(count, width, generator=generator) / width**0.5
    images, texts = (
        shared + noise * torch.randn(count, width, generator=generator) / width**0.5
        for _ in range(2)
    )
    images[:, 0] += mean
    texts[:, 0] += mean
    images[:, 1] += gap
    texts[:, 1] -= gap
    return images, texts


@pytest.mark.parametrize(
    ("mean", "noise", "gap", "collapsed", "success", "words"),
    [
        (0.0, 0.3, 0.0, False, True, "the gap is closed (0.0"),
        (
            30.0,
            50.0,
            0.0,
            True,
            False,
            "COLLAPSED: the gap is closed",
        ),  # one cone, and no pairs in it
        (0.0, 0.3, 2.0, False, False, "the gap is open (1."),  # CLIP's two cones: retrieval works
        (0.0, 50.0, 2.0, False, False, "the gap is open (1."),  # untrained: nothing works
    ],
)
def test_spaces_whose_answers_are_known(
    mean: float, noise: float, gap: float, collapsed: bool, success: bool, words: str
) -> None:
    images, texts = space(mean, 0.0, gap) if noise > 1 else space(mean, noise, gap)
    if noise > 1:
        texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))]
    owner = torch.arange(len(images))
    metrics = modality_gap(images, texts, separability=False) | recall(images, texts, owner)
    verdict = judge(metrics, recall_chance(owner))
    assert verdict is not None
    assert verdict.text.startswith(words)
    assert (verdict.collapsed, verdict.success) == (collapsed, success)
    assert ("near chance" in verdict.text) == (noise > 1)


def test_features_that_are_all_the_same_are_a_collapse() -> None:
    images, owner = torch.ones(50, 8), torch.arange(50)
    metrics = modality_gap(images, images, separability=False) | recall(images, images, owner)
    assert metrics["alignment_score"] == pytest.approx(1)
    assert metrics["centroid_distance"] == pytest.approx(0, abs=1e-6)
    verdict = judge(metrics, recall_chance(owner))
    assert verdict is not None
    assert verdict.collapsed


@pytest.mark.parametrize("count", [2, 4, 8, 20])
def test_few_pairs_that_find_each_other_are_no_collapse(count: int) -> None:
    images = torch.eye(max(count, 2))
    owner = torch.arange(count)
    metrics = modality_gap(images, images, separability=False) | recall(images, images, owner)
    verdict = judge(metrics, recall_chance(owner))
    assert verdict is not None
    assert not verdict.collapsed
    assert verdict.success


def test_against_the_beginning_of_the_run() -> None:
    now, chance = figures(600, WORKING[1][1])
    first = (
        now
        | {"centroid_distance": 1.05, "margin": 0.0}
        | {name: chance[name] for name in NAMES[-2:]}
    )
    verdict = judge(now, chance, first, "batch 10")
    assert verdict is not None
    assert verdict.text.startswith(
        "the gap closed (from 1.05 at batch 10 to 0.07), and retrieval rose (mean R@5 0.938, 112"
    )
    # a model that was good at retrieval, and lost it while its gap closed
    before = now | {"centroid_distance": 0.8} | dict.fromkeys(NAMES[-2:], 0.99)
    verdict = judge(now | dict.fromkeys(NAMES[-2:], 0.5), chance, before, "batch 0")
    assert verdict is not None
    assert not verdict.success
    assert "but retrieval fell (mean R@5 0.500, 60.0 × chance, 0.990 at batch 0)" in verdict.text


@pytest.mark.parametrize(
    ("first", "now", "words"),
    [
        (0.11, 0.27, "the gap is small (0.27; 0.11 at batch 20)"),  # more than twice as large
        (0.05, 0.05, "the gap is small (0.05; 0.05 at batch 20)"),
        (0.0549, 0.0451, "the gap is small (0.05; 0.05 at batch 20)"),  # one number in two decimals
        (0.18, 0.07, "the gap closed (from 0.18 at batch 20 to 0.07)"),
        (1.10, 0.60, "the gap narrowed (from 1.10 at batch 20 to 0.60)"),
        (0.40, 0.60, "the gap widened (from 0.40 at batch 20 to 0.60)"),
        (0.60, 0.62, "the gap has not changed (0.62; 0.60 at batch 20)"),
    ],
)
def test_the_gap_is_said_to_move_where_it_did(first: float, now: float, words: str) -> None:
    metrics, chance = figures(600, WORKING[1][1])
    verdict = judge(metrics | {NAMES[2]: now}, chance, metrics | {NAMES[2]: first}, "batch 20")
    assert verdict is not None
    assert verdict.text.startswith(f"{words}, and ")


def test_recall_is_said_to_be_a_mean_where_it_is_one() -> None:
    both = {NAMES[-2]: 0.0152, NAMES[-1]: 0.0182}
    verdict = judge(both, dict.fromkeys(both, 0.01))
    assert verdict is not None
    assert "(mean R@5 0.017," in verdict.text
    verdict = judge({NAMES[-2]: 0.0152}, dict.fromkeys(both, 0.01))
    assert verdict is not None
    assert "(R@5 0.015," in verdict.text


def test_the_examples_of_the_document_are_what_is_printed() -> None:
    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    examples = [
        line.removeprefix("    gap: ").removesuffix("…")
        for line in text.splitlines()
        if "    gap: " in line
    ]
    small = figures(286, (0.9, 0.01, 0.27, 1.5, 5.0, 0.0152, 0.0182))
    (now, chance), (first, _) = figures(600, WORKING[1][1]), figures(*COLLAPSED[3])
    given = [judge(*figures(*COLLAPSED[1])), judge(now, chance, first, "batch 20"),
             judge(*small, small[0] | {NAMES[2]: 0.11}, "batch 20")]  # fmt: skip
    assert len(examples) == len(given)
    for example, verdict in zip(examples, given, strict=True):
        assert verdict is not None
        assert verdict.text.startswith(example)


def test_one_class_for_all_images_is_a_collapse_whatever_its_accuracy() -> None:
    targets = torch.tensor([0] * 80 + [1] * 10 + [2] * 10)
    classes = torch.eye(3, 4)
    found = accuracy(torch.ones(100, 4) + classes[0], classes, targets)
    assert found["acc1"] == 0.8
    verdict = judge(found, accuracy_chance(targets))
    assert verdict is not None
    assert verdict.text == "COLLAPSED: 100% of the images get one class, which 80% have"
    verdict = judge(accuracy(classes[targets], classes, targets), accuracy_chance(targets))
    assert verdict is not None
    assert verdict.success
    assert verdict.text == "classes are told apart (mean per class recall 3.0 × chance)"


def test_other_tasks() -> None:
    for metrics, chance, success, words in (
        ({"spearman": math.nan}, {}, False, "COLLAPSED: all sentence pairs"),
        ({"spearman": 0.6}, {}, True, "similarities follow people's (0.60)"),
        ({"spearman": 0.01}, {}, False, "similarities say nothing of people's (0.01)"),
        ({"auroc": 0.51, "top_class_share": 0.1}, {}, False, "confidence does not tell outliers"),
        ({"auroc": 0.9, "top_class_share": 0.1}, {}, True, "confidence tells outliers"),
        (
            {"image_retrieval_recall@5": 0.02},
            {"image_retrieval_recall@5": 0.01},
            False,
            "retrieval is near chance",
        ),
    ):
        verdict = judge(metrics, chance)
        assert verdict is not None
        assert verdict.success == success
        assert verdict.text.startswith(words)
    assert judge({"rmg": 0.5}, {}) is None
