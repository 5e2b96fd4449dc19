"""Gap, margin and recall against the step, one PNG: is the gap closing, and did it help?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignclip.evaluation.frame import (
    DASH_DOTTED,
    DASHED,
    DOTTED,
    new_panels,
    save_figure,
    style,
)
from alignclip.evaluation.history import Record, history_beside, run_folder
from alignclip.evaluation.json_lines import with_nan, without_nan
from alignclip.evaluation.report import ComparisonReport, places
from alignclip.evaluation.verdict import RECALLS, judge

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
        return _mean_recall(self.metrics)

    @property
    def collapsed(self) -> bool:
        """Say whether the verdict is a collapse."""
        verdict = judge(self.metrics, self.chance) if self.metrics.keys() >= JUDGED else None
        return verdict is not None and verdict.collapsed


Curves = dict[str, list[Point]]  # by run and evaluator


def gap_curves(report: ComparisonReport) -> Curves:
    """Collect the evaluations in training of the runs that are compared, and the checkpoints' own.

    Each of several checkpoints is a point of its run's curve. A checkpoint whose batch is not known
    is a level. Both are called as in the table.
    """
    compared = places(report.config)
    runs: dict[str, list[Record]] = {}
    members: dict[str, list[str]] = {}  # of each run: the names of its checkpoints
    levels: dict[str, Curves] = {}
    for name, place in compared.items():
        batch = report.batches.get(name)
        batch = _batch_named(place) if batch is None else batch
        results = report.results.get(name, {})
        own = records_of(batch or 0, results, report.chance)
        past = history_beside(place)
        if batch is None and len(compared) > 1:
            levels[name] = {
                curve: [replace(point, batch=None) for point in points]
                for curve, points in curves_of(own, name).items()
            }
        own = [] if batch is None else own
        if own or past:
            folder = run_folder(place)
            members.setdefault(folder, []).append(name)
            runs[folder] = [*runs.get(folder, past), *own]
    found = dict(levels)
    for folder, records in runs.items():
        run = _run_name(folder, members, list(runs)) if len(compared) > 1 else ""
        first = members[folder][0]
        found[first] = found.get(first, {}) | curves_of(records, run)
    return {curve: points for name in compared for curve, points in found.get(name, {}).items()}


def _batch_named(place: str) -> int | None:
    """Return the batch that a kept checkpoint's name tells, as in ``ep1-ba200-rank0.pt``."""
    named = re.search(r"(?:^|/)ep\d+-ba(\d+)[^/]*$", place)
    return int(named[1]) if named else None


def _run_name(folder: str, members: Mapping[str, Sequence[str]], folders: Sequence[str]) -> str:
    """Return a run's folder, with the name of its checkpoint before it, where there is but one."""
    short = [one.rpartition("/")[2] for one in folders]
    # runs of one name in several places are told apart by the whole place
    run = folder.rpartition("/")[2] if len(set(short)) == len(short) else folder
    first, *others = members[folder]
    return run if others or first == run else f"{first} ({run})"


def records_of(
    batch: int, results: Mapping[str, Values], chance: Mapping[str, Values]
) -> list[Record]:
    """Return the results of a checkpoint as records of its run, by evaluator."""
    return [
        Record(
            batch=batch,
            evaluator=evaluator,
            metrics=without_nan(metrics),
            chance=dict(chance.get(evaluator, {})),
            verdict=None,
        )
        for evaluator, metrics in results.items()
    ]


