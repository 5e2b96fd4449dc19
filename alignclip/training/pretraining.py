"""From a configuration to a trained model: the whole run, top to bottom."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.core import Callback, DataSpec, Precision, Time, TimeUnit
from composer.devices import Device
from composer.loggers import LoggerDestination
from composer.utils import (
    dist,
    reproducibility,
)
from streaming import StreamingDataLoader
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from alignclip.config.schema import RunConfig, SchedulerConfig
from alignclip.data import shared_memory, shared_memory_room
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.data.streams import evaluated_on_training_data
from alignclip.errors import UserError, one_line
from alignclip.losses import AlignCLIPLoss
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import CLIP, build_encoders, clamp_logit_scale_
from alignclip.model.optimization import (
    build_optimizer,
    lr_multiplier,
    restore_settings,
    settings_of,
)
from alignclip.ranks import errors_on_all_ranks, local_rank_zero_first, run_on_rank_zero
from alignclip.runtime.distributed import join_ranks
from alignclip.runtime.environment import Start
from alignclip.training import composer_patches, plugins, uploads
from alignclip.training.batch_check import FiniteCheck
from alignclip.training.best import BestCheckpoint
from alignclip.training.callbacks import (
    Rotation,
    StopOnSignal,
    TrainingMonitor,
    WholeThroughBackward,
)
from alignclip.training.display import Console, say
from alignclip.training.evaluation_callback import EvaluationCallback
from alignclip.training.history import History
from alignclip.training.locking import lock_towers
from alignclip.training.preflight import check_inputs, check_parallelism, choose_device
from alignclip.training.resume import Origin, origin_of
from alignclip.training.save_folder import SaveFolder
from alignclip.training.saver import CheckpointSaver
from alignclip.training.trackers import with_wandb_id
from alignclip.training.trainer_arguments import (
    autocast_dtype,
    console_interval,
    show_progress,
    trainer_arguments,
)
from alignclip.weights.finite import check_weights
from alignclip.weights.licenses import card_of_run, named_license
from alignclip.weights.locate import card_beside
from alignclip.weights.start_from import load_pretrained

STOPPED = 128 + signal.SIGTERM  # exit status of a run that a signal ended early


def run(config: RunConfig) -> int:
    """Train until ``max_duration``, from the latest checkpoint where there is one.

    Returns:
        0 finished, :data:`STOPPED` where a signal ended it early with everything saved.

    Raises:
        UserError: anything that a person has to change first.
        NotFiniteError: a batch whose loss, gradients or weights are not finite; nothing of it is saved.
    """
    config = plugins.check(config)
    device = choose_device(config.device)
    join_ranks(device, config.dist_timeout)
    check_parallelism(config, device)
    folder = SaveFolder(config) if config.save_folder else None
    run_on_rank_zero(lambda: check_inputs(config, folder))
    # From here on SIGTERM and Ctrl-C mean: save, then stop.
    stop = StopOnSignal() if folder is not None else None
    trainer = build_trainer(config, device, folder, [stop] if stop else [])
    batch = trainer.state.timestamp.batch.value
    # by batches: a checkpoint at the last one of an epoch was saved before that epoch was counted
    total = in_batches(
        config.max_duration, batches_an_epoch(config, trainer.state.train_dataloader)
    )
    if batch >= total:
        composer_patches.close(trainer)
        print_once(f"run '{config.run_name}' is finished: {batch} of {total} batches are trained")
        return 0
    if folder is not None:
        run_on_rank_zero(lambda: write_record(folder, trainer))
    print_once(describe(config, trainer, folder))
    try:
        with shared_memory_room.bus_errors_explained():
            trainer.fit()
    finally:
        composer_patches.close(trainer)  # what was saved before an error is still on its way
    dist.barrier()
    batch = trainer.state.timestamp.batch.value
    where = f"; checkpoints in {folder.uri}" if folder is not None else ""
    if stop is not None and stop.stopped:
        print_once(
            f"stopped by a signal after batch {batch}{where}; the same command goes on from there"
        )
        return STOPPED
    print_once(f"run '{trainer.state.run_name}' is done: {batch} batches{where}")
    return 0


def describe(config: RunConfig, trainer: Trainer, folder: SaveFolder | None) -> str:
    """What is about to be trained, on what, from where: three lines for the top of a log, and what to know of it."""
    state, batch = trainer.state, trainer.state.timestamp.batch.value
    parameters = sum(p.numel() for p in state.model.parameters()) / 1e6
    locked = sum(p.numel() for p in state.model.parameters() if not p.requires_grad) / 1e6
    size = f"{parameters:,.1f} M parameters" + (f" ({locked:,.1f} M locked)" if locked else "")
    loader = state.train_dataloader
    assert isinstance(loader, StreamingDataLoader)
    assert isinstance(loader.dataset, ImageTextDataset)
    start = f"goes on after batch {batch}, from the latest checkpoint" if batch else "starts"
    processes = f"{dist.get_world_size()} × {state.device.name}"
    batches = f"{len(loader):,} batches of {config.global_train_batch_size:,} an epoch"
    checkpoints = (
        f"{folder.uri}, every {config.save_interval}" if folder else "none (save_folder is not set)"
    )
    known = "".join(
        f"\n  the figures of evaluator '{name}' are on training data: its set is data.streams.{stream}"
        for name, stream in evaluated_on_training_data(config).items()
    )
    return (
        f"run '{state.run_name}' {start}: {size}, {processes}, {config.precision}\n"
        f"  data: {loader.dataset.size:,} samples, {batches}, {config.max_duration} in all\n"
        f"  checkpoints: {checkpoints}{known}"
    )


def write_record(folder: SaveFolder, trainer: Trainer) -> None:
    """What is needed to run this again, and what it ran on, beside the checkpoints."""
    device = (
        torch.cuda.get_device_name()
        if trainer.state.device.name == "gpu"
        else trainer.state.device.name
    )
    folder.add_start(Start(trainer.state.timestamp.batch.value, dist.get_world_size(), device))
    folder.write_config()


def build_trainer(
    config: RunConfig, device: Device, folder: SaveFolder | None, callbacks: Sequence[Callback] = ()
) -> Trainer:
    """Everything that a run is made of, put together; loads the latest checkpoint where ``autoresume`` finds one."""
    composer_patches.install()
    uploads.install()
    with origin_of(config, folder) as origin:
        return build_trainer_from(origin, config, device, folder, callbacks)


def build_trainer_from(
    origin: Origin,
    config: RunConfig,
    device: Device,
    folder: SaveFolder | None,
    callbacks: Sequence[Callback],
) -> Trainer:
    """Everything that a run is made of, put together, with the state of the checkpoint that it starts from."""
    loader = build_data(config, device)
    assert isinstance(loader.dataset, ImageTextDataset)
    reproducibility.seed_all(config.seed)  # the same weights on every rank
    model = build_model(config, device)
    prepare(config, model.encoders, folder, origin)
    optimizer = build_optimizer(config.optimizer, model.encoders)
    # right after the step, so that EMA and the checkpoint see the clamped value
    optimizer.register_step_post_hook(lambda *_: clamp_logit_scale_(model.encoders))
    scheduler = build_scheduler(
        config.scheduler, optimizer, config.max_duration, batches_an_epoch(config, loader)
    )
    settings = settings_of(optimizer)
    trainer = Trainer(
        model=model,
        train_dataloader=DataSpec(loader),
        optimizers=optimizer,
        schedulers=scheduler,
        step_schedulers_every_batch=True,
        algorithms=plugins.build(config, "algorithms"),
        callbacks=[
            FiniteCheck(loader.dataset),  # first: the others see finite numbers only
            *callbacks,
            *build_callbacks(config, folder),
            *build_evaluation(config, model, device, folder),
            *saving(folder),
        ],
        loggers=[
            *plugins.build(with_wandb_id(config, folder), "loggers"),
            *build_displays(config, folder, loader),
        ],
        **(trainer_arguments(config, device) | origin.trainer_arguments()),
    )
    if origin.path is not None and not origin.goes_on:
        trainer.state.load_path = config.load_path  # where it lies, and not the copy of it here
    if trainer._rng_state is not None:
        # patch dropout draws from it; in the middle of an epoch Composer restores it only for loaders that can't resume
        reproducibility.load_rng_state(trainer._rng_state)
    if origin.path is not None:
        check_loaded(trainer, origin)
        before, now = restore_settings(optimizer, scheduler, settings)
        if trainer.state.timestamp.batch < in_batches(
            config.max_duration, batches_an_epoch(config, loader)
        ):
            say_jump(trainer, before, now)
    return trainer


def check_loaded(trainer: Trainer, origin: Origin) -> None:
    """Refuse a checkpoint whose numbers are not finite; on every rank, each of which may have a part of them.

    Raises:
        UserError: names them, and what to do; on every rank.
    """
    state = trainer.state
    what = (
        f"the latest checkpoint ({origin.place})" if origin.goes_on else f"load_path={origin.place}"
    )
    way_out = (
        "Move it away: the next start goes on from the newest one that is left"
        if origin.goes_on
        else ""
    )
    steps = [values for optimizer in state.optimizers for values in optimizer.state.values()]
    moments = {
        f"{name} ({i})": value for i, values in enumerate(steps) for name, value in values.items()
    }
    with errors_on_all_ranks():
        check_weights(dict(state.model.named_parameters()), what, way_out)
        check_weights(moments, f"the optimizer's state in {what}", way_out)


def say_jump(trainer: Trainer, before: float, now: float) -> None:
    """Say that the learning rate is not the one that the checkpoint's own schedule goes on with."""
    if not math.isclose(before, now, rel_tol=1e-6):
        batch = trainer.state.timestamp.batch.value
        print_once(
            f"learning rate of the next step (batch {batch + 1}): {before:.6g} → {now:.6g}, by this run's schedule"
        )


