"""Say where MDS sets lie, and check that they hold what is asked of them before they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from alignclip.checked_json import has_type, parse_json
from alignclip.config.schema import DataConfig, RunConfig, SetConfig
from alignclip.data.mds_index import (
    DATASET,
    INDEX,
    ShardEntry,
    columns_of,
    dimension_of,
    fingerprint_of_shards,
    parse_index,
)
from alignclip.errors import UserError, few, nearest
from alignclip.near import nearest_path
from alignclip.runtime.stand_ins import stand_ins
from alignclip.storage import StorageError, open_file, read_text

if TYPE_CHECKING:
    from alignclip.data.cached_stream import CachedStream

INTEGERS = (
    "int",
    "str_int",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
)
# How the columns that are read may be stored. Images as bytes alone: Streaming's own decoders try
# every format of PIL's, and some of PIL's decoders start programs.
STORED = {
    "image": ("bytes",),
    "caption": ("str", "json"),
    "semantic": ("ndarray",),
    "label": INTEGERS,
}
# the missing column of an evaluator's set -> the column of the other kind of set, and its tasks
OTHER_KIND = {
    "label": ("caption", "the set has pairs and no classes: retrieval and gap read pairs"),
    "caption": (
        "label",
        "the set has classes and no captions: zero_shot and linear_probe read classes",
    ),
}


class _Card(TypedDict, total=False):
    """The entries of ``dataset.json`` about caption embeddings."""

    encoder: str | None
    dimension: int | None


def local_folder(name: str, stream: SetConfig) -> str:
    """Return where a stream's shards are kept: ``local``, or a folder below the temporary one."""
    if stream.local:
        return stream.local
    place = str(stream.remote).replace("://", "-").replace("/", "-")
    return str(Path(tempfile.gettempdir()) / "alignclip-cache" / f"{name}-{place}")


def place_of(stream: SetConfig, name: str) -> str:
    """Return the path or URL of a file of a set."""
    parts = (stream.remote or stream.local, stream.split, name)
    return "/".join(part.rstrip("/") for part in parts if part)


def cached_stream(name: str, stream: SetConfig, **arguments: Any) -> CachedStream:
    """Build a stream that deletes nothing but what it has put into its cache.

    Args:
        name: of the stream.
        stream: where it lies.
        arguments: of :class:`streaming.Stream`; ``local`` is replaced by :func:`local_folder`.
    """
    with stand_ins():  # takes seconds, as PyTorch does
        from alignclip.data.cached_stream import CachedStream

    local = local_folder(name, stream)
    return CachedStream(**arguments | {"local": local}, is_own=not stream.local)


def check_streams(config: DataConfig, *, semantic: bool) -> dict[str, str]:
    """Read each stream's ``index.json`` and check that it holds what training will ask for.

    Returns:
        the fingerprint of each stream's set, by the stream's name.

    Raises:
        UserError: a set that isn't there or can't be reached, one without the columns needed,
            embeddings of different encoders, an algorithm that Streaming doesn't have, or two
            streams in one folder.
    """
    _check_algorithms(config)
    _check_folders(config)
    needed = {"image", "caption"} | ({"semantic"} if semantic else set())
    encoders: dict[str, tuple[str | None, int | None]] = {}
    sets: dict[str, str] = {}
    for name, stream in config.streams.items():
        where = f"data.streams.{name}"
        hint = f"; set {where}.remote or .local, or take it out with {where}=null"
        entries = read_index(where, stream, local_folder(name, stream), hint)
        if not entries:
            raise UserError(f"{where}: the set is empty (no shards in its index.json)")
        sets[name] = fingerprint_of_shards(entries)
        shards = [columns_of(entry) for entry in entries]
        if semantic:
            check_embeddings(where, shards)
        check_columns(where, shards, needed)
        if semantic:
            encoders[where] = _encoder(stream, shards[0])
    _check_encoders(encoders)
    return sets


def _check_algorithms(config: DataConfig) -> None:
    """Check the names that Streaming itself looks up in the first epoch."""
    with stand_ins():  # takes seconds, as PyTorch does
        from streaming.base import partition, shuffle
        from streaming.base.hashing import get_hashes

    for key, algorithms in (("shuffle_algo", shuffle.algos), ("partition_algo", partition.algos)):
        if (name := getattr(config, key)) not in algorithms:
            raise UserError(f"data.{key}={name} does not exist; {nearest(name, algorithms)}")
    algorithm, known = config.validate_hash, get_hashes()
    if algorithm is not None and algorithm not in known:
        raise UserError(f"data.validate_hash={algorithm}: {nearest(algorithm, known)}")


def _check_folders(config: DataConfig) -> None:
    """Check that no two streams have one folder: they would read one index."""
    folders: dict[Path, str] = {}
    for name, stream in config.streams.items():
        folder = Path(local_folder(name, stream), stream.split or "").resolve()
        if folder in folders:
            raise UserError(
                f"data.streams.{folders[folder]} and data.streams.{name} have one local folder: "
                f"{folder}; give each a local of its own"
            )
        folders[folder] = name


def check_embeddings(where: str, shards: Iterable[Collection[str]]) -> None:
    """Check that no set of pairs lacks caption embeddings.

    Args:
        where: the set's place, for messages.
        shards: names of the columns of each.

    Raises:
        UserError: a shard has images and captions alone.
    """
    if any({"image", "caption"} == STORED.keys() & {*columns} for columns in shards):
        raise UserError(
            f"{where} has no 'semantic' column, and loss.beta > 0 needs it: convert the set with "
            "caption embeddings (convert/cc12m.py --encoder …), or set loss.rescale=false or "
            "loss.beta=0"
        )


