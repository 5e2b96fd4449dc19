"""Is the gap closing, and did it help: gap, margin and recall against the step, one PNG."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignclip.evaluation.history import Record
from alignclip.evaluation.json_lines import with_nan
from alignclip.evaluation.plots import DASHED, DOTTED, finish, new_figure, style
from alignclip.evaluation.verdict import RECALLS, judge

Metrics = Mapping[str, float]
DASH_DOTTED = (0, (6, 1.5, 1.5, 1.5))
SAME = 1e-3  # of a recall: what precisions of encoding make of it


@dataclass(frozen=True)
class Point:
    """One evaluation of a run: its batch, its metrics, and what features that say nothing would score.

    ``batch`` is None for a model of which nothing says how long it was trained: a level, by which curves are measured.
    """

    batch: int | None
    metrics: Metrics
    chance: Metrics


Curves = Mapping[str, Sequence[Point]]  # by run and evaluator


def curves_of(history: Sequence[Record], run: str = "") -> dict[str, list[Point]]:
    """The evaluations of a run that can be drawn, a curve an evaluator.

    An evaluator of retrieval on the pairs of another one, which measures the gap as well, has no curve of its own. What
    is evaluated twice at one batch is there once, as it was measured last; on another set, which other chances show, it
    is another curve.

    Args:
        history: of the run, in any order.
        run: what to call the run; nothing where there is but one.
    """
    sets: dict[str, list[Metrics]] = {}
    found: dict[str, dict[int, Point]] = {}
    for record in history:
        if "centroid_distance" in record["metrics"] or not set(RECALLS).isdisjoint(
            record["metrics"]
        ):
            known = sets.setdefault(record["evaluator"], [])
            if record["chance"] not in known:
                known.append(record["chance"])
            number = known.index(record["chance"])
            evaluator = (
                f"{record['evaluator']}{f' on another set ({number + 1})' if number else ''}"
            )
            name = " · ".join(part for part in (run, evaluator) if part)
            point = Point(record["batch"], with_nan(record["metrics"]), record["chance"])
            found.setdefault(name, {})[record["batch"]] = point
    return _without_doubles(
        {name: [points[batch] for batch in sorted(points)] for name, points in found.items()}
    )


def levels_of(
    results: Mapping[str, Metrics], chance: Mapping[str, Metrics], checkpoint: str
) -> dict[str, list[Point]]:
    """The results of a checkpoint of which nothing says at which batch it was saved, a level an evaluator."""
    records = _records(0, results, chance)
    return {
        name: [replace(point, batch=None) for point in points]
        for name, points in curves_of(list(records), checkpoint).items()
    }


def _without_doubles(found: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """The curves without those of recalls that another curve, which has the gap as well, goes through."""
    gaps = [
        _recalls(points) for points in found.values() if "centroid_distance" in points[0].metrics
    ]
    return {
        name: points
        for name, points in found.items()
        if "centroid_distance" in points[0].metrics
        or not any(_lies_on(_recalls(points), gap) for gap in gaps)
    }


def records_of(
    place: str,
    results: Mapping[str, Metrics],
    chance: Mapping[str, Metrics],
    batch: int | None = None,
) -> Iterator[Record]:
    """The results of a checkpoint as records of its run.

    Args:
        place: the checkpoint's, whose name may tell its batch (``ep1-ba200-rank0.pt``).
        results: by evaluator.
        chance: by evaluator.
        batch: as the checkpoint itself says it; without it and in the name there are no records.
    """
    if batch is None and (named := re.search(r"(?:^|/)ep\d+-ba(\d+)[^/]*$", place)):
        batch = int(named[1])
    if batch is not None:
        yield from _records(batch, results, chance)


def _records(
    batch: int, results: Mapping[str, Metrics], chance: Mapping[str, Metrics]
) -> Iterator[Record]:
    for evaluator, metrics in results.items():
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        known = dict(chance.get(evaluator, {}))
        yield Record(batch=batch, evaluator=evaluator, metrics=finite, chance=known, verdict=None)


def draw_curves(curves: Curves, path: str | Path) -> None:
    """Draw the gap, the margin and recall@5 against the step, a colour a curve.

    The gap should fall, and margin and recall should rise with it. Dashed is the alignment score, the mean cosine of
    pairs: high where the margin is low, the space has collapsed; the markers of such evaluations are hollow. Dotted is
    the recall that chance would have. A model whose batch is not known is a dash-dotted level.

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
        points = sorted(points, key=lambda point: point.batch or 0)
        measured = [point for point in points if "centroid_distance" in point.metrics]
        _line(gap, measured, [point.metrics["centroid_distance"] for point in measured], index)
        paired = [point for point in measured if "margin" in point.metrics]
        _line(margin, paired, [point.metrics["margin"] for point in paired], index)
        _line(
            margin,
            measured,
            [point.metrics["alignment_score"] for point in measured],
            index,
            dashed=True,
        )
        found = [point for point in points if not math.isnan(_recall(point.metrics))]
        _line(recall, found, [100 * _recall(point.metrics) for point in found], index)
        known = [point for point in found if not math.isnan(_recall(point.chance))]
        if known:
            _plain(recall, known, [100 * _recall(point.chance) for point in known], index, DOTTED)
    titles = {
        gap: "gap: distance of the two means\n↓ lower is better",
        margin: "margin over wrong pairs (solid)\n↑ higher is better; dashed: alignment of pairs",
        recall: "recall@5, both directions, %\n↑ higher is better; dotted: chance",
    }
    for panel, title in titles.items():
        panel.set_title(title, fontsize=10.5)
        _axes(panel)
    finish(gap.figure, path, [_label(name, points) for name, points in curves.items()])


