"""The declarations of the evaluation tasks: their sets, their metrics, which way is better.

Each task declares its own (:mod:`alignclip.config.plugged`); this module finds them by their names.
Tables, ``results.json``, ``keep_best`` and plots ask here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from alignclip.config.plugged import TASKS, plugged
from alignclip.config.schema import EvaluatorConfig, SetConfig

Better = Literal["higher", "lower", "neither"]
ARROWS: dict[Better, str] = {"higher": "↑", "lower": "↓", "neither": " "}
# of ``keep_best``
KEEP_BEST_MODES: dict[Better, str | None] = {"higher": "max", "lower": "min", "neither": None}


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation.

    Attributes:
        better: which way is better; ``neither`` where the figure describes and doesn't judge.
        meaning: what the figure is, in a few words.
        watch: whether the figure tells that a model works; the others say how.
        chart: the chart of ``curves.html`` that shows the figure.
    """

    better: Better
    meaning: str
    watch: bool = False
    chart: Literal["gap", "score"] | None = None


@functools.cache
def metrics_of(task: str) -> dict[str, Metric]:
    """Return the metrics of a task by their names.

    Raises:
        UserError: there is no such task.
    """
    declared: dict[str, Metric] = plugged(TASKS, task, "task").METRICS
    return declared


@functools.cache
def metric_named(name: str) -> Metric:
    """Return the metric of that name; one that no task has is better neither way."""
    declared = (metrics_of(task) for task in TASKS)
    return next((metrics[name] for metrics in declared if name in metrics), Metric("neither", ""))


def better(name: str) -> Better:
    """Return which way a metric is better."""
    return metric_named(name).better


def arrow(name: str) -> str:
    """Return a sign for which way a metric is better; a blank where it is neither."""
    return ARROWS[better(name)]


def column_of(task: str) -> str | None:
    """Return the column of a task's sets besides ``image``; None where the task reads a file."""
    column: str | None = plugged(TASKS, task, "task").COLUMN
    return column


def sets_of(evaluator: EvaluatorConfig) -> dict[str, SetConfig]:
    """Return the sets that an evaluator reads: ``""`` is its own, others are keys of its task."""
    own = vars(evaluator.settings) if evaluator.settings is not None else {}
    return {"": evaluator} | {key: one for key, one in own.items() if isinstance(one, SetConfig)}
