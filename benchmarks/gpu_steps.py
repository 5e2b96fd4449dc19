"""Whole training steps on one GPU, and how often the host waits for it in a step of a run."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from gpu_work import Failed, Work, autocast, batch_of

from alignclip.model.encoders import clamp_logit_scale_
from alignclip.model.optimization import build_optimizer
from alignclip.training import composer_patches
from alignclip.training.build import build_model, build_trainer
from alignclip.training.preflight import training_device

NO_ROOM = "out of memory"


def eager(work: Work) -> str:
    """Measure whole steps on batches that lie on the device."""
    return _series(work, "eager", work.sizes.batches)


def compiled(work: Work) -> str:
    """Measure compiled steps."""
    return _series(work, "compiled", work.sizes.compiled)


def chunked(work: Work) -> str:
    """Measure steps that encode in chunks."""
    batch, chunk = work.sizes.chunked
    return _series(work, f"chunks of {chunk}", (batch,), f"model.encode_chunk_size={chunk}")


def _series(work: Work, name: str, batches: tuple[int, ...], *overrides: str) -> str:
    """Measure steps of several batch sizes; a size that the memory is too small for is told."""
    said = []
    for batch in batches:
        found = f"batch {batch}: {NO_ROOM}"
        with suppress(torch.OutOfMemoryError):
            found = _step(work, f"{name}, batch {batch}", batch, *overrides)
        torch.cuda.empty_cache()
        print(found, flush=True)
        said.append(found)
    if all(NO_ROOM in one for one in said):
        raise Failed("; ".join(said))
    return "; ".join(said)


def _step(work: Work, name: str, batch: int, *overrides: str) -> str:
    """Measure whole steps of a batch size, and put the outcome into words."""
    step, flops = training_step(work, batch, *overrides, is_compiled=name.startswith("compiled"))
    work.peak()
    seconds = work.seconds_of(step, *work.sizes.steps)
    rate = work.figures.add(f"{name}/rate", [batch / s for s in seconds], "pairs/s", "higher")
    said = f"batch {batch}: {rate:,.0f} pairs/s"
    if work.is_cuda:
        memory = work.figures.add(f"{name}/memory", [work.peak()], "GiB", "lower")
        said += f", {memory:.1f} GiB"
    done = [flops / s / 1e12 for s in seconds]
    work.figures.add(f"{name}/speed", done, "TFLOP/s", "higher")
    if ceiling := work.ceiling("product/rate"):
        mfu = work.figures.add(f"{name}/MFU", [100 * one / ceiling for one in done], "%", "higher")
        said += f", {statistics.median(done):,.3g} TFLOP/s = {mfu:.0f} % of the product"
    return said


def training_step(
    work: Work, batch: int, *overrides: str, is_compiled: bool = False
) -> tuple[Callable[[], None], float]:
    """Return a whole training step on a batch that lies on the device, and its FLOPs."""
    config = work.config(f"global_train_batch_size={batch}", *overrides)
    torch.manual_seed(0)
    model = build_model(config, training_device("gpu" if work.is_cuda else "cpu"))
    model.to(work.device)
    optimizer = build_optimizer(config.optimizer, model.encoders, work.is_cuda)
    inputs = batch_of(
        work, batch, config.model.vision_cfg.image_size, config.model.text_cfg.context_length
    )
    if is_compiled:
        # on a CPU only to see that it runs: kernels for one take minutes to compile
        model.compile(backend="inductor" if work.is_cuda else "aot_eager")

    def step() -> None:
        with autocast(work):
            loss = model.loss(model(inputs), inputs)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model.encoders)

    model.count_flops()
    return step, model.flops_per_batch(inputs)


def waits(work: Work) -> str:
    """Count how often the host waits for the device in a step of a run that logs nothing then."""
    first, last = 3, 8
    config = work.config(
        f"global_train_batch_size={work.sizes.loaded}",
        f"max_duration={last + 1}ba",
        "scheduler.t_warmup=1ba",
        "console_log_interval=1000ba",
        "progress_bar=false",
    )
    device = training_device("gpu" if work.is_cuda else "cpu")
    trainer = build_trainer(config, device, None, [_Watch(first, last)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit()
    composer_patches.close(trainer)
    found = [one for one in caught if "synchronizing" in str(one.message)]
    where = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in found)
    steps = last - first
    work.figures.add("host/waits", [len(found) / steps], "a step", "lower")
    places = "".join(f", {place} {count}×" for place, count in where.most_common(8))
    return f"{len(found) / steps:g} waits of the host a step{places}"


class _Watch(Callback):
    """Has PyTorch warn of each wait of the host for the GPU between the ends of two batches."""

    def __init__(self, first: int, last: int) -> None:
        self.modes = {first: "warn", last: "default"}

    def batch_end(self, state: State, logger: Logger) -> None:
        mode = self.modes.get(state.timestamp.batch.value)
        if mode and torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode(mode)
