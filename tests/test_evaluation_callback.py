"""Evaluation during training: at its intervals, without a trace in the losses, the best checkpoint kept."""

from __future__ import annotations

import errno
import re
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.utils import get_device
from runs import run, write_config, write_set
from s3 import S3Server

from alignclip.config.metrics import ARROWS, metrics_of
from alignclip.config.reading import load
from alignclip.config.schema import EvaluatorConfig, KeepBestConfig
from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.evaluator import Evaluator
from alignclip.evaluation.history import EvaluationRecords, history_beside, records_in
from alignclip.evaluation.sets import OpenSets
from alignclip.training.best import BestCheckpoint
from alignclip.training.build import build_trainer
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file
from alignclip.weights.load import load_encoders, open_encoders


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    write_set(str(folder), 64)
    return folder


def train(dataset: Path, folder: Path, *overrides: str) -> tuple[Trainer, InMemoryLogger]:
    """Two epochs of four batches."""
    config = load(
        write_config(folder, str(dataset), str(folder / "saved")),
        ("max_duration=2ep", "data.num_workers=0", "run_name=r", "scheduler.t_warmup=1ba", *overrides,
         "loggers.InMemoryLogger={}", "model.vision_cfg.patch_dropout=0.5", "model.shared.blocks=0"),
    )  # fmt: skip
    folder = SaveFolder(config)
    trainer = build_trainer(config, get_device("cpu"), folder)
    folder.write_config()
    trainer.fit()
    trainer.close()
    (memory,) = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    return trainer, memory


def logged(memory: InMemoryLogger, name: str) -> dict[int, float]:
    return {stamp.batch.value: float(value) for stamp, value in memory.data.get(name, [])}


def retrieval(dataset: Path, name: str = "pairs", **more: Any) -> list[str]:
    values = {"task": "retrieval", "local": dataset, "num_workers": 0, "batch_size": 16, **more}
    return [f"evaluators.{name}.{key}={value}" for key, value in values.items()]


def test_evaluators_have_their_intervals_and_leave_no_trace(dataset: Path, tmp_path: Path) -> None:
    _, without = train(dataset, tmp_path / "a")
    trainer, memory = train(
        dataset,
        tmp_path / "b",
        *retrieval(dataset, interval="3ba"),
        *retrieval(dataset, "gap", task="gap"),
    )
    # patch dropout draws from the global generator in every step
    assert logged(memory, "loss/train/total") == logged(without, "loss/train/total")
    assert logged(memory, "metrics/pairs/image_retrieval_recall@5").keys() == {3, 6, 8}
    assert logged(memory, "metrics/gap/centroid_distance").keys() == {4, 8}
    assert len(memory.data["metrics/gap/centroid_distance"]) == 2, (
        "the end of the run is also the end of an epoch"
    )
    assert trainer.state.model.training


@pytest.mark.parametrize(
    "more", [[], ["algorithms.EMA.half_life=4ba", "algorithms.EMA.update_interval=1ba"]]
)
def test_the_last_evaluation_is_of_the_model_that_is_saved(
    dataset: Path, tmp_path: Path, more: list[str]
) -> None:
    _, memory = train(dataset, tmp_path, *retrieval(dataset, task="gap", interval="1ep"), *more)
    encoder = Encoder(
        load_encoders(str(tmp_path / "saved")), torch.device("cpu"), batch_size=16, progress=False
    )
    config = EvaluatorConfig(task="gap", local=str(dataset), num_workers=0)
    after = Evaluator("pairs", config, encoder.image_size, OpenSets())(encoder).metrics
    for name, value in after.items():
        assert logged(memory, f"metrics/pairs/{name}")[8] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_checkpoint_is_kept(dataset: Path, tmp_path: Path, mode: str) -> None:
    name = "pairs/alignment_score"
    best = [f"keep_best.metric={name}", f"keep_best.mode={mode}", "save_interval=2ba"]
    evaluators = retrieval(dataset, task="gap", interval="1ba")
    _, memory = train(dataset, tmp_path, *evaluators, *best)
    values = logged(memory, f"metrics/{name}")
    assert len(values) == 8
    pick = max if mode == "max" else min
    at = pick(values, key=lambda batch: values[batch])
    kept = torch.load(tmp_path / "saved" / "best-rank0.pt", weights_only=False)
    assert kept["state"]["timestamp"]["Timestamp"]["batch"] == at
    assert not list((tmp_path / "saved").glob(".*"))


def test_a_resumed_run_has_to_beat_its_past(dataset: Path, tmp_path: Path) -> None:
    """With a past best that nothing can beat, the resumed run keeps none."""
    best = ["keep_best.metric=pairs/centroid_distance", "keep_best.mode=min", "save_interval=1ep"]
    evaluators = retrieval(dataset, task="gap", interval="1ba")
    train(dataset, tmp_path, *evaluators, *best)
    first = min((tmp_path / "saved").glob("ep*.pt"), key=lambda p: p.stat().st_mtime)
    state = torch.load(first, weights_only=False)
    kept = state["state"]["callbacks"]["EvaluationCallback"]
    assert kept["best"]["value"] > 0
    kept["best"]["value"] = 0.0
    torch.save(state, first)
    link = tmp_path / "saved" / "latest-rank0.pt"
    link.unlink()
    link.symlink_to(first.name)
    (tmp_path / "saved" / "best-rank0.pt").unlink()
    _, memory = train(dataset, tmp_path, *evaluators, *best)
    assert logged(memory, "metrics/pairs/centroid_distance").keys() == {5, 6, 7, 8}
    assert not (tmp_path / "saved" / "best-rank0.pt").exists()


