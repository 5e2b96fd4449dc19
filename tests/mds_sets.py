"""MDS sets for the tests: any rows in any columns, their index, and changes to its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from runs import jpeg
from streaming import MDSWriter

Row = dict[str, Any]
PAIR = {"key": "str", "image": "bytes", "caption": "str"}


def write_rows(
    folder: Path, rows: Iterable[Row], columns: dict[str, str] = PAIR, each: int = 0, **options: Any
) -> Path:
    """Write a set, with shards of ``each`` samples where that isn't 0."""
    options = {"hashes": ["xxh64"], **({"size_limit": None} if each else {}), **options}
    with MDSWriter(out=str(folder), columns=columns, **options) as writer:
        for i, row in enumerate(rows):
            if each and i and i % each == 0:
                writer.flush_shard()
                writer._reset_cache()
            writer.write(row)
    return folder


def pair_rows(count: int, seed: int = 0) -> list[Row]:
    """Pairs that can be told apart."""
    pictures = [jpeg(np.random.default_rng([seed, i])) for i in range(count)]
    return [
        {"key": str(i), "image": image, "caption": f"number {i}"}
        for i, image in enumerate(pictures)
    ]


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def shards_of(folder: Path) -> list[dict[str, Any]]:
    """The entries of a set's index."""
    entries: list[dict[str, Any]] = json.loads((folder / "index.json").read_text())["shards"]
    return entries
