"""MDS sets as input: another set's samples, image bytes untouched, for instance to add caption embeddings."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignclip.errors import UserError
from convert.samples import Sample, Skipped, pair
from convert.storage import TEMPORARY, fetched

COLUMNS = ("key", "image", "caption")


def shards_of(index: Path) -> list[str]:
    """The shard files that an ``index.json`` names.

    Raises:
        UserError: it is no index, or of shards without the columns of image–text pairs.
    """
    return [shard["raw_data"]["basename"] for shard in _shards(index)]


def read_mds(index: Path, source: str, name: str) -> Iterator[Sample | Skipped]:
    """The pairs of one shard, in order.

    Args:
        index: local copy of the set's ``index.json``.
        source: where the set lies, a local folder or URL.
        name: the shard, as :func:`shards_of` has it.
    """
    from streaming.base.format import reader_from_json

    shard: dict[str, Any] = next(one for one in _shards(index) if one["raw_data"]["basename"] == name)
    stored = (shard["zip_data"] or shard["raw_data"])["basename"]
    with fetched(f"{source}/{stored}") as path, tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        if shard["zip_data"]:
            from streaming.base.compression import decompress

            data = decompress(shard["compression"], path.read_bytes())
            path = Path(folder, "shard.mds")
            path.write_bytes(data)
        shard = shard | {"raw_data": shard["raw_data"] | {"basename": path.name}, "zip_data": None, "compression": None}
        reader = reader_from_json(str(path.parent), "", shard)
        for i in range(shard["samples"]):
            row = reader[i]
            if not isinstance(row["caption"], str):
                raise UserError(
                    f"{source}: several captions an image can't be converted; take the captions apart first"
                )
            yield pair(row["key"], row["image"], row["caption"])


def _shards(index: Path) -> list[dict[str, Any]]:
    try:
        shards = json.loads(index.read_text())["shards"]
        columns = set(shards[0]["column_names"]) if shards else set(COLUMNS)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index} is no index of MDS shards") from None
    if missing := set(COLUMNS) - columns:
        raise UserError(f"the shards of {index} lack the columns {sorted(missing)}; they have {sorted(columns)}")
    return [shard for shard in shards if shard["samples"]]
