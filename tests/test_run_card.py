"""The card of a run: what was trained and how, gathered from what the run keeps elsewhere."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from composer import Trainer
from s3 import S3Server
from small_runs import SmallRuns

from alignclip.storage import StorageError, Store, open_store
from alignclip.training import composer_patches
from alignclip.training.run import record_start
from alignclip.training.run_card import (
    FINISHED,
    JSON,
    PAGE,
    STOPPED_EARLY,
    RunCard,
    make_card,
    write_run_card,
)

SETTINGS = ("save_interval=4ba", "evaluators.e.task=retrieval", "evaluators.e.num_workers=0")


def start(runs: SmallRuns, batches: int, of_batches: int, status: str) -> Trainer:
    """A start of a run, as the command makes it."""
    trainer, folder = runs.build(f"max_duration={batches}ba"), runs.folder()
    record_start(folder, trainer, {})
    trainer.fit()
    composer_patches.close(trainer)
    write_run_card(folder, trainer.state, of_batches, status)
    return trainer


def card_in(store: Store) -> dict[str, Any]:
    return json.loads(store.read_text(JSON))  # type: ignore[no-any-return]


@pytest.fixture
def runs(dataset: Path, tmp_path: Path) -> SmallRuns:
    return SmallRuns(
        tmp_path, dataset, tmp_path / "runs", *SETTINGS, f"evaluators.e.local={dataset}"
    )


@pytest.mark.slow
def test_a_run_that_was_stopped_and_went_on(runs: SmallRuns, dataset: Path) -> None:
    store, runs.draws = open_store(runs.uri), True
    start(runs, 4, 8, STOPPED_EARLY)
    first = card_in(store)
    assert (first["status"], first["batch"], first["of_batches"]) == (STOPPED_EARLY, 4, 8)
    trainer = start(runs, 8, 8, FINISHED)
    card = card_in(store)
    assert card.keys() == {one.name for one in fields(RunCard)}
    assert (card["run_name"], card["status"], card["batch"]) == ("r", FINISHED, 8)
    batch = trainer.state.train_dataloader.batch_size  # type: ignore[union-attr]
    assert card["data"] == {
        "sets": {"e": str(dataset)},
        "samples": 64,
        "epochs": 8 * batch / 64,
        "global_train_batch_size": batch,
    }
    assert card["recipe"]["model"]["shared"]["blocks"] == -1
    assert card["recipe"]["loss"]["beta"] == 0.5
    assert card["hardware"]["ranks"] == card["hardware"]["machines"] == 1
    assert [one["batch"] for one in card["starts"]] == [0, 4]
    assert card["starts"] == json.loads(store.read_text("starts.json"))
    # of both starts
    hours = card["hours"]
    assert hours["training"] > first["hours"]["training"] > 0
    assert hours["evaluation"] > first["hours"]["evaluation"] > 0
    parts = ("training", "evaluation", "checkpoints")
    assert hours["total"] == pytest.approx(sum(hours[part] for part in parts))
    assert 0 < hours["data_wait"] < hours["training"]
    time.sleep(0.1)
    write_run_card(runs.folder(), trainer.state, 8, FINISHED)
    assert card_in(store)["hours"] == hours, "the time that closes a run is no training"
    assert card["speed"]["samples_seen"] == 8 * batch
    assert card["speed"]["samples_per_second"] > 0
    assert card["speed"]["mfu"] is None
    history = [json.loads(line) for line in store.read_text("history.jsonl").splitlines()]
    last = history[-1]
    assert card["losses"] == {
        **last["losses"],
        "lr": last["lr"],
        "logit_scale": last["logit_scale"],
    }
    evaluation = json.loads(store.read_text("evaluations.jsonl").splitlines()[-1])
    assert card["evaluations"] == {"e": {"batch": 8, "metrics": evaluation["metrics"]}}
    assert card["curves"]
    assert store.read_bytes("curves.png").startswith(b"\x89PNG")
    page = store.read_text(PAGE)
    assert page.startswith("# Run `r`\n\nFinished after 8 of 8 batches, in 2 starts.")
    assert "![learning curves](curves.png)" in page
    assert "| e | 8 | image_retrieval_recall@5 ↑ | " in page
    widths = {line.count("|") for line in page.splitlines() if line.startswith("|")}
    assert widths <= {3, 4, 5, 6}


def test_into_a_bucket(s3: S3Server, dataset: Path, tmp_path: Path) -> None:
    uri = f"{s3.bucket()}/runs/r"
    start(SmallRuns(tmp_path, dataset, uri, draws=True), 2, 2, FINISHED)
    store = open_store(uri)
    assert card_in(store)["status"] == FINISHED
    assert {"run.md", "curves.png", "curves.html"} <= store.names()


def test_trouble_is_a_warning(
    runs: SmallRuns, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(store: Store, name: str, text: str) -> None:
        raise StorageError("write", store.at(name), "no room left")

    trainer = start(runs, 2, 2, FINISHED)
    before = card_in(open_store(runs.uri))
    monkeypatch.setattr(Store, "write_text", refuse)
    with caplog.at_level(logging.WARNING):
        write_run_card(runs.folder(), trainer.state, 2, STOPPED_EARLY)
    (line,) = [one for one in caplog.messages if "card" in one]
    assert line == f"could not write the run's card in {runs.uri}: no room left"
    assert card_in(open_store(runs.uri)) == before


def test_records_of_earlier_versions_are_no_trouble(runs: SmallRuns) -> None:
    """No curves, no evaluations, a start with less and with more than ours."""
    trainer, folder = start(runs, 2, 2, FINISHED), runs.folder()
    for name in ("history.jsonl", "evaluations.jsonl"):
        folder.files.delete(name)
    early = {"batch": 0, "world_size": 2, "device": "cpu", "time": "2025", "command": "x"}
    folder.files.write_text("starts.json", json.dumps([early | {"versions": {}, "later": 1}]))
    card = make_card(folder, trainer.state, 2, FINISHED)
    assert (card.losses, card.evaluations) == ({}, {})
    assert [(one.world_size, one.git) for one in card.starts] == [(2, None)]
