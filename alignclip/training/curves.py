"""A page of learning curves: HTML with its pictures in it, which any browser shows without a connection."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignclip.config.metrics import arrow, metric_named

WIDTH, HEIGHT = 560, 280  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 34  # its margins
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito's: told apart by all eyes
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "12 4")
STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#222;max-width:1240px}h1{font-size:20px}"
    "h2{font-size:15px;margin:0 0 2px}.charts{display:flex;flex-wrap:wrap;gap:24px}figure{margin:0}"
    "figcaption,p{color:#555;font-size:12.5px;max-width:560px}svg text{font:11px system-ui,sans-serif;fill:#444}"
)
CHANCE = 'fill="none" stroke="#777" stroke-width="1.4" stroke-dasharray="1.5 4"'  # of a line of chance: dotted
ABOVE, TOLD = (
    "5 5",
    1.0,
)  # dashes of a curve on another one; pixels from which two curves are told apart
Point = tuple[int, float]
Place = tuple[float, float]  # of a point in a chart, in pixels


@dataclass
class Chart:
    """Curves that share an axis.

    Attributes:
        title: above it.
        caption: what to read off it.
        curves: points (batch, value) by name.
        chance: what features that say nothing would score, at the same batches, by the curve's name.
    """

    title: str
    caption: str
    curves: dict[str, list[Point]] = field(default_factory=dict)
    chance: dict[str, list[Point]] = field(default_factory=dict)


def page(run_name: str, lines: Sequence[dict[str, Any]]) -> str:
    """The page of a run.

    Args:
        run_name: in its title.
        lines: of :mod:`alignclip.training.history`.

    Returns:
        the text of an HTML file.
    """
    starts = sorted({line["batch"] for line in lines if line.get("start")})
    last = max((line["batch"] for line in lines), default=0)
    body = "\n".join(_figure(chart, starts, last) for chart in charts(lines))
    name = html.escape(run_name)
    again = [batch for batch in starts if batch > 0]
    went_on = (
        f" Grey lines: starts that went on, after batch {', '.join(f'{b:,}' for b in again)}."
        if again
        else ""
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: learning curves</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{name}: learning curves to batch {last:,}</h1>\n"
        f"<p>All starts of the run; the horizontal axis is the batch.{went_on}</p>\n"
        f'<div class="charts">\n{body or "<p>Nothing was trained yet.</p>"}\n</div>\n</body></html>\n'
    )


def charts(lines: Sequence[dict[str, Any]]) -> list[Chart]:
    """What is drawn: losses, rate, scale, and what each evaluator says that is worth watching."""
    losses = Chart(
        "Loss", "Lower is better. Of a model that knows nothing, contrastive is ln(batch size)."
    )
    rate = Chart("Learning rate", "Of the first parameter group.")
    scale = Chart("Logit scale", "exp(logit_scale), kept in [1, 100].")
    gap = Chart("Modality gap and margin", "centroid_distance ↓: the gap. margin ↑: pairs against wrong pairs; a gap "
                "that closes while the margin falls to 0 is a collapse.")  # fmt: skip
    score = Chart("Retrieval and accuracy", "Does it help? Shares in [0, 1]. Dotted: chance.")
    for line in lines:
        batch = line["batch"]
        for name, value in line.get("losses", {}).items():
            _add(losses.curves, name, batch, value)
        _add(rate.curves, "lr", batch, line.get("lr"))
        _add(scale.curves, "logit_scale", batch, line.get("logit_scale"))
        for name, value in line.get("metrics", {}).items():
            metric = name.rpartition("/")[2]
            if kind := metric_named(metric).chart:
                chart = {"gap": gap, "score": score}[kind]
                shown = f"{name} {arrow(metric)}".strip()
                _add(chart.curves, shown, batch, value)
                if value is not None:
                    _add(chart.chance, shown, batch, line.get("chance", {}).get(name))
    return [chart for chart in (losses, gap, score, rate, scale) if chart.curves]


def _add(curves: dict[str, list[Point]], name: str, batch: int, value: float | None) -> None:
    if value is not None:
        curves.setdefault(name, []).append((batch, float(value)))


def _figure(chart: Chart, starts: Sequence[int], last: int) -> str:
    """A chart with its legend."""
    values = [
        value for points in (*chart.curves.values(), *chart.chance.values()) for _, value in points
    ]
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], min(values)), max(ticks[-1], max(values))

    def x(batch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * batch / max(last, 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e4e4e4"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(0, max(last, 1)):
        if tick <= last and tick == int(tick):
            place = f'x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text {place} text-anchor="middle">{int(tick):,}</text>')
    parts += [
        f'<path d="M{x(batch):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#999" stroke-dasharray="3 3"/>'
        for batch in starts
        if batch > 0
    ]
    # once where several curves have the same, but for the last digits
    known = {
        tuple((batch, round(value, 6)) for batch, value in sorted(one))
        for one in chart.chance.values()
    }
    for line in sorted(known):
        parts.append(_chance([(x(batch), y(value)) for batch, value in line]))
    drawn = {
        name: [(x(batch), y(value)) for batch, value in points]
        for name, points in chart.curves.items()
    }
    hidden = {name: _beneath(name, drawn) for name in drawn}
    # whole lines first: those that would lie on them are dashed above, and both are seen
    for i, (name, points) in sorted(
        enumerate(drawn.items()), key=lambda one: hidden[one[1][0]] is not None
    ):
        parts.append(_curve(points, i, hidden[name] is not None))
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">batch</text>'
    )
    legend = "".join(
        _legend(i, name, points, hidden[name], chart.chance.get(name))
        for i, (name, points) in enumerate(chart.curves.items())
    )
    title, caption = html.escape(chart.title), html.escape(chart.caption)
    return (
        f'<figure><h2>{title}</h2>\n<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{title}">\n'
        + "\n".join(parts)
        + f"\n</svg>\n<figcaption>{legend}<div>{caption}</div></figcaption></figure>"
    )


def _beneath(name: str, drawn: Mapping[str, Sequence[Place]]) -> str | None:
    """The first curve that another one can't be told from; None where that is the curve itself."""
    places = drawn[name]
    for other, others in drawn.items():
        if other == name:
            return None
        same = len(places) == len(others)
        if same and all(
            abs(a - c) + abs(b - d) < TOLD for (a, b), (c, d) in zip(places, others, strict=True)
        ):
            return other
    return None


