"""Evaluation during training: at its intervals, without a trace in the losses, the best
checkpoint kept.
"""

from __future__ import annotations

import errno
import re
import threading
from concurrent.futures import Future
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from evaluations import encoder_of, evaluator_of
from runs import run, write_set
from s3 import S3Server
from save_folders import config_for
from small_runs import SmallRuns, logged, turn_back

from alignclip.config.metrics import ARROWS, metrics_of
from alignclip.config.schema import KeepBestConfig
from alignclip.errors import UserError
from alignclip.evaluation.history import (
    EvaluationRecord,
    EvaluationRecords,
    history_beside,
    records_in,
)
from alignclip.evaluation.json_lines import RecordFile, lines_in
from alignclip.storage import open_store
from alignclip.training.best import BestCheckpoint
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file
from alignclip.weights.load import load_encoders, open_encoders

pytestmark = pytest.mark.slow  # runs in process


class EvaluatedRuns(SmallRuns):
    """Runs of two epochs of four batches in ``folder``; patch dropout draws in every step."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.saved = folder / "saved"
        more = ("max_duration=2ep", "model.vision_cfg.patch_dropout=0.5", "model.shared.blocks=0")
        super().__init__(folder, dataset, self.saved, *more)

    def logged(self, name: str, *overrides: str) -> dict[int, float]:
        """Train, and return the values of a metric by their batches."""
        return of_batches(self.train(*overrides), name)

    def turn_back(self) -> None:
        """Have the next run go on from the first checkpoint, without a best one."""
        turn_back(self.saved, "ep1-ba4-rank0.pt")
        (self.saved / "best-rank0.pt").unlink(missing_ok=True)


def of_batches(trainer: Trainer, name: str) -> dict[int, float]:
    (memory,) = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
    return {stamp.batch.value: float(value) for stamp, value in memory.data.get(name, [])}


@pytest.fixture
def runs(dataset: Path, tmp_path: Path) -> EvaluatedRuns:
    return EvaluatedRuns(dataset, tmp_path)


def pairs(dataset: Path, name: str = "pairs", task: str = "gap", **more: Any) -> list[str]:
    values = {"task": task, "local": dataset, "num_workers": 0, "batch_size": 16, **more}
    return [f"evaluators.{name}.{key}={value}" for key, value in values.items()]


def test_evaluators_have_their_intervals_and_leave_no_trace(
    dataset: Path, tmp_path: Path, runs: EvaluatedRuns
) -> None:
    loss = "loss/train/total"
    without = EvaluatedRuns(dataset, tmp_path / "a").logged(loss)
    evaluators = [*pairs(dataset, task="retrieval", interval="3ba"), *pairs(dataset, "gap")]
    trainer = runs.train(*evaluators)
    assert of_batches(trainer, loss) == without
    recall = "metrics/pairs/image_retrieval_recall@5"
    assert of_batches(trainer, recall).keys() == {3, 6, 8}
    # the end of the run is also the end of an epoch
    assert len(logged(trainer, "metrics/gap/centroid_distance")) == 2
    assert of_batches(trainer, "metrics/gap/centroid_distance").keys() == {4, 8}
    assert trainer.state.model.training


@pytest.mark.parametrize(
    "more", [[], ["algorithms.EMA.half_life=4ba", "algorithms.EMA.update_interval=1ba"]]
)
def test_the_last_evaluation_is_of_the_model_that_is_saved(
    dataset: Path, runs: EvaluatedRuns, more: list[str]
) -> None:
    trainer = runs.train(*pairs(dataset), *more)
    encoder = encoder_of(load_encoders(str(runs.saved)), batch_size=16)
    for name, value in evaluator_of("gap", dataset)(encoder).metrics.items():
        found = of_batches(trainer, f"metrics/pairs/{name}")[8]
        assert found == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_best_checkpoint_is_kept(dataset: Path, runs: EvaluatedRuns, mode: str) -> None:
    name = "pairs/alignment_score"
    best = [f"keep_best.metric={name}", f"keep_best.mode={mode}", "save_interval=2ba"]
    values = runs.logged(f"metrics/{name}", *pairs(dataset, interval="1ba"), *best)
    assert len(values) == 8
    at = {"max": max, "min": min}[mode](values, key=lambda batch: values[batch])
    kept = torch.load(runs.saved / "best-rank0.pt", weights_only=False)
    assert kept["state"]["timestamp"]["Timestamp"]["batch"] == at
    assert not list(runs.saved.glob(".*"))


def test_a_resumed_run_has_to_beat_its_past(dataset: Path, runs: EvaluatedRuns) -> None:
    """With a past best that nothing can beat, the resumed run keeps none."""
    distance = "pairs/centroid_distance"
    settings = [f"keep_best.metric={distance}", "keep_best.mode=min", "save_interval=1ep"]
    settings += pairs(dataset, interval="1ba")
    runs.train(*settings)
    first = runs.saved / "ep1-ba4-rank0.pt"
    state = torch.load(first, weights_only=False)
    best = state["state"]["callbacks"]["EvaluationCallback"]["best"]
    assert best["value"] > 0
    best["value"] = 0.0
    torch.save(state, first)
    runs.turn_back()
    assert runs.logged(f"metrics/{distance}", *settings).keys() == {5, 6, 7, 8}
    assert not (runs.saved / "best-rank0.pt").exists()


def test_the_best_of_another_metric_does_not_count(
    dataset: Path, runs: EvaluatedRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*pairs(dataset), "save_interval=1ep"]
    runs.train(*settings, "keep_best.metric=pairs/effective_rank_image")
    runs.turn_back()
    runs.train(*settings, "keep_best.metric=pairs/rmg")  # which is better lower
    assert (runs.saved / "best-rank0.pt").exists()
    said = "the best pairs/effective_rank_image (max) so far doesn't count for pairs/rmg (min)"
    assert said in capsys.readouterr().out


def test_a_best_checkpoint_that_cannot_be_written_ends_no_run(
    dataset: Path,
    runs: EvaluatedRuns,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = checkpoint_file._write_all

    def full(file: FileIO, data: memoryview | bytes) -> None:
        if "/.best-" in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(checkpoint_file, "_write_all", full)
    found = runs.logged("metrics/pairs/rmg", *pairs(dataset), "keep_best.metric=pairs/rmg")
    assert found.keys() == {4, 8}
    assert "could not keep the best checkpoint" in caplog.text
    assert "no space left in" in caplog.text
    assert not list(runs.saved.glob("*best*"))


def test_the_best_goes_into_a_bucket_beside_the_training(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the upload is: what is being uploaded has to be beaten, and what is lost in
    it has not.
    """
    config = KeepBestConfig("pairs/rmg", "min")
    folder = SaveFolder(config_for(tmp_path, f"{s3.bucket()}/run"))
    go_on, uploaded, bring = threading.Event(), [], folder.bring

    def slow(source: Path, name: str, overwrite: bool) -> None:
        go_on.wait(60)
        uploaded.append(torch.load(source, weights_only=False)["state"]["at"])
        if uploaded[-1] == 3:
            raise ConnectionError("gone")
        bring(source, name, overwrite)

    monkeypatch.setattr(folder, "bring", slow)
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


