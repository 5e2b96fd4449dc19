"""A page of learning curves, and the same curves as a picture.

The page is HTML with its pictures in it, and needs no connection.
"""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.config.metrics import arrow, metric_named
from alignclip.evaluation.frame import (
    DASH_DOTTED,
    DASHED,
    DOTTED,
    MID_GREY,
    OKABE_ITO,
    Entry,
    add_legend,
    add_panel_legends,
    count_batches,
    new_panels,
    style,
    write_png,
)
from alignclip.evaluation.packages import library

NEARER = 0.005  # of the chart's height: curves that are nearer look like one
MOST_DOTS = 40  # points that get a dot each
WHOLE = ("-", DASH_DOTTED, (0, (9, 1.5)), (0, (9, 1.5, 3, 1.5)))  # lines: one after all colours
STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#222;max-width:1240px}"
    "h1{font-size:20px}h2{font-size:15px;margin:0 0 2px}figure{margin:0}"
    ".charts{display:flex;flex-wrap:wrap;gap:24px}"
    "figcaption,p{color:#555;font-size:12.5px;max-width:560px}"
)
GAP_CAPTION = (
    "centroid_distance ↓: the gap. margin ↑: pairs against wrong pairs; a gap that closes while "
    "the margin falls to 0 is a collapse."
)
NOTHING = "<p>Nothing was trained yet.</p>"

Curve = list[tuple[int, float]]  # batches and values


@dataclass
class Chart:
    """Curves that share an axis.

    Attributes:
        title: above it.
        caption: what to read off it.
        curves: by name.
        chance: what features that say nothing would score, at the same batches, by the curve's
            name.
    """

    title: str
    caption: str
    curves: dict[str, Curve] = field(default_factory=dict)
    chance: dict[str, Curve] = field(default_factory=dict)

    def add(self, name: str, batch: int, value: float | None, chance: float | None = None) -> None:
        """Add a point to a curve, and to its chance, where there are such."""
        if value is not None:
            self.curves.setdefault(name, []).append((batch, float(value)))
            if chance is not None:
                self.chance.setdefault(name, []).append((batch, float(chance)))


