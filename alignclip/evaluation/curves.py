"""Gap, margin and recall against the step, one PNG: is the gap closing, and did it help?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignclip.evaluation.frame import (
    DASH_DOTTED,
    DASHED,
    DOTTED,
    count_batches,
    entries,
    new_panels,
    save_figure,
    style,
)
from alignclip.evaluation.history import EvaluationRecord, run_folder
from alignclip.evaluation.json_lines import with_nan
from alignclip.evaluation.report import ComparisonReport
from alignclip.evaluation.verdict import RECALLS, judge, mean_recall

DISTANCE = "centroid_distance"
JUDGED = {DISTANCE, "margin", "effective_rank_image", "effective_rank_text"}
SAME = 1e-3  # of a recall: what precisions of encoding make of it
MANY = 20  # points of a curve whose markers are smaller

Values = Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """An evaluation of a run.

    Attributes:
        batch: None for a model whose batch is not known, which is drawn as a level.
        metrics: the figures.
        chance: what features that say nothing would score.
    """

    batch: int | None
    metrics: Values
    chance: Values

    @property
    def recall(self) -> float:
        """Recall@5, the mean over both directions; NaN where neither was measured."""
        return mean_recall(self.metrics)

    @property
    def collapsed(self) -> bool:
        """Say whether the verdict is a collapse."""
        verdict = judge(self.metrics, self.chance) if self.metrics.keys() >= JUDGED else None
        return verdict is not None and verdict.collapsed


Evaluated = tuple[str, Point]  # by an evaluator
Curves = dict[str, list[Point]]  # by run and evaluator


def gap_curves(report: ComparisonReport) -> Curves:
    """Collect the evaluations in training of the runs that are compared, and the checkpoints' own.

    Each of several checkpoints is a point of its run's curve. A checkpoint whose batch is not known
    is a level. Both are called as in the table.
    """
    own: dict[str, list[Evaluated]] = {}
    runs: dict[str, list[str]] = {}  # folder → the names of its checkpoints
    for name, one in report.checkpoints.items():
        own[name] = [
            (evaluator, Point(one.batch, metrics, report.chance.get(evaluator, {})))
            for evaluator, metrics in report.results[name].items()
        ]
        if one.history or (own[name] and one.batch is not None):
            runs.setdefault(run_folder(one.place), []).append(name)
    curves: Curves = {}
    several = len(report.checkpoints) > 1
    for name, one in report.checkpoints.items():
        if one.batch is None and several:
            curves |= curves_of(own[name], name)
        folder = run_folder(one.place)
        members = runs.get(folder, [])
        if members[:1] == [name]:
            found = of_records(one.history)
            known = [member for member in members if report.checkpoints[member].batch is not None]
            for member in known:
                found += own[member]
            curves |= curves_of(found, _run_name(folder, members, [*runs]) if several else "")
    return curves


def of_records(history: Sequence[EvaluationRecord]) -> list[Evaluated]:
    """Return the evaluations of a run as points of curves."""
    return [
        (one["evaluator"], Point(one["batch"], with_nan(one["metrics"]), one["chance"]))
        for one in history
    ]


def _run_name(folder: str, members: Sequence[str], folders: Sequence[str]) -> str:
    """Return a run's folder, with the name of its checkpoint before it, where there is but one."""
    short = [one.rpartition("/")[2] for one in folders]
    # runs of one name in several places are told apart by the whole place
    run = folder.rpartition("/")[2] if len(set(short)) == len(short) else folder
    first, *others = members
    return run if others or first == run else f"{first} ({run})"


def curves_of(evaluated: Sequence[Evaluated], run: str = "") -> Curves:
    """Choose the evaluations of a run that can be drawn, a curve an evaluator.

    An evaluator of retrieval on the pairs of another one, which measures the gap as well, has no
    curve of its own. What is evaluated twice at one batch is there once, as it was measured last;
    on another set, which other chances show, it is another curve.

    Args:
        evaluated: by the run, in any order.
        run: what to call the run; nothing where there is but one.
    """
    sets: dict[str, list[Values]] = {}
    found: dict[str, dict[int, Point]] = {}
    for evaluator, point in evaluated:
        if point.metrics.keys().isdisjoint((DISTANCE, *RECALLS)):
            continue
        known = sets.setdefault(evaluator, [])
        if point.chance not in known:
            known.append(point.chance)
        number = known.index(point.chance)
        name = f"{run} · {evaluator}" if run else evaluator
        name += f" on another set ({number + 1})" if number else ""
        found.setdefault(name, {})[point.batch or 0] = point
    curves = {name: [points[batch] for batch in sorted(points)] for name, points in found.items()}
    gaps = [points for points in curves.values() if DISTANCE in points[0].metrics]
    return {
        name: points
        for name, points in curves.items()
        if points in gaps or not any(_lies_on(points, gap) for gap in gaps)
    }


