"""The page of learning curves: every curve is seen, and the legend says which is which."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from evaluations import figures, legend
from runs import write_set
from small_runs import SmallRuns

from alignclip.evaluation.frame import DASHED, DOTTED, OKABE_ITO
from alignclip.evaluation.history import EVALUATIONS, EvaluationRecord
from alignclip.evaluation.json_lines import lines_in, text_of
from alignclip.storage import open_store
from alignclip.training import history
from alignclip.training.curve_page import page
from alignclip.training.history import History

__all__ = ["figures"]
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
    """Evaluations of retrieval, both directions with the same chance.

    One with a figure that was none.
    """
    found: list[dict[str, Any]] = [{"batch": 90, "metrics": dict.fromkeys(NAMES)}]
    for i, chance in enumerate(chances, 1):
        # as sums come out
        of_names = {name: chance * (1 + 1e-14 * k) for k, name in enumerate(NAMES)}
        metrics = dict.fromkeys(NAMES, 0.3 + 0.1 * i)
        found.append({"batch": 10 * i, "metrics": metrics, "chance": of_names})
    return found


def lines_of(figure: Any) -> list[Any]:
    """The curves in the order in which they are drawn: the last is on top."""
    lines = [line for line in figure.axes[0].lines if line.get_color() in OKABE_ITO]
    return sorted(lines, key=lambda line: line.get_zorder())


def chances_of(figure: Any) -> list[Any]:
    return [line for line in figure.axes[0].lines if line._unscaled_dash_pattern == DOTTED]


def test_a_curve_on_another_one_is_dashed_above_it_and_said(figures: list[Any]) -> None:
    html = page("a < b", losses(beta=0))
    total, contrastive, separation = OKABE_ITO[:3]
    *below, above = lines_of(figures[0])
    assert [line.get_color() for line in below] == [total, separation]
    assert {line.get_linestyle() for line in below} == {"-"}
    assert above.get_color() == contrastive
    assert above._unscaled_dash_pattern == DASHED
    words = [
        "total: 3 at batch 12",
        "contrastive: 3 at batch 12, on the line of total",
        "separation: 0 at batch 12",
    ]
    assert legend(figures[0]) == words
    assert all(
        one in html for one in ("a &lt; b: learning curves to batch 12", "<h2>Loss</h2>", *words)
    )
    assert html.count("<svg") == html.count("</svg>") == 1
    assert "<!DOCTYPE svg" not in html
    # and the dots of the one below are seen around those above
    assert above.get_markersize() < below[0].get_markersize()
    # curves that can be told apart are whole, and nothing is said
    page("run", losses(beta=0.5))
    assert {line.get_linestyle() for line in lines_of(figures[1])} == {"-"}
    assert not any("on the line" in entry for entry in legend(figures[1]))


def test_chance_is_a_dotted_line_and_in_the_legend(figures: list[Any]) -> None:
    html = page("run", evaluations([0.02, 0.02]))
    (chance,) = chances_of(figures[0])  # once for both directions
    assert list(chance.get_xdata()) == [0, 1]  # from side to side
    assert chance.get_ydata() == pytest.approx([0.02, 0.02])
    assert all(entry.endswith(", chance 0.02") for entry in legend(figures[0]))
    assert "Dotted: chance." in html
    # one that changes follows the evaluations
    page("run", evaluations([0.02, 0.04]))
    (chance,) = chances_of(figures[1])
    assert list(chance.get_xdata()) == [10, 20]
    assert chance.get_ydata() == pytest.approx([0.02, 0.04])
    for line in (without := evaluations([0.02])):
        line.pop("chance", None)
    page("run", without)
    assert not chances_of(figures[2])


@pytest.mark.filterwarnings("error")
def test_many_curves_with_long_names_look_different_and_are_named_in_full(
    figures: list[Any],
) -> None:
    names = [f"evaluator_{i:02}_on_猫_$x$_{'of a long name' * (i % 3)}" for i in range(16)]
    metrics = {f"{name}/image_retrieval_recall@5": i / 20 for i, name in enumerate(names)}
    html = page("run", [{"batch": 1_000_000 * i, "metrics": metrics} for i in (1, 2)])
    (figure,) = figures
    looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in lines_of(figure)}
    assert len(looks) == len(names)
    for at, line in enumerate(figure.legends[0].get_lines()):
        assert (line.get_color(), str(line._unscaled_dash_pattern)) in looks, names[at]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
    assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1
    assert all(name[: len("evaluator_00_on_猫_$x$")] in html for name in names)


def test_starts_that_went_on_are_grey_lines(figures: list[Any]) -> None:
    html = page("run", [{"batch": 0, "start": True}, {"batch": 6, "start": True}, *losses(0.5)])
    assert "after batch 6." in html
    assert [line.get_xdata()[0] for line in figures[0].axes[0].lines[:2]] == [6, 1]
    assert figures[0].axes[0].get_xlim() == pytest.approx((-0.24, 12.24))  # all charts alike
    assert "Nothing was trained yet" in page("run", [{"batch": 0, "start": True}])


def test_the_page_of_a_run_has_the_chance_of_its_record(tmp_path: Path) -> None:
    chance = {"recall@5": 0.1}
    record = EvaluationRecord(
        batch=4, evaluator="c", metrics={"recall@5": 0.5}, chance=chance, verdict=None
    )
    (tmp_path / EVALUATIONS).write_text(text_of([record]))
    folder: Any = SimpleNamespace(files=open_store(str(tmp_path)), uri=str(tmp_path))
    state: Any = SimpleNamespace(
        callbacks=[], timestamp=SimpleNamespace(batch=SimpleNamespace(value=4))
    )
    (line,) = History(folder, 10)._evaluations(state)
    assert line == {"batch": 4, "metrics": {"c/recall@5": 0.5}, "chance": {"c/recall@5": 0.1}}


class DiesIn(Callback):
    """Fails in the batch after so many."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def after_backward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batches:
            logger.log_metrics({"lr": 7.0})
            raise RuntimeError("a rank is lost")


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])  # batch 2 is written down as it ends, or at the end
def test_a_batch_that_failed_is_not_in_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """The batch before is there once, with its own values."""
    monkeypatch.setattr(history, "POINTS", 4 // every)
    write_set(str(tmp_path / "set"), 64)
    runs = SmallRuns(tmp_path, tmp_path / "set", tmp_path / "saved", "max_duration=4ba")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a rank is lost"):
            runs.train("save_interval=2ba", callbacks=[DiesIn(2)])
    text = (tmp_path / "saved" / history.HISTORY).read_text()
    lines = [line for line in lines_in(text) if "losses" in line]
    assert [line["batch"] for line in lines] == [1, 2]
    assert all(line["losses"] and line["lr"] != 7.0 for line in lines)