def test_an_upload_that_ends_while_it_is_asked_for_counts(tmp_path: Path) -> None:
    class EndsMeanwhile(Future[None]):
        def done(self) -> bool:
            was_done = super().done()
            if not was_done:
                self.set_result(None)
            return was_done

    folder = SaveFolder(config_for(tmp_path, str(tmp_path / "run")))
    best = BestCheckpoint(KeepBestConfig("pairs/rmg", "min"), folder)
    best._pending.append((0.5, EndsMeanwhile()))
    assert best.state_dict()["value"] is None
    assert best.state_dict()["value"] == 0.5


def test_an_evaluation_that_fails_does_not_end_the_run(
    dataset: Path, tmp_path: Path, runs: EvaluatedRuns, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    write_set(str(broken), 20)
    evaluators = pairs(broken, "broken") + pairs(dataset, "whole")
    trainer = runs.build("max_duration=1ep", *evaluators)
    shard = sorted(broken.glob("*.mds"))[0]
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    trainer.fit()
    trainer.close()
    assert "evaluator 'broken' at batch 4" in caplog.text
    assert of_batches(trainer, "metrics/whole/rmg").keys() == {4}
    assert not of_batches(trainer, "metrics/broken/rmg")


def test_a_set_that_is_not_there_is_told_before_the_first_step(
    tmp_path: Path, runs: EvaluatedRuns
) -> None:
    with pytest.raises(UserError, match=r"no MDS set at .*nowhere"):
        runs.train(*pairs(tmp_path / "nowhere"))


def test_a_run_that_is_told_to_stop_saves_before_anything_else(
    dataset: Path, tmp_path: Path, runs: EvaluatedRuns
) -> None:
    """In a process of its own, because of its signals: SIGTERM while the first of two evaluators
    works.
    """
    settings = ["run_name=r", "max_duration=8ba"]
    for name in ("first", "second"):
        settings += pairs(dataset, name, "retrieval", interval="2ba")
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
    output = run(script, runs.yaml, *settings, cwd=tmp_path, status=143)
    assert re.findall(r"batch (\d+), (\w+)", output) == [("2", "first")]
    assert "stopped by a signal after batch 3" in output
    assert (runs.saved / "latest-rank0.pt").resolve().name == "ep0-ba3-rank0.pt"


def test_the_record_of_evaluations_is_that_of_the_run_as_it_went_on(
    dataset: Path, runs: EvaluatedRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line an evaluation; a run that goes on from an earlier checkpoint has not those of the
    future that was lost.
    """
    settings = [*pairs(dataset, "gap", interval="2ba"), "save_interval=1ep"]
    settings += pairs(dataset, task="retrieval", interval="4ba")
    file = runs.saved / "evaluations.jsonl"

    def written() -> list[EvaluationRecord]:
        found = records_in(file.read_text(encoding="utf-8"))
        order = [(2, "gap"), (4, "gap"), (4, "pairs"), (6, "gap"), (8, "gap"), (8, "pairs")]
        assert [(one["batch"], one["evaluator"]) for one in found] == order
        return found

    values = runs.logged("metrics/gap/margin", *settings)
    records = written()
    margins = [one["metrics"]["margin"] for one in records if one["evaluator"] == "gap"]
    assert margins == list(values.values())
    assert records[-1]["chance"]["image_retrieval_recall@1"] == pytest.approx(1 / 64)
    said = capsys.readouterr().out
    assert all(f"  {one['evaluator']}: {one['verdict']}\n" in said for one in records)
    last = records[-2]
    assert "at batch 2" in str(last["verdict"]), "compared with the run's first evaluation"
    assert "at batch" not in str(records[0]["verdict"]), "which is compared with none"
    (line,) = re.findall("batch 8, gap: (.*)", said)
    watched = {name: one for name, one in metrics_of("gap").items() if one.watch}
    assert len(last["metrics"]) > 20
    assert line.split(", ") == [
        f"{name} {ARROWS[watched[name].better]} {value:.4f}"
        for name, value in last["metrics"].items()
        if name in watched
    ]
    assert line.count(",") == 3
    assert open_encoders(runs.saved).batch == 8
    assert open_encoders(runs.saved / "ep1-ba4").batch == 4
    runs.turn_back()
    file.write_text("", encoding="utf-8")
    runs.train(*settings)
    assert written()[:3] == records[:3]


def test_a_record_that_cannot_be_written_ends_no_run(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"{s3.bucket()}/run"
    history = EvaluationRecords(open_store(uri))
    history.add(3, "pairs", {"acc1": 0.5, "rmg": float("nan")}, {"acc1": 0.1})
    history.write()
    history.finish()
    history.finish()
    assert [key.rpartition("/")[2] for key in s3.keys(uri)] == ["evaluations.jsonl"]
    for place in (uri, f"{uri}/latest-rank0.pt"):
        assert history_beside(place) == history.records
    assert history.records[0]["metrics"] == {"acc1": 0.5, "rmg": None}
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    EvaluationRecords(open_store(str(tmp_path / "file" / "run"))).write()
    assert "could not write" in caplog.text


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_no_json_in_a_record_end_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: str
) -> None:
    lines = lines_in(f'{{"batch": 1, "lr": {number}}}')
    file = RecordFile(open_store(str(tmp_path)), "history.jsonl", "could not keep")
    file.write(lines)
    file.finish()
    if number == "1e999":
        assert "could not keep" in caplog.text
    else:
        assert (tmp_path / "history.jsonl").read_text() == '{"batch": 1, "lr": null}\n'


def test_a_mode_against_the_metric_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SaveFolder(config_for(tmp_path, str(tmp_path / "saved")))

    def mode(*settings: str) -> str:
        return BestCheckpoint(KeepBestConfig(*settings), folder).mode

    assert (mode("pairs/rmg"), mode("pairs/margin")) == ("min", "max")
    assert mode("pairs/alignment_std", "min") == "min"
    assert not capsys.readouterr().out
    assert mode("pairs/rmg", "max") == "max"
    said = "rmg is better lower, and keep_best.mode=max keeps the worst; keep_best.mode=min?"
    assert capsys.readouterr().out == f"keep_best: {said}\n"
