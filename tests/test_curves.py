"""The page of learning curves: every curve is seen, and the legend says which is which."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from alignclip.evaluation.history import EVALUATIONS, Record
from alignclip.evaluation.json_lines import text_of
from alignclip.storage import open_store
from alignclip.training.curve_page import ABOVE, BOTTOM, CHANCE, CURVE_COLOURS, LEFT, RIGHT, page
from alignclip.training.history import History

NAMES = ("pairs/image_retrieval_recall@5", "pairs/text_retrieval_recall@5")


def losses(beta: float, count: int = 12) -> list[dict[str, Any]]:
    """A run's history: losses that fall, of which the second term counts ``beta``."""
    found = []
    for batch in range(1, count + 1):
        contrastive, separation = 4 - batch / count, 0.8 if beta else 0.0
        total = contrastive + beta * separation
        terms = {"total": total, "contrastive": contrastive, "separation": separation}
        found.append({"batch": batch, "losses": terms})
    return found


def evaluations(chances: list[float]) -> list[dict[str, Any]]:
    """Evaluations of retrieval, both directions with the same chance; one with a figure that was none."""
    found: list[dict[str, Any]] = [{"batch": 90, "metrics": dict.fromkeys(NAMES)}]
    for i, chance in enumerate(chances, 1):
        # as sums come out
        of_names = {name: chance * (1 + 1e-14 * k) for k, name in enumerate(NAMES)}
        metrics = dict.fromkeys(NAMES, 0.3 + 0.1 * i)
        found.append({"batch": 10 * i, "metrics": metrics, "chance": of_names})
    return found


def curves(html: str) -> list[tuple[str, str]]:
    """Colour and dashes of the curves in the order in which they are drawn: the last is on top."""
    return re.findall('<polyline[^>]* stroke="([^"]*)"[^>]* stroke-dasharray="([^"]*)"', html)


def legend(html: str) -> list[str]:
    return re.findall("</svg> ([^<]*)</div>", html)


def test_a_curve_on_another_one_is_dashed_above_it_and_said() -> None:
    html = page("run", losses(beta=0))
    total, contrastive, separation = CURVE_COLOURS[:3]
    assert curves(html) == [(total, ""), (separation, ""), (contrastive, ABOVE)]
    assert legend(html) == [
        "total: 3 at batch 12", "contrastive: 3 at batch 12, on the line of total", "separation: 0 at batch 12",
    ]  # fmt: skip
    # and the dots of the one below are seen around those above
    dots = re.findall('r="([0-9.]*)" fill="([^"]*)"', html)
    radii = {colour: float(radius) for radius, colour in dots}
    assert radii[contrastive] < radii[total]
    # curves that can be told apart are whole, and nothing is said
    html = page("run", losses(beta=0.5))
    assert [dash for _, dash in curves(html)] == ["", "", ""]
    assert not any("on the line" in entry for entry in legend(html))


def test_chance_is_a_dotted_line_and_in_the_legend() -> None:
    html = page("run", evaluations([0.02, 0.02]))
    # once for both directions
    (height,) = re.findall(rf'<path d="M{LEFT} ([0-9.]+)H{RIGHT}" {CHANCE}/>', html)
    points = re.findall('points="([^"]*)"', html)[0].split()
    # below the curve, and in the chart
    assert max(float(place.split(",")[1]) for place in points) < float(height) < BOTTOM
    assert all(entry.endswith(", chance 0.02") for entry in legend(html))
    assert "Dotted: chance." in html
    # one that changes follows the evaluations
    html = page("run", evaluations([0.02, 0.04]))
    assert len(re.findall(rf'<path d="M[0-9. ]+ L[0-9. ]+" {CHANCE}/>', html)) == 1
    for line in (without := evaluations([0.02])):
        line.pop("chance", None)
    assert CHANCE not in page("run", without)


def test_the_page_of_a_run_has_the_chance_of_its_record(tmp_path: Path) -> None:
    chance = {"recall@5": 0.1}
    record = Record(batch=4, evaluator="c", metrics={"recall@5": 0.5}, chance=chance, verdict=None)
    (tmp_path / EVALUATIONS).write_text(text_of([record]))
    folder: Any = SimpleNamespace(files=open_store(str(tmp_path)), uri=str(tmp_path))
    state: Any = SimpleNamespace(
        callbacks=[], timestamp=SimpleNamespace(batch=SimpleNamespace(value=4))
    )
    (line,) = History(folder, 10)._evaluations(state)
    assert line == {"batch": 4, "metrics": {"c/recall@5": 0.5}, "chance": {"c/recall@5": 0.1}}
