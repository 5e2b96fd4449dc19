"""Bars of recall and accuracy, a colour a checkpoint, with what chance would score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.evaluation.frame import (
    DASHED,
    MID_GREY,
    chance_entry,
    entries,
    new_panels,
    save_figure,
    style,
    wrapped,
)

# checkpoint → evaluator → metric → value
ByCheckpoint = Mapping[str, Mapping[str, Mapping[str, float]]]
Chance = Mapping[str, Mapping[str, float]]  # evaluator → metric → value

SQUARES: dict[str, Any] = {"marker": "s", "linestyle": "none", "markersize": 8}
PER_CLASS = "mean_per_class_recall"
RECALL_TICKS = {
    f"{found}_retrieval_recall@{k}": f"{query} → {found}\nR@{k}"
    for query, found in (("text", "image"), ("image", "text"))
    for k in (1, 5, 10)
}


def recall_bars(results: ByCheckpoint, path: str | Path, chance: Chance | None = None) -> None:
    """Draw recall@1, 5 and 10 in both directions: a panel an evaluator, a colour a checkpoint.

    Evaluators of the same figures, as the gap and the retrieval of one set are, share a panel. Up
    to four checkpoints, the values are written on the bars; a dashed grey line is what chance would
    score.

    Args:
        results: checkpoint → evaluator → metrics; evaluators without recalls are left out.
        path: the PNG to write; its folder must exist.
        chance: evaluator → what features that say nothing would score.

    Raises:
        ValueError: no evaluator has recalls.
        UserError: matplotlib is not installed.
    """
    names, evaluators, percents = _percents(results, chance, list(RECALL_TICKS))
    same: dict[bytes, list[int]] = {}  # figures → where evaluators have them
    for column in range(len(evaluators)):
        same.setdefault(percents[:-1, column].tobytes(), []).append(column)
    panels = new_panels(names, 9.5, 3.2 * len(same), len(same))[:, 0]
    for panel, columns in zip(panels, same.values(), strict=True):
        _draw_bars(panel, percents[:, columns[0]], list(RECALL_TICKS.values()))
        panel.set_ylabel("recall, %")
        sharing = ", ".join(evaluators[column] for column in columns)
        panel.set_title(wrapped(sharing, 90), fontsize=11)
    shown = entries(names, **SQUARES) + chance_entry(chance)
    save_figure(panels[0].figure, path, shown)


def accuracy_bars(results: ByCheckpoint, path: str | Path, chance: Chance | None = None) -> None:
    """Draw ``mean_per_class_recall`` of each evaluator that classifies, a colour a checkpoint.

    That is the accuracy in which one answer for all images scores 1 / classes, however unequal the
    classes are; a dashed grey line is that number. Arguments and errors: those of
    :func:`recall_bars`.
    """
    names, evaluators, percents = _percents(results, chance, [PER_CLASS])
    panel = new_panels(names, max(6.0, 1.5 + 1.1 * len(evaluators)), 3.6)[0, 0]
    _draw_bars(panel, percents[:, :, 0], [wrapped(evaluator, 14) for evaluator in evaluators])
    panel.set_ylabel("mean per class recall, %")
    save_figure(panel.figure, path, entries(names, **SQUARES) + chance_entry(chance))


def _draw_bars(panel: Any, percents: np.ndarray, ticks: Sequence[str]) -> None:
    """Draw a group of bars a column, a colour a row; the last row is chance, a line a column."""
    *rows, chance = percents
    width = 0.84 / len(rows)
    groups = np.arange(len(ticks))
    for index, values in enumerate(rows):
        x = groups + (index - (len(rows) - 1) / 2) * width
        drawn = panel.bar(x, values, 0.92 * width, color=style(index)["color"])
        if len(rows) <= 4:
            texts = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
            panel.bar_label(drawn, texts, fontsize=8, padding=1)
    for group in np.flatnonzero(np.isfinite(chance)):
        ends, level = [group - 0.46, group + 0.46], chance[group]
        panel.plot(ends, [level, level], color=MID_GREY, linestyle=DASHED, linewidth=1.2)
    panel.set_xticks(groups, ticks)
    panel.set_ylim(0, max(1.0, 1.1 * np.nanmax(percents)))


def _percents(
    results: ByCheckpoint, chance: Chance | None, metrics: Sequence[str]
) -> tuple[list[str], list[str], np.ndarray]:
    """Return the checkpoints and evaluators that have any of the metrics, and their percents.

    The percents are [checkpoints + 1, evaluators, metrics], NaN where one is missing; the last row
    is what chance would score.
    """
    found: dict[str, dict[str, Mapping[str, float]]] = {}  # checkpoint → evaluator → figures
    for checkpoint, of_checkpoint in results.items():
        for evaluator, figures in of_checkpoint.items():
            if not figures.keys().isdisjoint(metrics):
                found.setdefault(checkpoint, {})[evaluator] = figures
    evaluators = list(dict.fromkeys(name for figures in found.values() for name in figures))
    shares = [
        [[of_row.get(name, {}).get(metric, math.nan) for metric in metrics] for name in evaluators]
        for of_row in (*found.values(), chance or {})
    ]
    return list(found), evaluators, 100 * np.array(shares)
