"""Read and check the ``index.json`` of an MDS set, for everybody who reads a set.

A set may come from a stranger. Its index names files, and says how bytes become values. So every
name has to be a plain name below the set's folder, and no column may be stored in a way that
executes code (``pkl``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, TypedDict, cast

from alignclip.checked_json import parse_json
from alignclip.runtime.stand_ins import stand_ins
from alignclip.storage.staging import INDEX as INDEX

# beside the index: what a converter says of the set, the classes of a classification set
DATASET, CLASSES = "dataset.json", "classes.json"
BROKEN_INPUT = "truncated file"  # in a sub-folder's counts: its source was not read to the end
VERSION = 2  # of the format; Streaming reads no other
LARGEST_SHARD = 2**32  # bytes: offsets in a shard are 32-bit
# Images are compressed already, and texts by ten; what unpacks into a thousand times as much is no
# data of anybody's
MOST_TIMES, SMALL = 1000, 2**26
LONGEST_NAME = 255  # bytes of a part of a path, on every common file system
# A sample takes at least this many bytes of its shard: its offset, and a byte of data.
LEAST_BYTES = 5


class IndexedFile(TypedDict):
    """A file of a shard: its name below the set's folder, its size and its hashes by algorithm."""

    basename: str
    bytes: int
    hashes: dict[str, str]


class ShardEntry(TypedDict):
    """A shard as the index describes it."""

    version: int
    format: str
    compression: str | None
    hashes: list[str]
    samples: int
    size_limit: int | str | None
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]
    raw_data: IndexedFile
    zip_data: IndexedFile | None


FIELDS = ShardEntry.__annotations__.keys()


def stored_file(entry: ShardEntry) -> IndexedFile:
    """Return the file that lies in the set: the compressed one where the shard is compressed."""
    return entry["zip_data"] or entry["raw_data"]


def columns_of(entry: ShardEntry) -> dict[str, str]:
    """Return the encoding of each column, by the column's name."""
    return dict(zip(entry["column_names"], entry["column_encodings"], strict=True))


def dimension_of(columns: Mapping[str, str]) -> int | None:
    """Return the numbers of a caption embedding as the encoding ``ndarray:float16:384`` has them.

    None where the columns have no ``semantic``, or embeddings of any shape.
    """
    shape = columns.get("semantic", "").split(":")[2:]
    return int(shape[0].split(",")[-1]) if shape else None


def fingerprint_of_shards(entries: Iterable[ShardEntry]) -> str:
    """Return a short text that another set's samples, or another order of them, would not have.

    It is the same however the shards are compressed, and whatever they are called.
    """
    shards = [
        (entry["samples"], entry["raw_data"]["bytes"], sorted(entry["raw_data"]["hashes"].items()))
        for entry in entries
    ]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]


def read_shards(path: Path) -> list[ShardEntry]:
    """Read an index; see :func:`parse_index`.

    Raises:
        OSError: the file can't be read.
    """
    return parse_index(path.read_bytes())


def parse_index(content: bytes) -> list[ShardEntry]:
    """Return the shards that an index names; each is safe to read.

    Raises:
        ValueError: the content is no index of an MDS set, or one of its shards can't be read, or
            not safely. The message continues a sentence that names the file: "is …", "names …".
    """
    try:
        index = parse_json(content)
    except ValueError:
        raise ValueError("is not a streaming index") from None
    return usable_shards(index)


def usable_shards(index: Any) -> list[ShardEntry]:
    """Return the shards of an index that is parsed JSON; see :func:`parse_index`."""
    entries = listed_shards(index)
    for number, entry in enumerate(entries):
        if why := why_unusable(entry):
            raise ValueError(f"can't be used: shard {number} {why}")
    return cast("list[ShardEntry]", entries)


def listed_shards(index: Any) -> list[Any]:
    """Return the entries of an index that is parsed JSON; nobody has looked at them yet.

    Raises:
        ValueError: it is no index of this version. The message continues a sentence that names the
            file.
    """
    if not isinstance(index, dict) or not isinstance(index.get("shards"), list):
        raise ValueError("is not a streaming index")
    if (version := index.get("version")) is None:
        raise ValueError("is not a streaming index")
    if version != VERSION:
        raise ValueError(f"has version {version}; Streaming reads {VERSION}")
    return cast("list[Any]", index["shards"])


