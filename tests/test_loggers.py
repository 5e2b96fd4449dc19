"""TensorBoard and Weights & Biases: what a run leaves for them, read back with their own readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from composer.utils import get_device
from runs import write_config, write_set
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignclip.config import reading
from alignclip.training import plugins
from alignclip.training.build import build_trainer

LOGGED = {
    "loss/train/total", "loss/train/contrastive", "loss/train/separation", "logit_scale", "lr",
    "metrics/e/image_retrieval_recall@1",
}  # fmt: skip


def fit(folder: Path, *overrides: str) -> None:
    write_set(str(folder / "set"), 64)
    fixed = ["run_name=r", "max_duration=24ba", "scheduler.t_warmup=1ba", "data.num_workers=0"]
    fixed += [
        "evaluators.e.task=retrieval",
        f"evaluators.e.local={folder / 'set'}",
        "evaluators.e.interval=12ba",
    ]
    fixed += ["evaluators.e.num_workers=0"]
    config = reading.load(write_config(folder, str(folder / "set")), [*fixed, *overrides])
    plugins.check(config)
    trainer = build_trainer(config, get_device("cpu"), None)
    trainer.fit()
    trainer.close()


def test_tensorboard(tmp_path: Path) -> None:
    fit(
        tmp_path,
        f"loggers.TensorboardLogger.log_dir={tmp_path / 'board'}",
        "loggers.TensorboardLogger.flush_interval=1",
    )
    (folder,) = {events.parent for events in (tmp_path / "board").rglob("events.*")}
    found = EventAccumulator(str(folder))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert tags >= LOGGED
    assert any(tag.startswith("throughput/") for tag in tags)
    # Composer begins a new file at each flush, and the reader sorts them by their names
    assert sorted(scalar.step for scalar in found.Scalars("loss/train/total")) == list(range(24))
    rates = [scalar.value for scalar in sorted(found.Scalars("lr"), key=lambda scalar: scalar.step)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates == sorted(rates, reverse=True)


def test_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_wandb: None
) -> None:
    """Offline: the run's file as wandb itself would upload it later."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    monkeypatch.chdir(tmp_path)
    fit(tmp_path, "loggers.WandBLogger={project: mine, rank_zero_only: true}")
    wandb.teardown()  # as at the end of a process: a run that has finished may be in its file a moment later
    (file,) = tmp_path.rglob("run-*.wandb")
    store, keys, project = DataStore(), set(), ""
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = Record()
        record.ParseFromString(data)
        keys |= {item.key or "/".join(item.nested_key) for item in record.history.item}
        project = record.run.project or project
    assert project == "mine"
    assert keys >= LOGGED
