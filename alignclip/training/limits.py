"""The side that limits a run, and what to change: from measured shares and the run's settings.

Only what is true for the run's settings is advised; what is on already isn't.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from alignclip.config.schema import RunConfig

# Shares of the time from which on a part is worth a change: below, other parts take more
WAITING, EVALUATION, CHECKPOINTS = 0.1, 0.15, 0.1
# A crop keeps 8/7 of its side as open_clip's evaluation does: 256 pixels for 224
STORED_TO_CROP = 8 / 7
MUCH_LARGER = 1.3  # times the pixels that are stored then: from there on smaller files load faster
IDLE = 0.1  # an MFU below which the device mostly waits for its host, or has too little to do


@dataclass(frozen=True)
class MeasuredBatches:
    """The speed of a number of batches, and the shares of their time.

    Attributes:
        samples: a second, of all ranks, while they trained.
        waiting: share of the training that the slowest rank waited for data.
        evaluation: share of the time since the first measured batch: the windows without an
            evaluation count as well.
        checkpoints: the same share.
        mfu: model FLOPs utilization of the device; None where that isn't known.
    """

    samples: float
    waiting: float
    evaluation: float = 0.0
    checkpoints: float = 0.0
    mfu: float | None = None


@dataclass(frozen=True)
class Circumstances:
    """The settings and the machine of a run, as far as advice depends on them.

    Attributes:
        config: of the run.
        device: ``cpu``, ``gpu`` or ``mps``.
        cores: that the processes of a machine may use.
        threads: of PyTorch, in each process.
        ranks: processes on this machine.
        devices: GPUs of this machine.
        fast_bf16: whether the device computes in bf16 faster than in fp32.
        stored_side: the shorter side of the set's images, in pixels; None where that isn't known.
        may_download: whether shards may still be on their way, for the first time.
        evaluators: seconds by an evaluator's name.
    """

    config: RunConfig
    device: str
    cores: int
    threads: int = 1
    ranks: int = 1
    devices: int = 0
    fast_bf16: bool = False
    stored_side: int | None = None
    may_download: bool = False
    evaluators: Mapping[str, float] = field(default_factory=dict)


def verdict(measured: MeasuredBatches, here: Circumstances) -> str:
    """Say in a sentence which side limits a run, and what to change."""
    excess = {
        _loader: measured.waiting / WAITING,
        _evaluation: measured.evaluation / EVALUATION,
        _checkpoints: measured.checkpoints / CHECKPOINTS,
    }
    worst = max(excess, key=lambda one: excess[one])
    return worst(measured, here) if excess[worst] >= 1 else _device(measured, here)


def figures(measured: MeasuredBatches) -> str:
    """Return the figures of a line: samples/s, data wait, MFU where it is known."""
    mfu = "" if measured.mfu is None else f", MFU {percent(measured.mfu)}"
    return f"{measured.samples:,.0f} samples/s, data wait {percent(measured.waiting)}{mfu}"


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.0f} %"


def _loader(measured: MeasuredBatches, here: Circumstances) -> str:
    data, side = here.config.data, _resized_side(here)
    readers = data.num_workers * here.ranks
    advice = []
    if data.num_workers == 0:
        advice.append("set data.num_workers (with 0 the training reads its own data)")
    elif readers < here.cores:
        advice.append(f"raise data.num_workers ({readers} of {here.cores} cores used)")
    if side:
        advice.append(f"convert with --resize {side} (the images have {here.stored_side} pixels)")
    if here.may_download:
        advice.append("wait for the next epoch, if shards are still being downloaded")
    if not advice:
        shared = " beside the training" if here.device == "cpu" else ""
        advice.append(
            f"{readers} workers read on {here.cores} cores{shared}; more cores would help"
        )
    return f"the loader limits: {', or '.join(advice)}"


def _evaluation(measured: MeasuredBatches, here: Circumstances) -> str:
    slowest = max(here.evaluators, key=lambda name: here.evaluators[name])
    key = f"evaluators.{slowest}.interval"
    now = here.config.evaluators[slowest].interval
    share = percent(measured.evaluation)
    return f"evaluation took {share} of the time: raise {key} (it is {now})"


def _checkpoints(measured: MeasuredBatches, here: Circumstances) -> str:
    share, now = percent(measured.checkpoints), here.config.save_interval
    return f"checkpoints took {share} of the time: raise save_interval (it is {now})"


def _device(measured: MeasuredBatches, here: Circumstances) -> str:
    advice = {"gpu": _on_gpu, "cpu": _on_cpu}.get(here.device, _on_any)(here)
    if measured.mfu is not None and measured.mfu < IDLE:
        advice.append("see where a step's time goes (profiler={})")
    said = ", or ".join(advice) or "no setting is left that would make it faster"
    return f"the device limits: {said}"


def _on_gpu(here: Circumstances) -> list[str]:
    config, advice = here.config, []
    if here.devices > here.ranks:
        advice.append(f"use all {here.devices} GPUs (composer -n {here.devices})")
    if config.precision == "fp32" and here.fast_bf16:
        advice.append("precision=amp_bf16")
    if config.compile_config is None:
        advice.append("compile_config.regional=true")
    fsdp2 = config.parallelism_config.fsdp2
    if fsdp2 is not None and fsdp2.activation_checkpointing:
        advice.append("parallelism_config.fsdp2.activation_checkpointing=false if memory allows")
    return advice + _on_any(here)


def _on_cpu(here: Circumstances) -> list[str]:
    config, advice = here.config, []
    if here.devices:
        advice.append("device=gpu")
    if here.threads * here.ranks < here.cores:
        used = f"{here.threads * here.ranks} of {here.cores} cores compute"
        advice.append(f"raise OMP_NUM_THREADS ({used})")
    if config.precision == "fp32" and here.fast_bf16:
        advice.append("precision=amp_bf16")
    return advice + _on_any(here)


def _on_any(here: Circumstances) -> list[str]:
    if not here.config.model.encode_chunk_size:
        return []
    return ["model.encode_chunk_size=0 if memory allows: chunks are encoded twice"]


def _resized_side(here: Circumstances) -> int | None:
    """Return the side to convert with, where the stored images are much larger."""
    side = math.ceil(here.config.model.vision_cfg.image_size * STORED_TO_CROP)
    return side if here.stored_side is not None and here.stored_side > MUCH_LARGER * side else None
