"""Bars of recall and accuracy, a colour a checkpoint, with what chance would score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.evaluation.frame import (
    DASHED,
    GREY,
    SQUARES,
    chance_entry,
    new_panels,
    save_figure,
    style,
    wrapped,
)

# checkpoint → evaluator → metric → value
Results = Mapping[str, Mapping[str, Mapping[str, float]]]
Chance = Mapping[str, Mapping[str, float]]  # evaluator → metric → value

PER_CLASS = "mean_per_class_recall"
RECALL_TICKS = {
    f"{found}_retrieval_recall@{k}": f"{query} → {found}\nR@{k}"
    for query, found in (("text", "image"), ("image", "text"))
    for k in (1, 5, 10)
}


def recall_bars(results: Results, path: str | Path, chance: Chance | None = None) -> None:
    """Draw recall@1, 5 and 10 in both directions: a panel an evaluator, a colour a checkpoint.

    Evaluators of the same figures, as the gap and the retrieval of one set are, share a panel. Up
    to four checkpoints, the values are written on the bars; a dashed grey line is what chance would
    score.

    Args:
        results: checkpoint → evaluator → metrics; evaluators without recalls are left out.
        path: the PNG to write; its folder must exist.
        chance: evaluator → what features that say nothing would score.

    Raises:
        ValueError: no evaluator has recalls, or one is not in [0, 1]: which.
        UserError: matplotlib is not installed.
    """
    evaluators = _percents(results, tuple(RECALL_TICKS))
    distinct: dict[str, list[str]] = {}
    for evaluator, bars in evaluators.items():
        distinct.setdefault(str(bars), []).append(evaluator)
    names = _drawn(results, evaluators)
    panels = new_panels(names, 9.5, 3.2 * len(distinct), len(distinct))[:, 0]
    for panel, same in zip(panels, distinct.values(), strict=True):
        of_chance = _in_percent((chance or {}).get(same[0], {}), tuple(RECALL_TICKS))
        _draw_bars(panel, names, evaluators[same[0]], list(RECALL_TICKS.values()), of_chance)
        panel.set_ylabel("recall, %")
        panel.set_title(wrapped(", ".join(same), 90), fontsize=11)
    save_figure(panels[0].figure, path, names, SQUARES, chance_entry(chance))


def accuracy_bars(results: Results, path: str | Path, chance: Chance | None = None) -> None:
    """Draw ``mean_per_class_recall`` of each evaluator that classifies, a colour a checkpoint.

    That is the accuracy in which one answer for all images scores 1 / classes, however unequal the
    classes are; a dashed grey line is that number. Arguments and errors: those of
    :func:`recall_bars`.
    """
    evaluators = _percents(results, (PER_CLASS,))
    names = _drawn(results, evaluators)
    bars = {
        name: [of_name.get(name, [math.nan])[0] for of_name in evaluators.values()]
        for name in names
    }
    of_chance = [
        _in_percent((chance or {}).get(evaluator, {}), (PER_CLASS,))[0] for evaluator in evaluators
    ]
    panel = new_panels(names, max(6.0, 1.5 + 1.1 * len(evaluators)), 3.6)[0, 0]
    _draw_bars(panel, names, bars, [wrapped(evaluator, 14) for evaluator in evaluators], of_chance)
    panel.set_ylabel("mean per class recall, %")
    save_figure(panel.figure, path, names, SQUARES, chance_entry(chance))


def _draw_bars(
    panel: Any,
    names: Sequence[str],
    bars: Mapping[str, Sequence[float]],
    ticks: Sequence[str],
    chance: Sequence[float],
) -> None:
    """Draw groups of bars in percent, a colour a name, and a line at each group's chance."""
    width = 0.84 / len(names)
    groups = np.arange(len(ticks))
    for index, name in enumerate(names):
        values = bars.get(name, [math.nan] * len(ticks))
        x = groups + (index - (len(names) - 1) / 2) * width
        drawn = panel.bar(x, values, 0.92 * width, color=style(index)["color"])
        if len(names) <= 4:
            texts = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
            panel.bar_label(drawn, texts, fontsize=8, padding=1)
    for group, value in enumerate(chance):
        if math.isfinite(value):
            ends = [group - 0.46, group + 0.46]
            panel.plot(ends, [value, value], color=GREY, linestyle=DASHED, linewidth=1.2)
    panel.set_xticks(groups, ticks)
    panel.set_ylim(0, max(1.0, 1.1 * np.nanmax([*bars.values(), chance])))


def _in_percent(found: Mapping[str, float], metrics: Sequence[str]) -> list[float]:
    return [100 * found.get(name, math.nan) for name in metrics]


def _drawn(results: Results, evaluators: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the checkpoints that have bars."""
    return [name for name in results if any(name in bars for bars in evaluators.values())]


def _percents(results: Results, metrics: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Return evaluator → checkpoint → percent by metrics, NaN where one is missing.

    Raises:
        ValueError: a figure is not in [0, 1]; no evaluator has any of the metrics.
    """
    evaluators: dict[str, dict[str, list[float]]] = {}
    for checkpoint, of_checkpoint in results.items():
        for evaluator, found in of_checkpoint.items():
            known = {name: found[name] for name in metrics if name in found}
            for name, value in known.items():
                if not 0 <= value <= 1:
                    where = f"{checkpoint}, {evaluator}"
                    raise ValueError(f"{where}: {name} must be in [0, 1], not {value}")
            if known:
                evaluators.setdefault(evaluator, {})[checkpoint] = _in_percent(known, metrics)
    if not evaluators:
        raise ValueError(f"no evaluator has any of {', '.join(metrics)}")
    return evaluators
