"""The pace of a run: the plan at its start, a line every hundred batches, what all starts spent."""

from __future__ import annotations

from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Timestamp
from composer.devices import DeviceCPU

from alignclip.config.reading import load
from alignclip.training.display import Console
from alignclip.training.limits import Circumstances
from alignclip.training.pace import Pace, duration, planned
from alignclip.training.spent import Spent

NOW = datetime(2025, 11, 27, 15, 30)
LOGGER: Any = None  # not used
COCO = ("evaluators.coco.task=retrieval", "evaluators.coco.local=x")


class Run:
    """A run of batches of 64 whose clocks the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, first: int = 0) -> None:
        settings = ["global_train_batch_size=64", "data.num_workers=1", *COCO]
        config = load("yamls/debug.yaml", settings)
        self.pace, self.spent = Pace(config, total), Spent()
        self.told = list[str]()
        self.batch, self.begun = first, False
        self.console = Console.__new__(Console)
        monkeypatch.setattr(self.console, "tell", self.told.append)
        monkeypatch.setattr(self.pace, "_own", lambda: self.spent)
        seconds = {"coco": 1.0}
        here = Circumstances(config, "cpu", cores=4, threads=4, evaluators=seconds)
        monkeypatch.setattr(self.pace, "_circumstances", lambda measured, state: here)

    @property
    def state(self) -> Any:
        time = Timestamp(batch=self.batch, epoch=self.batch // 10)
        return SimpleNamespace(callbacks=[self.console], timestamp=time, device=DeviceCPU())

    def train(self, to: int, **each: float) -> None:
        """Up to a batch; what each takes: ``seconds`` are of all parts."""
        if not self.begun:
            self.pace.fit_start(self.state, LOGGER)
            self.pace._speed = SimpleNamespace(gpu_flops_available=1e9)  # type: ignore[assignment]
            self.begun = True
        while self.batch < to:
            self.batch += 1
            self.spent += Spent(batches=1, **each)
            self.pace.batch_end(self.state, LOGGER)


def test_a_line_every_hundred_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 250)
    run.train(3, seconds=50.0, waiting=40.0)  # the first ones say nothing
    run.train(100, seconds=0.1, waiting=0.05)
    run.train(200, seconds=0.1, waiting=0.002, flops=3e7)
    run.train(250, seconds=0.1)
    run.pace.fit_end(run.state, LOGGER)
    assert run.told == [
        "batch 100: 640 samples/s, data wait 50 %; the loader limits: raise data.num_workers (1 of "
        "4 cores used)",
        "batch 200: 640 samples/s, data wait 2 %, MFU 30 %; the device limits: no setting is left "
        "that would make it faster",
    ]
    assert run.pace.rates == pytest.approx([640.0, 640.0])
    assert run.pace.mfus == pytest.approx([0.3])


def test_evaluation_is_no_part_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 100)
    run.train(100, seconds=0.2, evaluation=0.02, checkpoints=0.08)
    (line,) = run.told
    assert line.startswith("batch 100: 640 samples/s, data wait 0 %; checkpoints took 40 %")


def test_the_share_of_a_rare_evaluation_is_of_the_whole_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, 1_000)
    run.train(999, seconds=0.1)
    run.train(1_000, seconds=10.1, evaluation=10.0)  # half of the last window
    assert "evaluation" not in run.told[-1]
    run.spent += Spent(seconds=20.0, evaluation=20.0)
    run.train(1_100, seconds=0.1)
    assert "evaluation took 21 % of the time" in run.told[-1]


def test_a_short_run_has_a_line_at_its_end_where_enough_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for total, count in ((12, 0), (13, 1), (99, 1)):
        run = Run(monkeypatch, total)
        run.train(total, seconds=0.1)
        assert run.told == []
        run.pace.fit_end(run.state, LOGGER)
        assert [line.partition(":")[0] for line in run.told] == [f"batch {total}"] * count
        assert len(run.pace.rates) == count


def test_a_start_just_before_a_hundred_waits_for_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch, 300, first=95)
    run.train(200, seconds=0.1)
    assert [line.partition(":")[0] for line in run.told] == ["batch 200"]


def test_the_plan_is_of_the_first_measured_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 10_013)
    run.train(3, seconds=50.0)
    run.train(12, seconds=0.5)
    assert run.told == []
    run.train(13, seconds=0.5)
    (plan,) = run.told
    assert plan.startswith("10,000 batches will take 1 h 23 min at 128 samples/s, until ")
    assert "on top" not in plan  # neither evaluators nor a save folder


def test_a_run_that_ends_soon_has_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, 170)
    run.train(20, seconds=0.5)
    assert run.told == []


def test_a_start_that_goes_on_plans_with_what_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Run(monkeypatch, 1_000)
    first.train(500, seconds=1.0, evaluation=0.4, checkpoints=0.1, waiting=0.2)
    first.spent += Spent(seconds=7.0)  # after the last batch
    kept = first.pace.state_dict()
    second = Run(monkeypatch, 1_013, first=500)
    second.pace.load_state_dict(kept)
    second.train(513, seconds=0.5)
    assert second.told[0].startswith("500 batches will take 8 min")  # 500 · (0.5 + 0.5)
    assert second.pace.spent().batches == 513
    assert second.pace.spent().seconds == pytest.approx(507.0 + 6.5)
    assert second.pace.spent().training == pytest.approx(507.0 - 250.0 + 6.5)
    assert second.pace.rates == first.pace.rates
    assert len(second.pace.rates) == 5


@pytest.mark.parametrize(
    ("seconds", "others", "words"),
    [
        (7_200, [], "100 batches will take 2 h 0 min at 50 samples/s, until 17:30"),
        (
            36_000,
            ["evaluation", "checkpoints"],
            "100 batches will take 10 h 0 min at 50 samples/s, until Fri 28 Nov 01:30; evaluation "
            "and checkpoints come on top",
        ),
        (1e13, [], "100 batches will take 115740740 d 17 h at 50 samples/s"),
    ],
)
def test_the_words_of_a_plan(seconds: float, others: list[str], words: str) -> None:
    assert planned(100, seconds, 50.0, others, NOW) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3_500, "58 min"), (3_599, "1 h 0 min"),
        (86_399, "1 d 0 h"), (200_000, "2 d 7 h"),
    ],
)  # fmt: skip
def test_a_duration_has_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words