def test_the_best_of_another_metric_does_not_count(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluators = retrieval(dataset, task="gap", interval="1ep")
    train(
        dataset,
        tmp_path,
        *evaluators,
        "keep_best.metric=pairs/effective_rank_image",
        "save_interval=1ep",
    )
    link = tmp_path / "saved" / "latest-rank0.pt"
    link.unlink()
    link.symlink_to(min((tmp_path / "saved").glob("ep*.pt"), key=lambda p: p.stat().st_mtime).name)
    (tmp_path / "saved" / "best-rank0.pt").unlink()
    capsys.readouterr()
    train(dataset, tmp_path, *evaluators, "keep_best.metric=pairs/rmg")  # which is better lower
    assert (tmp_path / "saved" / "best-rank0.pt").exists()
    said = capsys.readouterr().out
    assert (
        "the best pairs/effective_rank_image (max) so far doesn't count for pairs/rmg (min)" in said
    )


def test_a_best_checkpoint_that_cannot_be_written_ends_no_run(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint_file._write_all

    def full(file: FileIO, data: memoryview | bytes) -> None:
        if "/.best-" in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(checkpoint_file, "_write_all", full)
    evaluators = retrieval(dataset, task="gap", interval="1ep")
    _, memory = train(dataset, tmp_path, *evaluators, "keep_best.metric=pairs/rmg")
    assert logged(memory, "metrics/pairs/rmg").keys() == {4, 8}
    assert "could not keep the best checkpoint" in caplog.text
    assert "no space left in" in caplog.text
    assert not list((tmp_path / "saved").glob("*best*"))


def test_the_best_goes_into_a_bucket_beside_the_training(
    s3: S3Server, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the upload is: what is being uploaded has to be beaten, and what is lost in it has not."""
    config = KeepBestConfig("pairs/rmg", "min")
    folder = SaveFolder(
        load(write_config(tmp_path, str(dataset), f"{s3.bucket()}/run"), ["run_name=r"])
    )
    folder.open()
    go_on, uploaded, keep_file = threading.Event(), [], folder.keep_file

    def slow(source: Path, name: str) -> None:
        go_on.wait(60)
        uploaded.append(torch.load(source, weights_only=False)["state"]["at"])
        if uploaded[-1] == 3:
            raise ConnectionError("gone")
        keep_file(source, name)

    monkeypatch.setattr(folder, "keep_file", slow)
    best = BestCheckpoint(config, folder)

    class State:
        at = 0

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

    state: Any = State()
    for state.at, value in ((1, 0.5), (2, 0.6), (3, 0.4), (4, float("nan"))):
        best.offer({"pairs/rmg": value}, state)
    assert best.state_dict()["value"] is None, "nothing has arrived"
    assert not uploaded
    go_on.set()
    best.finish()
    assert uploaded == [1, 3]
    assert best.state_dict()["value"] == 0.5, "the second one was lost"
    names = [key.rpartition("/")[2] for key in s3.keys(folder.uri)]
    assert names == ["best-rank0.pt"]


def test_an_evaluation_that_fails_does_not_end_the_run(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    write_set(str(broken), 20)
    shard = sorted(broken.glob("*.mds"))[0]
    evaluators = retrieval(broken, "broken") + retrieval(dataset, "whole")
    config = load(
        write_config(tmp_path, str(dataset), str(tmp_path / "saved")),
        ["max_duration=1ep", "data.num_workers=0", "run_name=r", "scheduler.t_warmup=1ba", *evaluators,
         "loggers.InMemoryLogger={}"],
    )  # fmt: skip
    trainer = build_trainer(config, get_device("cpu"), SaveFolder(config))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    trainer.fit()
    trainer.close()
    (memory,) = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    assert "evaluator 'broken' at batch 4" in caplog.text
    assert logged(memory, "metrics/whole/image_retrieval_recall@1").keys() == {4}
    assert not [name for name in memory.data if "broken" in name]


def test_a_set_that_is_not_there_is_told_before_the_first_step(
    dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"no MDS set at .*nowhere"):
        train(dataset, tmp_path, *retrieval(tmp_path / "nowhere"))


def test_a_run_that_is_told_to_stop_saves_before_anything_else(
    dataset: Path, tmp_path: Path
) -> None:
    """In a process of its own, because of its signals: SIGTERM while the first of two evaluators works."""
    evaluators = retrieval(dataset, "first", interval="2ba") + retrieval(
        dataset, "second", interval="2ba"
    )
    config = write_config(tmp_path, str(dataset), str(tmp_path / "saved"))
    script = tmp_path / "stopped.py"
    script.write_text(
        "import os, signal, sys\n"
        "from alignclip.training import command\n"
        "from alignclip.evaluation import retrieval\n"
        "found = retrieval.recall\n"
        "def recall(*args, **more):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return found(*args, **more)\n"
        "retrieval.recall = recall\n"
        "sys.exit(command.main(sys.argv[1:]))\n"
    )
    output = run(
        script, config, "run_name=r", "max_duration=8ba", *evaluators, cwd=tmp_path, status=143
    )
    assert re.findall(r"batch (\d+), (\w+)", output) == [("2", "first")]
    assert "stopped by a signal after batch 3" in output
    assert (tmp_path / "saved" / "latest-rank0.pt").resolve().name == "ep0-ba3-rank0.pt"


def test_the_record_of_evaluations_is_that_of_the_run_as_it_went_on(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line an evaluation; a run that goes on from an earlier checkpoint has not those of the future that was lost."""
    evaluators = [
        *retrieval(dataset, "gap", task="gap", interval="2ba"),
        *retrieval(dataset, interval="4ba"),
    ]
    _, memory = train(dataset, tmp_path, *evaluators, "save_interval=1ep")
    file = tmp_path / "saved" / "evaluations.jsonl"
    lines = [(2, "gap"), (4, "gap"), (4, "pairs"), (6, "gap"), (8, "gap"), (8, "pairs")]
    records = records_in(file.read_text(encoding="utf-8"))
    assert [(one["batch"], one["evaluator"]) for one in records] == lines
    values = logged(memory, "metrics/gap/margin")
    assert [one["metrics"]["margin"] for one in records if one["evaluator"] == "gap"] == list(
        values.values()
    )
    assert records[-1]["chance"]["image_retrieval_recall@1"] == pytest.approx(1 / 64)
    said = capsys.readouterr().out
    for record in records:
        assert f"  {record['evaluator']}: {record['verdict']}\n" in said
    assert "at batch 2" in str(records[-2]["verdict"]), "compared with the run's first evaluation"
    assert "at batch" not in str(records[0]["verdict"]), "which is compared with none"
    (line,) = re.findall("batch 8, gap: (.*)", said)
    last = records[-2]["metrics"]
    watched = {name: one for name, one in metrics_of("gap").items() if one.watch}
    assert len(last) > 20
    assert line.split(", ") == [
        f"{name} {ARROWS[watched[name].better]} {value:.4f}"
        for name, value in last.items()
        if name in watched
    ]
    assert line.count(",") == 3
    assert open_encoders(tmp_path / "saved").batch == 8
    assert open_encoders(tmp_path / "saved" / "ep1-ba4").batch == 4
    link = tmp_path / "saved" / "latest-rank0.pt"
    link.unlink()
    link.symlink_to(min((tmp_path / "saved").glob("ep*.pt"), key=lambda p: p.stat().st_mtime).name)
    file.write_text("", encoding="utf-8")
    train(dataset, tmp_path, *evaluators, "save_interval=1ep")
    again = records_in(file.read_text(encoding="utf-8"))
    assert [(one["batch"], one["evaluator"]) for one in again] == lines
    assert again[:3] == records[:3]


def test_a_record_that_cannot_be_written_ends_no_run(
    s3: S3Server, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SaveFolder(
        load(write_config(tmp_path, str(dataset), f"{s3.bucket()}/run"), ["run_name=r"])
    )
    folder.open()
    history = EvaluationRecords(folder.files)
    history.add(3, "pairs", {"acc1": 0.5, "rmg": float("nan")}, {"acc1": 0.1})
    history.write()
    history.finish()
    history.finish()
    assert [key.rpartition("/")[2] for key in s3.keys(folder.uri)] == ["evaluations.jsonl"]
    assert (
        history_beside(folder.uri)
        == history_beside(f"{folder.uri}/latest-rank0.pt")
        == history.records
    )
    assert history.records[0]["metrics"] == {"acc1": 0.5, "rmg": None}
    local = SaveFolder(
        load(write_config(tmp_path, str(dataset), str(tmp_path / "file" / "run")), ["run_name=r"])
    )
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    EvaluationRecords(local.files).write()
    assert "could not write" in caplog.text


def test_a_mode_against_the_metric_is_told(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SaveFolder(
        load(write_config(tmp_path, str(dataset), str(tmp_path / "saved")), ["run_name=r"])
    )
    assert BestCheckpoint(KeepBestConfig("pairs/rmg"), folder).mode == "min"
    assert BestCheckpoint(KeepBestConfig("pairs/margin"), folder).mode == "max"
    assert BestCheckpoint(KeepBestConfig("pairs/alignment_std", "min"), folder).mode == "min"
    assert not capsys.readouterr().out
    assert BestCheckpoint(KeepBestConfig("pairs/rmg", "max"), folder).mode == "max"
    said = "keep_best: rmg is better lower, and keep_best.mode=max keeps the worst; keep_best.mode=min?\n"
    assert capsys.readouterr().out == said
