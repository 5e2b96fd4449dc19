"""The pace of a run on its console: how long it will take, and what limits it."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from datetime import datetime, timedelta
from typing import Any, TypeVar

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from alignclip.config.schema import RunConfig
from alignclip.data.dataset import ImageTextDataset
from alignclip.device import is_faster_in_bf16
from alignclip.ranks import gather, local_world_size
from alignclip.runtime.threads import available_cores
from alignclip.training import memory
from alignclip.training.callbacks import TrainingMonitor
from alignclip.training.display import Console, print_once
from alignclip.training.evaluation_callback import EvaluationCallback
from alignclip.training.limits import WAITING, Circumstances, MeasuredBatches, figures, verdict
from alignclip.training.saver import CheckpointSaver
from alignclip.training.speed import SpeedMonitor
from alignclip.training.spent import Spent

EVERY = 100  # batches between two lines
ENOUGH_BATCHES = 10  # batches that say something
# Batches of a start that say nothing: memory is allocated, kernels are chosen. Behind these come as
# many as there are data workers, which were made ready meanwhile.
UNMEASURED_BATCHES = 2
SHORT = 90.0  # seconds: the end of a run that is shorter is waited for
IMAGES_LOOKED_AT = 16  # images of a batch

C = TypeVar("C", bound=Callback)


class Pace(Callback):
    """Measures a run in windows of :data:`EVERY` batches, and says what limits it.

    All ranks read their clocks once a window, when the device is done. Between the windows nothing
    waits. This must be the last callback: the others' work is then measured.

    Attributes:
        rates: samples a second of each window, of all starts.
        mfus: model FLOPs utilization of each window, where that is known.
    """

    def __init__(self, config: RunConfig, total: int) -> None:
        # of a checkpoint that an earlier version wrote, there is nothing to go on with
        warnings.filterwarnings("ignore", "Pace is not in the state_dict", UserWarning)
        self._config, self._total = config, total
        self.rates: list[float] = []
        self.mfus: list[float] = []
        self._earlier = Spent()  # by earlier starts
        self._began = 0.0  # when the first batch was asked for
        self._ended: float | None = None  # when training was over: what closes the run is no part
        self._first_batch = 0
        self._first: Spent | None = None  # the first measured batch
        self._since: Spent | None = None  # the beginning of the window
        self._has_told = False
        self._memory = memory.MemoryWatch()
        self._first_epoch = 0
        # looked up where they are needed, once
        self._side: int | None = None
        self._fast_bf16: bool | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Find the callbacks that know where the time goes."""
        self._began, self._ended = time.perf_counter(), None
        self._first_batch = state.timestamp.batch.value
        self._first_epoch = state.timestamp.epoch.value
        self._monitor, self._speed = one_of(state, TrainingMonitor), one_of(state, SpeedMonitor)
        self._evaluation = one_of(state, EvaluationCallback)
        self._saver, self._console = one_of(state, CheckpointSaver), one_of(state, Console)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure; say what is due. A run that is profiled has no pace of its own."""
        if self._config.profiler is not None:
            return
        batch = state.timestamp.batch.value
        trained = batch - self._first_batch
        first = UNMEASURED_BATCHES + self._config.data.num_workers
        if trained == first:
            self._first = self._since = self._now(state)
        if trained == first + ENOUGH_BATCHES:
            self._plan(state)
        if batch % EVERY == 0:
            self._end_window(state)
        if batch % memory.LOOK_EVERY == 0 and (line := self._memory.look(batch)):
            (print_once if self._console is None else self._console.tell)(line)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say once what limits a short run."""
        if not self._has_told:
            self._end_window(state)
        self._ended = time.perf_counter()

    def spent(self) -> Spent:
        """Return what all starts have spent."""
        return self._earlier + self._own()

    def advice(self, waiting: float, state: State) -> str:
        """Say what limits the run, of which so much of a step is waiting for data."""
        measured = MeasuredBatches(0.0, waiting)
        return verdict(measured, self._circumstances(measured, state))

    def state_dict(self) -> dict[str, Any]:
        """Return the windows so far, and what was spent."""
        return {
            "rates": list(self.rates),
            "mfus": list(self.mfus),
            "spent": dataclasses.asdict(self.spent()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.rates, self.mfus = list(state["rates"]), list(state["mfus"])
        self._earlier = Spent(**state["spent"])

    def _own(self) -> Spent:
        """Read what this start has spent."""
        if not self._began:
            return Spent()
        return Spent(
            batches=self._monitor.batches if self._monitor else 0,
            seconds=(self._ended or time.perf_counter()) - self._began,
            waiting=self._monitor.waited if self._monitor else 0.0,
            evaluation=self._evaluation.watch.seconds if self._evaluation else 0.0,
            checkpoints=self._saver.watch.seconds if self._saver else 0.0,
            flops=self._speed.flops if self._speed else 0.0,
        )

    def _now(self, state: State) -> Spent:
        """Read what was spent when the device is done with what it was told to do."""
        if state.device.name == "gpu":
            torch.cuda.synchronize()
        return self._own()

    def _plan(self, state: State) -> None:
        """Say how long the rest will take at the pace of the window so far."""
        assert self._since is not None
        window, earlier = self._now(state) - self._since, self._earlier
        left = self._total - state.timestamp.batch.value
        seconds = left * window.training / window.batches
        others = [
            name
            for name, one in (("evaluation", self._evaluation), ("checkpoints", self._saver))
            if one is not None
        ]
        if earlier.batches:
            seconds += left * (earlier.evaluation + earlier.checkpoints) / earlier.batches
            others = []
        if seconds >= SHORT:
            rate = window.batches * self._config.global_train_batch_size / window.training
            self._tell(planned(left, seconds, rate, others, datetime.now()))

    def _end_window(self, state: State) -> None:
        """Say what limits the run, and begin the next window."""
        if self._since is None:
            return
        now = self._now(state)
        window = now - self._since
        if window.batches < ENOUGH_BATCHES:
            return
        self._since = now
        assert self._first is not None
        measured = self._measure(window, now - self._first, state)
        self.rates.append(measured.samples)
        self.mfus += [] if measured.mfu is None else [measured.mfu]
        self._has_told = True
        batch = state.timestamp.batch.value
        if self._console is not None:
            said = verdict(measured, self._circumstances(measured, state))
            self._tell(f"batch {batch:,}: {figures(measured)}; {said}")

    def _measure(self, window: Spent, whole: Spent, state: State) -> MeasuredBatches:
        """Compute the figures of a window, with the wait of the rank that waited the longest.

        Evaluation and checkpoints are rare: their shares are of all measured batches.
        """
        mine = torch.tensor([window.waiting / window.training])
        waiting = float(gather(state.device.tensor_to_device(mine)).max())
        peak = self._speed.gpu_flops_available if self._speed else None
        is_known = bool(peak and window.flops)
        return MeasuredBatches(
            samples=window.batches * self._config.global_train_batch_size / window.training,
            waiting=waiting,
            evaluation=whole.evaluation / whole.seconds,
            checkpoints=whole.checkpoints / whole.seconds,
            mfu=window.flops / window.training / float(peak or 1) if is_known else None,
        )

    def _circumstances(self, measured: MeasuredBatches, state: State) -> Circumstances:
        """Describe the machine and what is known of the data."""
        data, evaluation = self._config.data, self._evaluation
        is_remote = any(one.remote for one in data.streams.values())
        is_first_epoch = state.timestamp.epoch == self._first_epoch
        seconds = {} if evaluation is None else evaluation.seconds_of_evaluators()
        return Circumstances(
            self._config,
            state.device.name,
            cores=available_cores(),
            threads=torch.get_num_threads(),
            ranks=local_world_size(),
            devices=torch.cuda.device_count(),
            fast_bf16=self._is_faster_in_bf16(state),
            stored_side=self._look_at_images(state) if measured.waiting >= WAITING else None,
            may_download=is_remote and is_first_epoch and data.cache_limit is None,
            evaluators=seconds,
        )

    def _look_at_images(self, state: State) -> int | None:
        """Return the median of the shorter sides of a few stored images; once a start."""
        if self._side is None:
            dataset = state.train_dataloader.dataset  # type: ignore[union-attr]
            assert isinstance(dataset, ImageTextDataset)
            samples = state.batch["sample"][:IMAGES_LOOKED_AT].tolist()
            sides = [side for one in samples if (side := dataset.side_of(one))]
            self._side = int(statistics.median(sides)) if sides else 0
        return self._side or None

    def _is_faster_in_bf16(self, state: State) -> bool:
        if self._fast_bf16 is None:
            self._fast_bf16 = is_faster_in_bf16(next(state.model.parameters()).device)
        return self._fast_bf16

    def _tell(self, text: str) -> None:
        if self._console is not None:
            self._console.tell(text)


def planned(left: int, seconds: float, rate: float, others: list[str], now: datetime) -> str:
    """Say how long the rest of a run will take, and when it ends.

    Args:
        left: batches.
        seconds: that they will take.
        rate: samples a second.
        others: what takes time besides, and isn't counted.
        now: local time.
    """
    besides = f"; {' and '.join(others)} come on top" if others else ""
    takes = f"{left:,} batches will take {duration(seconds)} at {rate:,.0f} samples/s"
    try:
        end = now + timedelta(seconds=seconds)
    except OverflowError:  # max_duration=1000000000000ba, for a run that a person will stop
        return f"{takes}{besides}"
    day = "" if end.date() == now.date() else f"{end:%a} {end.day} {end:%b} "
    return f"{takes}, until {day}{end:%H:%M}{besides}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    if seconds < SHORT:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours = divmod(minutes // 60, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min"


def one_of(state: State, kind: type[C]) -> C | None:
    """Return a run's callback of a kind; None where there is none."""
    return next((one for one in state.callbacks if isinstance(one, kind)), None)
