"""MDS sets as input: another set's samples, image bytes untouched, for instance to add caption embeddings."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from alignclip.conversion.samples import BROKEN_INPUT, Sample, Skipped, pair, pairs
from alignclip.data.mds_index import ShardEntry, columns_of, read_shards, stored_file
from alignclip.data.mds_reader import open_shard
from alignclip.errors import UserError, one_line
from alignclip.storage.copies import TEMPORARY, fetched

COLUMNS = {"key": "str", "image": "bytes", "caption": "str"}  # and how they are stored
LIST = "json"  # how captions are stored of which an image has several
REMEMBERED = 300.0  # seconds, of an index in a bucket: a worker converts many of its shards


@dataclass(frozen=True)
class Shard:
    """A shard as its ``entry`` in the index has it: file name, that of the file there, bytes uncompressed, columns."""

    name: str
    stored: str
    size: int
    columns: dict[str, str]
    entry: ShardEntry


def shards_of(index: str) -> dict[str, Shard]:
    """The shards that the ``index.json`` at a path or URL names, by their file names; parsed once a process.

    Raises:
        UserError: it is no index, or of shards without the columns of image–text pairs, or stored otherwise.
    """
    if "://" in index:
        return _remembered(index, int(time.monotonic() // REMEMBERED), 0)
    stat = Path(index).stat()
    return _remembered(index, stat.st_mtime_ns, stat.st_size)


@lru_cache(8)
def _remembered(index: str, when: int, size: int) -> dict[str, Shard]:
    with fetched(index) as path:
        return {shard.name: shard for shard in _shards(path, index)}


def shard_of(index: str, name: str) -> Shard:
    """One of them.

    Raises:
        UserError: the index names it no more.
    """
    if name not in shards_of(index):  # which may have changed in the bucket
        forget()
    if name not in shards_of(index):
        raise UserError(f"{index} does not name the shard {name}")
    return shards_of(index)[name]


def forget() -> None:
    """Look at every index anew."""
    _remembered.cache_clear()


def file_of(index: str, name: str) -> str:
    """Path or URL of the file of a shard."""
    return f"{index.rpartition('/')[0]}/{shard_of(index, name).stored}"


@contextmanager
def opened_mds(index: str, name: str) -> Iterator[tuple[Path, Iterator[Sample | Skipped]]]:
    """The local file of a shard, fetched where it is remote, and its pairs in order; of a broken one those before.

    Args:
        index: path or URL of the set's ``index.json``.
        name: the shard, as :func:`shards_of` has it.

    Raises:
        UserError: it is not there.
    """
    shard = shard_of(index, name)
    with (
        fetched(file_of(index, name)) as path,
        tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder,
    ):
        if not path.is_file():
            raise UserError(f"{index} names the shard {path}, which is not there")
        yield path, _read(path, shard, Path(folder))


def _read(path: Path, shard: Shard, folder: Path) -> Iterator[Sample | Skipped]:
    several = shard.columns["caption"] == LIST
    try:
        for row in open_shard(shard.entry, path, folder):
            yield (pairs if several else pair)(row["key"], row["image"], row["caption"])
    except Exception as error:  # Streaming raises nearly anything on broken samples
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the shard's
        yield Skipped("", BROKEN_INPUT, f"{type(error).__name__}: {one_line(error)}")


def _shards(path: Path, index: str) -> list[Shard]:
    try:
        shards = [
            Shard(
                entry["raw_data"]["basename"],
                stored_file(entry)["basename"],
                entry["raw_data"]["bytes"],
                columns_of(entry),
                entry,
            )
            for entry in read_shards(path)
            if entry["samples"]
        ]
    except ValueError as error:
        raise UserError(f"{index} {error}") from None
    for columns in (shard.columns for shard in shards):
        if missing := sorted(COLUMNS.keys() - columns.keys()):
            raise UserError(
                f"the shards of {index} lack the columns {missing}; they have {sorted(columns)}"
            )
        for name, encoding in COLUMNS.items():
            if columns[name] != encoding and (name, columns[name]) != ("caption", LIST):
                raise UserError(
                    f"{index}: the column {name} is stored as {columns[name]}, not as {encoding}"
                )
    if len({shard.columns["caption"] for shard in shards}) > 1:
        raise UserError(f"{index}: the column caption is stored in two ways")
    return shards
