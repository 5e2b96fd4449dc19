"""Configuration → Trainer: data, model, optimizer, schedule, callbacks, loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer.core import Callback, DataSpec, Precision, Time, TimeUnit
from composer.devices import Device
from composer.loggers import LoggerDestination
from composer.utils import reproducibility
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from alignclip.config.schema import RunConfig
from alignclip.data import shared_memory, shared_memory_room
from alignclip.data.batch import count_samples
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.errors import UserError, one_line
from alignclip.losses import AlignCLIPLoss
from alignclip.model.blocks import compile_blocks
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders, clamp_logit_scale_
from alignclip.model.optimization import (
    build_optimizer,
    group_settings,
    lr_multiplier,
    restore_settings,
)
from alignclip.ranks import (
    local_rank,
    local_rank_zero_first,
    local_world_size,
    rank,
    world_size,
)
from alignclip.training import composer_patches, plugins
from alignclip.training.batch_check import FiniteCheck
from alignclip.training.callbacks import TrainingMonitor
from alignclip.training.device_memory import out_of_memory_explained
from alignclip.training.display import Console
from alignclip.training.evaluation_callback import EvaluationCallback
from alignclip.training.history import History
from alignclip.training.pace import Pace
from alignclip.training.profiling import build_profiler
from alignclip.training.resume import StartingPoint, check_loaded, say_jump, starting_point
from alignclip.training.save_folder import SaveFolder
from alignclip.training.saver import CheckpointSaver
from alignclip.training.speed import SpeedMonitor
from alignclip.training.starting_weights import load_starting_weights
from alignclip.training.trackers import with_wandb_id
from alignclip.training.trainer import LoggedBatches, Trainer
from alignclip.training.trainer_arguments import (
    compile_options,
    console_interval,
    show_progress,
    trainer_arguments,
)

LOG_INTERVAL = 10  # batches, on a device that the host waits for when it reads a loss


def build_trainer(
    config: RunConfig, device: Device, folder: SaveFolder | None, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Build the Trainer of a run, with the latest checkpoint where ``autoresume`` finds one."""
    composer_patches.install()
    with starting_point(config, folder) as start:
        return build_trainer_from(start, config, device, folder, callbacks)


def build_trainer_from(
    start: StartingPoint,
    config: RunConfig,
    device: Device,
    folder: SaveFolder | None,
    callbacks: Sequence[Callback],
) -> Trainer:
    """Build the Trainer of a run, with the state of the checkpoint that the run starts from."""
    loader = build_data(config, device)
    assert isinstance(loader.dataset, ImageTextDataset)
    reproducibility.seed_all(config.seed)  # the same weights on every rank
    model = build_model(config, device)
    load_starting_weights(config, model.encoders, folder, start)
    model.count_flops()
    if config.compile_config is not None and config.compile_config.regional:
        compile_blocks(model, **compile_options(config.compile_config))
    optimizer = build_optimizer(config.optimizer, model.encoders, device.name == "gpu")
    # right after the step, so that EMA and the checkpoint see the clamped value
    optimizer.register_step_post_hook(lambda *_: clamp_logit_scale_(model.encoders))
    scheduler = build_scheduler(config, optimizer, batches_an_epoch(config, loader))
    settings = group_settings(optimizer)
    logged = logged_batches(config, device, total_batches(config, loader))
    check = FiniteCheck(
        loader.dataset,
        later=can_check_later(config, device, optimizer),
        skips=config.non_finite == "skip",
    )
    trainer = Trainer(
        logged,
        lambda: out_of_memory_explained(config),
        lambda: check.skips_step,
        model=model,
        train_dataloader=DataSpec(loader, get_num_samples_in_batch=count_samples),
        optimizers=optimizer,
        schedulers=scheduler,
        step_schedulers_every_batch=True,
        algorithms=plugins.instances(config, "algorithms"),
        callbacks=_ordered_callbacks(config, model, folder, check, logged, callbacks),
        loggers=[
            *plugins.instances(with_wandb_id(config, folder), "loggers"),
            *build_displays(config, folder, logged.total),
        ],
        profiler=build_profiler(config.profiler) if config.profiler is not None else None,
        **(trainer_arguments(config, device) | start.trainer_arguments()),
    )
    if start.path is not None:
        if not start.goes_on:
            trainer.state.load_path = config.load_path  # rather than its copy on this machine
        composer_patches.restore_random_state(trainer)
        composer_patches.name_averages(trainer)
        check_loaded(trainer, start)
        before, now = restore_settings(optimizer, scheduler, settings)
        if trainer.state.timestamp.batch < logged.total:
            say_jump(trainer, before, now)
    return trainer


def _ordered_callbacks(
    config: RunConfig,
    model: AlignCLIPModel,
    folder: SaveFolder | None,
    check: FiniteCheck,
    logged: LoggedBatches,
    callbacks: Sequence[Callback],
) -> list[Callback]:
    """Put the callbacks into an order in which each sees the work of those that it measures."""
    return [
        check,  # first: the others see finite numbers only
        *callbacks,
        TrainingMonitor(logged),
        *build_callbacks(config),
        # behind the callbacks whose work they measure and save
        *([EvaluationCallback(config, model.encoders, folder)] if config.evaluators else []),
        *([CheckpointSaver(folder)] if folder is not None else []),
        Pace(config, logged.total),
    ]


