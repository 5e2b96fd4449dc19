"""A page of learning curves: HTML with its pictures in it, which needs no connection."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignclip.config.metrics import arrow, metric_named

LEFT, RIGHT, TOP, BOTTOM = 64, 546, 12, 246  # edges of a chart's panel, in pixels
CHART_WIDTH, CHART_HEIGHT = 560, 280  # of a chart
# Okabe and Ito's: told apart by all eyes
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "12 4")
ABOVE, TOLD_APART_FROM = (
    "5 5",
    1.0,
)  # dashes of a curve on another one; pixels that tell two curves apart
MOST_DOTS = 40  # points that get a dot each
STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#222;max-width:1240px}"
    "h1{font-size:20px}h2{font-size:15px;margin:0 0 2px}figure{margin:0}"
    ".charts{display:flex;flex-wrap:wrap;gap:24px}"
    "figcaption,p{color:#555;font-size:12.5px;max-width:560px}"
    "svg text{font:11px system-ui,sans-serif;fill:#444}"
)
CHANCE = 'fill="none" stroke="#777" stroke-width="1.4" stroke-dasharray="1.5 4"'  # dotted
GAP_CAPTION = (
    "centroid_distance ↓: the gap. margin ↑: pairs against wrong pairs; a gap that closes while "
    "the margin falls to 0 is a collapse."
)
NOTHING = "<p>Nothing was trained yet.</p>"
Spot = tuple[float, float]  # of a point, in pixels


@dataclass
class Chart:
    """Curves that share an axis.

    Attributes:
        title: above it.
        caption: what to read off it.
        curves: points (batch, value) by name.
        chance: what features that say nothing would score, at the same batches, by the curve's
            name.
    """

    title: str
    caption: str
    curves: dict[str, list[Spot]] = field(default_factory=dict)
    chance: dict[str, list[Spot]] = field(default_factory=dict)

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
    """
    starts = sorted({line["batch"] for line in lines if line.get("start") and line["batch"] > 0})
    last = max((line["batch"] for line in lines), default=0)
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


def _figure(chart: Chart, starts: Sequence[int], last: int) -> str:
    """Draw a chart with its legend."""
    lines = [*chart.curves.values(), *chart.chance.values()]
    values = [value for points in lines for _, value in points]
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def x(batch: float) -> float:
        return LEFT + (RIGHT - LEFT) * batch / max(last, 1)

    def y(value: float) -> float:
        return TOP + (BOTTOM - TOP) * (high - value) / (high - low)

    def places(points: Iterable[Spot]) -> list[Spot]:
        return [(x(batch), y(value)) for batch, value in points]

    parts = []
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{RIGHT}" stroke="#e4e4e4"/>')
        parts.append(_svg_text(LEFT - 6, y(tick) + 4, f"{tick:g}", "end"))
    whole = [tick for tick in _ticks(0, max(last, 1)) if tick <= last and tick == int(tick)]
    parts += [_svg_text(x(tick), BOTTOM + 16, f"{int(tick):,}") for tick in whole]
    grey = 'stroke="#999" stroke-dasharray="3 3"'
    parts += [f'<path d="M{x(batch):.1f} {TOP}V{BOTTOM}" {grey}/>' for batch in starts]
    # once where several curves have the same chance, but for the last digits
    rounded = {tuple((b, round(v, 6)) for b, v in sorted(one)) for one in chart.chance.values()}
    parts += [_chance(places(line)) for line in sorted(rounded)]
    drawn = {name: places(points) for name, points in chart.curves.items()}
    hidden = {name: _beneath(name, drawn) for name in drawn}
    looks = {name: _look(i, hidden[name]) for i, name in enumerate(drawn)}
    # whole lines first: those that would lie on them are dashed above, and both are seen
    for name in sorted(drawn, key=lambda name: hidden[name] is not None):
        parts.append(_curve(drawn[name], looks[name], 1.3 if hidden[name] else 2.4))
    parts.append(_svg_text((LEFT + RIGHT + 14) / 2, CHART_HEIGHT - 4, "batch"))
    legend = "".join(_legend(chart, name, looks[name], hidden[name]) for name in drawn)
    title, caption = html.escape(chart.title), html.escape(chart.caption)
    return (
        f'<figure><h2>{title}</h2>\n<svg width="{CHART_WIDTH}" height="{CHART_HEIGHT}" '
        f'role="img" aria-label="{title}">\n'
        + "\n".join(parts)
        + f"\n</svg>\n<figcaption>{legend}<div>{caption}</div></figcaption></figure>"
    )


def _svg_text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _beneath(name: str, drawn: Mapping[str, Sequence[Spot]]) -> str | None:
    """Return the first curve that this one can't be told from, if that is another one."""
    for other, places in drawn.items():
        pairs = zip(drawn[name], places, strict=False)
        apart = max(abs(a - c) + abs(b - d) for (a, b), (c, d) in pairs)
        if len(places) == len(drawn[name]) and apart < TOLD_APART_FROM:
            return None if other == name else other
    return None


def _look(index: int, beneath: str | None) -> str:
    """Return colour and dashes; a curve that lies on another one is seen through its gaps."""
    dash = ABOVE if beneath else DASHES[index // len(CURVE_COLOURS) % len(DASHES)]
    return f'stroke="{CURVE_COLOURS[index % len(CURVE_COLOURS)]}" stroke-dasharray="{dash}"'


def _curve(places: Sequence[Spot], look: str, radius: float) -> str:
    """Draw a line through the places, with dots where they are few."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline points="{path}" fill="none" {look} stroke-width="1.6"/>'
    fill = look.split()[0].replace("stroke", "fill")
    dots = places if len(places) <= MOST_DOTS else ()
    return drawn + "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {fill}/>' for x, y in dots
    )


def _chance(places: Sequence[Spot]) -> str:
    """Draw a dotted line: across the chart where chance is the same at every evaluation."""
    if len({height for _, height in places}) == 1:
        return f'<path d="M{LEFT} {places[0][1]:.1f}H{RIGHT}" {CHANCE}/>'
    return f'<path d="M{" L".join(f"{x:.1f} {y:.1f}" for x, y in places)}" {CHANCE}/>'


def _legend(chart: Chart, name: str, look: str, beneath: str | None) -> str:
    batch, value = chart.curves[name][-1]
    said = f"{html.escape(name)}: {value:.4g} at batch {batch:,}"
    said += f", on the line of {html.escape(beneath)}" if beneath else ""
    said += f", chance {chart.chance[name][-1][1]:.4g}" if name in chart.chance else ""
    line = f'<svg width="26" height="10"><path d="M1 5H25" {look} stroke-width="2"/></svg>'
    return f"<div>{line} {said}</div>"


def _ticks(low: float, high: float) -> list[float]:
    """Return five or so round numbers from below ``low`` to above ``high``."""
    if high - low < 1e-12 * max(abs(high), 1e-300):
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    enough = raw / power * (1 - 1e-9)
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor >= enough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]