def _line(
    panel: Any, points: Sequence[Point], values: Sequence[float], index: int, dashed: bool = False
) -> None:
    look = style(index)
    if dashed:
        _plain(panel, points, values, index, DASHED)
        return
    if any(point.batch is None for point in points):
        _plain(panel, points, values, index, DASH_DOTTED)
        return
    steps = [point.batch for point in points]
    panel.plot(steps, values, color=look["color"], linewidth=1.5)
    for hollow in (False, True):
        some = [i for i, point in enumerate(points) if _collapsed(point) == hollow]
        face = (
            {"markerfacecolor": "white", "markeredgecolor": look["color"], "markeredgewidth": 1.2}
            if hollow
            else {}
        )
        marks = {**look, "markersize": 5 if len(points) > 20 else 7, "linestyle": "none", **face}
        panel.plot([steps[i] for i in some], [values[i] for i in some], **marks)


def _plain(
    panel: Any, points: Sequence[Point], values: Sequence[float], index: int, line: Any
) -> None:
    """A line without markers; of one point a dash, and across the panel where its batch is not known."""
    look = {"color": style(index)["color"], "linewidth": 1.4, "linestyle": line}
    if any(point.batch is None for point in points):
        for value in values:
            panel.axhline(value, **look)
    else:
        lone = {"marker": "_", "markersize": 12} if len(points) == 1 else {}
        panel.plot([point.batch for point in points], values, **look, **lone)


def _label(name: str, points: Sequence[Point]) -> str:
    """An entry of the legend, with what is particular about the curve."""
    level = any(point.batch is None for point in points)
    notes = ["dash-dotted: at no known batch"] if level else []
    notes += ["collapsed" if level else "hollow: collapsed"] if _any_collapsed(points) else []
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


def _collapsed(point: Point) -> bool:
    known = {
        "centroid_distance",
        "margin",
        "effective_rank_image",
        "effective_rank_text",
    } <= point.metrics.keys()
    verdict = judge(point.metrics, point.chance) if known else None
    return verdict is not None and verdict.collapsed


def _any_collapsed(points: Sequence[Point]) -> bool:
    return any(_collapsed(point) for point in points)


def _recall(metrics: Metrics) -> float:
    """The mean over both directions; NaN where neither was measured."""
    known = [metrics[name] for name in RECALLS if name in metrics]
    return sum(known) / len(known) if known else math.nan


def _recalls(points: Sequence[Point]) -> dict[int | None, float]:
    return {point.batch: _recall(point.metrics) for point in points}


def _lies_on(some: dict[int | None, float], curve: dict[int | None, float]) -> bool:
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
