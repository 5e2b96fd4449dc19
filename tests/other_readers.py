"""Read MDS sets with another library, in an interpreter that has it, and print what it read.

``python other_readers.py LIBRARY`` with a JSON list of folders on standard input. The last line of
standard output is a JSON list: for each folder ``{"rows": […]}`` or ``{"error": "Type: message"}``.
Bytes are hexadecimal, arrays are lists with their type. Nothing of alignclip is imported here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any


def neprr(folder: str) -> Iterator[dict[str, Any]]:
    from streaming import StreamingDataset

    with tempfile.TemporaryDirectory() as cache:
        arguments = {"batch_size": 1, "shuffle": False, "validate_hash": "xxh64"}
        dataset = StreamingDataset(remote=folder, local=cache, **arguments)
        yield from (dataset[i] for i in range(len(dataset)))


def litdata(folder: str) -> Iterator[dict[str, Any]]:
    import litdata

    with tempfile.TemporaryDirectory() as cache:
        dataset = litdata.StreamingDataset(folder, cache_dir=cache)
        yield from (dataset[i] for i in range(len(dataset)))


LIBRARIES = {"neprr-streaming": neprr, "litdata": litdata}


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if hasattr(value, "dtype"):
        return {"dtype": str(value.dtype), "values": value.tolist()}
    return value


def read(library: str, folder: str) -> dict[str, Any]:
    try:
        rows = [
            {name: plain(value) for name, value in row.items()}
            for row in LIBRARIES[library](folder)
        ]
        return {"rows": sorted(rows, key=lambda row: str(row["key"]))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    name, folders = sys.argv[1], json.load(sys.stdin)
    found = [read(name, folder) for folder in folders]
    print(json.dumps({"version": version(name), "sets": found}))
