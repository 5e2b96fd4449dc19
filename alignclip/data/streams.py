"""Where MDS sets lie, and whether they hold what is asked of them: told before anything is read from them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignclip.config.schema import DataConfig, RunConfig, SetConfig
from alignclip.data.mds_index import INDEX, ShardEntry, columns_of, read_shards
from alignclip.errors import UserError, few, nearest
from alignclip.near import nearest_path
from alignclip.storage import StorageError, open_file

if TYPE_CHECKING:
    from alignclip.data.shard_cache import CachedStream

DATASET = "dataset.json"  # beside the index: what a converter says of the set
INTEGERS = (
    "int",
    "str_int",
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
)
# How the columns that are read may be stored. Pictures as bytes alone: Streaming's own decoders try every format of
# PIL's, and some of these start programs.
STORED = {
    "image": ("bytes",),
    "caption": ("str", "json"),
    "semantic": ("ndarray",),
    "label": INTEGERS,
}


def local_folder(name: str, stream: SetConfig) -> str:
    """Where a stream's shards are kept: ``local``, or a folder of its own below the temporary directory."""
    if stream.local:
        return stream.local
    place = str(stream.remote).replace("://", "-").replace("/", "-")
    return str(Path(tempfile.gettempdir()) / "alignclip-cache" / f"{name}-{place}")


def cached_stream(name: str, stream: SetConfig, **arguments: Any) -> CachedStream:
    """A stream that deletes nothing but what was put into its cache.

    Args:
        name: of the stream.
        stream: where it lies.
        arguments: of :class:`streaming.Stream`; ``local`` is replaced by :func:`local_folder`.
    """
    from alignclip.data.shard_cache import CachedStream  # takes seconds, as PyTorch does

    return CachedStream(
        **arguments | {"local": local_folder(name, stream)}, is_own=not stream.local
    )


def check_streams(config: DataConfig, *, semantic: bool) -> None:
    """Read each stream's ``index.json`` and make sure that it holds what training will ask for.

    Raises:
        UserError: a set that isn't there or can't be reached, one without the columns needed, or embeddings of
            different dimensions.
    """
    _check_algorithms(config)
    _check_folders(config)
    _check_sets(config, semantic=semantic)


def _check_algorithms(config: DataConfig) -> None:
    """Names that Streaming itself would look up in the first epoch.

    Raises:
        UserError: one that it doesn't have.
    """
    from streaming.base import partition, shuffle  # takes seconds, as PyTorch does
    from streaming.base.hashing import get_hashes

    for key, algorithms in (("shuffle_algo", shuffle.algos), ("partition_algo", partition.algos)):
        if (
            name := getattr(config, key)
        ) not in algorithms:  # Streaming itself finds out in the first epoch
            raise UserError(f"data.{key}={name} does not exist; {nearest(name, algorithms)}")
    if config.validate_hash is not None and config.validate_hash not in get_hashes():
        raise UserError(
            f"data.validate_hash={config.validate_hash}: {nearest(config.validate_hash, get_hashes())}"
        )


def _check_sets(config: DataConfig, *, semantic: bool) -> None:
    encoders: dict[str, tuple[str | None, int | None]] = {}
    for name, stream in config.streams.items():
        where = f"data.streams.{name}"
        hint = f"; set {where}.remote or .local, or take it out with {where}=null"
        shards = read_index(where, stream, local_folder(name, stream), hint)
        if not shards:
            raise UserError(f"{where}: the set is empty (no shards in its index.json)")
        if semantic:
            check_embeddings(where, [columns_of(shard).keys() for shard in shards])
        check_columns(
            where,
            map(columns_of, shards),
            {"image", "caption"} | ({"semantic"} if semantic else set()),
        )
        if semantic:
            encoders[where] = _encoder(stream, columns_of(shards[0])["semantic"])
    _check_encoders(encoders)


def check_embeddings(where: str, shards: Iterable[Collection[str]]) -> None:
    """Make sure that no set of pairs lacks caption embeddings.

    Args:
        where: the set's place, for messages.
        shards: names of the columns of each.

    Raises:
        UserError: a shard has images and captions alone.
    """
    if any({"image", "caption"} == STORED.keys() & columns for columns in shards):
        raise UserError(
            f"{where} has no 'semantic' column, and loss.beta > 0 needs it: convert the set with caption "
            "embeddings (convert/cc12m.py --encoder …), or set loss.rescale=false or loss.beta=0"
        )


