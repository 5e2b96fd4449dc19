"""Whole training steps on one GPU, and how often the host waits for it in a step of a run."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import open_clip
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from gpu_work import Failed, Work, autocast, batch_of
from torch.autograd import DeviceType

from alignclip.data.transforms import normalize
from alignclip.model.blocks import compile_blocks
from alignclip.model.encoders import clamp_logit_scale_
from alignclip.model.optimization import build_optimizer
from alignclip.training import composer_patches
from alignclip.training.build import build_model, build_trainer
from alignclip.training.preflight import training_device

NO_ROOM = "out of memory"
KERNELS = 40  # rows of a table


def eager(work: Work) -> str:
    """Measure whole steps on batches that lie on the device."""
    return _series(work, "eager", work.sizes.batches)


def compiled(work: Work) -> str:
    """Measure steps of a model that is compiled as a whole."""
    return _series(work, "compiled", work.sizes.compiled)


def regional(work: Work) -> str:
    """Measure steps of a model whose blocks are compiled one by one."""
    return _series(work, "regional", work.sizes.compiled)


def beside(work: Work) -> str:
    """Measure SharedCLIP and CLIP of this package, and open_clip's CLIP with its own loss."""
    batch = work.sizes.compiled[0]
    nothing = "model.shared={blocks: 0, ln_final: false, projection: false}"
    ways: dict[str, tuple[str, ...]] = {"SharedCLIP": ("loss.beta=0",)}
    ways["CLIP"] = (*ways["SharedCLIP"], nothing)
    said = [f"{name}, {_step(work, name, batch, *words)}" for name, words in ways.items()]
    step = open_clip_step(work, batch)
    seconds = work.seconds_of(step, *work.sizes.steps)
    rates = [batch / s for s in seconds]
    rate = work.figures.add(f"open_clip, batch {batch}/rate", rates, "pairs/s", "higher")
    return "; ".join([*said, f"open_clip {rate:,.0f} pairs/s"])


def profile(work: Work) -> str:
    """Print which kernels an eager step and a regionally compiled one spend their time in."""
    steps, batch, said = 2, work.sizes.compiled[0], []
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if work.is_cuda else [activity.CPU]
    for name in ("eager", "regional"):
        step, _ = training_step(work, batch, how=name)
        seconds = statistics.median(work.seconds_of(step, *work.sizes.steps))
        with torch.profiler.profile(activities=activities) as profiler:
            work.seconds_of(step, 0, steps)
        print(f"{name}, a step of {batch} pairs: {1000 * seconds:.1f} ms")
        busy = _print_kernels(work, profiler, steps)
        said.append(f"{name}: kernels take {busy:.1f} of {1000 * seconds:.1f} ms")
    return "; ".join(said)


def _print_kernels(work: Work, profiler: torch.profiler.profile, steps: int) -> float:
    """Print the kernels that take most time; return the milliseconds a step of all of them."""
    wanted = DeviceType.CUDA if work.is_cuda else DeviceType.CPU
    events = [one for one in profiler.key_averages() if one.device_type == wanted]
    took = {}
    for one in events:
        if not one.is_user_annotation:
            taken = one.self_device_time_total if work.is_cuda else one.self_cpu_time_total
            took[one.key] = (taken / 1000 / steps, one.count / steps)
    whole = sum(milliseconds for milliseconds, _ in took.values())
    for key, (milliseconds, count) in sorted(took.items(), key=lambda item: -item[1][0])[:KERNELS]:
        print(f"{milliseconds:8.2f} ms {milliseconds / whole:6.1%} {count:6.0f} ×  {key[:130]}")
    return whole


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
    began = time.perf_counter()
    step, flops = training_step(work, batch, *overrides, how=name.partition(",")[0])
    step()
    work.wait()
    first = work.figures.add(f"{name}/first", [time.perf_counter() - began], "s", "lower")
    work.peak()
    seconds = work.seconds_of(step, *work.sizes.steps)
    rate = work.figures.add(f"{name}/rate", [batch / s for s in seconds], "pairs/s", "higher")
    said = f"batch {batch}: {rate:,.0f} pairs/s"
    if work.is_cuda:
        memory = work.figures.add(f"{name}/memory", [work.peak()], "GiB", "lower")
        said += f", {memory:.1f} GiB"
    said += f", first step after {first:.0f} s"
    done = [flops / s / 1e12 for s in seconds]
    work.figures.add(f"{name}/speed", done, "TFLOP/s", "higher")
    if ceiling := work.ceiling("product/rate"):
        mfu = work.figures.add(f"{name}/MFU", [100 * one / ceiling for one in done], "%", "higher")
        said += f", {statistics.median(done):,.3g} TFLOP/s = {mfu:.0f} % of the product"
    return said


def training_step(
    work: Work, batch: int, *overrides: str, how: str = "eager"
) -> tuple[Callable[[], None], float]:
    """Return a whole training step on a batch that lies on the device, and its FLOPs.

    Args:
        work: the device.
        batch: pairs.
        *overrides: of the recipe.
        how: ``compiled`` as a whole, or ``regional``, block by block; else eager.
    """
    config = work.config(f"global_train_batch_size={batch}", *overrides)
    torch.manual_seed(0)
    model = build_model(config, training_device("gpu" if work.is_cuda else "cpu"))
    model.to(work.device)
    optimizer = build_optimizer(config.optimizer, model.encoders, work.is_cuda)
    inputs = batch_of(
        work, batch, config.model.vision_cfg.image_size, config.model.text_cfg.context_length
    )
    ways: dict[str, Callable[..., None]] = {
        "compiled": model.compile,
        "regional": partial(compile_blocks, model),
    }
    if how in ways:
        composer_patches.compile_whole_graphs()
        # on a CPU only to see that it runs: kernels for one take minutes to compile
        ways[how](backend="inductor" if work.is_cuda else "aot_eager")

    def step() -> None:
        with autocast(work):
            loss = model.loss(model(inputs), inputs)["total"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model.encoders)

    model.count_flops()
    return step, model.flops_per_batch(inputs)


def open_clip_step(work: Work, batch: int) -> Callable[[], None]:
    """Return a step as ``open_clip_train`` takes it: its CLIP, its loss, AdamW in bf16."""
    config = work.config(f"global_train_batch_size={batch}")
    vision, text = asdict(config.model.vision_cfg), asdict(config.model.text_cfg)
    torch.manual_seed(0)
    model = open_clip.CLIP(config.model.embed_dim, vision, text).to(work.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=work.is_cuda)
    criterion = open_clip.ClipLoss()
    inputs = batch_of(
        work, batch, config.model.vision_cfg.image_size, config.model.text_cfg.context_length
    )

    def step() -> None:
        with autocast(work):
            # its loader normalises on the host
            loss = criterion(*model(normalize(inputs["image"]), inputs["text"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model)

    return step


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
