"""MDS sets as input: another set's samples, images untouched, for instance to add embeddings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from alignclip.conversion.formats.declaration import (
    CAPTION_LISTS,
    PAIR_COLUMNS,
    InputFormat,
    Listing,
    OpenInput,
)
from alignclip.conversion.samples import (
    BROKEN_INPUT,
    Item,
    Reading,
    Skipped,
    pair,
    pair_with_captions,
)
from alignclip.conversion.wording import first_few
from alignclip.data.mds_index import INDEX, ShardEntry, columns_of, read_shards, stored_file
from alignclip.data.mds_reader import open_shard
from alignclip.errors import UserError, one_line
from alignclip.storage.copies import fetched
from alignclip.storage.temporary import temporary_folder

REMEMBERED_SECONDS = 300.0  # seconds, of an index in a bucket: a worker converts many of its shards


class Mds(InputFormat):
    """The ``index.json`` of an MDS set; a shard becomes a shard."""

    words = "an MDS set's index.json"
    described = (
        "an MDS set's `index.json`",
        "its pairs; images are copied, not decoded (`--check none`). This adds `semantic` to a set "
        "that has none; to its held-out split in a second command, `--inputs SET/val/index.json "
        "--out NEW/val`. A shard becomes one shard. Where `caption` is a list "
        "(`convert/retrieval.py`), `semantic` has a row for each. Other columns are left out, and "
        "named at the start",
    )
    flags = ()
    has_parts = True

    def fits(self, place: str) -> bool:
        """See the base class."""
        return place.endswith(f"/{INDEX}")

    def in_folder(self, listing: Listing) -> list[str]:
        """Say by which names a folder that is an MDS set, or holds some, is read.

        Raises:
            UserError: the folder is a set, or holds some.
        """
        sets = [name for name in sorted(listing.folders) if INDEX in listing.names_in(name)]
        there = [INDEX] if INDEX in listing.files else [f"{name}/{INDEX}" for name in sets]
        if there:
            names = first_few([listing.at(name) for name in there])
            raise UserError(f"{listing.place} holds MDS, which is read by its index: name {names}")
        return []

    def parts(self, place: str, reading: Reading) -> list[str]:
        """See the base class."""
        _remembered.cache_clear()
        return list(entries_of(place))

    def columns(self, place: str, reading: Reading) -> dict[str, str]:
        """See the base class."""
        return columns_of(next(iter(entries_of(place).values())))

    def shard_name(self, place: str, part: str) -> str:
        """See the base class."""
        return part.replace("/", "-").replace(".mds", "").replace(".", "-")

    def file_of(self, place: str, part: str) -> str:
        """See the base class."""
        return f"{place.rpartition('/')[0]}/{stored_file(entry_of(place, part))['basename']}"

    def shard_size(self, place: str, part: str) -> tuple[int, int]:
        """See the base class."""
        entry = entry_of(place, part)
        return entry["raw_data"]["bytes"], entry["samples"]

    @contextmanager
    def opened(self, place: str, part: str, reading: Reading) -> Iterator[OpenInput]:
        """See the base class.

        Raises:
            UserError: the shard is not there.
        """
        with fetched(self.file_of(place, part)) as path:
            if not path.is_file():
                raise UserError(f"{place} names the shard {path}, which is not there")
            yield OpenInput(*self.stamp(path), _shard_pairs(path, entry_of(place, part)))


def entries_of(index: str) -> dict[str, ShardEntry]:
    """Return the shards that the ``index.json`` at a path or URL names, by their file names.

    Raises:
        UserError: the file is no index, or its shards lack the columns of image–text pairs, or
            store them otherwise.
    """
    if "://" in index:
        return _remembered(index, int(time.monotonic() // REMEMBERED_SECONDS), 0)
    stat = Path(index).stat()
    return _remembered(index, stat.st_mtime_ns, stat.st_size)


@lru_cache(8)
def _remembered(index: str, when: int, size: int) -> dict[str, ShardEntry]:
    with fetched(index) as path:
        return {entry["raw_data"]["basename"]: entry for entry in _read_index(path, index)}


def entry_of(index: str, name: str) -> ShardEntry:
    """Return one shard of :func:`entries_of`.

    Raises:
        UserError: the index doesn't name the shard any more.
    """
    if name not in entries_of(index):  # which may have changed in the bucket
        _remembered.cache_clear()
    if name not in entries_of(index):
        raise UserError(f"{index} does not name the shard {name}")
    return entries_of(index)[name]


def _read_index(path: Path, index: str) -> list[ShardEntry]:
    try:
        entries = [entry for entry in read_shards(path) if entry["samples"]]
    except ValueError as error:
        raise UserError(f"{index} {error}") from None
    for columns in map(columns_of, entries):
        if missing := sorted(PAIR_COLUMNS.keys() - columns.keys()):
            raise UserError(
                f"the shards of {index} lack the columns {missing}; they have {sorted(columns)}"
            )
        for name, encoding in PAIR_COLUMNS.items():
            if columns[name] != encoding and (name, columns[name]) != ("caption", CAPTION_LISTS):
                raise UserError(
                    f"{index}: the column {name} is stored as {columns[name]}, not as {encoding}"
                )
    if len({columns_of(entry)["caption"] for entry in entries}) > 1:
        raise UserError(f"{index}: the column caption is stored in two ways")
    return entries


def _shard_pairs(path: Path, entry: ShardEntry) -> Iterator[Item]:
    """Yield a shard's pairs in order; of a broken shard the pairs before the break."""
    as_pair = pair_with_captions if columns_of(entry)["caption"] == CAPTION_LISTS else pair
    try:
        with temporary_folder() as folder:
            for row in open_shard(entry, path, folder):
                yield as_pair(row["key"], row["image"], row["caption"])
    except Exception as error:  # Streaming raises nearly anything on broken samples
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's trouble, not the shard's
        yield Skipped("", BROKEN_INPUT, f"{type(error).__name__}: {one_line(error)}")
