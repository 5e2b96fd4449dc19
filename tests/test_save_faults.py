"""A run that ends at any operation of a save or a rotation: the same command loses at most an interval."""

from __future__ import annotations

import json
import os
import shutil
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from faults import OVER, every_point, forked
from processes import call
from runs import write_config, write_set
from save_folders import LATEST

from alignclip.config.reading import load
from alignclip.config.schema import RunConfig
from alignclip.data import shared_memory
from alignclip.training import run as training
from alignclip.training.build import build_trainer
from alignclip.training.callbacks import Rotation
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.safe_read import read_pickled

MODEL = """
device: cpu
precision: fp32
progress_bar: false
global_train_batch_size: 4
max_duration: 8ba
save_interval: 2ba
save_num_checkpoints_to_keep: 1
model:
  embed_dim: 8
  vision_cfg: {image_size: 16, patch_size: 8, width: 8, layers: 1, head_width: 8}
  text_cfg: {context_length: 16, width: 8, layers: 1, heads: 1}
loss: {beta: 0.5}
data: {num_workers: 0, num_canonical_nodes: 1, pin_memory: false}
scheduler: {t_warmup: 1ba}
"""
SAVED, BATCH, END = 4, 6, 8  # what is saved before, the save that is interrupted, and the last
HISTORY = "history.jsonl"


class BeforeTheSave(Callback):
    """Acts when a batch is trained and not saved yet."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Act; Composer calls CheckpointSavers last."""
        if state.timestamp.batch == BATCH:
            self.act(state, logger)


def train(config: RunConfig, act: Any) -> None:
    """Train in this process."""
    folder = SaveFolder(config)
    folder.write_config()
    trainer = build_trainer(config, training.choose_device("cpu"), folder, [BeforeTheSave(act)])
    trainer.fit()
    trainer.close()


def save_and_rotate(state: State, logger: Logger) -> None:
    """What a run does from the start of a save to the end of the rotation that follows."""
    (rotation,) = (one for one in state.callbacks if isinstance(one, Rotation))
    (saver,) = (one for one in state.callbacks if isinstance(one, CheckpointSaver))
    saver.batch_checkpoint(state, logger)
    rotation.batch_end(state, logger)
    rotation.post_close()


def losses(folder: Path) -> list[dict[str, Any]]:
    """The batches of a run's history."""
    lines = [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]
    return [line for line in lines if "losses" in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_pickled(folder / f"ep0-ba{END}-rank0.pt")["state"]["model"]


def assert_checkpoints_are_whole(config: RunConfig) -> None:
    """Each file with a checkpoint's name, and what ``latest`` names."""
    folder = SaveFolder(config)
    names = folder.checkpoints()
    assert folder.latest_target() in names
    damages = {name: folder.damage(name) for name in names}
    assert not any(damages.values()), damages
    assert folder.batch_of(folder.latest_target()) in (SAVED, BATCH)


def interrupt_a_save_everywhere(folder: Path, kind: str) -> int:
    """Interrupt a save and its rotation at each operation, and go on; return how many these are."""
    os.fsync = lambda _: None  # a process that dies takes nothing from the disk
    torch.set_num_threads(1)
    resource_tracker.ensure_running()  # which each of the forked processes would start
    write_set(str(folder / "set"), 64)
    runs, before = folder / "runs", folder / "before"
    config = load(write_config(folder, str(folder / "set"), str(runs), MODEL), ["run_name=r"])
    train(config, lambda *_: shutil.copytree(runs, before, symlinks=True))
    expected, expected_weights = losses(runs), weights(runs)
    assert [line["batch"] for line in expected] == list(range(1, END + 1))

    def restore(_: int = 0) -> None:
        shutil.rmtree(runs)
        shutil.copytree(before, runs, symlinks=True)

    def go_on() -> None:
        assert_checkpoints_are_whole(config)
        assert training.run(config) == 0
        assert losses(runs) == expected
        found = weights(runs)
        assert all(torch.equal(found[name], expected_weights[name]) for name in expected_weights)
        assert (runs / LATEST).readlink() == Path(f"ep0-ba{END}-rank0.pt")
        assert [path.name for path in runs.glob("ep*")] == [f"ep0-ba{END}-rank0.pt"]
        assert not list(runs.glob(".*.partial"))

    points = 0

    def interrupt(state: State, logger: Logger) -> None:
        nonlocal points

        def act(_: int) -> None:
            save_and_rotate(state, logger)

        for points in every_point(act, kind, runs, restore):
            assert forked(go_on) == OVER, f"after operation {points}"
            shared_memory.remove_stale()
        restore()

    restore()
    train(config, interrupt)
    return points


@pytest.mark.full  # failed once of five times behind other tests, for a reason not yet known
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dies", "fails"])
def test_a_save_is_interrupted_at_every_operation(tmp_path: Path, kind: str) -> None:
    assert call(interrupt_a_save_everywhere, tmp_path, kind, timeout=300) >= 10
