"""Which way each metric is better, and what features that say nothing score."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from alignclip.config.metrics import ARROWS, better, metrics_of
from alignclip.config.plugged import TASKS, plugged
from alignclip.evaluation.retrieval import recall, recall_chance
from alignclip.evaluation.zero_shot import accuracy_chance

ALL = {name: metric for task in TASKS for name, metric in metrics_of(task).items()}


def test_every_metric_says_which_way_is_better() -> None:
    assert {metric.better for metric in ALL.values()} <= set(ARROWS)
    assert all(metric.meaning for metric in ALL.values())
    for task in TASKS:
        assert any(one.watch for one in metrics_of(task).values()), "a number to watch"
    names = ("margin", "rmg", "C", "another's")
    assert [better(name) for name in names] == ["higher", "lower", "neither", "neither"]


def test_a_name_means_the_same_in_all_tasks() -> None:
    for task in TASKS:
        for name, metric in metrics_of(task).items():
            assert metric == ALL[name], f"{name} of {task}: take over the other task's declaration"


def test_a_task_is_declared_without_pytorch() -> None:
    """Reading a YAML imports the tasks, and a typo shall be told within a second."""
    code = (
        "import sys; from alignclip.config.metrics import *; from alignclip.config.plugged import "
        "*;"
        "[metrics_of(task) for task in TASKS];"
        "assert not {'torch', 'numpy', 'sklearn', 'composer', 'streaming'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("texts_an_image", [[1] * 30, [5] * 12, [1, 7, 2, 2, 40, 1]])
def test_chance_of_recall_is_that_of_features_drawn_at_random(texts_an_image: list[int]) -> None:
    owner = torch.tensor([row for row, count in enumerate(texts_an_image) for _ in range(count)])
    generator = torch.Generator().manual_seed(0)
    chance, found = recall_chance(owner), []
    for _ in range(300):
        images = torch.randn(len(texts_an_image), 16, generator=generator)
        texts = torch.randn(len(owner), 16, generator=generator)
        found.append(recall(images, texts, owner))
    for name, value in chance.items():
        mean = np.mean([one[name] for one in found])
        assert mean == pytest.approx(value, abs=0.03), name


def test_chance_of_recall_where_everything_is_found() -> None:
    chance = recall_chance(torch.tensor([0, 0, 0, 1]))
    assert chance["image_retrieval_recall@5"] == chance["text_retrieval_recall@5"] == 1
    assert chance["text_retrieval_recall@1"] == pytest.approx((3 / 4 + 1 / 4) / 2)


def test_chance_of_accuracy_is_one_answer_for_all() -> None:
    targets = torch.tensor([2] * 7 + [0] * 2 + [5])
    assert accuracy_chance(targets) == pytest.approx(
        {"acc1": 0.7, "acc5": 1.0, "mean_per_class_recall": 1 / 3, "top_class_share": 0.7}
    )


PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS)
def test_the_document_has_every_task(task: str) -> None:
    module = plugged(TASKS, task, "task")
    reads = {"label": "labels", "caption": "captions", None: "a file"}[module.COLUMN]
    keys = ", ".join(f"`{one.name}`" for one in dataclasses.fields(module.Settings))
    sentence = str(module.__doc__).partition("\n")[0].partition(": ")[2]
    assert f"| `{task}` | {reads} | {keys} | {sentence} |" in PAGE


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("closed_")])
def test_the_document_has_every_metric(name: str) -> None:
    metric = ALL[name]
    way = f"{ARROWS[metric.better]} {metric.better}".strip()
    assert f"| `{name}`{' *' * metric.watch} | {way} | {metric.meaning} |" in PAGE
