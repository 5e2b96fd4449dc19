"""A run that commit 5e8d6ab began: the code of today loads it, goes on with it and exports it."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import get_device
from golden import FOLDER, ROOT, Recorder, is_the_platform
from models import FIXTURES

import alignclip
from alignclip.config import reading
from alignclip.training.build import build_trainer
from alignclip.training.composer_patches import ReshardAfterBackward
from alignclip.training.run_record import check_config
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.export_command import ExportOptions, run_export

OVERRIDES = [
    "max_duration=8ba",
    "save_interval=4ba",
    "save_num_checkpoints_to_keep=-1",
    "save_folder=run",
    "run_name=old",
    "data.streams.scenes.local=set",
    "progress_bar=false",
    "model.embed_dim=8",
    "model.vision_cfg.width=8",
    "model.vision_cfg.layers=1",
    "model.vision_cfg.head_width=4",
    "model.text_cfg.width=8",
    "model.text_cfg.layers=1",
    "model.text_cfg.heads=2",
    "optimizer.lr=0.01",
    "algorithms.EMA.half_life=4ba",
    "algorithms.GradientClipping.clipping_type=norm",
    "algorithms.GradientClipping.clipping_threshold=1.0",
]  # as its command had them


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder with its checkpoint after four of eight batches, and its set beside it."""
    with tarfile.open(FIXTURES / "run_5e8d6ab.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copytree(FOLDER / "mds", tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def expected(run: Path) -> dict[str, Any]:
    """What 5e8d6ab computed: features of its model, and the losses of the four batches to come."""
    content: dict[str, Any] = json.loads((run / "expected.json").read_text())
    return content


def check_features(place: Path, run: Path) -> None:
    model, _, _ = alignclip.load(place)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = expected(run)
    with torch.no_grad():
        found = model.encode_image(images), model.encode_text(torch.tensor(theirs["tokens"]))
    for ours, name in zip(found, ("image", "text"), strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs[name]), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["open_clip", "huggingface", "release", "composer"])
def test_it_is_loaded_and_exported(run: Path, to: str) -> None:
    check_features(run, run)
    run_export(ExportOptions("run", to, "out"))
    check_features(Path("out", {"release": "release.pt", "composer": "model.pt"}.get(to, "")), run)


def test_it_goes_on(run: Path) -> None:
    config = reading.load(ROOT / "yamls" / "debug.yaml", OVERRIDES)
    folder, recorder, threads = SaveFolder(config), Recorder(), torch.get_num_threads()
    check_config(folder)
    torch.set_num_threads(1)
    try:
        trainer = build_trainer(config, get_device("cpu"), folder, [recorder])
        trainer.fit()
        trainer.close()
    finally:
        torch.set_num_threads(threads)
    assert trainer.state.timestamp.batch == 8
    for step, losses in zip(recorder.steps, expected(run)["losses"], strict=True):
        for name, value in losses.items():
            ours, theirs = float.fromhex(step.losses[name]), float.fromhex(value)
            assert ours == (theirs if is_the_platform() else pytest.approx(theirs, rel=1e-3))
    assert (run / "ep1-ba8-rank0.pt").is_file()
    assert (run / "latest-rank0.pt").resolve().name == "ep1-ba8-rank0.pt"


@pytest.mark.filterwarnings("error")
def test_a_callback_finds_its_state_under_its_earlier_name() -> None:
    state = State(
        model=torch.nn.Linear(1, 1),
        rank_zero_seed=0,
        run_name="old",
        device=get_device("cpu"),
        callbacks=[ReshardAfterBackward()],
    )
    states: dict[str, Any] = {"callbacks": {"WholeThroughBackward": {}}}
    state.load_state_dict(states, Logger(state))
