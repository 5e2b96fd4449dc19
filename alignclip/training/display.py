"""The console of a run: a progress bar in a terminal, a line an interval in a file."""

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

from alignclip.ranks import rank
from alignclip.training.callbacks import TrainingMonitor

LOSS = "loss/train/"  # names of loss terms, as the Trainer logs them
BAR = (
    "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
    "[{elapsed}<{remaining}, {rate_fmt}{postfix}]"
)
NARROW_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left, {rate_fmt}{postfix}]"
# columns from which on the bar has the epoch and the time so far; whole names; rate and throughput
MIDDLE, WIDE, WIDEST = 96, 110, 150


def say(text: str) -> None:
    """Print one line, above the progress bars where there are any."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def print_once(text: str) -> None:
    """Print one line of a run, whatever its number of processes."""
    if rank() == 0:
        say(text)


class Console(LoggerDestination):
    """Shows where training stands: on rank 0, as a bar or as lines.

    Rates and the time left are those of this start: earlier starts may have been slower or faster.

    Args:
        total: batches of the whole run.
        batch_size: samples of all ranks in a batch.
        bar: whether there is a progress bar.
        interval: between two lines; None shows no lines.
        log_traces: whether to print which algorithms ran when.
        stream: stderr by default.
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
        # the time when the first batch of this start ended, and its number
        self._first_end: tuple[float, int] | None = None
        self._batch_of_line = -1  # the last line's
        self._counts_at_line = (0, 0.0, 0.0)  # the monitor's

    def tell(self, text: str) -> None:
        """Write a line of its own, above the bar where there is one."""
        tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=self._stream)
        self._stream.flush()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember losses and rate."""
        self._metrics |= {k: v for k, v in metrics.items() if k.startswith(LOSS) or k == "lr"}

    def log_traces(self, traces: dict[str, Any]) -> None:
        """Print traces where the YAML asks for them."""
        if self._log_traces:
            for name, trace in traces.items():
                tqdm.write(f"[trace]: {name}: {format_log_data_value(trace)}", file=self._stream)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Show the bar."""
        self._monitor = next(c for c in state.callbacks if isinstance(c, TrainingMonitor))
        self._batch_of_line = state.timestamp.batch.value
        if self._wants_bar:
            self._bar = tqdm(
                total=self._total,
                initial=self._batch_of_line,
                unit="ba",
                desc=f"{_epoch(state)}:",
                file=self._stream,
                bar_format=self._format(),
                dynamic_ncols=True,
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Move the bar, or write a line where one is due."""
        batch = state.timestamp.batch.value
        if self._first_end is None:
            self._first_end = time.monotonic(), batch
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
        """Write a last line, and leave the bar visible."""
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
        """Return the terms of the loss, and more where the terminal has room."""
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
        batches, seconds, _ = self._since_line()
        return batches * self._batch_size / seconds if seconds else 0.0

    def _since_line(self) -> tuple[int, float, float]:
        """Count batches, seconds of training and of waiting for data since the last line.

        A bar has no lines: these are the counts since the start.
        """
        monitor = self._monitor
        batches, seconds, waited = self._counts_at_line
        return monitor.batches - batches, monitor.seconds - seconds, monitor.waited - waited

    def _write(self, state: State) -> None:
        batch = state.timestamp.batch.value
        if batch == self._batch_of_line:
            return
        _, seconds, waited = self._since_line()
        parts = [f"{name} {value:.4f}" for name, value in self._losses().items()]
        parts += [
            f"lr {float(self._metrics.get('lr', 0)):.2e}",
            f"{self._samples_a_second():,.0f} samples/s",
        ]
        parts += [f"data wait {100 * waited / seconds if seconds else 0:.0f} %"]
        if (left := self._seconds_left(batch)) is not None:
            parts += [f"{tqdm.format_interval(left)} left"]
        where = f"batch {batch:,}/{self._total:,}, {_epoch(state)}"
        self.tell(f"{where}: {', '.join(parts)}")
        self._batch_of_line = batch
        monitor = self._monitor
        self._counts_at_line = monitor.batches, monitor.seconds, monitor.waited

    def _seconds_left(self, batch: int) -> float | None:
        """Estimate the rest of the run by the pace of this start without its first batch.

        None while the first batch is the only one.
        """
        if batch >= self._total:
            return 0.0
        if self._first_end is None or batch <= self._first_end[1]:
            return None
        since, first = self._first_end
        return (time.monotonic() - since) / (batch - first) * (self._total - batch)


def _epoch(state: State) -> str:
    """Name the epoch that the last batch belongs to, from 1."""
    ended = state.timestamp.batch_in_epoch == 0 and state.timestamp.batch > 0
    return f"epoch {state.timestamp.epoch.value + (not ended)}"


def _columns(stream: TextIO) -> int:
    """Return the width of the terminal; 120 where there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 120
    except (OSError, ValueError):
        return 120
