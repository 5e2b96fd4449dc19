"""A run from its configuration to its exit status: check, build, fit, say."""

from __future__ import annotations

import signal

import torch
from composer import Trainer

from alignclip.config.schema import RunConfig
from alignclip.data import workers
from alignclip.data.dataset import ImageTextDataset
from alignclip.data.streams import evaluated_on_training_data
from alignclip.ranks import rank, run_on_rank_zero, wait_for_all_ranks, world_size
from alignclip.runtime import attendance
from alignclip.runtime.environment import Start
from alignclip.training import composer_patches
from alignclip.training.build import build_trainer, total_batches
from alignclip.training.callbacks import StopOnSignal
from alignclip.training.display import print_once
from alignclip.training.preflight import check_inputs, join
from alignclip.training.run_card import FINISHED, STOPPED_EARLY, write_run_card
from alignclip.training.run_record import add_start, record_config
from alignclip.training.save_folder import SaveFolder

STOPPED = 128 + signal.SIGTERM  # exit status of a run that a signal ended early


def run(config: RunConfig) -> int:
    """Train until ``max_duration``, from the latest checkpoint where there is one.

    Returns:
        0 finished, :data:`STOPPED` where a signal ended the run early with everything saved.

    Raises:
        UserError: anything that a person has to change first.
        NotFiniteError: a batch whose loss, gradients or weights are not finite; the batch is not
            saved.
    """
    config, device = join(config)
    folder = SaveFolder(config) if config.save_folder else None
    sets = run_on_rank_zero(lambda: prepare(config, folder))
    # From here on SIGTERM and Ctrl-C mean: save, then stop.
    stop = StopOnSignal() if folder is not None else None
    trainer = build_trainer(config, device, folder, [stop] if stop else [])
    batch = trainer.state.timestamp.batch.value
    # by batches: a checkpoint at the last one of an epoch was saved before that epoch was counted
    total = total_batches(config, trainer.state.train_dataloader)
    if batch >= total:
        composer_patches.close(trainer)
        trained = f"{batch} of {total} {batches(total)} are trained"
        print_once(f"run '{config.run_name}' is finished: {trained}")
        return 0
    if folder is not None:
        run_on_rank_zero(lambda: record_start(folder, trainer, sets))
    print_once(introduction(config, trainer, folder))
    try:
        with attendance.failures_told(), workers.deaths_explained():
            trainer.fit()
    finally:
        composer_patches.close(trainer)  # what was saved before an error is still on its way
    is_stopped = stop is not None and stop.stopped
    if folder is not None and rank() == 0:
        write_run_card(folder, trainer.state, total, STOPPED_EARLY if is_stopped else FINISHED)
    wait_for_all_ranks()
    batch = trainer.state.timestamp.batch.value
    where = f"; checkpoints in {folder.uri}" if folder is not None else ""
    if is_stopped:
        print_once(
            f"stopped by a signal after batch {batch}{where}; the same command goes on from there"
        )
        return STOPPED
    print_once(f"run '{trainer.state.run_name}' is done: {batch} {batches(batch)}{where}")
    return 0


def prepare(config: RunConfig, folder: SaveFolder | None) -> dict[str, str]:
    """Look at what the run needs, and tidy its save folder up; for rank 0.

    Returns:
        the fingerprint of each stream's set.
    """
    sets = check_inputs(config, folder)
    if folder is not None:
        folder.remove_partial()
    return sets


def batches(number: int) -> str:
    """Return the noun for so many batches."""
    return "batch" if number == 1 else "batches"


def introduction(config: RunConfig, trainer: Trainer, folder: SaveFolder | None) -> str:
    """Say in three lines what is trained, on which data, from where; then what to beware of."""
    state, batch = trainer.state, trainer.state.timestamp.batch.value
    parameters = sum(p.numel() for p in state.model.parameters()) / 1e6
    locked = sum(p.numel() for p in state.model.parameters() if not p.requires_grad) / 1e6
    size = f"{parameters:,.1f} M parameters" + (f" ({locked:,.1f} M locked)" if locked else "")
    dataset = state.train_dataloader.dataset  # type: ignore[union-attr]
    assert isinstance(dataset, ImageTextDataset)
    start = f"goes on after batch {batch}, from the latest checkpoint" if batch else "starts"
    processes = f"{world_size()} × {state.device.name}"
    number = len(state.train_dataloader)  # type: ignore[arg-type]
    an_epoch = f"{number:,} {batches(number)} of {config.global_train_batch_size:,} an epoch"
    checkpoints = (
        f"{folder.uri}, every {config.save_interval}" if folder else "none (save_folder is not set)"
    )
    warnings = "".join(
        f"\n  the figures of evaluator '{name}' are on training data: "
        f"its set is data.streams.{stream}"
        for name, stream in evaluated_on_training_data(config).items()
    )
    return (
        f"run '{state.run_name}' {start}: {size}, {processes}, {config.precision}\n"
        f"  data: {dataset.size:,} samples, {an_epoch}, {config.max_duration} in all\n"
        f"  checkpoints: {checkpoints}{warnings}"
    )


def record_start(folder: SaveFolder, trainer: Trainer, sets: dict[str, str]) -> None:
    """Leave beside the checkpoints how to run this again, and on which machine it ran."""
    device = trainer.state.device.name
    if device == "gpu":
        device = torch.cuda.get_device_name()
    add_start(folder, Start(trainer.state.timestamp.batch.value, world_size(), device, sets=sets))
    record_config(folder)
