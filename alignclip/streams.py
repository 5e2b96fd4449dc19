"""Where MDS sets lie, and whether they hold what is asked of them: told before anything is read from them."""

from __future__ import annotations

import json
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

from streaming.base import partition, shuffle
from streaming.base.hashing import get_hashes
from streaming.base.storage import CloudDownloader

from alignclip.config import DataConfig, SetConfig
from alignclip.errors import UserError, describe_storage_error, nearest

DATASET = "dataset.json"  # beside the index: what a converter says of the set


def local_folder(name: str, stream: SetConfig) -> str:
    """Where a stream's shards are kept: ``local``, or a folder of its own below the temporary directory."""
    if stream.local:
        return stream.local
    place = str(stream.remote).replace("://", "-").replace("/", "-")
    return str(Path(tempfile.gettempdir()) / "alignclip-cache" / f"{name}-{place}")


def check_streams(config: DataConfig, *, semantic: bool) -> None:
    """Read each stream's ``index.json`` and make sure that it holds what training will ask for.

    Raises:
        UserError: a set that isn't there or can't be reached, one without the columns needed, or embeddings of
            different dimensions.
    """
    for key, algorithms in (("shuffle_algo", shuffle.algos), ("partition_algo", partition.algos)):
        if (name := getattr(config, key)) not in algorithms:  # Streaming itself finds out in the first epoch
            raise UserError(f"data.{key}={name} does not exist; {nearest(name, algorithms)}")
    if config.validate_hash is not None and config.validate_hash not in get_hashes():
        raise UserError(f"data.validate_hash={config.validate_hash}: {nearest(config.validate_hash, get_hashes())}")
    encoders: dict[str, tuple[str | None, int | None]] = {}
    for name, stream in config.streams.items():
        where = f"data.streams.{name}"
        hint = f"; set {where}.remote or .local, or take it out with {where}=null"
        index = read_index(where, stream, local_folder(name, stream), hint)
        if not index.get("shards"):
            raise UserError(f"{where}: the set is empty (no shards in its index.json)")
        columns = dict(zip(index["shards"][0]["column_names"], index["shards"][0]["column_encodings"], strict=True))
        needed = {"image", "caption"} | ({"semantic"} if semantic else set())
        missing = sorted(needed - columns.keys())
        if missing == ["semantic"]:
            raise UserError(
                f"{where} has no 'semantic' column, and loss.beta > 0 needs it: convert the set with caption "
                "embeddings (convert/cc12m.py --encoder …), or set loss.rescale=false or loss.beta=0"
            )
        if missing:
            raise UserError(f"{where} lacks the columns {missing}; it has {sorted(columns)}")
        if semantic:
            encoders[where] = _encoder(stream, columns["semantic"])
    _check_encoders(encoders)


def _encoder(stream: SetConfig, encoding: str) -> tuple[str | None, int | None]:
    """Name and dimension of the sentence encoder of a set, as far as they are known."""
    place = "/".join(part.rstrip("/") for part in (stream.remote or stream.local, stream.split, DATASET) if part)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(place)
            if stream.remote:
                path = Path(folder, DATASET)
                CloudDownloader.direct_download(place, str(path))
            said = json.loads(path.read_text())
        name, dimension = said.get("encoder"), said.get("dimension")
    except Exception:  # a set of another converter's
        name = dimension = None
    shape = encoding.split(":")[2:]  # sets with several captions an image have none in their encoding
    return name, int(shape[0]) if shape else dimension


def _check_encoders(encoders: dict[str, tuple[str | None, int | None]]) -> None:
    """Embeddings of two encoders, be they of one dimension, say nothing about each other.

    Raises:
        UserError: two streams are known to differ.
    """
    for (first, (name, dimension)), (second, (other, another)) in combinations(encoders.items(), 2):
        if None not in (dimension, another) and dimension != another:
            raise UserError(
                f"{first} has caption embeddings of dimension {dimension}, {second} of {another}; "
                "use one sentence encoder"
            )
        # the same model may have been a hub's name there and a folder here
        if name and other and Path(name).name != Path(other).name:
            raise UserError(
                f"{first} has caption embeddings of '{name}', {second} of '{other}', which can't be compared; use one "
                f"sentence encoder (if they are one and the same, give them one name in the sets' {DATASET})"
            )


def read_index(where: str, stream: SetConfig, local: str, hint: str = "") -> dict[str, Any]:
    """The parsed ``index.json`` of a set, fetched once and without retries: a typo should fail at once.

    Args:
        where: the set's place in the configuration, for messages.
        stream: where it lies.
        local: where it lies or is cached.
        hint: what else a person could do where there is none.

    Raises:
        UserError: there is none, it can't be read, or another set is cached in ``local``.
    """
    subfolder = stream.split or ""
    if not stream.remote:
        path = Path(str(stream.local), subfolder, "index.json")
        if not path.is_file():
            raise UserError(f"{where}: no MDS set at {path.parent} (no index.json there){hint}")
        try:
            return _parse_index(path)
        except ValueError:
            raise UserError(f"{where}: {path} is not a streaming index") from None
    remote = "/".join(part.rstrip("/") for part in (stream.remote, subfolder, "index.json") if part)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.json")
        try:
            CloudDownloader.direct_download(remote, str(path))
        except Exception as error:
            raise UserError(f"{where}: can't read {remote}: {describe_storage_error(error)}") from None
        try:
            index = _parse_index(path)
        except ValueError:
            raise UserError(f"{where}: {remote} is not a streaming index") from None
    # Streaming takes the index that is there already, whatever the remote one says
    cached = Path(local, subfolder, "index.json")
    if cached.is_file():
        try:
            same = _parse_index(cached) == index
        except ValueError:  # written half when a machine went down
            same = False
        if not same:
            raise UserError(
                f"{where}: {cached.parent} holds another set than {remote}; remove it or choose another local"
            )
    return index


def _parse_index(path: Path) -> dict[str, Any]:
    """The parsed index; ValueError where it is not one of MDS shards."""
    index = json.loads(path.read_text(encoding="utf-8"))
    shards = index.get("shards", []) if isinstance(index, dict) else None
    if not isinstance(shards, list) or any(not isinstance(s, dict) or "column_names" not in s for s in shards):
        raise ValueError("not an index of MDS shards")
    return index