def build_data(config: RunConfig, device: Device) -> StreamingDataLoader:
    """The training data of this rank."""
    if dist.get_local_rank() == 0:
        shared_memory.remove_stale()
    dist.barrier()  # the ranks of a machine look for the first free prefix, and have to find the same
    try:
        dataset = ImageTextDataset(
            config.data,
            batch_size=config.global_train_batch_size // dist.get_world_size(),
            image_size=config.model.vision_cfg.image_size,
            context_length=config.model.text_cfg.context_length,
            semantic=config.loss.needs_semantic,
        )
    except (
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # of StreamingDataset, about its own arguments
        raise UserError(f"data: {one_line(error)}") from error
    local_rank_zero_first(lambda: check_shared_memory(config, dataset))
    return build_dataloader(
        dataset, config.data, pin_memory=config.data.pin_memory and device.name == "gpu"
    )


def check_shared_memory(config: RunConfig, dataset: ImageTextDataset) -> None:
    """Make sure that this machine has room for the batches that loaders hand over.

    Raises:
        UserError: it hasn't.
    """
    data, size = config.data, config.model.vision_cfg.image_size
    batch = shared_memory_room.batch_bytes(
        int(dataset.batch_size or 0), size, config.model.text_cfg.context_length, dataset.dimension
    )
    shared_memory_room.check_room(
        shared_memory_room.loader_bytes(batch, data.num_workers, data.prefetch_factor),
        dist.get_local_world_size(),
        dataset.epoch_size,
        data.num_workers,
    )


def build_model(config: RunConfig, device: Device) -> AlignCLIPModel:
    """Encoders and loss of a configuration, as a ComposerModel."""
    loss = AlignCLIPLoss(**vars(config.loss))
    cpu_bf16 = device.name == "cpu" and config.precision == Precision.AMP_BF16.value
    return AlignCLIPModel(
        build_encoders(config.model), loss, config.model.encode_chunk_size, cpu_bf16
    )


def prepare(config: RunConfig, encoders: CLIP, folder: SaveFolder | None, origin: Origin) -> None:
    """What a new run starts from, on every rank; then, new or not, what of it is locked.

    A run that goes on has its checkpoint: ``pretrained`` may be gone by then.
    """
    report = None
    if config.pretrained and not origin.goes_on:
        place, shared_from = config.pretrained, config.pretrained_shared_from
        report = local_rank_zero_first(
            lambda: load_pretrained(encoders, place, shared_from, config.model)
        )
        print_once(report.text)
        run_on_rank_zero(lambda: carry_license(config, folder, place, report.license))
    if config.load_path and not origin.goes_on:
        place = config.load_path
        run_on_rank_zero(
            lambda: carry_license(config, folder, place, named_license(card_beside(place)))
        )
    lock_towers(encoders, config, report)


def carry_license(
    config: RunConfig, folder: SaveFolder | None, place: str, license: str | None
) -> None:
    """Leave the licence of what a run starts from beside its checkpoints, where exports find it."""
    if folder is not None and license:
        folder.write_card(card_of_run(config.run_name, license, place))


def build_scheduler(
    config: SchedulerConfig, optimizer: Optimizer, max_duration: str, batches_per_epoch: int
) -> LambdaLR:
    """Warm-up and cosine by the optimizer's own step count.

    Composer's schedulers read the timestamp before it moves, so that the first two steps get the same rate.

    Raises:
        UserError: the warm-up is not shorter than the run.
    """
    warmup = in_batches(config.t_warmup, batches_per_epoch)
    total = in_batches(max_duration, batches_per_epoch)
    if warmup >= total:
        raise UserError(
            f"scheduler.t_warmup={config.t_warmup} ({warmup} batches) must be shorter than "
            f"max_duration={max_duration} ({total} batches, {batches_per_epoch} an epoch)"
        )
    return LambdaLR(optimizer, lambda step: lr_multiplier(step, warmup, total, config.alpha_f))


def batches_an_epoch(config: RunConfig, loader: Any) -> int:
    """Of this run, which may be told to take a part of its set."""
    subset = config.train_subset_num_batches
    return len(loader) if subset < 0 else min(subset, len(loader))


def in_batches(duration: str, batches_per_epoch: int) -> int:
    """A duration in epochs or batches as a number of batches."""
    time = Time.from_input(duration, TimeUnit.BATCH)
    return time.value * batches_per_epoch if time.unit == TimeUnit.EPOCH else time.value


def build_callbacks(config: RunConfig, folder: SaveFolder | None) -> list[Callback]:
    """The YAML's callbacks, and what every run has."""
    callbacks: list[Callback] = [TrainingMonitor(), *plugins.build(config, "callbacks")]
    if not any(isinstance(c, SpeedMonitor) for c in callbacks):
        callbacks.append(SpeedMonitor(window_size=10))
    if config.parallelism_config.fsdp2 is not None and config.model.encode_chunk_size:
        callbacks.append(WholeThroughBackward())
    keep = config.save_num_checkpoints_to_keep
    if folder is not None and keep > 0:
        callbacks.append(Rotation(folder, keep))
    return callbacks


def build_displays(
    config: RunConfig, folder: SaveFolder | None, loader: StreamingDataLoader
) -> list[LoggerDestination]:
    """What a person looks at: bar or lines on the console, the learning curves in the save folder."""
    total = in_batches(config.max_duration, batches_an_epoch(config, loader))
    displays: list[LoggerDestination] = [History(folder, total)] if folder is not None else []
    bar, interval = show_progress(config), console_interval(config)
    if (bar or interval) and dist.get_global_rank() == 0:
        displays.append(
            Console(total, config.global_train_batch_size, bar, interval, config.log_traces)
        )
    return displays


def build_evaluation(
    config: RunConfig, model: AlignCLIPModel, device: Device, folder: SaveFolder | None
) -> list[Callback]:
    """What the YAML's ``evaluators`` and ``keep_best`` ask for; it goes last, so that it sees what others did."""
    if not config.evaluators:
        return []
    best = (
        BestCheckpoint(config.keep_best, folder)
        if config.keep_best and folder is not None
        else None
    )
    return [
        EvaluationCallback(
            config.evaluators,
            model.encoders,
            config.model.vision_cfg.image_size,
            autocast_dtype(config.precision),
            show_progress(config),
            best,
            folder,
        )
    ]


def saving(folder: SaveFolder | None) -> list[Callback]:
    """What saves checkpoints; last, so that they hold what the other callbacks have done."""
    return [CheckpointSaver(folder)] if folder is not None else []


def print_once(text: str) -> None:
    """One line on the console of a run, whatever its number of processes."""
    if dist.get_global_rank() == 0:
        say(text)
