"""Loader workers that are forked and spawned give what the loader gives without workers."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from mds_sets import pair_rows, write_rows
from models import refused

from alignclip.config.reading import load
from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader

SAMPLES = 40
CONTEXTS = ["fork", "forkserver", "spawn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("sets"), pair_rows(SAMPLES), each=8)


def open_set(folder: Path, **settings: Any) -> tuple[ImageTextDataset, DataConfig]:
    streams = {"s": StreamConfig(local=str(folder))}
    config = replace(DataConfig(streams, num_canonical_nodes=1), **settings)
    sizes = {"image_size": 16, "context_length": 8}
    return ImageTextDataset(config, batch_size=4, semantic=False, **sizes), config


def epochs_of(dataset: ImageTextDataset, config: DataConfig) -> list[dict[str, Any]]:
    """All batches of two epochs, in the order of their samples: it depends on how many work."""
    loader = build_dataloader(dataset, config, pin_memory=False)
    found: list[dict[str, Any]] = []
    for _ in range(2):
        batches = list(loader)
        joined = {
            name: torch.cat([b[name] for b in batches]) for name in ("image", "text", "sample")
        }
        order = joined["sample"].argsort()
        found.append({name: one[order] for name, one in joined.items()})
    return found


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("is_kept", [True, False])
def test_every_kind_of_worker_reads_the_same(folder: Path, context: str, is_kept: bool) -> None:
    expected = epochs_of(*open_set(folder, num_workers=0, multiprocessing_context=context))
    settings = {"num_workers": 2, "multiprocessing_context": context}
    dataset, config = open_set(folder, persistent_workers=is_kept, **settings)
    dataset.prepare_shard(0)  # a process that has used the cache's lock
    found = epochs_of(dataset, config)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["sample"].tolist() == list(range(SAMPLES))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_worker_that_is_spawned_does_not_count_the_memory_as_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, _ = open_set(folder)
    pickled = bytes(ForkingPickler.dumps(dataset))
    registered: list[tuple[str, str]] = []
    monkeypatch.setattr(resource_tracker, "register", lambda *one: registered.append(one))
    copy = pickle.loads(pickled)
    assert registered == []
    dataset.next_epoch = 5
    assert copy.next_epoch == 5  # the same memory


def test_another_name_is_refused() -> None:
    with refused("data.multiprocessing_context=spwan: did you mean 'spawn'"):
        load("yamls/debug.yaml", ["data.multiprocessing_context=spwan"])
