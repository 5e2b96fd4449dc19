"""Nothing is deleted but what this program downloaded, and can download again."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mds_sets import edit, pair_rows, shards_of, write_rows
from streaming.base.compression import compress
from streaming.base.format.mds import MDSReader

from alignclip.config.schema import DataConfig, SetConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.data.mds_reader import decompress_to
from alignclip.data.shard_cache import NOTE, CachedShard, ShardCache
from alignclip.data.streaming_patches import CachedDataset
from alignclip.data.streams import cached_stream, check_streams
from alignclip.errors import NotReadError, UserError
from alignclip.evaluation.sets import OpenSets

SAMPLES = 96
# threads of a worker that download; Streaming doesn't count a shard before the shard is there
IN_FLIGHT = 2
MOST_SHARDS = (
    6 + IN_FLIGHT
)  # of the sets here, with the fixture's limit: the last shard of a set is a small one
Contents = dict[str, bytes]


def write(folder: Path, compression: str | None = None, seed: int = 0) -> Path:
    """A set of about a dozen shards."""
    rows = pair_rows(SAMPLES, seed)
    return write_rows(folder, rows, size_limit="8kb", compression=compression)


def cached(remote: Path, local: Path) -> StreamConfig:
    return StreamConfig(remote=str(remote), local=str(local))


def only(local: Path) -> StreamConfig:
    return StreamConfig(local=str(local))


def contents(folder: Path) -> Contents:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != NOTE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def shards_in(folder: Path) -> int:
    return len(list(folder.rglob("*.mds")))


def raw_sizes(folder: Path) -> list[int]:
    return [entry["raw_data"]["bytes"] for entry in shards_of(folder)]


def read(*streams: StreamConfig, epochs: int = 2, **settings: Any) -> ImageTextDataset:
    """Read streams for some epochs, by a config's settings; every sample is seen."""
    config = DataConfig(
        streams={f"s{i}": stream for i, stream in enumerate(streams)},
        num_canonical_nodes=1,
        num_workers=0,
        **settings,
    )
    check_streams(config, semantic=False)
    dataset = ImageTextDataset(
        config, batch_size=8, image_size=16, context_length=12, semantic=False
    )
    try:
        loader = build_dataloader(dataset, config, pin_memory=False)
        for _ in range(epochs):
            assert sum(len(batch["image"]) for batch in loader) == SAMPLES * len(streams)
    finally:
        dataset._locals_shm.cleanup()  # or the next one has "another's" cache
    return dataset


def read_nothing(stream: StreamConfig) -> CachedDataset:
    """Open a set of any columns."""
    one = cached_stream("s", stream, local=stream.local)
    return CachedDataset(streams=[one], batch_size=1)


