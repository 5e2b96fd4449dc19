"""What a run shows: the bar within any terminal, a line an interval in a file, the time left at
this start's pace.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import struct
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest
from composer.core import Time, Timestamp, TimeUnit
from composer.loggers import Logger
from runs import write_config

from alignclip.config.reading import load
from alignclip.training.build import build_displays, total_batches
from alignclip.training.callbacks import TrainingMonitor
from alignclip.training.display import Console

LOGGER = cast(Logger, None)  # not used
LOSSES = {
    "loss/train/contrastive": 4.1234,
    "loss/train/separation": 0.5678,
    "loss/train/total": 4.6912,
}


class Clock:
    """The time of tqdm and of the lines, which the test itself moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        monkeypatch.setattr(
            "alignclip.training.display.time",
            SimpleNamespace(monotonic=lambda: self.now, strftime=time.strftime),
        )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Run:
    """A training of ``total`` batches, 4 an epoch, that goes on after ``batch``."""

    def __init__(self, clock: Clock, total: int, batch: int = 0) -> None:
        self.clock, self.total, self.monitor = clock, total, TrainingMonitor()
        self.state: Any = SimpleNamespace(
            callbacks=[self.monitor], get_elapsed_duration=self._elapsed
        )
        self._move(batch)

    def _elapsed(self) -> Time:
        return Time(self.state.timestamp.batch.value / self.total, TimeUnit.DURATION)

    def _move(self, batch: int) -> None:
        self.state.previous_timestamp = getattr(self.state, "timestamp", None)
        self.state.timestamp = Timestamp(batch=batch, epoch=batch // 4, batch_in_epoch=batch % 4)

    def train(self, console: Console, to: int, seconds: float) -> None:
        """Up to a batch, so many seconds each."""
        for batch in range(self.state.timestamp.batch.value + 1, to + 1):
            self.clock.now += seconds
            self.monitor.batches, self.monitor.seconds = (
                self.monitor.batches + 1,
                self.monitor.seconds + seconds,
            )
            self.monitor.waited += seconds / 4
            self._move(batch)
            console.log_metrics({**LOSSES, "lr": 5e-4})
            console.batch_end(self.state, LOGGER)
            if batch % 4 == 0:
                console.epoch_end(self.state, LOGGER)


class Terminal:
    """A terminal of so many columns."""

    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        self._read: list[bytes] = []
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def _drain(self) -> None:
        try:
            while data := os.read(self._master, 4096):
                self._read.append(data)
        except OSError:  # how Linux says that the other side is closed
            pass

    def shown(self) -> list[str]:
        """All states of the bar; the terminal is closed then."""
        self.stream.close()
        self._reader.join(30)
        os.close(self._master)
        text = b"".join(self._read).decode()
        return [state for state in re.split(r"[\r\n]+", text) if state.strip()]


@pytest.mark.parametrize("columns", [80, 95, 96, 100, 120, 160])
@pytest.mark.parametrize(("seconds", "rate"), [(2.5, "2.50s/ba"), (0.4, "2.50ba/s")])
def test_the_bar_has_rate_and_all_terms_in_any_terminal(
    clock: Clock, columns: int, seconds: float, rate: str
) -> None:
    terminal = Terminal(columns)
    console, run = (
        Console(21_490, 4096, True, None, stream=terminal.stream),
        Run(clock, 21_490, 12_300),
    )
    console.fit_start(run.state, LOGGER)
    clock.now += 40_000  # hours, as the time left is: the longest that the times get
    run.train(console, 12_350, seconds)
    console.close(run.state, LOGGER)
    *_, last, closed = terminal.shown()  # at the end there is the mean rate of all
    assert max(len(last), len(closed)) <= columns
    assert rate in last
    assert "s/ba" in closed
    assert "12350/21490" in last, "of the whole run, an earlier start's batches with it"
    found = dict(re.findall(r"(tot|con|sep)\w* (\d\.\d+)", last))
    assert {name: float(value) for name, value in found.items()} == {
        "tot": pytest.approx(4.6912, abs=0.006), "con": pytest.approx(4.1234, abs=0.006),
        "sep": pytest.approx(0.5678, abs=0.006),
    }  # fmt: skip
    assert ("samples/s" in last) == (columns >= 150)


def lines(text: str) -> list[str]:
    return text.splitlines()


def test_a_file_has_one_line_an_interval(clock: Clock) -> None:
    file = io.StringIO()
    console, run = Console(12, 16, False, "5ba", stream=file), Run(clock, 12)
    console.fit_start(run.state, LOGGER)
    run.train(console, 12, 2.0)
    console.fit_end(run.state, LOGGER)
    assert [re.findall(r"batch (\d+)/12, epoch (\d)", line) for line in lines(file.getvalue())] == [
        [("5", "2")], [("10", "3")], [("12", "3")],
    ]  # fmt: skip
    assert "\r" not in file.getvalue()
    first, _, last = lines(file.getvalue())
    assert first.endswith(
        "total 4.6912, contrastive 4.1234, separation 0.5678, lr 5.00e-04, 8 samples/s, data wait "
        "25 %, 00:14 left"
    )
    assert last.endswith("00:00 left")


def test_an_interval_in_epochs_has_a_line_an_epoch_and_none_twice(clock: Clock) -> None:
    file = io.StringIO()
    console, run = Console(8, 16, False, "1ep", stream=file), Run(clock, 8)
    console.fit_start(run.state, LOGGER)
    run.train(console, 8, 2.0)
    console.fit_end(run.state, LOGGER)
    assert re.findall(r"batch (\d+)/8, epoch (\d)", file.getvalue()) == [("4", "1"), ("8", "2")]


def test_the_time_left_is_of_this_starts_steps(clock: Clock) -> None:
    """Neither the batches of earlier starts nor this one's first, which builds and reads, are
    part of the pace.
    """
    file = io.StringIO()
    console, run = Console(200, 16, False, "1ba", stream=file), Run(clock, 200, 100)
    console.fit_start(run.state, LOGGER)
    run.train(console, 101, 500.0)
    run.train(console, 110, 2.0)
    first, second, *_, last = lines(file.getvalue())
    assert "left" not in first, "of one batch there is no pace"
    assert second.endswith("03:16 left")  # 98 batches
    assert "batch 110/200" in last
    assert last.endswith("03:00 left")


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The displays of a run on some rank, with a set of four batches."""

    def build(rank: int, *overrides: str) -> list[Any]:
        monkeypatch.setattr("alignclip.training.build.rank", lambda: rank)
        config = load(write_config(tmp_path, str(tmp_path)), ["run_name=r", *overrides])
        return list(build_displays(config, None, total_batches(config, range(4))))

    return build


@pytest.mark.parametrize(
    "overrides", [("progress_bar=true",), ("progress_bar=false", "log_to_console=true")]
)
def test_the_first_rank_alone_shows_anything(built: Any, overrides: tuple[str, ...]) -> None:
    assert [type(one) for one in built(0, *overrides)] == [Console]
    assert built(1, *overrides) == []


@pytest.mark.parametrize(("duration", "total"), [("12ba", 12), ("5ep", 20)])
def test_a_longer_run_that_goes_on_is_measured_by_its_new_length(
    built: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, duration: str, total: int
) -> None:
    terminal = Terminal(100)
    monkeypatch.setattr("sys.stderr", terminal.stream)
    (console,) = built(0, "progress_bar=true", "scheduler.t_warmup=1ba", f"max_duration={duration}")
    run = Run(clock, total, 8)  # the end of the run as it was before
    console.fit_start(run.state, LOGGER)
    run.train(console, 9, 2.0)
    console.fit_end(run.state, LOGGER)
    states = terminal.shown()
    assert f" 8/{total} " in states[0]
    assert f" 9/{total} " in states[-1]
    assert f"{100 * 9 / total:3.0f}%" in states[-1]
