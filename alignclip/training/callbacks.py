"""What runs have besides Composer's own: log line, orderly stop, chunks under FSDP2, the save folder's rotation."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import resource_tracker
from types import FrameType

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.fsdp import FSDPModule

from alignclip.storage import describe_storage_error
from alignclip.training.save_folder import SaveFolder

log = logging.getLogger(__name__)


class TrainingMonitor(Callback):
    """Logs ``lr``, ``logit_scale`` (exponentiated, as open_clip logs it) and ``time/data_wait_fraction``.

    The last is the share of wall-clock time that this rank waited for its next batch, since the last step logged.
    The loss terms are logged by the Trainer (``loss/train/…``), samples/s by Composer's SpeedMonitor.

    Attributes:
        batches: trained in this start.
        seconds: that they took, from asking for data to the end of the step, without evaluation.
        waited: seconds of these, for data.
    """

    def __init__(self) -> None:
        self.batches, self.seconds, self.waited = 0, 0.0, 0.0
        self._asked = 0.0
        self._waited = 0.0
        self._last_end: float | None = None

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The Trainer asks for a batch."""
        self._asked = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The batch is there."""
        self._waited = time.perf_counter() - self._asked

    def batch_start(self, state: State, logger: Logger) -> None:
        """Before the step: what it will use."""
        logger.log_metrics({"lr": state.optimizers[0].param_groups[0]["lr"]})

    def batch_end(self, state: State, logger: Logger) -> None:
        """After the step."""
        logger.log_metrics({"logit_scale": float(state.outputs[2])})
        now = time.perf_counter()
        self.batches, self.seconds, self.waited = (
            self.batches + 1,
            self.seconds + now - self._asked,
            self.waited + self._waited,
        )
        if self._last_end is not None:
            logger.log_metrics({"time/data_wait_fraction": self._waited / (now - self._last_end)})
        self._last_end = now


class StopOnSignal(Callback):
    """A preempted node, or Ctrl-C: SIGTERM to any rank makes all ranks save at the same batch end, and stop.

    SIGTERM is blocked in this thread, so that the processes which it starts from now on — data workers, uploaders —
    inherit the block and outlive a signal to the whole process group until the checkpoint is in the bucket.
    A handler is there as well: threads that were running before may still take the signal.

    Ctrl-C reaches all of them too. Under the launcher it counts as SIGTERM (the launcher sends that one as well, and
    a second Ctrl-C makes it kill them); a process that was started without it ends at once, as any would.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._received = False
        launched = "LOCAL_RANK" in os.environ
        self._signals = {signal.SIGTERM, signal.SIGINT} if launched else {signal.SIGTERM}
        for number in self._signals:
            signal.signal(number, self._on_signal)
        resource_tracker.ensure_running()  # its start ends with unblocking both; it starts once
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        atexit.register(_end_workers)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the processes that upload: their imports take a third of the launcher's 30 s, or more."""
        for saver in (c for c in state.callbacks if isinstance(c, CheckpointSaver)):
            uploader = saver.remote_uploader
            if uploader is not None and dist.get_global_rank() == 0:
                for executor in (
                    uploader.upload_executor,
                    *[uploader.check_remote_files_exist_executor] * 2,
                ):
                    executor.submit(dist.get_global_rank)  # any function of Composer's

    def batch_end(self, state: State, logger: Logger) -> None:
        """Stop where anyone was told to; the Trainer saves whenever training ends."""
        if self.requested(state) and not self._is_last_batch(state):
            self.stopped = True
            state.stop_training()

    def requested(self, state: State) -> bool:
        """Whether any rank was told to stop; all have to ask at the same time."""
        received = self._received or bool(self._signals & signal.sigpending())
        flag = state.device.tensor_to_device(torch.tensor([int(received)], dtype=torch.int32))
        dist.all_reduce(flag, reduce_operation="MAX")
        return bool(flag.item())

    def post_close(self) -> None:
        """Everything is saved: a launcher that ends the others when the first rank exits does no harm any more."""
        if self.stopped:
            for number in self._signals:
                signal.signal(number, signal.SIG_IGN)

    @staticmethod
    def _is_last_batch(state: State) -> bool:
        """Whether training ends here anyway: then it is finished, not stopped."""
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and float(elapsed) >= 1


def _end_workers() -> None:
    """Data workers that are still at work when this process ends: deaf to SIGTERM, they would be waited for."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class WholeThroughBackward(Callback):
    """Under FSDP2, encoding in recomputed chunks: what the backward pass has gathered stays whole until its end.

    FSDP2 takes a block that runs in the backward pass for one whose parameters are there. Those of a chunk's blocks
    are, but go with the chunk's gradients, and the next chunk runs the same blocks again.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        """Nothing is given up during the backward pass."""
        for module in self._sharded(state):
            module.set_reshard_after_backward(False)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Everything is, before the optimizer changes the shards: the next forward pass must gather them anew."""
        for module in self._sharded(state):
            module.reshard()

    @staticmethod
    def _sharded(state: State) -> list[FSDPModule]:
        return [module for module in state.model.modules() if isinstance(module, FSDPModule)]


class Rotation(Callback):
    """Keeps the newest ``save_num_checkpoints_to_keep`` checkpoints of a save folder.

    Composer prunes local files only, and of these forgets what a run has saved before it was resumed. Works beside
    training, a batch after each save: between saves there is one more than asked for.
    """

    def __init__(self, folder: SaveFolder, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._executor = ThreadPoolExecutor(1)
        self._running: Future[list[str]] | None = None
        self._seen: Time | None = None
        self._closed = False

    def batch_end(self, state: State, logger: Logger) -> None:
        """Start a rotation if a checkpoint was saved since the last one."""
        if dist.get_global_rank() != 0 or (self._running is not None and not self._running.done()):
            return
        self._report()
        saver = next(c for c in state.callbacks if isinstance(c, CheckpointSaver))
        if saver.last_checkpoint_batch != self._seen:
            self._seen = saver.last_checkpoint_batch
            self._running = self._executor.submit(self.folder.rotate, self.keep)

    def post_close(self) -> None:
        """Rotate once more when the last uploads are through. Composer calls this twice."""
        if dist.get_global_rank() != 0 or self._closed:
            return
        self._closed = True
        with suppress(
            RuntimeError
        ):  # Python ends, so an error has ended the run: the next start rotates
            self._running = self._executor.submit(self.folder.rotate, self.keep)
        self._executor.shutdown()
        self._report()

    def end(self) -> None:
        """Delete nothing more: the run ends with trouble."""
        self._closed = True
        self._executor.shutdown()

    def _report(self) -> None:
        """Old checkpoints that stay cost money, not the run: say so and go on."""
        if self._running is not None and (error := self._running.exception()) is not None:
            log.warning(
                f"could not remove old checkpoints of {self.folder.uri}: {describe_storage_error(error)}"
            )
        self._running = None