@pytest.fixture(scope="module")
def limit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Room for five shards and two indexes."""
    folder = write(tmp_path_factory.mktemp("measured"))
    return str(5 * max(raw_sizes(folder)) + 2 * (folder / "index.json").stat().st_size)


@pytest.mark.slow
def test_a_stream_without_a_remote_is_never_evicted(tmp_path: Path, limit: str) -> None:
    mine, other = write(tmp_path / "mine"), write(tmp_path / "other", seed=1)
    before = contents(mine)
    read(only(mine), cached(other, tmp_path / "cache"), cache_limit=limit)
    assert contents(mine) == before
    # the limit holds for the cache, and the other set doesn't use it up
    assert 0 < shards_in(tmp_path / "cache") <= MOST_SHARDS


# remote, local and split of the set {0}/sets/mine
SPELLINGS = {
    "same": ("{0}/sets/mine", "{0}/sets/mine", None),
    "slash": ("{0}/sets/mine/", "{0}/sets/mine", None),
    "dots": ("{0}/sets/mine", "{0}/sets/mine/../mine", None),
    "link": ("{0}/sets/mine", "{0}/link", None),
    "relative": ("sets/mine", "{0}/sets/mine", None),
    "split": ("{0}/sets", "{0}/./sets", "mine"),
}


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_remote_that_is_the_same_folder(
    tmp_path: Path,
    limit: str,
    spelling: str,
    compression: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write(tmp_path / "sets" / "mine", compression)
    other = write(tmp_path / "other", seed=1)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    remote, local, split = SPELLINGS[spelling]
    mine = StreamConfig(remote.format(tmp_path), local.format(tmp_path), split)
    before = contents(folder)
    read(mine, cached(other, tmp_path / "cache"), cache_limit=limit, epochs=1)
    after = contents(folder)
    assert before.items() <= after.items()
    assert compression or after == before


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("keep_zip", [False, True])
def test_a_copy_that_was_there_before_is_not_a_cache(
    tmp_path: Path, limit: str, compression: str | None, keep_zip: bool
) -> None:
    remote = write(tmp_path / "remote", compression)
    mine = tmp_path / "mine"
    shutil.copytree(remote, mine)
    (mine / "notes.txt").write_text("mine")
    gone = sorted(mine.glob("shard.*"))[-1]
    gone.unlink()  # one is fetched, and is the cache's alone
    before = contents(mine)
    for _ in range(2):
        read(cached(remote, mine), cache_limit=limit, keep_zip=keep_zip)
        assert before.items() <= contents(mine).items()


@pytest.mark.slow
def test_decompressed_copies_of_a_compressed_set_are_evicted_and_the_set_is_not(
    tmp_path: Path, limit: str
) -> None:
    mine = write(tmp_path / "mine", "zstd")
    before = contents(mine)
    assert shards_in(mine) == 0
    read(only(mine), cache_limit=limit)
    assert before.items() <= contents(mine).items()
    assert 0 < shards_in(mine) <= MOST_SHARDS


def test_raw_shards_whose_compressed_files_are_gone_are_the_only_copy(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", "zstd")
    read(only(mine), epochs=1)
    for path in mine.glob("*.zstd"):
        path.unlink()
    before = contents(mine)
    assert shards_in(mine) == len(raw_sizes(mine))
    for settings in ({}, {"cache_limit": str(sum(raw_sizes(mine)))}):
        read(only(mine), epochs=1, **settings)
        assert contents(mine) == before


@pytest.mark.slow
@pytest.mark.parametrize("keep_zip", [False, True])
def test_a_cache_keeps_to_its_limit_over_starts(tmp_path: Path, limit: str, keep_zip: bool) -> None:
    remote, cache = write(tmp_path / "remote", "zstd"), tmp_path / "cache"
    size = 2 * int(limit)
    for _ in range(3):
        read(cached(remote, cache), cache_limit=str(size), keep_zip=keep_zip, epochs=1)
        used = sum(map(len, contents(cache).values()))
        assert 0 < used <= size + IN_FLIGHT * 2 * max(raw_sizes(remote))
        assert bool(list(cache.glob("*.zstd"))) == keep_zip
    assert len((cache / NOTE).read_text().splitlines()) <= 2 * 3 * SAMPLES


def test_what_was_copied_over_the_cache_stays(
    tmp_path: Path, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, cache = write(tmp_path / "remote"), tmp_path / "cache"
    read(cached(remote, cache), epochs=1)
    assert shards_in(cache) == shards_in(remote)
    for path in cache.glob("*.mds"):
        path.unlink()
        shutil.copyfile(remote / path.name, path)
        os.utime(path, ns=(1, 1))
    before = contents(cache)
    capsys.readouterr()
    read(cached(remote, cache), cache_limit=limit)
    assert contents(cache) == before
    number = len(raw_sizes(remote))
    said = (
        f"{cache}: {number:,} of {number:,} shards were put there by somebody else; they stay, "
        f"and data.cache_limit"
    )
    assert said in capsys.readouterr().err


def test_what_is_copied_over_the_cache_of_a_run_at_work_stays(tmp_path: Path) -> None:
    """A start alone shortens the note: until then it has a line about the file that was there."""
    for folder in ("remote", "cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shard.mds").write_bytes(b"a shard")
    cache = ShardCache(tmp_path / "cache", str(tmp_path / "remote"), is_own=False)
    cache.add("shard.mds")
    assert cache.may_delete("shard.mds")
    os.utime(tmp_path / "cache" / "shard.mds", ns=(1, 1))
    assert not cache.may_delete("shard.mds")


def test_a_cache_whose_remote_was_taken_out_is_the_only_copy(tmp_path: Path, limit: str) -> None:
    remote, cache = write(tmp_path / "remote"), tmp_path / "cache"
    read(cached(remote, cache), epochs=1)
    before = contents(cache)
    read(only(cache), cache_limit=limit)
    assert contents(cache) == before
    shutil.rmtree(remote)


def test_evaluation_deletes_nothing_of_a_set(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", "zstd")
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    opened = OpenSets().open(SetConfig(remote=str(folder), local=str(tmp_path / "link")))
    for i in range(SAMPLES):
        opened[i]
    opened._locals_shm.cleanup()
    assert before.items() <= contents(folder).items()


def test_a_limit_that_is_too_small_is_one_line(tmp_path: Path) -> None:
    remote = write(tmp_path / "remote")
    with pytest.raises(ValueError, match="too low"):
        read(cached(remote, tmp_path / "cache"), cache_limit="9kb")
    read(only(remote), cache_limit="1kb")  # nothing is cached


def test_two_streams_in_one_folder(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", seed=1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    streams = {"a": cached(one, tmp_path / "cache"), "b": cached(two, tmp_path / "link")}
    with pytest.raises(
        UserError, match=r"data\.streams\.a and data\.streams\.b have one local folder"
    ):
        check_streams(DataConfig(streams=streams), semantic=False)


def test_a_shard_that_fails_its_hash_is_not_taken_for_whole_by_the_next_run(tmp_path: Path) -> None:
    remote, cache = write(tmp_path / "remote"), tmp_path / "cache"
    broken = sorted(remote.glob("*.mds"))[0]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for _ in range(2):
        with pytest.raises(NotReadError, match="damaged, fetched twice: its xxh64"):
            read(cached(remote, cache), epochs=1)
    assert not (cache / broken.name).exists()
    broken.write_bytes(whole[:-1])
    with pytest.raises(NotReadError, match=r"bytes, and the set's index says"):
        read(cached(remote, cache), epochs=1, validate_hash=None)
    broken.write_bytes(whole)
    read(cached(remote, cache), epochs=1)


def test_nothing_is_written_through_links_that_lead_out_of_a_set(tmp_path: Path) -> None:
    mine, target = write(tmp_path / "mine", "zstd"), tmp_path / "target"
    target.write_text("precious")
    first = sorted(mine.glob("*.zstd"))[0]
    (mine / f"{first.name.removesuffix('.zstd')}.tmp").symlink_to(target)
    read(only(mine), epochs=1)
    assert target.read_text() == "precious"

    other, outside = write(tmp_path / "other", "zstd"), tmp_path / "outside"
    outside.mkdir()
    shards = shards_of(other)
    for entry in shards:
        entry["raw_data"]["basename"] = f"sub/{entry['raw_data']['basename']}"
    edit(other / "index.json", lambda index: index.update(shards=shards))
    (other / "sub").symlink_to(outside)
    with pytest.raises(NotReadError, match="is a link to another folder"):
        read(only(other), epochs=1)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("algorithm", ["zstd", "zstd:19", "gz", "bz2", "br:5", "snappy"])
def test_a_compression_bomb_is_refused_before_it_fills_the_memory(algorithm: str) -> None:
    import tracemalloc

    data = bytes(30_000_000)
    bomb = compress(algorithm, data)
    assert decompress_to(len(data), algorithm, bomb) == data
    del data
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more than 1,000 bytes"):
        decompress_to(1000, algorithm, bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000 + 2 * len(bomb)
    with pytest.raises(ValueError, match=r"holds less than|can't be decompressed"):
        decompress_to(30_000_001, algorithm, bomb)
    with pytest.raises(ValueError, match=r"can't be decompressed|holds less"):
        decompress_to(30_000_000, algorithm, bomb[: len(bomb) // 2])


def test_the_threads_of_a_process_have_one_lock(tmp_path: Path) -> None:
    dataset = read(only(write(tmp_path / "mine")), epochs=1)
    lock = dataset._cache_filelock
    with lock:
        other = threading.Thread(target=dataset.prepare_shard, args=(0,))
        other.start()
        other.join(0.3)
        assert other.is_alive()  # the other thread waits
        assert dataset._cache_filelock is lock  # and has put no lock of its own in the place
        assert lock.is_locked
    other.join(10)
    assert not other.is_alive()


@pytest.mark.parametrize("columns", [1, 2])
def test_samples_are_read_as_streaming_reads_them(tmp_path: Path, columns: int) -> None:
    rows: list[dict[str, Any]] = [
        {
            "key": f"{i}é" * i,
            "image": bytes(range(i)),
            "number": i - 2,
            "fixed": np.full(3, i, np.float16),
            "free": np.full((2, i + 1), i, np.float32),
            "json": {"i": [i]},
        }
        for i in range(5)
    ]
    kinds = ["str", "bytes", "int32", "ndarray:float16:3", "ndarray", "json"]
    encodings = dict(list(zip(rows[0], kinds, strict=True))[-6 // columns :])
    written = [{name: row[name] for name in encodings} for row in rows]
    dataset = read_nothing(only(write_rows(tmp_path / "mine", written, encodings)))
    (shard,) = dataset.shards
    assert isinstance(shard, CachedShard)
    for i in range(len(rows)):
        data = MDSReader.get_sample_data(shard, i)
        assert shard.get_sample_data(i) == data
        assert repr(shard[i]) == repr(MDSReader.decode_sample(shard, data))
    with pytest.raises(IndexError):
        shard.get_sample_data(5)
    with pytest.raises(IndexError):
        shard.get_sample_data(10**6)
    Path(shard._place).unlink()
    with pytest.raises(FileNotFoundError):
        shard.get_sample_data(0)