def build_data(config: RunConfig, device: Device) -> DataLoader[Any]:
    """Open the training data of this rank.

    Raises:
        UserError: the settings contradict the sets; this machine has no room for the batches.
    """
    if local_rank() == 0:
        shared_memory.remove_stale()
    try:
        dataset = ImageTextDataset(
            config.data,
            batch_size=config.global_train_batch_size // world_size(),
            image_size=config.model.vision_cfg.image_size,
            context_length=config.model.text_cfg.context_length,
            semantic=config.loss.needs_semantic,
        )
    except (ValueError, KeyError, TypeError, OSError) as error:  # StreamingDataset's
        raise UserError(f"data: {one_line(error)}") from error
    local_rank_zero_first(lambda: check_shared_memory(config, dataset))
    pin_memory = config.data.pin_memory and device.name == "gpu"
    return build_dataloader(dataset, config.data, pin_memory=pin_memory)


def check_shared_memory(config: RunConfig, dataset: ImageTextDataset) -> None:
    """Make sure that this machine has room for the batches that loaders hand over.

    Raises:
        UserError: the machine hasn't.
    """
    data, sizes = config.data, config.model
    batch = shared_memory_room.batch_bytes(
        int(dataset.batch_size or 0),
        sizes.vision_cfg.image_size,
        sizes.text_cfg.context_length,
        dataset.dimension,
    )
    shared_memory_room.check_room(
        shared_memory_room.loader_bytes(batch, data.num_workers, data.prefetch_factor),
        local_world_size(),
        dataset.epoch_size,
        data.num_workers,
    )


def build_model(config: RunConfig, device: Device) -> AlignCLIPModel:
    """Build encoders and loss of a configuration, as a ComposerModel."""
    loss = AlignCLIPLoss(**vars(config.loss))
    cpu_bf16 = device.name == "cpu" and config.precision == Precision.AMP_BF16.value
    return AlignCLIPModel(
        build_encoders(config.model), loss, config.model.encode_chunk_size, cpu_bf16
    )


def build_scheduler(config: RunConfig, optimizer: Optimizer, batches_per_epoch: int) -> LambdaLR:
    """Build warm-up and cosine by the optimizer's own step count.

    Composer's schedulers read the timestamp before it moves, so that the first two steps get the
    same rate.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    schedule, max_duration = config.scheduler, config.max_duration
    warmup = in_batches(schedule.t_warmup, batches_per_epoch)
    total = in_batches(max_duration, batches_per_epoch)
    if warmup >= total:
        raise UserError(
            f"scheduler.t_warmup={schedule.t_warmup} ({warmup} batches) must be shorter than "
            f"max_duration={max_duration} ({total} batches, {batches_per_epoch} an epoch)"
        )
    return LambdaLR(optimizer, lambda step: lr_multiplier(step, warmup, total, schedule.alpha_f))


def batches_an_epoch(config: RunConfig, loader: Any) -> int:
    """Count the batches of an epoch; a run may take only a part of its set."""
    subset = config.train_subset_num_batches
    return len(loader) if subset < 0 else min(subset, len(loader))


def total_batches(config: RunConfig, loader: Any) -> int:
    """Count the batches of the whole run."""
    return in_batches(config.max_duration, batches_an_epoch(config, loader))


def can_check_later(config: RunConfig, device: Device, optimizer: Optimizer) -> bool:
    """Say whether the host may look at a batch's numbers while the device trains the next one.

    The device has to skip the step of a batch that is not finite, which fused optimizers can. fp16
    has a scaler for that, whose scale the host reads. An algorithm that acts between two batches
    (EMA) has to know about the first one.
    """
    return (
        device.name == "gpu"
        and config.precision != Precision.AMP_FP16.value
        and all(group.get("fused") for group in optimizer.param_groups)
        and config.algorithms.keys() <= {"GradientClipping"}
    )


def logged_batches(config: RunConfig, device: Device, total: int) -> LoggedBatches:
    """Return the batches whose losses are logged: all of them where reading them costs nothing.

    Args:
        total: batches of the whole run.
    """
    interval = 1 if device.name == "cpu" else LOG_INTERVAL
    return LoggedBatches(config.batch_log_interval or interval, total)


def in_batches(duration: str, batches_per_epoch: int) -> int:
    """Convert a duration in epochs or batches to a number of batches."""
    time = Time.from_input(duration, TimeUnit.BATCH)
    return time.value * batches_per_epoch if time.unit == TimeUnit.EPOCH else time.value


def build_callbacks(config: RunConfig) -> list[Callback]:
    """Build the YAML's callbacks, and those that every run has."""
    callbacks: list[Callback] = plugins.instances(config, "callbacks")
    if not any(isinstance(c, SpeedMonitor) for c in callbacks):
        callbacks.append(SpeedMonitor(window_size=10))
    if config.parallelism_config.fsdp2 is not None and config.model.encode_chunk_size:
        callbacks.append(composer_patches.ReshardAfterBackward())
    return callbacks


def build_displays(
    config: RunConfig, folder: SaveFolder | None, total: int
) -> list[LoggerDestination]:
    """Build the bar or lines on the console, and the learning curves in the save folder.

    Args:
        total: batches of the whole run.
    """
    displays: list[LoggerDestination] = [History(folder, total)] if folder is not None else []
    bar, interval = show_progress(config), console_interval(config)
    if (bar or interval) and rank() == 0:
        batch_size = config.global_train_batch_size
        displays.append(Console(total, batch_size, bar, interval, config.log_traces))
    return displays