def curves_of(history: Sequence[Record], run: str = "") -> Curves:
    """Choose the evaluations of a run that can be drawn, a curve an evaluator.

    An evaluator of retrieval on the pairs of another one, which measures the gap as well, has no
    curve of its own. What is evaluated twice at one batch is there once, as it was measured last;
    on another set, which other chances show, it is another curve.

    Args:
        history: of the run, in any order.
        run: what to call the run; nothing where there is but one.
    """
    sets: dict[str, list[Values]] = {}
    found: dict[str, dict[int, Point]] = {}
    for record in history:
        if record["metrics"].keys().isdisjoint((DISTANCE, *RECALLS)):
            continue
        known = sets.setdefault(record["evaluator"], [])
        if record["chance"] not in known:
            known.append(record["chance"])
        number = known.index(record["chance"])
        parts = [run, record["evaluator"]] if run else [record["evaluator"]]
        name = " · ".join(parts) + (f" on another set ({number + 1})" if number else "")
        point = Point(record["batch"], with_nan(record["metrics"]), record["chance"])
        found.setdefault(name, {})[record["batch"]] = point
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
        ValueError: no curves, or a figure that is not finite: which.
        UserError: matplotlib is not installed.
    """
    _check_points(curves)
    gap, margin, recall = panels = new_panels(curves, 12, 4, columns=3, sharex=True)[0]
    for index, points in enumerate(curves.values()):
        points = sorted(points, key=lambda point: point.batch or 0)
        _draw_marked(gap, points, [point.metrics.get(DISTANCE) for point in points], index)
        _draw_marked(margin, points, [point.metrics.get("margin") for point in points], index)
        aligned = [point.metrics.get("alignment_score") for point in points]
        _draw_line(margin, points, aligned, index, DASHED)
        _draw_marked(recall, points, [100 * point.recall for point in points], index)
        chances = [100 * _mean_recall(point.chance) for point in points]
        _draw_line(recall, points, chances, index, DOTTED)
    titles = (
        "gap: distance of the two means\n↓ lower is better",
        "margin over wrong pairs (solid)\n↑ higher is better; dashed: alignment of pairs",
        "recall@5, both directions, %\n↑ higher is better; dotted: chance",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10.5)
        _axes(panel)
    save_figure(gap.figure, path, [_label(name, points) for name, points in curves.items()])


def _known(
    points: Sequence[Point], values: Sequence[float | None]
) -> tuple[list[Point], list[float]]:
    """Leave out what was not measured."""
    pairs = [
        (point, value)
        for point, value in zip(points, values, strict=True)
        if value is not None and not math.isnan(value)
    ]
    return [point for point, _ in pairs], [value for _, value in pairs]


def _draw_marked(
    panel: Any, points: Sequence[Point], values: Sequence[float | None], index: int
) -> None:
    """Draw a solid line with markers, which are hollow where the space has collapsed."""
    if any(point.batch is None for point in points):
        _draw_line(panel, points, values, index, DASH_DOTTED)
        return
    points, numbers = _known(points, values)
    look = style(index)
    steps = [point.batch for point in points]
    panel.plot(steps, numbers, color=look["color"], linewidth=1.5)
    look |= {"markersize": 5 if len(points) > MANY else 7, "linestyle": "none"}
    hollow = {
        "markerfacecolor": "white",
        "markeredgecolor": look["color"],
        "markeredgewidth": 1.2,
    }
    for collapsed, more in ((False, {}), (True, hollow)):
        rows = [i for i, point in enumerate(points) if point.collapsed == collapsed]
        panel.plot([steps[i] for i in rows], [numbers[i] for i in rows], **{**look, **more})


def _draw_line(
    panel: Any, points: Sequence[Point], values: Sequence[float | None], index: int, dashes: Any
) -> None:
    """Draw a line without markers: of one point a dash, of a level a line across the panel."""
    points, numbers = _known(points, values)
    look = {"color": style(index)["color"], "linewidth": 1.4, "linestyle": dashes}
    if any(point.batch is None for point in points):
        for number in numbers:
            panel.axhline(number, **look)
    elif points:
        lone = {"marker": "_", "markersize": 12} if len(points) == 1 else {}
        panel.plot([point.batch for point in points], numbers, **look, **lone)


def _label(name: str, points: Sequence[Point]) -> str:
    """Return an entry of the legend, with what is particular about the curve."""
    level = any(point.batch is None for point in points)
    notes = ["dash-dotted: at no known batch"] if level else []
    if any(point.collapsed for point in points):
        notes.append("collapsed" if level else "hollow: collapsed")
    return f"{name} ({'; '.join(notes)})" if notes else name


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


def _mean_recall(metrics: Values) -> float:
    known = [metrics[name] for name in RECALLS if name in metrics]
    return sum(known) / len(known) if known else math.nan


def _check_points(curves: Mapping[str, Sequence[Point]]) -> None:
    if not any(curves.values()):
        raise ValueError("no checkpoints to draw")
    for name, points in curves.items():
        for point in points:
            for metric in (DISTANCE, "alignment_score", "margin", *RECALLS):
                if not math.isfinite(value := point.metrics.get(metric, 0.0)):
                    where = f"{name}, batch {point.batch}"
                    raise ValueError(f"{where}: {metric} must be finite, not {value}")
