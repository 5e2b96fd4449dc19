"""A run that ends at any operation of a save or a rotation: the same command loses at most an
interval.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from faults import OVER, every_point, forked, prepare_for_forks
from processes import call
from runs import write_config, write_set
from save_folders import name_of

from alignclip.config.reading import load
from alignclip.config.schema import RunConfig
from alignclip.data import shared_memory
from alignclip.evaluation.json_lines import lines_in
from alignclip.storage import open_store
from alignclip.training import run as training
from alignclip.training.build import build_trainer
from alignclip.training.history import HISTORY, History
from alignclip.training.preflight import training_device
from alignclip.training.run_record import record_config
from alignclip.training.save_folder import SaveFolder
from alignclip.training.saver import CheckpointSaver
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
    record_config(folder)
    trainer = build_trainer(config, training_device("cpu"), folder, [BeforeTheSave(act)])
    trainer.fit()
    trainer.close()


def saver_of(state: State) -> CheckpointSaver:
    (saver,) = (one for one in state.callbacks if isinstance(one, CheckpointSaver))
    return saver


def save_and_rotate(state: State, logger: Logger) -> None:
    """What a run does from the start of a save to the end of the rotation that follows."""
    saver_of(state).batch_checkpoint(state, logger)
    saver_of(state).post_close()


def wait_for_what_goes_on_beside_training(state: State, logger: Logger) -> None:
    """Until what was saved before has arrived, the history too, and what it replaces is gone."""
    saver_of(state).fit_end(state, logger)
    (history,) = (one for one in logger.destinations if isinstance(one, History))
    for worker in (saver_of(state)._delivery._worker, history._file._writer):
        worker.submit(int).result()


class Saved:
    """The files of a save folder, which are put back before each interruption."""

    def __init__(self, uri: str, copy: Path) -> None:
        self.store, self.copy = open_store(uri), copy
        self.objects: dict[str, bytes] = {}

    def keep(self) -> None:
        if self.store.is_remote:
            self.objects = {name: self.store.read_bytes(name) for name in self.store.names()}
        else:
            shutil.copytree(self.store.place, self.copy, symlinks=True)

    def restore(self) -> None:
        if not self.store.is_remote:
            shutil.rmtree(self.store.place)
            shutil.copytree(self.copy, self.store.place, symlinks=True)
            return
        for name in self.store.names():
            self.store.delete(name)
        for name, content in self.objects.items():
            self.copy.write_bytes(content)
            self.store.put(self.copy, name)

    def losses(self) -> list[dict[str, Any]]:
        """The batches of the run's history."""
        return [line for line in lines_in(self.store.read_text(HISTORY)) if "losses" in line]

    def weights(self) -> dict[str, torch.Tensor]:
        self.store.download(name_of(END), self.copy.with_name("end.pt"))
        return read_pickled(self.copy.with_name("end.pt"))["state"]["model"]


def assert_checkpoints_are_whole(folder: SaveFolder) -> None:
    """Each file with a checkpoint's name, and what ``latest`` names."""
    names = folder.checkpoints()
    assert folder.latest_target() in names
    damages = {name: folder.damage(name) for name in names}
    assert not any(damages.values()), damages
    assert folder.batch_of(folder.latest_target()) in (SAVED, BATCH)


def interrupt_a_save_everywhere(folder: Path, uri: str, kind: str) -> int:
    """Interrupt a save and its rotation at each operation, and go on; return how many these are."""
    prepare_for_forks("://" in uri)
    History._draw = lambda *_: None  # type: ignore[method-assign]  # most of a run's time
    torch.set_num_threads(1)
    write_set(str(folder / "set"), 64)
    config = load(write_config(folder, str(folder / "set"), uri, MODEL), ["run_name=r"])
    saved = Saved(uri, folder / "before")

    def keep(state: State, logger: Logger) -> None:
        wait_for_what_goes_on_beside_training(state, logger)
        saved.keep()

    train(config, keep)
    expected, expected_weights = saved.losses(), saved.weights()
    assert [line["batch"] for line in expected] == list(range(1, END + 1))

    def go_on() -> None:
        assert_checkpoints_are_whole(SaveFolder(config))
        assert training.run(config) == 0
        found, weights = saved.losses(), saved.weights()
        # into a bucket the history goes behind the checkpoint: the interval's lines may be lost
        lost = [line for line in expected if line not in found]
        may_be_lost = range(SAVED + 1, BATCH + 1) if saved.store.is_remote else ()
        assert {line["batch"] for line in lost} <= {*may_be_lost}
        assert found == [line for line in expected if line not in lost]
        assert all(torch.equal(weights[name], expected_weights[name]) for name in expected_weights)
        left = SaveFolder(config)
        assert left.latest_target() == name_of(END)
        assert list(left.checkpoints()) == [name_of(END)]
        assert not list(Path(uri).glob(".*.partial"))

    points = 0

    def interrupt(state: State, logger: Logger) -> None:
        nonlocal points

        def act(_: int) -> None:
            save_and_rotate(state, logger)

        for points in every_point(act, kind, folder / "runs", lambda _: saved.restore()):
            assert forked(go_on) == OVER, f"after operation {points}"
            shared_memory.remove_stale()
        saved.restore()

    saved.restore()
    train(config, interrupt)
    return points


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dies", "fails"])
@pytest.mark.parametrize("to", ["folder", pytest.param("bucket", marks=pytest.mark.full)])
def test_a_save_is_interrupted_at_every_operation(
    s3: Any, tmp_path: Path, to: str, kind: str
) -> None:
    uri = f"{s3.bucket()}/runs" if to == "bucket" else str(tmp_path / "runs")
    assert call(interrupt_a_save_everywhere, tmp_path, uri, kind, timeout=500) >= 10
