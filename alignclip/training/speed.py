"""Composer's SpeedMonitor for these models: samples/s, FLOPs, MFU; the device isn't waited for."""

from __future__ import annotations

import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from composer import callbacks
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import Precision, State
from composer.loggers import Logger
from composer.models import ComposerModel

from alignclip.model.composer_model import AlignCLIPModel
from alignclip.ranks import world_size


class Totals(NamedTuple):
    """The work of a run up to the end of a batch: of all ranks, but for the rank's own FLOPs."""

    batches: float
    samples: float
    flops: float
    seconds: float


class SpeedMonitor(callbacks.SpeedMonitor):
    """Logs ``throughput/*`` and ``time/*`` under Composer's names.

    Composer's own sums the FLOPs over the ranks, and the host waits for the sum at every step. Here
    the FLOPs of all ranks are those of this rank times the ranks: their batches have the same size,
    and their longest captions are about as long.

    Attributes:
        flops: operations of this rank in this start.
        gpu_flops_available: operations a second that a device can do; 0 where that isn't known.
    """

    def __init__(
        self,
        window_size: int = 100,
        gpu_flops_available: float | int | None = None,
        time_unit: str = "hours",
    ) -> None:
        super().__init__(window_size, gpu_flops_available, time_unit)
        self.flops = 0.0
        self._counts: deque[Totals] = deque(maxlen=window_size + 1)

    def init(self, state: State, logger: Logger) -> None:
        """Look up the device's peak where the YAML doesn't say it."""
        if self.gpu_flops_available is None:
            self.gpu_flops_available = peak_flops(state.precision)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the rates of the last batches, and the hours."""
        self.flops += model_of(state).flops_per_batch(state.batch)
        time = state.timestamp
        seconds = time.total_wct.total_seconds()
        self._counts.append(Totals(time.batch.value, time.sample.value, self.flops, seconds))
        if len(self._counts) == self._counts.maxlen:
            logger.log_metrics(self._rates())
        hours = {
            "train": seconds,
            "val": self.total_eval_wct,
            "total": seconds + self.total_eval_wct,
        }
        logger.log_metrics({f"time/{name}": value / self.divider for name, value in hours.items()})

    def _rates(self) -> dict[str, float]:
        first, last = self._counts[0], self._counts[-1]
        seconds = last.seconds - first.seconds
        rates = {
            "batches": (last.batches - first.batches) / seconds,
            "samples": (last.samples - first.samples) / seconds,
        }
        if last.flops:
            rates["flops"] = world_size() * (last.flops - first.flops) / seconds
        logged = {f"throughput/{name}_per_sec": rate for name, rate in rates.items()}
        of_device = {name: rate / world_size() for name, rate in rates.items()}
        logged |= {f"throughput/device/{name}_per_sec": rate for name, rate in of_device.items()}
        if last.flops and self.gpu_flops_available:
            logged["throughput/device/mfu"] = of_device["flops"] / self.gpu_flops_available
        return logged


def model_of(state: State) -> AlignCLIPModel:
    """Return the model that DDP may have wrapped."""
    model = state.model if isinstance(state.model, ComposerModel) else state.model.module
    assert isinstance(model, AlignCLIPModel)
    return model


def peak_flops(precision: Precision) -> float:
    """Return Composer's figure of operations a second of this GPU; 0 where there is none.

    Composer's table of fp32 is without TF32, which matrix products in fp32 use where it is allowed.
    """
    name = precision.value
    if precision == Precision.FP32 and torch.backends.cuda.matmul.allow_tf32:
        name = "tf32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no figure: then there is no MFU
        asked: Any = SimpleNamespace(precision=SimpleNamespace(value=name))
        return float(get_gpu_flops_available(asked) or 0)
