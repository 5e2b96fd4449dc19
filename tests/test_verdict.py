"""What is said of an evaluation: figures of runs that were measured, and of spaces whose answers
are known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.retrieval import recall, recall_chance
from alignclip.evaluation.verdict import Verdict, judge
from alignclip.evaluation.zero_shot import accuracy, accuracy_chance

NAMES = (
    "alignment_score", "margin", "centroid_distance", "effective_rank_image", "effective_rank_text",
    "image_retrieval_recall@5", "text_retrieval_recall@5",
)  # fmt: skip
GAP, RECALLS = NAMES[2], NAMES[-2:]
# Of AlignCLIP on 3,500 emoji at batch 80 and on the quickstart's scenes, evaluated on 286 and on
# 600 pairs
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

Space = tuple[torch.Tensor, torch.Tensor]


def figures(count: int, values: tuple[float, ...]) -> tuple[dict[str, float], dict[str, float]]:
    return dict(zip(NAMES, values, strict=True)), recall_chance(torch.arange(count))


def judged(*given: Any) -> Verdict:
    verdict = judge(*given)
    assert verdict is not None
    return verdict


def judged_space(images: torch.Tensor, texts: torch.Tensor) -> Verdict:
    owner = torch.arange(len(images))
    metrics = modality_gap(images, texts, separability=False) | recall(images, texts, owner)
    return judged(metrics, recall_chance(owner))


@pytest.mark.parametrize(("count", "values"), COLLAPSED)
def test_a_closed_gap_without_retrieval_is_a_collapse(
    count: int, values: tuple[float, ...]
) -> None:
    verdict = judged(*figures(count, values))
    assert (verdict.success, verdict.collapsed) == (False, True)
    assert verdict.text.startswith("COLLAPSED: the gap is closed (")
    assert "but retrieval is near chance" in verdict.text


@pytest.mark.parametrize(("count", "values"), WORKING)
def test_a_closed_gap_with_retrieval_is_a_success(count: int, values: tuple[float, ...]) -> None:
    verdict = judged(*figures(count, values))
    assert (verdict.success, verdict.collapsed) == (True, False)
    assert "the gap is closed" in verdict.text


def space(mean: float, noise: float, gap: float, count: int = 400, width: int = 64) -> Space:
    """Pairs around one direction: how much of it there is, what a pair doesn't share, what
    modalities don't.
    """
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(count, width, generator=generator) / width**0.5
    images, texts = shared + noise * torch.randn(2, count, width, generator=generator) / width**0.5
    images[:, 0] += mean
    texts[:, 0] += mean
    images[:, 1] += gap
    texts[:, 1] -= gap
    return images, texts


@pytest.mark.parametrize(
    ("mean", "gap", "paired", "collapsed", "success", "words"),
    [
        (0.0, 0.0, True, False, True, "the gap is closed (0.0"),
        (30.0, 0.0, False, True, False, "COLLAPSED: the gap is closed"),  # one cone, no pairs in it
        (0.0, 2.0, True, False, False, "the gap is open (1."),  # CLIP's two cones: retrieval works
        (0.0, 2.0, False, False, False, "the gap is open (1."),  # untrained: nothing works
    ],
)
def test_spaces_whose_answers_are_known(
    mean: float, gap: float, paired: bool, collapsed: bool, success: bool, words: str
) -> None:
    images, texts = space(mean, 0.3 if paired else 0.0, gap)
    if not paired:
        texts = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(1))]
    verdict = judged_space(images, texts)
    assert verdict.text.startswith(words)
    assert (verdict.collapsed, verdict.success) == (collapsed, success)
    assert ("near chance" in verdict.text) != paired


def test_features_that_are_all_the_same_are_a_collapse() -> None:
    assert judged_space(torch.ones(50, 8), torch.ones(50, 8)).collapsed


@pytest.mark.parametrize("count", [2, 4, 8, 20])
def test_few_pairs_that_find_each_other_are_no_collapse(count: int) -> None:
    verdict = judged_space(torch.eye(count), torch.eye(count))
    assert (verdict.success, verdict.collapsed) == (True, False)


def test_against_the_beginning_of_the_run() -> None:
    now, chance = figures(*WORKING[1])
    at_random = {name: chance[name] for name in RECALLS}
    verdict = judged(now, chance, now | {GAP: 1.05, "margin": 0.0} | at_random, "batch 10")
    assert verdict.text.startswith(
        "the gap closed (from 1.05 at batch 10 to 0.07), and retrieval rose (mean R@5 0.938, 112"
    )
    # a model that was good at retrieval, and lost it while its gap closed
    before = now | {GAP: 0.8} | dict.fromkeys(RECALLS, 0.99)
    verdict = judged(now | dict.fromkeys(RECALLS, 0.5), chance, before, "batch 0")
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
    metrics, chance = figures(*WORKING[1])
    verdict = judged(metrics | {GAP: now}, chance, metrics | {GAP: first}, "batch 20")
    assert verdict.text.startswith(f"{words}, and ")


def test_the_examples_of_the_document_are_what_is_printed() -> None:
    text = (Path(__file__).parents[1] / "docs/evaluation.md").read_text(encoding="utf-8")
    lines = [line.removeprefix("    gap: ") for line in text.splitlines() if "    gap: " in line]
    (small, of_small) = figures(286, (0.9, 0.01, 0.27, 1.5, 5.0, 0.0152, 0.0182))
    (now, chance), (first, _) = figures(*WORKING[1]), figures(*COLLAPSED[3])
    given = [
        figures(*COLLAPSED[1]),
        (now, chance, first, "batch 20"),
        (small, of_small, small | {GAP: 0.11}, "batch 20"),
    ]
    for line, one in zip(lines, given, strict=True):
        assert judged(*one).text.startswith(line.removesuffix("…"))


def test_one_class_for_all_images_is_a_collapse_whatever_its_accuracy() -> None:
    targets = torch.tensor([0] * 80 + [1] * 10 + [2] * 10)
    classes, chance = torch.eye(3, 4), accuracy_chance(targets)
    found = accuracy(torch.ones(100, 4) + classes[0], classes, targets)
    assert found["acc1"] == 0.8
    text = judged(found, chance).text
    assert text == "COLLAPSED: 100% of the images get one class, which 80% have"
    verdict = judged(accuracy(classes[targets], classes, targets), chance)
    assert verdict.success
    assert verdict.text == "classes are told apart (mean per class recall 3.0 × chance)"


@pytest.mark.parametrize(
    ("metrics", "success", "words"),
    [
        ({"spearman": math.nan}, False, "COLLAPSED: all sentence pairs are equally similar"),
        ({"spearman": 0.6}, True, "similarities follow people's (0.60)"),
        ({"spearman": 0.01}, False, "similarities say nothing of people's (0.01)"),
        ({"auroc": 0.51, "top_class_share": 0.1}, False, "confidence does not tell outliers"),
        ({"auroc": 0.9, "top_class_share": 0.1}, True, "confidence tells outliers"),
        # a mean where there are two directions
        ({RECALLS[0]: 0.0152}, False, "retrieval is near chance (R@5 0.015,"),
        (
            {RECALLS[0]: 0.0152, RECALLS[1]: 0.0182},
            False,
            "retrieval is near chance (mean R@5 0.017,",
        ),
    ],
)
def test_other_tasks(metrics: dict[str, float], success: bool, words: str) -> None:
    verdict = judged(metrics, dict.fromkeys(RECALLS, 0.01))
    assert verdict.success == success
    assert verdict.text.startswith(words)


def test_what_says_nothing_has_no_verdict() -> None:
    assert judge({"rmg": 0.5}, {}) is None