def _look(index: int, above: bool) -> tuple[str, str]:
    """Colour and dashes of a curve; ``above``: of one that lies on another one, which is seen through its gaps."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return COLOURS[index % len(COLOURS)], ABOVE if above else dash


def _curve(places: Sequence[Place], index: int, above: bool) -> str:
    """A line through the places, with dots where they are few: smaller ones on another curve's."""
    colour, dash = _look(index, above)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/>'
    if len(places) <= 40:
        radius = 1.3 if above else 2.4
        drawn += "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>' for x, y in places
        )
    return drawn


def _chance(places: Sequence[Place]) -> str:
    """A dotted line: across the chart where chance is the same at every evaluation."""
    if len({height for _, height in places}) == 1:
        return f'<path d="M{LEFT} {places[0][1]:.1f}H{WIDTH - RIGHT}" {CHANCE}/>'
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" {CHANCE}/>'


def _legend(
    index: int,
    name: str,
    points: Sequence[Point],
    beneath: str | None,
    chance: Sequence[Point] | None = None,
) -> str:
    colour, dash = _look(index, beneath is not None)
    line = (
        f'<svg width="26" height="10"><path d="M1 5H25" stroke="{colour}" stroke-width="2" '
        f'stroke-dasharray="{dash}"/>'
    )
    where = f", on the line of {html.escape(beneath)}" if beneath else ""
    where += f", chance {chance[-1][1]:.4g}" if chance else ""
    return f"<div>{line}</svg> {html.escape(name)}: {points[-1][1]:.4g} at batch {points[-1][0]:,}{where}</div>"


def _ticks(low: float, high: float) -> list[float]:
    """Five or so round numbers from below ``low`` to above ``high``."""
    if high - low < 1e-12 * max(abs(high), 1e-300):
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(
        factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)
    )
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
