"""The learning rate of a run that goes on is that of its own schedule, from the first step on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from small_runs import SmallRuns, turn_back

from alignclip.model.optimization import lr_multiplier

pytestmark = pytest.mark.slow  # runs in process

FIXED = (
    "scheduler.t_warmup=2ba", "data.num_canonical_nodes=1", "save_interval=4ba",
    "optimizer.lr=0.001", "loss.beta=0",
)  # fmt: skip


class Rates(Callback):
    """Keeps the rates that the steps use: of each group, with its full rate."""

    def __init__(self) -> None:
        self.found: dict[int, list[tuple[float, float]]] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        groups = state.optimizers[0].param_groups
        self.found[state.timestamp.batch.value] = [
            (group["lr"], group["initial_lr"]) for group in groups
        ]


@pytest.fixture
def train(dataset: Path, tmp_path: Path) -> Any:
    runs = SmallRuns(tmp_path, dataset, tmp_path / "{run_name}", *FIXED)

    def train(*overrides: str) -> dict[int, list[tuple[float, float]]]:
        rates = Rates()
        runs.train(*overrides, callbacks=[rates])
        return rates.found

    return train


def first(found: dict[int, list[tuple[float, float]]]) -> dict[int, float]:
    return {batch: groups[0][0] for batch, groups in found.items()}


def schedule(start: int, total: int, lr: float = 1e-3) -> dict[int, float]:
    return {
        step: pytest.approx(lr * lr_multiplier(step, 2, total), rel=1e-12)
        for step in range(start, total)
    }


@pytest.mark.parametrize(("before", "now"), [("8ba", "16ba"), ("2ep", "4ep"), ("8ba", "5ep")])
def test_a_finished_run_is_made_longer(
    train: Any, capsys: pytest.CaptureFixture[str], before: str, now: str
) -> None:
    assert first(train(f"max_duration={before}")) == schedule(0, 8)
    assert "learning rate" not in capsys.readouterr().out
    total = {"16ba": 16, "4ep": 16, "5ep": 20}[now]
    assert first(train(f"max_duration={now}")) == schedule(8, total)
    said = (
        f"learning rate of the next step (batch 9): 0 → "
        f"{1e-3 * lr_multiplier(8, 2, total):.6g}, by this run's"
    )
    assert said in capsys.readouterr().out


def test_a_run_is_made_shorter(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("max_duration=16ba")
    turn_back(tmp_path / "r", "ep0-ba4-rank0.pt")
    assert first(train("max_duration=6ba")) == schedule(4, 6)
    rates = [f"{1e-3 * lr_multiplier(4, 2, total):.6g}" for total in (16, 6)]
    assert f"(batch 5): {rates[0]} → {rates[1]}, by this run's schedule" in capsys.readouterr().out


def test_an_unchanged_run_has_the_very_rates(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train("max_duration=8ba", "run_name=whole")
    train("max_duration=8ba")
    turn_back(tmp_path / "r", "ep0-ba4-rank0.pt")
    assert train("max_duration=8ba") == {
        batch: rates for batch, rates in whole.items() if batch >= 4
    }
    assert "learning rate" not in capsys.readouterr().out


def test_each_layer_has_its_own_rate(train: Any) -> None:
    decayed = train("max_duration=8ba", "optimizer.layer_decay=0.5")[0]
    longer = train("max_duration=16ba", "optimizer.layer_decay=0.5")
    assert len({full for _, full in decayed}) > 1
    for batch, groups in longer.items():
        assert [full for _, full in groups] == [full for _, full in decayed]
        for rate, full in groups:
            assert rate == pytest.approx(full * lr_multiplier(batch, 2, 16), rel=1e-12)


def test_another_run_begins_with_a_checkpoint(train: Any, tmp_path: Path) -> None:
    """The settings of its optimizer are its own.

    The checkpoint brings weights, moments and the step count.
    """
    train("max_duration=4ba")
    path = tmp_path / "r" / "ep0-ba4-rank0.pt"
    found = train("max_duration=8ba", f"load_path={path}", "run_name=other", "optimizer.lr=0.01")
    assert first(found) == schedule(4, 8, 0.01)
    assert {full for groups in found.values() for _, full in groups} == {0.01}