def _lies_on(points: Sequence[Point], curve: Sequence[Point]) -> bool:
    """Say whether all recalls of one curve are another one's, but for rounding."""
    recalls = {point.batch: point.recall for point in curve}
    return all(abs(recalls.get(one.batch, math.inf) - one.recall) < SAME for one in points)


def draw_curves(curves: Mapping[str, Sequence[Point]], path: str | Path) -> None:
    """Draw the gap, the margin and recall@5 against the step, a colour a curve.

    The gap should fall, and margin and recall should rise with it. Dashed is the alignment score,
    the mean cosine of pairs: high where the margin is low, the space has collapsed; the markers of
    such evaluations are hollow. Dotted is the recall that chance would have. A model whose batch is
    not known is a dash-dotted level.

    Args:
        curves: evaluations by the name of the curve, in any order.
        path: the PNG to write; its folder must exist.

    Raises:
        ValueError: no curves.
        UserError: matplotlib is not installed.
    """
    gap, margin, recall = panels = new_panels(curves, 12, 4, columns=3, sharex=True)[0]
    for index, points in enumerate(curves.values()):
        points = sorted(points, key=lambda point: point.batch or 0)
        drawn = _Drawn(points, style(index))
        drawn.marked(gap, [point.metrics.get(DISTANCE, math.nan) for point in points])
        drawn.marked(margin, [point.metrics.get("margin", math.nan) for point in points])
        aligned = [point.metrics.get("alignment_score", math.nan) for point in points]
        drawn.line(margin, aligned, DASHED)
        drawn.marked(recall, [100 * point.recall for point in points])
        drawn.line(recall, [100 * mean_recall(point.chance) for point in points], DOTTED)
    titles = (
        "gap: distance of the two means\n↓ lower is better",
        "margin over wrong pairs (solid)\n↑ higher is better; dashed: alignment of pairs",
        "recall@5, both directions, %\n↑ higher is better; dotted: chance",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10.5)
        _axes(panel)
    labels = [_label(name, points) for name, points in curves.items()]
    save_figure(gap.figure, path, entries(labels))


class _Drawn:
    """The curve of some points, in its colour, on any panel; NaN was not measured."""

    def __init__(self, points: Sequence[Point], look: Mapping[str, Any]) -> None:
        self.level = any(point.batch is None for point in points)
        self.batches = [point.batch or 0 for point in points]
        self.color, self.marker = look["color"], look["marker"]
        # hollow where the space has collapsed
        self.faces = ["white" if point.collapsed else self.color for point in points]
        self.edges = [self.color if point.collapsed else "white" for point in points]

    def marked(self, panel: Any, values: Sequence[float]) -> None:
        """Draw a solid line with markers."""
        if self.level:
            self.line(panel, values, DASH_DOTTED)
            return
        panel.plot(self.batches, values, color=self.color, linewidth=1.5)
        side = 5 if len(values) > MANY else 7
        marks = {"marker": self.marker, "s": side**2, "linewidths": 1.0, "zorder": 3}
        colours = {"facecolors": self.faces, "edgecolors": self.edges}
        panel.scatter(self.batches, values, **marks, **colours)

    def line(self, panel: Any, values: Sequence[float], dashes: Any) -> None:
        """Draw a line without markers: of one point a dash, of a level a line across the panel."""
        look = {"color": self.color, "linewidth": 1.4, "linestyle": dashes}
        known = [value for value in values if not math.isnan(value)]
        if self.level:
            for value in known:
                panel.axhline(value, **look)
        elif known:
            lone = {"marker": "_", "markersize": 12} if len(known) == 1 else {}
            panel.plot(self.batches, values, **look, **lone)


def _label(name: str, points: Sequence[Point]) -> str:
    """Return an entry of the legend, with what is particular about the curve."""
    level = any(point.batch is None for point in points)
    notes = ["dash-dotted: at no known batch"] if level else []
    if any(point.collapsed for point in points):
        notes.append("collapsed" if level else "hollow: collapsed")
    return f"{name} ({'; '.join(notes)})" if notes else name


def _axes(panel: Any) -> None:
    # 0 is in view: a small change looks small; and above the highest marker there is room for it
    low, high = panel.dataLim.intervaly
    if math.isfinite(low) and math.isfinite(high):
        panel.set_ylim(min(1.08 * low, 0), max(1.08 * high, 0) or 1.0)
    else:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", color="0.4")
    count_batches(panel)