def _check_folders(config: DataConfig) -> None:
    """Two streams in one folder would read one index, and delete each other's shards.

    Raises:
        UserError: there are two.
    """
    folders: dict[Path, str] = {}
    for name, stream in config.streams.items():
        folder = Path(local_folder(name, stream), stream.split or "").resolve()
        if folder in folders:
            raise UserError(
                f"data.streams.{folders[folder]} and data.streams.{name} have one local folder: {folder}; give each a "
                "local of its own"
            )
        folders[folder] = name


def check_columns(where: str, shards: Iterable[dict[str, str]], needed: set[str]) -> None:
    """Make sure that every shard has these columns, stored in a way that training and evaluation read.

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
            if columns[name].partition(":")[0] not in STORED[name]:
                raise UserError(
                    f"{where} stores the column {name} as {columns[name]}, not as {STORED[name][0]}"
                )


def evaluated_on_training_data(config: RunConfig) -> dict[str, str]:
    """The evaluators whose set is one of the run's own streams, and that stream, by their names."""
    streams = [(name, _places(stream)) for name, stream in config.data.streams.items()]
    found = {}
    for name, evaluator in config.evaluators.items():
        read = _places(evaluator)[:1]  # a remote set, whatever folder caches it
        stream = next((stream for stream, places in streams if set(read) & set(places)), None)
        if stream is not None:
            found[name] = stream
    return found


def _places(stream: SetConfig) -> list[str]:
    """The URL of a set, and the folder that it lies in or is cached in, each with its split."""
    remote = (
        f"{stream.remote.rstrip('/')}/{stream.split or ''}".rstrip("/") if stream.remote else None
    )
    local = str(Path(stream.local, stream.split or "").resolve()) if stream.local else None
    return [place for place in (remote, local) if place]


def check_task_columns(where: str, shards: Iterable[dict[str, str]], column: str) -> None:
    """:func:`check_columns` for an evaluator's set: it has images and ``column``, a label or a caption of each.

    Raises:
        UserError: one of the shards hasn't; where the set is of the other kind, with the tasks that read it.
    """
    shards = list(shards)
    try:
        check_columns(where, shards, {"image", column})
    except UserError as error:
        columns = {name for one in shards for name in one}
        hint = ""
        if column == "label" and columns >= {"image", "caption"} and column not in columns:
            hint = "; the set has pairs and no classes: retrieval and gap read pairs"
        elif column == "caption" and columns >= {"image", "label"} and column not in columns:
            hint = "; the set has classes and no captions: zero_shot and linear_probe read classes"
        raise UserError(f"{error}{hint}") from None


def _encoder(stream: SetConfig, encoding: str) -> tuple[str | None, int | None]:
    """Name and dimension of the sentence encoder of a set, as far as they are known."""
    place = "/".join(
        part.rstrip("/") for part in (stream.remote or stream.local, stream.split, DATASET) if part
    )
    try:
        store, file = open_file(place)
        said = json.loads(store.read_text(file))
        name, dimension = said.get("encoder"), said.get("dimension")
    except Exception:  # a set of another converter's
        name = dimension = None
    shape = encoding.split(":")[
        2:
    ]  # sets with several captions an image have none in their encoding
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


def no_set_at(folder: Path, hint: str = "") -> str:
    """The sentence that a folder of this machine holds no set: where one is near, or else what a person could do."""
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
    """Fetch a set's ``index.json`` once and without retries (a typo should fail at once), and check it.

    Args:
        where: the set's place in the configuration, for messages; nothing where it has none.
        stream: where it lies.
        local: where it lies or is cached.
        hint: what else a person could do where there is none.

    Raises:
        UserError: there is none, it can't be read, a shard of it can't be read safely, or another set is cached in
            ``local``.
    """
    subfolder, whose = stream.split or "", f"{where}: " if where else ""
    if not stream.remote:
        path = Path(str(stream.local), subfolder, INDEX)
        if not path.is_file():
            raise UserError(f"{whose}{no_set_at(path.parent, hint)}")
        try:
            return read_shards(path)
        except ValueError as error:
            raise UserError(f"{whose}{path} {error}") from None
    remote = "/".join(part.rstrip("/") for part in (stream.remote, subfolder, INDEX) if part)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, INDEX)
        try:
            store, name = open_file(remote)
            store.download(name, path)
        except StorageError as error:
            raise UserError(f"{whose}{error}") from None
        try:
            shards = read_shards(path)
        except ValueError as error:
            raise UserError(f"{whose}{remote} {error}") from None
    # Streaming takes the index that is there already, whatever the remote one says
    cached = Path(local, subfolder, INDEX)
    if cached.is_file():
        try:
            same = read_shards(cached) == shards
        except ValueError:  # written half when a machine went down
            same = False
        if not same:
            raise UserError(
                f"{whose}{cached.parent} holds another set than {remote}; remove it or choose another local"
            )
    return shards
