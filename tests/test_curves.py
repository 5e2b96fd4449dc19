"""The page of learning curves: every curve is seen, and the legend says which is which."""

from __future__ import annotations

import re

from alignclip.curves import ABOVE, COLOURS, page


def lines(beta: float, count: int = 12) -> list[dict[str, object]]:
    """A run's history: losses that fall, of which the second term counts ``beta``."""
    found = []
    for batch in range(1, count + 1):
        contrastive, separation = 4 - batch / count, 0.8 if beta else 0.0
        losses = {"total": contrastive + beta * separation, "contrastive": contrastive, "separation": separation}
        found.append({"batch": batch, "losses": losses})
    return found


def curves(html: str) -> list[tuple[str, str]]:
    """Colour and dashes of the curves in the order in which they are drawn: the last is on top."""
    return re.findall('<polyline[^>]* stroke="([^"]*)"[^>]* stroke-dasharray="([^"]*)"', html)


def legend(html: str) -> list[str]:
    return re.findall("</svg> ([^<]*)</div>", html)


def test_a_curve_on_another_one_is_dashed_above_it_and_said() -> None:
    html = page("run", lines(beta=0))
    total, contrastive, separation = COLOURS[:3]
    assert curves(html) == [(total, ""), (separation, ""), (contrastive, ABOVE)]
    assert legend(html) == [
        "total: 3 at batch 12", "contrastive: 3 at batch 12, on the line of total", "separation: 0 at batch 12",
    ]  # fmt: skip
    # and the dots of the one below are seen around those above
    radii = {colour: float(radius) for radius, colour in re.findall('r="([0-9.]*)" fill="([^"]*)"', html)}
    assert radii[contrastive] < radii[total]


def test_curves_that_can_be_told_apart_are_as_they_were() -> None:
    html = page("run", lines(beta=0.5))
    assert [dash for _, dash in curves(html)] == ["", "", ""]
    assert not any("on the line" in entry for entry in legend(html))
