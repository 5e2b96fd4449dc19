"""Is the gap closing, and did it help: gap, margin and recall against the step, one PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignclip.evaluation.history import Record, numbers
from alignclip.evaluation.plots import DASHED, DOTTED, finish, new_figure, style
from alignclip.evaluation.verdict import RECALLS, judge

Metrics = Mapping[str, float]
SAME = 1e-3  # of a recall: what precisions of encoding make of it


@dataclass(frozen=True)
class Point:
    """One evaluation of a run: its batch, its metrics, and what features that say nothing would score."""

    batch: int
    metrics: Metrics
    chance: Metrics


Curves = Mapping[str, Sequence[Point]]  # by run and evaluator


def curves_of(history: Sequence[Record], run: str = "") -> dict[str, list[Point]]:
    """The evaluations of a run that can be drawn, a curve an evaluator.

    An evaluator of retrieval on the pairs of another one, which measures the gap as well, has no curve of its own.

    Args:
        history: of the run, in any order.
        run: what to call the run; nothing where there is but one.
    """
    found: dict[str, list[Point]] = {}
    for record in sorted(history, key=lambda record: record["batch"]):
        if "centroid_distance" in record["metrics"] or not set(RECALLS).isdisjoint(record["metrics"]):
            name = " · ".join(part for part in (run, record["evaluator"]) if part)
            found.setdefault(name, []).append(Point(record["batch"], numbers(record["metrics"]), record["chance"]))
    gaps = [_recalls(points) for points in found.values() if "centroid_distance" in points[0].metrics]
    return {
        name: points
        for name, points in found.items()
        if "centroid_distance" in points[0].metrics or not any(_lies_on(_recalls(points), gap) for gap in gaps)
    }


def records_of(place: str, results: Mapping[str, Metrics], chance: Mapping[str, Metrics]) -> Iterator[Record]:
    """The results of a checkpoint as records of its run, where its name tells the batch (``ep1-ba200-rank0.pt``)."""
    if batch := re.search(r"(?:^|/)ep\d+-ba(\d+)[^/]*$", place):
        for evaluator, metrics in results.items():
            finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            known = dict(chance.get(evaluator, {}))
            yield Record(batch=int(batch[1]), evaluator=evaluator, metrics=finite, chance=known, verdict=None)


def draw_curves(curves: Curves, path: str | Path) -> None:
    """Draw the gap, the margin and recall@5 against the step, a colour a curve.

    The gap should fall, and margin and recall should rise with it. Dashed is the alignment score, the mean cosine of
    pairs: high where the margin is low, the space has collapsed; the markers of such evaluations are hollow. Dotted is
    the recall that chance would have.

    Args:
        curves: evaluations by the name of the curve, in any order.
        path: the PNG to write; its folder must exist.

    Raises:
        ValueError: no curves, or a figure that is not finite: which.
        UserError: matplotlib is not installed.
    """
    _check(curves)
    panels = new_figure(curves, 12, 4).subplots(1, 3, sharex=True)
    gap, margin, recall = panels
    for index, points in enumerate(curves.values()):
        points = sorted(points, key=lambda point: point.batch)
        measured = [point for point in points if "centroid_distance" in point.metrics]
        _line(gap, measured, [point.metrics["centroid_distance"] for point in measured], index)
        paired = [point for point in measured if "margin" in point.metrics]
        _line(margin, paired, [point.metrics["margin"] for point in paired], index)
        _line(margin, measured, [point.metrics["alignment_score"] for point in measured], index, dashed=True)
        found = [point for point in points if not math.isnan(_recall(point.metrics))]
        _line(recall, found, [100 * _recall(point.metrics) for point in found], index)
        known = [point for point in found if not math.isnan(_recall(point.chance))]
        if known:
            chance = [100 * _recall(point.chance) for point in known]
            recall.plot([p.batch for p in known], chance, color=style(index)["color"], linestyle=DOTTED, linewidth=1.5)
    titles = {
        gap: "gap: distance of the two means\n↓ lower is better",
        margin: "margin over wrong pairs (solid)\n↑ higher is better; dashed: alignment of pairs",
        recall: "recall@5, both directions, %\n↑ higher is better; dotted: chance",
    }
    for panel, title in titles.items():
        panel.set_title(title, fontsize=10.5)
        _axes(panel)
    labels = [f"{name}{' (hollow: collapsed)' if _any_collapsed(points) else ''}" for name, points in curves.items()]
    finish(gap.figure, path, labels)


def _line(panel: Any, points: Sequence[Point], values: Sequence[float], index: int, dashed: bool = False) -> None:
    look = style(index)
    steps = [point.batch for point in points]
    if dashed:
        panel.plot(steps, values, color=look["color"], linestyle=DASHED, linewidth=1.2)
        return
    panel.plot(steps, values, color=look["color"], linewidth=1.5)
    for hollow in (False, True):
        some = [i for i, point in enumerate(points) if _collapsed(point) == hollow]
        face = {"markerfacecolor": "white", "markeredgecolor": look["color"], "markeredgewidth": 1.2} if hollow else {}
        marks = {**look, "markersize": 5 if len(points) > 20 else 7, "linestyle": "none", **face}
        panel.plot([steps[i] for i in some], [values[i] for i in some], **marks)


def _axes(panel: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.set_xlabel("batch")
    # 0 is in view: a small change looks small; and above the highest marker there is room for it
    low, high = panel.dataLim.intervaly
    if math.isfinite(low) and math.isfinite(high):
        panel.set_ylim(min(1.08 * low, 0), max(1.08 * high, 0) or 1.0)
    else:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", color="0.4")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _collapsed(point: Point) -> bool:
    known = {"centroid_distance", "margin", "effective_rank_image", "effective_rank_text"} <= point.metrics.keys()
    verdict = judge(point.metrics, point.chance) if known else None
    return verdict is not None and verdict.collapsed


def _any_collapsed(points: Sequence[Point]) -> bool:
    return any(_collapsed(point) for point in points)


def _recall(metrics: Metrics) -> float:
    """The mean over both directions; NaN where neither was measured."""
    known = [metrics[name] for name in RECALLS if name in metrics]
    return sum(known) / len(known) if known else math.nan


def _recalls(points: Sequence[Point]) -> dict[int, float]:
    return {point.batch: _recall(point.metrics) for point in points}


def _lies_on(some: dict[int, float], curve: dict[int, float]) -> bool:
    """Whether all points of one curve are on another one, but for rounding."""
    return all(batch in curve and abs(curve[batch] - value) < SAME for batch, value in some.items())


def _check(curves: Curves) -> None:
    if not any(curves.values()):
        raise ValueError("no checkpoints to draw")
    for name, points in curves.items():
        for point in points:
            drawn = ("centroid_distance", "alignment_score", "margin", *RECALLS)
            for metric in drawn:
                if not math.isfinite(point.metrics.get(metric, 0.0)):
                    raise ValueError(
                        f"{name}, batch {point.batch}: {metric} must be finite, not {point.metrics[metric]}"
                    )
