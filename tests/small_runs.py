"""Runs of a tiny model in this process, on one device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from composer import Trainer
from composer.core import Callback
from composer.loggers import InMemoryLogger
from composer.utils import get_device
from runs import write_config, write_set

from alignclip.config.reading import load
from alignclip.config.schema import RunConfig
from alignclip.errors import UserError, one_line_errors
from alignclip.training import composer_patches
from alignclip.training.build import build_trainer
from alignclip.training.history import History
from alignclip.training.run_record import check_config, record_config
from alignclip.training.save_folder import SaveFolder

# what makes a run small, and its losses known
SMALL = ("run_name=r", "data.num_workers=0", "scheduler.t_warmup=1ba", "loggers.InMemoryLogger={}")
EMA = ("algorithms.EMA.half_life=2ba", "algorithms.EMA.update_interval=1ba")


class SmallRuns:
    """Runs that have a set, a save folder and settings in common.

    Args:
        folder: where the YAML is written.
        dataset: the set to train on.
        save_folder: path or URL, which may hold ``{run_name}``; None saves nothing.
        settings: overrides of every run, besides :data:`SMALL`.
        draws: whether a run draws its learning curves, which takes as long as everything else.
    """

    def __init__(
        self,
        folder: Path,
        dataset: Path,
        save_folder: str | Path | None,
        *settings: str,
        draws: bool = False,
    ) -> None:
        self.draws = draws
        self.uri = str(save_folder or "")
        self.yaml = write_config(folder, str(dataset), self.uri or None)
        self.settings = (*SMALL, *settings)

    def config(self, *overrides: str) -> RunConfig:
        return load(self.yaml, [*self.settings, *overrides])

    def folder(self, *overrides: str) -> SaveFolder:
        """The save folder as a new process sees it."""
        return SaveFolder(self.config(*overrides))

    def build(self, *overrides: str, callbacks: Sequence[Callback] = ()) -> Trainer:
        config, folder = self.config(*overrides), None
        if config.save_folder:
            folder = SaveFolder(config)
            folder.open()
            check_config(folder)
            record_config(folder)
        trainer = build_trainer(config, get_device(config.device), folder, callbacks)
        if not self.draws:
            draw_nothing(trainer)
        return trainer

    def train(self, *overrides: str, callbacks: Sequence[Callback] = ()) -> Trainer:
        """Train to the end."""
        trainer = self.build(*overrides, callbacks=callbacks)
        try:
            trainer.fit()
        finally:
            composer_patches.close(trainer)
        return trainer


def exit_status(trainer: Trainer) -> int:
    """Train as the command does, until one line ends the run; return the exit status."""
    try:
        with pytest.raises(SystemExit) as ended, one_line_errors():
            trainer.fit()
    finally:
        composer_patches.close(trainer)
    return int(ended.value.code or 0)


def ending(runs: SmallRuns) -> str:
    """Train on this rank of several; return the error that ends the run."""
    trainer = build_trainer(runs.config(), get_device("cpu"), runs.folder())
    try:
        trainer.fit()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        composer_patches.close(trainer)
    return "it was saved"


def draw_nothing(trainer: Trainer) -> None:
    """Have a run leave out its learning curves."""
    for logger in trainer.logger.destinations:
        if isinstance(logger, History):
            logger._draw = lambda *_: None  # type: ignore[method-assign]


def logged(trainer: Trainer, name: str = "loss/train/total") -> list[float]:
    """The values of a metric, step by step."""
    (memory,) = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    return [float(value) for _, value in memory.data[name]]


def turn_back(folder: Path, checkpoint: str) -> None:
    """Have a local ``latest`` point at an earlier checkpoint."""
    (folder / "latest-rank0.pt").unlink()
    (folder / "latest-rank0.pt").symlink_to(checkpoint)


def trained(folder: Path, *overrides: str) -> Trainer:
    """Three batches of a model that shares everything, on a set beside it; it is in ``saved``."""
    write_set(str(folder / "set"), 64)
    runs = SmallRuns(folder, folder / "set", folder / "saved", "optimizer.lr=0.01")
    return runs.train("max_duration=3ba", *overrides)
