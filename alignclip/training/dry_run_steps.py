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

from alignclip.config.schema import RunConfig, SchedulerConfig
from alignclip.ranks import largest_of_all_ranks
from alignclip.training import composer_patches
from alignclip.training.build import build_trainer
from alignclip.training.display import print_once
from alignclip.training.pace import UNMEASURED_BATCHES

ROUNDS = 2  # batches of each data worker, from which the loader's rate is measured


@dataclass(frozen=True)
class MeasuredSteps:
    """The times of a few batches, of the slowest rank.

    Attributes:
        count: batches measured.
        step: seconds of a batch.
        loader: seconds that the loader alone takes for a batch; 0 where that isn't known.
        memory: the most bytes that rank 0 has held, on its GPU or else in its process.
    """

    count: int
    step: float
    loader: float
    memory: int


def measure(config: RunConfig, device: Device, steps: int) -> MeasuredSteps:
    """Train a few steps as the run would; time them, and time the loader alone."""
    clock = StepClock()
    trainer = build_trainer(shortened(config, UNMEASURED_BATCHES + steps), device, None, [clock])
    try:
        print_once("\nmeasuring the loader, then the steps …")
        loading = seconds_of_loader(trainer.state.train_dataloader, config.data.num_workers)
        trainer.fit()
    finally:
        composer_patches.close(trainer)
    seconds = clock.seconds[UNMEASURED_BATCHES:]
    own = torch.tensor([statistics.median(seconds), loading], dtype=torch.float64)
    step, loader = largest_of_all_ranks(own).tolist()
    return MeasuredSteps(len(seconds), step, loader, _peak_memory(device))


def shortened(config: RunConfig, batches: int) -> RunConfig:
    """Return a run of a few batches that leaves nothing: no checkpoints, no logs, no evaluation."""
    return dataclasses.replace(
        config,
        max_duration=f"{batches}ba",
        scheduler=SchedulerConfig(t_warmup="0ba"),
        train_subset_num_batches=-1,
        save_folder=None,
        autoresume=False,
        load_path=None,
        keep_best=None,
        profiler=None,
        evaluators={},
        callbacks={},
        loggers={},
    )


def seconds_of_loader(loader: Any, workers: int) -> float:
    """Return the seconds that the loader alone takes for a batch.

    The first batch of each worker isn't counted: the workers start, and shards are downloaded.

    Returns:
        0 where the epoch is too short to tell.
    """
    first = max(workers, 1)
    batches = iter(loader)
    for _ in itertools.islice(batches, first):
        pass
    began = time.perf_counter()
    count = sum(1 for _ in itertools.islice(batches, ROUNDS * first))
    return (time.perf_counter() - began) / count if count else 0.0


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