def check_columns(where: str, shards: Iterable[dict[str, str]], needed: set[str]) -> None:
    """Check that all shards have the columns needed, stored as training and evaluation read them.

    Args:
        where: the set's place, for messages.
        shards: the columns of each, name -> encoding.
        needed: names of :data:`STORED`.

    Raises:
        UserError: one of the shards hasn't.
    """
    for columns in {tuple(columns.items()): columns for columns in shards}.values():
        if missing := sorted(needed - columns.keys()):
            raise UserError(f"{where} lacks the columns {missing}; it has {sorted(columns)}")
        for name in sorted(needed):
            encoding, stored = columns[name], STORED[name]
            if encoding.partition(":")[0] not in stored:
                raise UserError(
                    f"{where} stores the column {name} as {encoding}, not as {stored[0]}"
                )


def check_task_columns(where: str, shards: Iterable[dict[str, str]], column: str) -> None:
    """Check that an evaluator's set has images and ``column``, a label or a caption of each.

    Raises:
        UserError: one of the shards hasn't; where the set is of the other kind, with the tasks that
            read it.
    """
    shards = list(shards)
    try:
        check_columns(where, shards, {"image", column})
    except UserError as error:
        there = {name for one in shards for name in one}
        other, advice = OTHER_KIND[column]
        hint = f"; {advice}" if column not in there and {"image", other} <= there else ""
        raise UserError(f"{error}{hint}") from None


def evaluated_on_training_data(config: RunConfig) -> dict[str, str]:
    """Return the evaluators whose set is one of the run's own streams: evaluator -> stream."""
    streams = [(name, _reads_from(stream)) for name, stream in config.data.streams.items()]
    found = {}
    for name, evaluator in config.evaluators.items():
        read = _reads_from(evaluator)[:1]  # a remote set, whatever folder caches it
        stream = next((stream for stream, places in streams if {*read} & {*places}), None)
        if stream is not None:
            found[name] = stream
    return found


def _reads_from(stream: SetConfig) -> list[str]:
    """Return the URL of a set, and the folder where it lies or is cached, each with its split."""
    split = stream.split or ""
    remote = [f"{stream.remote.rstrip('/')}/{split}".rstrip("/")] if stream.remote else []
    return remote + ([str(Path(stream.local, split).resolve())] if stream.local else [])


def _encoder(stream: SetConfig, columns: dict[str, str]) -> tuple[str | None, int | None]:
    """Return the name and the dimension of a set's sentence encoder, None where nobody says."""
    try:
        said = parse_json(read_text(place_of(stream, DATASET)))
    except (UserError, ValueError):
        said = {}
    said = said if has_type(said, _Card) else {}  # of another converter's set
    return said.get("encoder"), dimension_of(columns) or said.get("dimension")


def _check_encoders(encoders: dict[str, tuple[str | None, int | None]]) -> None:
    """Check that all embeddings are of one encoder: others can't be compared."""
    for (first, (name, dimension)), (second, (other, another)) in combinations(encoders.items(), 2):
        if None not in (dimension, another) and dimension != another:
            raise UserError(
                f"{first} has caption embeddings of dimension {dimension}, {second} of {another}; "
                "use one sentence encoder"
            )
        # the same model may have been a hub's name there and a folder here
        if name and other and Path(name).name != Path(other).name:
            raise UserError(
                f"{first} has caption embeddings of '{name}', {second} of '{other}', which can't "
                "be compared; use one sentence encoder (if they are one and the same, give them "
                f"one name in the sets' {DATASET})"
            )


def no_set_at(folder: Path, hint: str = "") -> str:
    """Say that a local folder holds no set, and where one is near, or else the ``hint``."""
    below = [str(path.parent) for path in sorted(folder.glob(f"*/{INDEX}"))]
    near = nearest_path(folder, lambda path: (path / INDEX).is_file()) or nearest_path(
        folder, Path.is_dir
    )
    if below:
        hint = f"; there is one in {few(below)}"
    elif near is not None and not folder.is_dir():
        hint = f"; did you mean '{near}'?"
    return f"no MDS set at {folder} (no {INDEX} there){hint}"


def read_index(where: str, stream: SetConfig, local: str, hint: str = "") -> list[ShardEntry]:
    """Fetch a set's ``index.json`` and check it; without retries, so that a typo fails at once.

    Args:
        where: the set's place in the configuration, for messages; nothing where it has none.
        stream: where it lies.
        local: where it lies or is cached.
        hint: what else a person could do where there is none.

    Raises:
        UserError: there is none, it can't be read, a shard of it can't be read safely, or another
            set is cached in ``local``.
    """
    whose, place = f"{where}: " if where else "", place_of(stream, INDEX)
    if not stream.remote and not Path(place).is_file():
        raise UserError(f"{whose}{no_set_at(Path(place).parent, hint)}")
    try:
        store, name = open_file(place)
        entries = parse_index(store.read_bytes(name))
    except StorageError as error:
        raise UserError(f"{whose}{error}") from None
    except ValueError as error:
        raise UserError(f"{whose}{place} {error}") from None
    # Streaming takes the index that is there already, whatever the remote one says
    cached = Path(local, stream.split or "", INDEX)
    if stream.remote and cached.is_file():
        try:
            same = parse_index(cached.read_bytes()) == entries
        except ValueError:  # written half when a machine went down
            same = False
        if not same:
            raise UserError(
                f"{whose}{cached.parent} holds another set than {place}; remove it or choose "
                "another local"
            )
    return entries
