"""A few steps of a run, measured: how long a step takes, and how long the loader takes alone."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Callback, State
from composer.devices import Device
from composer.loggers import Logger

from alignclip.config.schema import DataConfig, RunConfig, SchedulerConfig
from alignclip.ranks import largest_of_all_ranks
from alignclip.training import composer_patches
from alignclip.training.build import build_trainer
from alignclip.training.display import print_once
from alignclip.training.pace import UNMEASURED_BATCHES

# from which the loader's rate is measured: batches of each worker, and their time
ROUNDS, ENOUGH_SECONDS = 2, 2.0


@dataclass(frozen=True)
class MeasuredSteps:
    """The times of a few batches, of the slowest rank.

    Attributes:
        count: batches measured.
        step: seconds of a batch.
        loader: seconds that the workers alone take for a batch; 0 where that isn't known.
        memory: the most bytes that rank 0 has held, on its GPU or else in its process.
    """

    count: int
    step: float
    loader: float
    memory: int


def measure_steps(config: RunConfig, device: Device, steps: int) -> MeasuredSteps:
    """Train a few steps as the run would; time them, and time the loader alone."""
    clock = StepClock()
    trainer = build_trainer(shortened(config, UNMEASURED_BATCHES + steps), device, None, [clock])
    try:
        print_once("\nmeasuring the loader, then the steps …")
        loading = seconds_of_loader(trainer.state.train_dataloader, config.data)
        trainer.fit()
    finally:
        composer_patches.close(trainer)
    seconds = clock.seconds[UNMEASURED_BATCHES:]
    own = torch.tensor([statistics.median(seconds), loading], dtype=torch.float64)
    step, loader = largest_of_all_ranks(own).tolist()
    return MeasuredSteps(len(seconds), step, loader, _peak_memory(device))


def shortened(config: RunConfig, batches: int) -> RunConfig:
    """Return a run of a few batches that leaves nothing: no checkpoints, no logs, no evaluation.

    The run loads no weights: its times are the same without.
    """
    return dataclasses.replace(
        config,
        max_duration=f"{batches}ba",
        scheduler=SchedulerConfig(t_warmup="0ba"),
        train_subset_num_batches=-1,
        save_folder=None,
        autoresume=False,
        load_path=None,
        pretrained=None,
        keep_best=None,
        profiler=None,
        evaluators={},
        callbacks={},
        loggers={},
    )


def seconds_of_loader(loader: Any, config: DataConfig) -> float:
    """Return the seconds that the loader's workers take for a batch, all of them together.

    What the workers have prepared ahead isn't counted, nor the time in which they start and the
    first shards are downloaded.

    Returns:
        0 where there are no workers, or the epoch is too short to tell.
    """
    workers, batches = config.num_workers, iter(loader)
    ahead = workers * (config.prefetch_factor + 1)
    if not workers or sum(1 for _ in itertools.islice(batches, ahead)) < ahead:
        return 0.0
    began, counted, seconds = time.perf_counter(), 0, 0.0
    while counted < ROUNDS * workers or seconds < ENOUGH_SECONDS:
        if sum(1 for _ in itertools.islice(batches, workers)) < workers:
            break
        counted, seconds = counted + workers, time.perf_counter() - began
    return seconds / counted if counted else 0.0


class StepClock(Callback):
    """Measures each batch, from the end of the one before.

    Attributes:
        seconds: of each batch.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Wait for the device, and read the clock."""
        if state.device.name == "gpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


def _peak_memory(device: Device) -> int:
    """Return the most bytes that this rank has held: on its GPU, or else in its process."""
    if device.name == "gpu":
        return torch.cuda.max_memory_allocated()
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024)
