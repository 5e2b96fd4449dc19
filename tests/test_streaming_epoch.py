"""The threads that look at coming samples: what they yield, how far and how often they look."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mds_sets import pair_rows, write_rows
from runs import wait_until
from streaming import StreamingDataset

from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.data.streaming_epoch import EpochDataset

SAMPLES, EACH = 100, 5  # of a set, of a shard


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("remote"), pair_rows(SAMPLES), each=EACH)


@pytest.fixture
def opened(remote: Path, tmp_path: Path) -> Callable[..., ImageTextDataset]:
    """Opens the set, with an empty cache of its own."""

    def open_set(batch_size: int = 4, **settings: Any) -> ImageTextDataset:
        cache = tmp_path / f"cache{len(list(tmp_path.iterdir()))}"
        streams = {"s": StreamConfig(remote=str(remote), local=str(cache))}
        nodes = settings.pop("num_canonical_nodes", 1)
        config = DataConfig(streams, num_canonical_nodes=nodes, **settings)
        sizes = {"image_size": 8, "context_length": 8}
        dataset = ImageTextDataset(config, batch_size=batch_size, semantic=False, **sizes)
        dataset.config = config  # type: ignore[attr-defined]
        return dataset

    return open_set


def shards_in(dataset: ImageTextDataset) -> int:
    return len(list(Path(dataset.streams[0].local).glob("*.mds")))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each shard was prepared."""
    counted: Counter[int] = Counter()
    prepare = ImageTextDataset.prepare_shard

    def count(dataset: ImageTextDataset, shard_id: int, blocking: bool = True) -> None:
        counted[int(shard_id)] += 1
        prepare(dataset, shard_id, blocking)

    monkeypatch.setattr(ImageTextDataset, "prepare_shard", count)
    return counted


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shuffle": False},
        {"predownload": 1},
        {"predownload": 0},
        {"predownload": 13},
        {"num_canonical_nodes": 8},  # shares are filled up
        {"cache_limit": "40kb"},
        {"batch_size": 7, "num_workers": 2},  # and so is the last batch of a worker
        {"num_workers": 3},
        {"num_workers": 2, "predownload": 5},
    ],
    ids=str,
)
def test_samples_come_in_streamings_own_order(
    opened: Callable[..., ImageTextDataset],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
) -> None:
    found = []
    for is_ours in (True, False):
        with monkeypatch.context() as patch:
            if not is_ours:
                for name in ("_prepare_thread", "_ready_thread", "_each_sample_id"):
                    patch.setattr(EpochDataset, name, getattr(StreamingDataset, name))
                settings = settings | {"cache_limit": None}  # with one, Streaming's may stand still
            dataset = opened(**{"num_workers": 0, **settings})
            loader = build_dataloader(dataset, dataset.config, pin_memory=False)  # type: ignore[attr-defined]
            epochs = [[batch["sample"].tolist() for batch in loader] for _ in range(2)]
        found.append(epochs)
    assert found[0] == found[1]
    for epoch in found[0]:
        assert {sample for batch in epoch for sample in batch} <= set(range(SAMPLES))
        assert len(epoch) >= SAMPLES // 7


def test_a_shard_is_looked_at_once(
    opened: Callable[..., ImageTextDataset], prepared: Counter[int]
) -> None:
    dataset = opened()
    assert len(list(dataset)) == SAMPLES
    assert prepared.keys() == set(range(SAMPLES // EACH))
    prepared.clear()  # some shards twice: a thread may come while the other one downloads
    assert len(list(dataset)) == SAMPLES
    # some never: the thread ends once the other one has found that all shards are there
    assert set(prepared.values()) <= {1}


def test_nobody_looks_further_than_predownload(opened: Callable[..., ImageTextDataset]) -> None:
    dataset = opened(shuffle=False, predownload=12)
    for count, _ in enumerate(dataset, start=1):
        ahead = min(SAMPLES, count - 1 + 12 + 1)  # the sample that was just read is not behind us
        wait_until(lambda ahead=ahead: shards_in(dataset) * EACH >= ahead - 1 - 12 // 8)
        time.sleep(0.01)
        assert (shards_in(dataset) - 1) * EACH < ahead
        if count == 30:
            break


def test_nobody_looks_while_nobody_reads(
    opened: Callable[..., ImageTextDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, look = [], EpochDataset._shards_of

    def counted(dataset: EpochDataset, *arguments: Any) -> Any:
        looks.append(arguments[1:])
        return look(dataset, *arguments)

    monkeypatch.setattr(EpochDataset, "_shards_of", counted)
    samples = iter(opened(predownload=16))
    next(samples)
    before = -1
    while before != len(looks):  # the threads are as far as they may go
        before = len(looks)
        time.sleep(0.5)
    for _ in range(16):
        next(samples)
    wait_until(lambda: len(looks) > before)


def test_an_evicted_shard_is_fetched_again(
    opened: Callable[..., ImageTextDataset], prepared: Counter[int]
) -> None:
    dataset = opened(shuffle=False, predownload=40)
    samples = iter(dataset)
    seen = [int(dataset[next(samples)]["sample"]) for _ in range(3)]
    wait_until(lambda: shards_in(dataset) == 9)
    for shard_id in range(2, 8):
        dataset.evict_shard(shard_id)
    seen += [int(dataset[sample_id]["sample"]) for sample_id in samples]
    assert seen == list(range(SAMPLES))
    assert all(prepared[shard_id] >= 2 for shard_id in range(2, 8))


def test_an_epoch_that_is_given_up(opened: Callable[..., ImageTextDataset]) -> None:
    dataset = opened(predownload=8)
    for _ in range(3):
        first = iter(dataset)
        next(first)
        given_up = dataset._iterator
        assert len(list(dataset)) == SAMPLES
        assert given_up._num_exited >= 2
        assert list(first) == []


@pytest.mark.slow
def test_a_process_ends_in_the_middle_of_an_epoch(remote: Path, tmp_path: Path) -> None:
    script = f"""
        from alignclip.config.schema import DataConfig, StreamConfig
        from alignclip.data.dataset import ImageTextDataset
        stream = StreamConfig(remote={str(remote)!r}, local={str(tmp_path / "cache")!r})
        config = DataConfig(streams={{"s": stream}}, num_canonical_nodes=1, predownload=8)
        sizes = dict(batch_size=4, image_size=8, context_length=8)
        samples = iter(ImageTextDataset(config, **sizes, semantic=False))
        next(samples)
        print("read", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "read\n"), done.stderr
