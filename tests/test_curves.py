"""The page of learning curves: every curve is seen, and the legend says which is which."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

from alignclip.evaluation.history import Record
from alignclip.training.curves import (
    ABOVE,
    BOTTOM,
    CHANCE,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    page,
)
from alignclip.training.history import History


def lines(beta: float, count: int = 12) -> list[dict[str, object]]:
    """A run's history: losses that fall, of which the second term counts ``beta``."""
    found = []
    for batch in range(1, count + 1):
        contrastive, separation = 4 - batch / count, 0.8 if beta else 0.0
        losses = {
            "total": contrastive + beta * separation,
            "contrastive": contrastive,
            "separation": separation,
        }
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
    radii = {
        colour: float(radius) for radius, colour in re.findall('r="([0-9.]*)" fill="([^"]*)"', html)
    }
    assert radii[contrastive] < radii[total]


def test_curves_that_can_be_told_apart_are_as_they_were() -> None:
    html = page("run", lines(beta=0.5))
    assert [dash for _, dash in curves(html)] == ["", "", ""]
    assert not any("on the line" in entry for entry in legend(html))


def evaluations(chances: list[float]) -> list[dict[str, object]]:
    """Evaluations of retrieval, both directions with the same chance; one with a figure that was none."""
    names = ("pairs/image_retrieval_recall@5", "pairs/text_retrieval_recall@5")
    found: list[dict[str, object]] = [
        {
            "batch": 10 * i,
            "metrics": dict.fromkeys(names, 0.3 + 0.1 * i),
            "chance": {
                name: chance * (1 + 1e-14 * k) for k, name in enumerate(names)
            },  # as sums come out
        }
        for i, chance in enumerate(chances, 1)
    ]
    return [
        *found,
        {"batch": 90, "metrics": dict.fromkeys(names), "chance": dict.fromkeys(names, 0.9)},
    ]


def test_chance_is_a_dotted_line_and_in_the_legend() -> None:
    html = page("run", evaluations([0.02, 0.02]))
    (height,) = re.findall(
        rf'<path d="M{LEFT} ([0-9.]+)H{WIDTH - RIGHT}" {CHANCE}/>', html
    )  # once for both directions
    heights = [
        float(place.split(",")[1]) for place in re.findall('points="([^"]*)"', html)[0].split()
    ]
    assert float(height) > max(heights)  # below the curve, and in the chart
    assert float(height) < HEIGHT - BOTTOM
    assert all(entry.endswith(", chance 0.02") for entry in legend(html))
    assert "Dotted: chance." in html


def test_chance_that_changes_follows_the_evaluations() -> None:
    html = page("run", evaluations([0.02, 0.04]))
    assert len(re.findall(rf'<path d="M[0-9. ]+ L[0-9. ]+" {CHANCE}/>', html)) == 1
    without = [
        {key: value for key, value in line.items() if key != "chance"}
        for line in evaluations([0.02])
    ]
    assert CHANCE not in page("run", without)


def test_the_page_of_a_run_has_the_chance_of_its_record() -> None:
    chance, names = {"image_retrieval_recall@5": 0.1}, ("image_retrieval_recall@5",)
    record = Record(
        batch=4, evaluator="c", metrics=dict.fromkeys(names, 0.5), chance=chance, verdict=None
    )
    folder = SimpleNamespace(
        files=SimpleNamespace(read_text_optional=lambda name: f"{json.dumps(record)}\n")
    )
    state = SimpleNamespace(callbacks=[], timestamp=SimpleNamespace(batch=SimpleNamespace(value=4)))
    (line,) = History(folder, 10)._evaluations(state)  # type: ignore[arg-type]
    assert line == {"batch": 4, "metrics": {f"c/{names[0]}": 0.5}, "chance": {f"c/{names[0]}": 0.1}}
