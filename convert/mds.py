"""MDS sets as input: another set's samples, image bytes untouched, for instance to add caption embeddings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignclip.errors import UserError, one_line
from convert.samples import BROKEN_INPUT, Sample, Skipped, pair
from convert.storage import TEMPORARY, fetched

COLUMNS = {"key": "str", "image": "bytes", "caption": "str"}  # and how they are stored


@dataclass(frozen=True)
class Shard:
    """A shard as its ``entry`` in the index has it: file name, that of the file there, bytes uncompressed, columns."""

    name: str
    stored: str
    size: int
    columns: dict[str, str]
    entry: dict[str, Any]


def shards_of(index: Path) -> list[str]:
    """The shard files that an ``index.json`` names.

    Raises:
        UserError: it is no index, or of shards without the columns of image–text pairs, or stored otherwise.
    """
    return [shard.name for shard in _shards(index)]


def read_mds(index: Path, source: str, name: str) -> Iterator[Sample | Skipped]:
    """The pairs of one shard, in order; of a broken one those before the break.

    Args:
        index: local copy of the set's ``index.json``.
        source: where the set lies, a local folder or URL.
        name: the shard, as :func:`shards_of` has it.

    Raises:
        UserError: it is not there.
    """
    shard = next(shard for shard in _shards(index) if shard.name == name)
    with fetched(f"{source}/{shard.stored}") as path, tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        if not path.is_file():
            raise UserError(f"{index} names the shard {path}, which is not there")
        try:
            for row in _rows(path, shard, Path(folder)):
                yield pair(row["key"], row["image"], row["caption"])
        except Exception as error:  # Streaming and the decompressors check little, and raise nearly anything
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's trouble, not the shard's
            yield Skipped("", BROKEN_INPUT, f"{type(error).__name__}: {one_line(error)}")


def _rows(path: Path, shard: Shard, folder: Path) -> Iterator[dict[str, Any]]:
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json
    from streaming.base.hashing import get_hash

    for algorithm, expected in (shard.entry["zip_data"] or shard.entry["raw_data"])["hashes"].items():
        if get_hash(algorithm, path.read_bytes()) != expected:
            raise ValueError(f"its {algorithm} differs from the index's")
    if shard.entry["zip_data"]:
        data = decompress(shard.entry["compression"], path.read_bytes())
        path = folder / "shard.mds"
        path.write_bytes(data)
    if (size := path.stat().st_size) != shard.size:
        raise ValueError(f"{size:,} bytes instead of {shard.size:,}")
    plain = {"raw_data": shard.entry["raw_data"] | {"basename": path.name}, "zip_data": None, "compression": None}
    reader = reader_from_json(str(path.parent), "", shard.entry | plain)
    for i in range(shard.entry["samples"]):
        yield reader[i]


def _shards(index: Path) -> list[Shard]:
    try:
        shards = [
            Shard(
                shard["raw_data"]["basename"],
                (shard["zip_data"] or shard["raw_data"])["basename"],
                shard["raw_data"]["bytes"],
                dict(zip(shard["column_names"], shard["column_encodings"], strict=True)),
                shard,
            )
            for shard in json.loads(index.read_text())["shards"]
            if shard["samples"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{index} is no index of MDS shards") from None
    for columns in (shard.columns for shard in shards):
        if missing := sorted(COLUMNS.keys() - columns.keys()):
            raise UserError(f"the shards of {index} lack the columns {missing}; they have {sorted(columns)}")
        for name, encoding in COLUMNS.items():
            if columns[name] != encoding:
                hint = "; take the captions apart first" if name == "caption" else ""
                raise UserError(f"{index}: the column {name} is stored as {columns[name]}, not as {encoding}{hint}")
    return shards
