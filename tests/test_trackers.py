"""Loggers of a run that is killed and goes on: one run in each tracker, each step once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
from runs import write_config
from small_runs import SmallRuns, turn_back
from tensorboard.summary.writer.event_file_writer import AtomicCounter
from tracked import in_file, in_tensorboard, in_wandb, steps_of

from alignclip.config.reading import load
from alignclip.errors import UserError
from alignclip.evaluation.json_lines import lines_in
from alignclip.training import trackers
from alignclip.training.history import HISTORY, PAGE
from alignclip.training.save_folder import SaveFolder
from alignclip.training.wandb_files import newest_step

FIXED = (
    "data.num_canonical_nodes=1", "save_interval=4ba", "loss.beta=0", "evaluators.e.task=retrieval",
    "evaluators.e.interval=4ba", "evaluators.e.num_workers=0",
)  # fmt: skip
# the steps of each metric, and of others that are there
STEPS = {
    "loss/train/total": [*range(9)],
    "lr": [*range(9)],
    "logit_scale": [*range(1, 10)],
    "metrics/e/image_retrieval_recall@1": [4, 8, 9],
}
MORE = {"loss/train/contrastive", "loss/train/separation"}


@pytest.fixture
def train(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two starts: the first one trains 7 batches, the second one goes on after 4 and trains to
    the 9th.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "runs"
    runs = SmallRuns(tmp_path, dataset, folder, *FIXED, f"evaluators.e.local={dataset}")

    def train(*overrides: str, draws: bool = False) -> None:
        runs.draws = draws
        for first_number, length in ((10, 7), (20, 9)):
            # Files of one second and one process differ by a number, and TensorBoard reads number
            # 10 before number 9. Real starts are processes of their own.
            monkeypatch.setattr(
                "tensorboard.summary.writer.event_file_writer._global_uid",
                AtomicCounter(first_number),
            )
            trainer = runs.train(f"max_duration={length}ba", *overrides)
            assert trainer.state.timestamp.batch == length
            for newer in folder.glob("ep*-ba7-*"):
                newer.unlink()  # as if the start had been killed before it saved
                turn_back(folder, "ep0-ba4-rank0.pt")

    return train


@pytest.mark.slow
def test_tensorboard_has_each_step_once(train: Any, tmp_path: Path) -> None:
    train(
        f"loggers.TensorboardLogger.log_dir={tmp_path / 'board'}",
        "loggers.TensorboardLogger.flush_interval=3",
    )
    found = in_tensorboard(tmp_path / "board" / "r")
    assert {name: steps_of(found, name) for name in STEPS} == STEPS
    assert {name for name, _ in found} >= MORE
    rates = [found["lr", step][0] for step in range(4)]
    assert rates == sorted(rates[:4], reverse=True)


@pytest.mark.slow
def test_a_file_has_each_step_once(train: Any, tmp_path: Path) -> None:
    train(f"loggers.FileLogger.filename={tmp_path / 'log.txt'}")
    found = in_file(tmp_path / "log.txt")
    assert {name: steps_of(found, name) for name in STEPS} == STEPS


def test_weights_and_biases_has_a_step_in_the_files_of_two_starts(tmp_path: Path) -> None:
    """Whatever order the files are found in."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    for start, name in (("1", "loss"), ("2", "metrics")):
        folder = tmp_path / f"offline-run-{start}-me"
        folder.mkdir()
        store = DataStore()
        store.open_for_write(str(folder / "run-me.wandb"))
        record = Record()
        record.history.step.num = 4
        record.history.item.add().key = name
        store.write(record)
        store.close()
    assert newest_step(tmp_path, "me") == (4, {"loss", "metrics"})


@pytest.mark.slow
def test_weights_and_biases_has_one_run_and_each_step_once(
    train: Any, tmp_path: Path, fresh_wandb: None
) -> None:
    train("loggers.WandBLogger.project=x")
    found, ids = in_wandb(tmp_path / "wandb")
    kept = (tmp_path / "runs" / trackers.WANDB_ID).read_text(encoding="utf-8").strip()
    assert ids == {("x", kept)}
    names = {name for name, _ in found}
    assert names >= STEPS.keys() | MORE
    for name in ("loss/train/total", "lr"):
        assert steps_of(found, name) == STEPS[name]


def test_nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(write_config(tmp_path, str(tmp_path / "set")), ["loggers.WandBLogger.project=x"])
    with pytest.raises(
        UserError, match=r"nobody is logged in to Weights & Biases; run `wandb login`"
    ):
        trackers.check_login(config)
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers.check_login(config)


def _without_an_id(yaml: Path) -> str:
    config = load(yaml, ["run_name=r", "loggers.WandBLogger.project=x"])
    try:
        trackers.with_wandb_id(config, SaveFolder(config))
    except UserError as error:
        return str(error)
    return "goes on"


def test_all_ranks_hear_that_the_id_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be", encoding="utf-8")
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    found = processes.run(2, _without_an_id, yaml, timeout=60)
    assert found[0] == found[1]
    assert found[0].startswith("can't write")


@pytest.mark.slow
def test_the_history_of_all_starts(train: Any, tmp_path: Path) -> None:
    train(draws=True)
    text = (tmp_path / "runs" / HISTORY).read_text(encoding="utf-8")
    lines = lines_in(text)
    assert [line["batch"] for line in lines if "losses" in line] == list(range(1, 10))
    assert [line["batch"] for line in lines if line.get("start")] == [0, 4]
    assert lines_in(text[:-20]) == lines[:-1]  # a kill in the middle of a line
    page = (tmp_path / "runs" / PAGE).read_text(encoding="utf-8")
    assert "learning curves to batch 9" in page
    assert "after batch 4" in page
    for name in (
        "total",
        "contrastive",
        "e/image_retrieval_recall@5",
        "Learning rate",
        "Logit scale",
    ):
        assert name in page