def why_unusable(entry: Any) -> str | None:
    """Say why the shard of an entry can't be read, or not safely; None where it can."""
    if not isinstance(entry, dict):
        return "is no object"
    if "format" in entry and entry["format"] != "mds":
        return f"has the format {_printable(entry['format'])}, not mds"
    if missing := sorted(FIELDS - entry.keys()):
        return f"lacks {', '.join(missing)}"
    if unknown := sorted(entry.keys() - FIELDS):
        return f"has {_printable(unknown[0])}, which no MDS shard has"
    if entry["version"] != VERSION:
        return f"has version {_printable(entry['version'])}; Streaming reads {VERSION}"
    return _why_not_files(entry) or _why_not_columns(entry)


def why_not_plain(name: Any) -> str | None:
    """Say why a name from an index isn't a file's below the index's folder; None where it is.

    Sub-folders are allowed, separated by ``/``. Refused is what leads elsewhere on any system
    (``..``, absolute paths, drives and backslashes of Windows), and what no file can be called.
    """
    if not isinstance(name, str) or not name:
        return f"names no file: {_printable(name)}"
    parts, windows = name.split("/"), PureWindowsPath(name)
    if name[0] == "/" or "\\" in name or windows.drive or windows.root or ".." in parts:
        return f"names a file outside the set: {_printable(name)}"
    # half of a surrogate pair is not printable, and can't be encoded
    if not name.isprintable() or not all(
        part != "." and 0 < len(part.encode()) <= LONGEST_NAME for part in parts
    ):
        return f"names no file: {_printable(name)}"
    return None


def _why_not_files(entry: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a shard's files or its number of samples."""
    raw, compressed, samples = entry["raw_data"], entry["zip_data"], entry["samples"]
    for file in (raw,) if compressed is None else (raw, compressed):
        if not isinstance(file, dict) or IndexedFile.__annotations__.keys() != file.keys():
            return f"has no file with a basename, bytes and hashes: {_printable(file)}"
        if why := why_not_plain(file["basename"]):
            return why
        name, size, hashes = _printable(file["basename"]), file["bytes"], file["hashes"]
        if file["basename"].rpartition("/")[2] == INDEX:
            return f"names the index as a shard: {name}"
        is_size = _is_count(size) and size <= LARGEST_SHARD
        if not is_size or not isinstance(hashes, dict) or not _are_texts([*hashes.values()]):
            return f"has no size or no hashes of {name}"
    if bool(entry["compression"]) != bool(compressed):
        return "is compressed and has no zip_data, or the other way round"
    if compressed and raw["bytes"] > MOST_TIMES * compressed["bytes"] + SMALL:
        size = f"{raw['bytes']:,} bytes in {compressed['bytes']:,}"
        return f"would unpack {size}: {_printable(raw['basename'])}"
    if compressed and compressed["basename"] == raw["basename"]:
        return f"has one name for two files: {_printable(raw['basename'])}"
    if not _is_count(samples):
        return f"has {_printable(samples)} samples"
    if samples * LEAST_BYTES > raw["bytes"]:
        return f"has {samples:,} samples in {raw['bytes']:,} bytes"
    return None


def _why_not_columns(entry: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a shard's columns, or with how their bytes become values."""
    with stand_ins():
        from streaming.base.compression import is_compression

    names, encodings, sizes = (entry[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    if not _are_texts(names) or not _are_texts(encodings) or not isinstance(sizes, list):
        return "has no names, encodings and sizes of columns"
    if not len({*names}) == len(names) == len(encodings) == len(sizes):
        return "has not one name, encoding and size for each column"
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        stores = f"stores the column {_printable(name)}"
        if why := _why_not_encoding(encoding):
            return f"{stores} as {_printable(encoding)}, which {why}"
        if size is not None and (not _is_count(size) or not size):
            return f"{stores} in {_printable(size)} bytes"
    compression = entry["compression"]
    is_known = isinstance(compression, str) and is_compression(compression)
    if compression is not None and not is_known:
        return f"is compressed with {_printable(compression)}, which Streaming can't read"
    is_limit = isinstance(entry["size_limit"], int | str | None)
    if not is_limit or not isinstance(entry["hashes"], list):
        return "has no list of hashes, or no size limit"
    return None


@lru_cache(256)
def _why_not_encoding(encoding: str) -> str | None:
    """Say why Streaming can't read an encoding, or not safely."""
    with stand_ins():
        from streaming.base.format.mds.encodings import get_mds_encoded_size, is_mds_encoding_safe

    if not is_mds_encoding_safe(encoding.partition(":")[0]):
        return "executes code when it is read"
    try:
        get_mds_encoded_size(encoding)
    except Exception:  # a name or a shape that isn't one: Streaming asserts, looks up and converts
        return "Streaming can't read"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _printable(value: Any) -> str:
    """Make what a file says safe to print: short, in one line, without control characters."""
    text = value if isinstance(value, str) and value.isprintable() and value else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
