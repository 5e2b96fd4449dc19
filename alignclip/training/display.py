"""What a run shows while it trains: a progress bar in a terminal, a line an interval in a file."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from composer.core import Event, State
from composer.loggers import Logger, LoggerDestination
from composer.loggers.logger import format_log_data_value
from composer.utils import create_interval_scheduler
from tqdm import tqdm

from alignclip.training.callbacks import TrainingMonitor

LOSS = "loss/train/"  # names of loss terms, as the Trainer logs them
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
NARROW_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
# columns from which on the bar has the epoch and the time so far, whole names, and rate and throughput
MIDDLE, WIDE, WIDEST = 96, 110, 150


def say(text: str) -> None:
    """Print one line, above the progress bars where there are any."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Console(LoggerDestination):
    """Shows where training stands: on rank 0, as a bar or as lines.

    Rates and the time left are those of this start: what an earlier start trained took another time.

    Args:
        total: batches of the whole run.
        batch_size: samples of all ranks in a batch.
        bar: whether there is a progress bar.
        interval: between two lines; None: there are none.
        log_traces: whether to print which algorithms ran when.
        stream: where it goes; stderr.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        bar: bool,
        interval: str | None,
        log_traces: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._batch_size, self._wants_bar = total, batch_size, bar
        self._monitor = TrainingMonitor()
        self._stream = stream or sys.stderr
        self._is_due = (
            create_interval_scheduler(interval, checkpoint_events=False) if interval else None
        )
        self._log_traces = log_traces
        self._metrics: dict[str, Any] = {}
        self._bar: tqdm[Any] | None = None
        self._begun: tuple[float, int] | None = (
            None  # when which batch ended: the first one of this start
        )
        self._shown = -1  # batch of the last line
        self._before = (0, 0.0, 0.0)  # the monitor's counts at the last line

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember what is to be shown."""
        self._metrics |= {k: v for k, v in metrics.items() if k.startswith(LOSS) or k == "lr"}

    def log_traces(self, traces: dict[str, Any]) -> None:
        """Print them where that is asked for."""
        if self._log_traces:
            for name, trace in traces.items():
                tqdm.write(f"[trace]: {name}: {format_log_data_value(trace)}", file=self._stream)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Show the bar."""
        self._monitor = next(c for c in state.callbacks if isinstance(c, TrainingMonitor))
        self._shown = state.timestamp.batch.value
        if self._wants_bar:
            self._bar = tqdm(
                total=self._total,
                initial=self._shown,
                unit="ba",
                desc=f"{_epoch(state)}:",
                file=self._stream,
                bar_format=self._format(),
                dynamic_ncols=True,
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move the bar, or write a line where one is due."""
        batch = state.timestamp.batch.value
        if self._begun is None:
            self._begun = time.monotonic(), batch
        if self._bar is not None:
            self._bar.set_description_str(f"{_epoch(state)}:", refresh=False)
            self._bar.set_postfix_str(self._postfix(), refresh=False)
            self._bar.bar_format = self._format()
            self._bar.update(batch - self._bar.n)
        if self._is_due is not None and self._is_due(state, Event.BATCH_END):
            self._write(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Write a line where the interval is in epochs."""
        if self._is_due is not None and self._is_due(state, Event.EPOCH_END):
            self._write(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        """The last state of things stays visible."""
        if self._is_due is not None:
            self._write(state)
        self.close(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Leave the bar where it stands, and go to the next line."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _losses(self) -> dict[str, float]:
        terms = {
            k.removeprefix(LOSS): float(v) for k, v in self._metrics.items() if k.startswith(LOSS)
        }
        return dict(sorted(terms.items(), key=lambda term: term[0] != "total"))

    def _format(self) -> str:
        return BAR if _columns(self._stream) >= MIDDLE else NARROW_BAR

    def _postfix(self) -> str:
        """As much as the terminal has room for: the terms of the loss always."""
        columns = _columns(self._stream)
        whole = columns >= WIDE
        parts = [
            f"{name if whole else name[:3]} {value:.{3 if whole else 2}f}"
            for name, value in self._losses().items()
        ]
        if columns >= WIDEST:
            parts += [
                f"lr {float(self._metrics.get('lr', 0)):.2e}",
                f"{self._samples_a_second():,.0f} samples/s",
            ]
        return " ".join(parts)

    def _samples_a_second(self) -> float:
        batches, seconds, _ = self._since()
        return batches * self._batch_size / seconds if seconds else 0.0

    def _since(self) -> tuple[int, float, float]:
        """Batches, seconds of training and of waiting for data since the last line; in a bar since the start."""
        monitor = self._monitor
        batches, seconds, waited = self._before
        return monitor.batches - batches, monitor.seconds - seconds, monitor.waited - waited

    def _write(self, state: State) -> None:
        """One line."""
        batch = state.timestamp.batch.value
        if batch == self._shown:
            return
        _, seconds, waited = self._since()
        parts = [f"{name} {value:.4f}" for name, value in self._losses().items()]
        parts += [
            f"lr {float(self._metrics.get('lr', 0)):.2e}",
            f"{self._samples_a_second():,.0f} samples/s",
        ]
        parts += [f"data wait {100 * waited / seconds if seconds else 0:.0f} %"]
        if (left := self._left(batch)) is not None:
            parts += [f"{tqdm.format_interval(left)} left"]
        where = f"batch {batch:,}/{self._total:,}, {_epoch(state)}"
        tqdm.write(f"{time.strftime('%H:%M:%S')} {where}: {', '.join(parts)}", file=self._stream)
        self._stream.flush()
        self._shown = batch
        self._before = self._monitor.batches, self._monitor.seconds, self._monitor.waited

    def _left(self, batch: int) -> float | None:
        """Seconds to the end of the run at the pace of this start, its first batch aside; None in that one."""
        if batch >= self._total or self._begun is None or batch <= self._begun[1]:
            return 0.0 if batch >= self._total else None
        since, first = self._begun
        return (time.monotonic() - since) / (batch - first) * (self._total - batch)


def _epoch(state: State) -> str:
    """The epoch that the last batch belongs to, from 1."""
    ended = state.timestamp.batch_in_epoch == 0 and state.timestamp.batch > 0
    return f"epoch {state.timestamp.epoch.value + (not ended)}"


def _columns(stream: TextIO) -> int:
    """How wide the terminal is; 120 where there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 120
    except (OSError, ValueError):
        return 120
