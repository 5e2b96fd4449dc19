"""Callbacks of every run: values to log, the stop on a signal."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections import deque
from multiprocessing import resource_tracker
from types import FrameType

import torch
from composer.core import Callback, State
from composer.loggers import Logger

from alignclip.data import workers
from alignclip.ranks import true_on_any_rank
from alignclip.training.trainer import EVERY_BATCH, LoggedBatches


class SettlingCallback(Callback):
    """A callback that looks at a batch later than at its end, and so never waits for the device."""

    def settle(self, state: State, logger: Logger) -> None:
        """Look at everything that was put off; on every rank."""
        raise NotImplementedError


def settle_callbacks(state: State, logger: Logger) -> None:
    """Have everything looked at that was put off; before the last batch is relied on.

    Call this on every rank.
    """
    for callback in state.callbacks:
        if isinstance(callback, SettlingCallback):
            callback.settle(state, logger)


class TrainingMonitor(Callback):
    """Logs ``lr``, ``logit_scale`` and ``time/data_wait_fraction``.

    The scale is exponentiated, as open_clip logs it, and logged with the losses. The last is the
    share of wall-clock time that this rank waited for its next batch, since the last step logged. A
    GPU waits only when it has nothing left to do, so there the GPU's own clock counts, and tells a
    batch later. The loss terms are logged by the Trainer (``loss/train/…``), samples/s by the
    SpeedMonitor.

    Args:
        logged: the batches whose losses are logged.

    Attributes:
        batches: trained in this start.
        seconds: that they took, from asking for data to the end of the step, without evaluation.
        waited: seconds of these, for data.
    """

    def __init__(self, logged: LoggedBatches = EVERY_BATCH) -> None:
        self.batches, self.seconds, self.waited = 0, 0.0, 0.0
        self._logged = logged
        self._asked = 0.0
        self._waited = 0.0
        self._gap: DeviceGap | None = None  # that the device has now
        self._gaps: deque[DeviceGap] = deque()  # whose length is not known so far
        self._last_end: float | None = None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Note when the Trainer asks for a batch."""
        self._asked = time.perf_counter()
        if state.device.name == "gpu":
            self._gap = DeviceGap()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Note how long the Trainer waited for the batch."""
        self._waited = time.perf_counter() - self._asked
        if self._gap is not None:
            self._gap.end()
            self._gaps.append(self._gap)

    def batch_start(self, state: State, logger: Logger) -> None:
        """Log the learning rate that the step uses."""
        logger.log_metrics({"lr": state.optimizers[0].param_groups[0]["lr"]})

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the scale and the share of waiting."""
        if self._logged.has(state.timestamp.batch.value):
            logger.log_metrics({"logit_scale": float(state.outputs[2].detach())})
        now = time.perf_counter()
        if self._gap is not None:
            self._waited = self._ended_gaps()
        self.batches += 1
        self.seconds += now - self._asked
        self.waited += self._waited
        if self._last_end is not None:
            logger.log_metrics({"time/data_wait_fraction": self._waited / (now - self._last_end)})
        self._last_end = now

    def _ended_gaps(self) -> float:
        """Add up the gaps, in seconds, that have become known since the last batch."""
        seconds = 0.0
        while self._gaps and (gap := self._gaps[0].seconds()) is not None:
            self._gaps.popleft()
            seconds += gap
        return seconds


class DeviceGap:
    """The time for which a GPU has nothing to do, from now until :meth:`end`."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()  # when the GPU has done what it was told to do so far

    def end(self) -> None:
        """Tell the GPU that work comes now."""
        self._end.record()

    def seconds(self) -> float | None:
        """Return the gap's length; None while the GPU hasn't come to its end."""
        return self._begin.elapsed_time(self._end) / 1000 if self._end.query() else None


class StopOnSignal(Callback):
    """Makes all ranks save and stop at the same batch end, on SIGTERM to any of them or on Ctrl-C.

    SIGHUP, which a terminal sends when it is closed, counts as SIGTERM, unless ``nohup`` has it
    ignored.

    SIGTERM is blocked in this thread, so that the processes which this thread starts from now on
    (data workers) inherit the block and outlive a signal to the whole process group until the
    checkpoint is in the bucket. A handler is there as well: threads that were running
    before may still take the signal.

    Ctrl-C reaches all processes too. Under the launcher Ctrl-C counts as SIGTERM: the launcher
    sends SIGTERM as well, and a second Ctrl-C makes the launcher kill them. A process that was
    started without the launcher ends at once.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._received = False
        launched = "LOCAL_RANK" in os.environ
        self._signals = {signal.SIGTERM, signal.SIGINT} if launched else {signal.SIGTERM}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            self._signals.add(signal.SIGHUP)
        for number in self._signals:
            signal.signal(number, self._on_signal)
        resource_tracker.ensure_running()  # its start ends with unblocking both; it starts once
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        atexit.register(workers.kill_all)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop where any rank was told to; the Trainer saves whenever training ends."""
        if self.requested(state) and not self._is_last_batch(state):
            self.stopped = True
            state.stop_training()

    def requested(self, state: State) -> bool:
        """Say whether any rank was told to stop; call this on every rank."""
        received = self._received or bool(self._signals & signal.sigpending())
        return true_on_any_rank(torch.tensor([received]))[0]  # the hosts ask one another

    def post_close(self) -> None:
        """Ignore signals: all is saved, and the launcher signals when the first rank exits."""
        if self.stopped:
            for number in self._signals:
                signal.signal(number, signal.SIG_IGN)

    @staticmethod
    def _is_last_batch(state: State) -> bool:
        """Say whether training ends here anyway: then the run is finished, not stopped."""
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and float(elapsed) >= 1