def page(run_name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw the page of a run.

    Args:
        run_name: in its title.
        lines: of :mod:`alignclip.training.history`.

    Returns:
        the text of an HTML file.

    Raises:
        UserError: matplotlib is not installed.
    """
    starts, last = _starts_and_last(lines)
    figures = "\n".join(_figure(chart, starts, last) for chart in charts(lines))
    title = f"{html.escape(run_name)}: learning curves"
    batches = ", ".join(f"{batch:,}" for batch in starts)
    went_on = f" Grey lines: starts that went on, after batch {batches}." if starts else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{title} to batch {last:,}</h1>\n"
        f"<p>All starts of the run; the horizontal axis is the batch.{went_on}</p>\n"
        f'<div class="charts">\n{figures or NOTHING}\n</div>\n</body></html>\n'
    )


def save_picture(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write the curves of a run as a PNG.

    Args:
        path: of the picture.
        lines: see :func:`page`.

    Raises:
        UserError: matplotlib is not installed.
    """
    starts, last = _starts_and_last(lines)
    shown = charts(lines) or [Chart("Nothing was trained yet", "")]
    rows = math.ceil(len(shown) / 2)
    panels = list(new_panels([one.title for one in shown], 12.0, 3.0 * rows, rows, 2).flat)
    figure, legends = panels[0].figure, []
    for panel, chart in zip(panels, shown, strict=False):
        panel.set_title(chart.title, loc="left")
        legends.append(_draw(panel, chart, starts, last))
    for panel in panels[len(shown) :]:
        panel.remove()
    add_panel_legends(figure, legends)
    with _without_warnings():
        write_png(figure, path)


def charts(lines: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """Choose what is drawn: losses, rate, scale, and the metrics that declare a chart."""
    found = {
        "loss": Chart(
            "Loss", "Lower is better. Of a model that knows nothing, contrastive is ln(batch size)."
        ),
        "gap": Chart("Modality gap and margin", GAP_CAPTION),
        "score": Chart("Retrieval and accuracy", "Does it help? Shares in [0, 1]. Dotted: chance."),
        "lr": Chart("Learning rate", "Of the first parameter group."),
        "logit_scale": Chart("Logit scale", "exp(logit_scale), kept in [1, 100]."),
    }
    for line in lines:
        batch = line["batch"]
        for name, value in line.get("losses", {}).items():
            found["loss"].add(name, batch, value)
        for name in ("lr", "logit_scale"):
            found[name].add(name, batch, line.get(name))
        for name, value in line.get("metrics", {}).items():
            metric = name.rpartition("/")[2]
            if chart := metric_named(metric).chart:
                chance = line.get("chance", {}).get(name)
                found[chart].add(f"{name} {arrow(metric)}".strip(), batch, value, chance)
    return [chart for chart in found.values() if chart.curves]


def _starts_and_last(lines: Sequence[Mapping[str, Any]]) -> tuple[list[int], int]:
    """Return the batches after which the run went on, and the last batch of all."""
    starts = sorted({line["batch"] for line in lines if line.get("start") and line["batch"] > 0})
    return starts, max((line["batch"] for line in lines), default=0)


def _figure(chart: Chart, starts: Iterable[int], last: int) -> str:
    """Draw a chart with its legend below."""
    panel = new_panels(chart.curves, 5.8, 2.9)[0, 0]
    add_legend(panel.figure, _draw(panel, chart, starts, last), side="left")
    title = f"<h2>{chart.title}</h2>\n{_svg(panel.figure)}"
    return f"<figure>{title}\n<figcaption>{chart.caption}</figcaption></figure>"


def _draw(panel: Any, chart: Chart, starts: Iterable[int], last: int) -> list[Entry]:
    """Draw a chart from the run's first batch to its last, and return the legend's entries."""
    panel.grid(axis="y", color="0.9", linewidth=0.8)
    for batch in starts:
        panel.axvline(batch, color=MID_GREY, linestyle=DASHED, linewidth=0.8)
    # once where several curves have the same chance, but for the last digits
    rounded = {tuple((b, round(v, 6)) for b, v in curve) for curve in chart.chance.values()}
    for level in sorted(rounded):
        _draw_chance(panel, level)
    beneath = _beneath(chart.curves)
    shown: list[Entry] = []
    for index, (name, curve) in enumerate(chart.curves.items()):
        line = WHOLE[index // len(OKABE_ITO) % len(WHOLE)]
        look = {"color": style(index)["color"], "linewidth": 1.3, "linestyle": line}
        if name in beneath:  # dashed above the other curve: both are seen
            look |= {"linestyle": DASHED, "zorder": 3}
        dots = {"marker": "o", "markersize": 2 if name in beneath else 3.5}
        batches, values = zip(*curve, strict=True)
        panel.plot(batches, values, **look, **(dots if len(curve) <= MOST_DOTS else {}))
        shown.append((_said(chart, name, beneath), look))
    count_batches(panel)
    panel.set_xlim(-0.02 * last, max(1.02 * last, 1))
    return shown


def _draw_chance(panel: Any, curve: Sequence[tuple[int, float]]) -> None:
    """Draw a dotted line: across the chart where chance is the same at every evaluation."""
    look = {"color": MID_GREY, "linestyle": DOTTED, "linewidth": 1.4}
    batches, values = zip(*curve, strict=True)
    if len(set(values)) == 1:
        panel.axhline(values[0], **look)
    else:
        panel.plot(batches, values, **look)


def _beneath(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Return the curves that can't be told from an earlier one, and the earlier one's name."""
    values = [value for curve in curves.values() for _, value in curve]
    apart = NEARER * (max(values) - min(values))
    found: dict[str, str] = {}
    for name, curve in curves.items():
        for earlier in [one for one in curves if one not in found]:
            if earlier == name:
                break
            same = len(curve) == len(curves[earlier])
            if same and np.allclose(curve, curves[earlier], rtol=0, atol=apart):
                found[name] = earlier
                break
    return found


def _said(chart: Chart, name: str, beneath: Mapping[str, str]) -> str:
    """Return a curve's words in the legend: its last value, and where it lies."""
    batch, value = chart.curves[name][-1]
    said = f"{name}: {value:.4g} at batch {batch:,}"
    said += f", on the line of {beneath[name]}" if name in beneath else ""
    return said + (f", chance {chart.chance[name][-1][1]:.4g}" if name in chart.chance else "")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Say nothing of letters that matplotlib's own font lacks; a browser's fonts have them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")
        yield


def _svg(figure: Any) -> str:
    """Return a figure as an element of a page, whose texts are texts."""
    text = io.StringIO()
    with library("matplotlib").rc_context({"svg.fonttype": "none"}), _without_warnings():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("?>")[2].partition(">")[2].strip()
