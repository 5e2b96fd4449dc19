"""What each checkpoint gets right, as bars: recall and accuracy, with what chance would score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.evaluation.plots import DASHED, GREY, finish, new_figure, style, wrapped

Results = Mapping[str, Mapping[str, Mapping[str, float]]]  # checkpoint → evaluator → metric → value
Chance = Mapping[str, Mapping[str, float]]  # evaluator → metric → value

CLASSES = "mean_per_class_recall"
RECALLS = {
    f"{found}_retrieval_recall@{k}": f"{query} → {found}\nR@{k}"
    for query, found in (("text", "image"), ("image", "text"))
    for k in (1, 5, 10)
}


def recall_bars(results: Results, path: str | Path, chance: Chance | None = None) -> None:
    """Draw recall@1, 5 and 10 in both directions as bars, a panel an evaluator, a colour a checkpoint.

    Evaluators of the same figures, as the gap and the retrieval of one set are, share a panel. Up to four
    checkpoints, the values are written on the bars; a dashed grey line is what chance would score.

    Args:
        results: checkpoint → evaluator → metrics; evaluators without recalls are left out.
        path: the PNG to write; its folder must exist.
        chance: evaluator → what features that say nothing would score.

    Raises:
        ValueError: no evaluator has recalls, or one is not in [0, 1]: which.
        UserError: matplotlib is not installed.
    """
    evaluators = _percents(results, tuple(RECALLS))
    names = [name for name in results if any(name in bars for bars in evaluators.values())]
    distinct: dict[str, list[str]] = {}
    for evaluator, bars in evaluators.items():
        distinct.setdefault(str(bars), []).append(evaluator)
    panels = new_figure(names, 9.5, 3.2 * len(distinct)).subplots(len(distinct), squeeze=False)[
        :, 0
    ]
    for panel, (evaluator, *others) in zip(panels, distinct.values(), strict=True):
        bars = evaluators[evaluator]
        of_chance = [
            100 * (chance or {}).get(evaluator, {}).get(name, math.nan) for name in RECALLS
        ]
        _bars(panel, names, bars, list(RECALLS.values()), of_chance)
        panel.set_ylabel("recall, %")
        panel.set_title(wrapped(", ".join([evaluator, *others]), 90), fontsize=11)
    finish(
        panels[0].figure,
        path,
        names,
        chance=bool(chance),
        marker="s",
        linestyle="none",
        markersize=8,
    )


def accuracy_bars(results: Results, path: str | Path, chance: Chance | None = None) -> None:
    """Draw ``mean_per_class_recall`` of each evaluator that classifies, a colour a checkpoint.

    That is the accuracy in which one answer for all images scores 1 / classes, however unequal the classes are; a
    dashed grey line is that number. Arguments and errors: those of :func:`recall_bars`.
    """
    found = _percents(results, (CLASSES,))
    names = [name for name in results if any(name in bars for bars in found.values())]
    values = {name: [bars.get(name, [math.nan])[0] for bars in found.values()] for name in names}
    panel = new_figure(names, max(6.0, 1.5 + 1.1 * len(found)), 3.6).subplots()
    of_chance = [
        100 * (chance or {}).get(evaluator, {}).get(CLASSES, math.nan) for evaluator in found
    ]
    _bars(panel, names, values, [wrapped(evaluator, 14) for evaluator in found], of_chance)
    panel.set_ylabel("mean per class recall, %")
    finish(
        panel.figure, path, names, chance=bool(chance), marker="s", linestyle="none", markersize=8
    )


def _bars(
    panel: Any,
    names: Sequence[str],
    bars: dict[str, list[float]],
    ticks: list[str],
    chance: list[float],
) -> None:
    """Groups of bars in percent, a colour a name, and a line across each group at its chance."""
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        values = bars.get(name, [math.nan] * len(ticks))
        x = np.arange(len(ticks)) + (index - (len(names) - 1) / 2) * width
        drawn = panel.bar(x, values, 0.92 * width, color=style(index)["color"])
        if len(names) <= 4:
            texts = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
            panel.bar_label(drawn, texts, fontsize=8, padding=1)
    for group, value in enumerate(chance):
        if math.isfinite(value):
            panel.plot(
                [group - 0.46, group + 0.46],
                [value, value],
                color=GREY,
                linestyle=DASHED,
                linewidth=1.2,
            )
    panel.set_xticks(np.arange(len(ticks)), ticks)
    panel.set_ylim(0, max(1.0, 1.1 * np.nanmax([*bars.values(), chance])))


def _percents(results: Results, metrics: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """Evaluator → checkpoint → percent by metrics, NaN where one is missing."""
    evaluators: dict[str, dict[str, list[float]]] = {}
    for checkpoint, of_checkpoint in results.items():
        for evaluator, found in of_checkpoint.items():
            wrong = [name for name in metrics if not 0 <= found.get(name, 0) <= 1]
            if wrong:
                raise ValueError(
                    f"{checkpoint}, {evaluator}: {wrong[0]} must be in [0, 1], not {found[wrong[0]]}"
                )
            if any(name in found for name in metrics):
                bars = [100 * found.get(name, math.nan) for name in metrics]
                evaluators.setdefault(evaluator, {})[checkpoint] = bars
    if not evaluators:
        raise ValueError(f"no evaluator has any of {', '.join(metrics)}")
    return evaluators
