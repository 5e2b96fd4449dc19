"""The ``index.json`` of an MDS set: read and checked in one place, for everybody who reads a set.

A set may come from a stranger. Its index names files, and says how bytes become values. So every name has to be a
plain name below the set's folder, and no column may be stored in a way that executes code (``pkl``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, TypedDict, cast

INDEX = "index.json"
VERSION = 2  # of the format; Streaming reads no other
LARGEST_SHARD = 2**32  # bytes: offsets in a shard are 32-bit
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
    """The file that lies in the set: the compressed one where the shard is compressed."""
    return entry["zip_data"] or entry["raw_data"]


def columns_of(entry: ShardEntry) -> dict[str, str]:
    """The encoding of each column, by the column's name."""
    return dict(zip(entry["column_names"], entry["column_encodings"], strict=True))


def read_shards(path: Path) -> list[ShardEntry]:
    """The shards that an ``index.json`` names; each is safe to read.

    Raises:
        ValueError: the file is no index of an MDS set, or one of its shards can't be read, or not safely. The message
            continues a sentence that names the file: "is …", "names …".
        OSError: the file can't be read.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError("is not a streaming index") from None
    entries = listed_shards(index)
    for number, entry in enumerate(entries):
        if why := why_unusable(entry):
            raise ValueError(f"can't be used: shard {number} {why}")
    return cast("list[ShardEntry]", entries)


def listed_shards(index: Any) -> list[Any]:
    """The entries of a parsed index, not looked at yet.

    Raises:
        ValueError: it is no index of this version. The message continues a sentence that names the file.
    """
    if (
        not isinstance(index, dict)
        or not isinstance(index.get("shards"), list)
        or index.get("version") is None
    ):
        raise ValueError("is not a streaming index")
    if index.get("version") != VERSION:
        raise ValueError(f"has version {index.get('version')}; Streaming reads {VERSION}")
    return cast("list[Any]", index["shards"])


def why_unusable(entry: Any) -> str | None:
    """Why the shard that an index's entry describes can't be read, or not safely; None where it can."""
    if not isinstance(entry, dict):
        return "is no object"
    if "format" in entry and entry["format"] != "mds":
        return f"has the format {_shown(entry['format'])}, not mds"
    if missing := sorted(FIELDS - entry.keys()):
        return f"lacks {', '.join(missing)}"
    if unknown := sorted(entry.keys() - FIELDS):
        return f"has {_shown(unknown[0])}, which no MDS shard has"
    if entry["version"] != VERSION:
        return f"has version {_shown(entry['version'])}; Streaming reads {VERSION}"
    return _why_not_files(entry) or _why_not_columns(entry)


def why_not_plain(name: Any) -> str | None:
    """Why a name that was read from a file isn't the name of a file below that file's folder; None where it is.

    Sub-folders are allowed, separated by ``/``. What leads elsewhere on any system isn't: ``..``, absolute paths,
    drives and backslashes of Windows; nor is what no file can be called.
    """
    if not isinstance(name, str) or not name:
        return f"names no file: {_shown(name)}"
    outside = PureWindowsPath(name)
    if (
        name.startswith("/")
        or "\\" in name
        or outside.drive
        or outside.root
        or ".." in name.split("/")
    ):
        return f"names a file outside the set: {_shown(name)}"
    try:
        lengths = [len(part.encode()) for part in name.split("/")]
    except UnicodeEncodeError:  # half of a surrogate pair
        lengths = [0]
    if (
        not all(0 < length <= LONGEST_NAME for length in lengths)
        or not name.isprintable()
        or "." in name.split("/")
    ):
        return f"names no file: {_shown(name)}"
    return None


def _why_not_files(entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a shard's files or its number of samples."""
    for file in (entry["raw_data"], entry["zip_data"]):
        if file is None and file is not entry["raw_data"]:
            continue
        if not isinstance(file, dict) or IndexedFile.__annotations__.keys() != file.keys():
            return f"has no file with a basename, bytes and hashes: {_shown(file)}"
        if why := why_not_plain(file["basename"]):
            return why
        if file["basename"].rpartition("/")[2] == INDEX:
            return f"names the index as a shard: {_shown(file['basename'])}"
        if (
            not _is_count(file["bytes"])
            or file["bytes"] > LARGEST_SHARD
            or not _are_hashes(file["hashes"])
        ):
            return f"has no size or no hashes of {_shown(file['basename'])}"
    if bool(entry["compression"]) != bool(entry["zip_data"]):
        return "is compressed and has no zip_data, or the other way round"
    if entry["zip_data"] and entry["zip_data"]["basename"] == entry["raw_data"]["basename"]:
        return f"has one name for two files: {_shown(entry['raw_data']['basename'])}"
    samples, size = entry["samples"], entry["raw_data"]["bytes"]
    if not _is_count(samples):
        return f"has {_shown(samples)} samples"
    if samples * LEAST_BYTES > size:
        return f"has {samples:,} samples in {size:,} bytes"
    return None


def _why_not_columns(entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a shard's columns, or with how their bytes become values."""
    from streaming.base.compression import is_compression

    names, encodings, sizes = (entry[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    if not _are_texts(names) or not _are_texts(encodings) or not isinstance(sizes, list):
        return "has no names, encodings and sizes of columns"
    if not len(names) == len(encodings) == len(sizes) or len(set(names)) < len(names):
        return "has not one name, encoding and size for each column"
    for name, encoding, size in zip(names, encodings, sizes, strict=True):
        known, is_safe = _encoding(encoding)
        if not is_safe:
            return f"stores the column {_shown(name)} as {_shown(encoding)}, which executes code when it is read"
        if not known:
            return f"stores the column {_shown(name)} as {_shown(encoding)}, which Streaming can't read"
        if size is not None and (not _is_count(size) or not size):
            return f"stores the column {_shown(name)} in {_shown(size)} bytes"
    if entry["compression"] is not None and not (
        isinstance(entry["compression"], str) and is_compression(entry["compression"])
    ):
        return f"is compressed with {_shown(entry['compression'])}, which Streaming can't read"
    if not isinstance(entry["hashes"], list) or not isinstance(
        entry["size_limit"], int | str | None
    ):
        return "has no list of hashes, or no size limit"
    return None


@lru_cache(256)
def _encoding(encoding: str) -> tuple[bool, bool]:
    """Whether Streaming knows an encoding, and whether reading it executes nothing."""
    from streaming.base.format.mds.encodings import get_mds_encoded_size, is_mds_encoding_safe

    is_safe = is_mds_encoding_safe(encoding.partition(":")[0])
    try:
        get_mds_encoded_size(encoding)
    except Exception:  # a name or a shape that isn't one: Streaming asserts, looks up and converts
        return False, is_safe
    return True, is_safe


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_hashes(value: Any) -> bool:
    return isinstance(value, dict) and _are_texts(list(value.values()))


def _are_texts(value: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(v, str) for v in value)
    )


def _shown(value: Any) -> str:
    """What a file says, safe to print: short, in one line, without a terminal's control characters."""
    text = value if isinstance(value, str) and value.isprintable() and value else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
