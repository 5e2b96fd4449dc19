"""A run and its save folder: what is there, whether it is this run's, and what of it may go.

The folder is local or an object store's URI. Beside the checkpoints lie ``config.yaml``, the resolved configuration,
and ``starts.json``, an entry for each start of the run (:class:`alignclip.runtime.environment.Start`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from alignclip.config.reading import to_yaml
from alignclip.config.schema import RunConfig, StartConfig
from alignclip.config.yaml_text import natural, parse
from alignclip.errors import UserError
from alignclip.runtime.environment import Start
from alignclip.storage import (
    StorageError,
    is_absent,
    is_denied,
    open_store,
    to_disk,
    write_text_whole,
)
from alignclip.weights import checkpoint_file
from alignclip.weights.locate import CARD

CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.json"
# Sections that make a run what it is; a rerun with other values would be another run.
FIXED = (
    "model", "loss", "data", "optimizer", "scheduler", "algorithms", "global_train_batch_size", "seed",
    "train_subset_num_batches", *(f.name for f in dataclasses.fields(StartConfig)),
)  # fmt: skip
# … except what only says where and how fast: the same samples in the same order.
FREE = {
    "model.encode_chunk_size", "data.num_workers", "data.prefetch_factor", "data.persistent_workers",
    "data.pin_memory", "data.predownload", "data.cache_limit", "data.download_retry", "data.download_timeout",
    "data.validate_hash", "data.keep_zip",
}  # fmt: skip


class SaveFolder:
    """One run's folder. All of its methods are for rank 0 alone, except where they say otherwise.

    Args:
        config: of the run; ``save_folder`` and ``save_latest_filename`` may hold ``{run_name}``.

    Raises:
        UserError: ``save_folder`` holds another placeholder.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.save_folder
        try:
            self.uri = config.save_folder.format(run_name=config.run_name).rstrip("/")
        except (KeyError, IndexError, ValueError):
            raise UserError(
                f"save_folder={config.save_folder} may hold {{run_name}}, and no other braces"
            ) from None
        self.config = config
        self.files = open_store(self.uri)
        self.remote = self.files.is_remote
        self.latest = str(config.save_latest_filename).format(run_name=config.run_name, rank=0)
        self._named = _batch_in(config)
        # what was read: in a folder by how the file looked then, in a bucket the size of what is whole
        self._seen: dict[str, tuple[tuple[int, int, int], str | None]] = {}
        self._sizes: dict[str, int] = {}

    def open(self) -> None:
        """See that the folder can be written.

        Raises:
            UserError: no such bucket, no credentials, no connection; no such place on this machine.
        """
        try:
            self.files.check_writable()
        except StorageError as error:
            raise UserError(f"save_folder={self.uri}: {error.why}") from None

    def remove_partial(self) -> None:
        """Remove what a run that was killed has left half-written; after :meth:`check_config`.

        A start that is refused leaves the folder of another run, which may be at work, as it is.
        """
        if not self.remote:
            for left in Path(self.uri).glob(".*.partial"):
                with suppress(OSError):
                    left.unlink()

    def check_config(self) -> None:
        """Refuse to go on with another run's checkpoints.

        Raises:
            UserError: the folder holds a run that was configured differently (with the differences), or a run at all
                when ``autoresume`` is off.
        """
        before = self._read(CONFIG_FILE)
        has_checkpoint = self.has_checkpoint()
        if not self.config.autoresume and has_checkpoint:
            raise UserError(
                f"{self.uri} holds checkpoints of run '{self.config.run_name}' already; "
                "set autoresume=true to go on with it, or choose another run_name"
            )
        if before is not None and has_checkpoint:
            old, now = _plain(before), _plain(to_yaml(self.config))
            if old.get("run_name") != now["run_name"]:
                raise UserError(
                    f"{self.uri} is the folder of run '{old.get('run_name')}', not of '{now['run_name']}'; "
                    "choose another save_folder, e.g. one with {run_name} in it"
                )
            changed = differences(old, now)
            if changed:
                raise UserError(
                    f"run '{self.config.run_name}' in {self.uri} was started with other settings: "
                    f"{'; '.join(changed)}. Put them back, or choose another run_name"
                )
            if old.get("max_duration") != now["max_duration"]:
                print(
                    f"max_duration: {old.get('max_duration')} → {now['max_duration']}; the learning rate follows it"
                )

    def write_config(self) -> None:
        """Leave this run's configuration beside its checkpoints, to be compared when it goes on, or run again.

        Raises:
            UserError: the folder can't be written.
        """
        self._put(CONFIG_FILE, to_yaml(self.config))

    def write_card(self, card: str) -> None:
        """Leave a model card beside the checkpoints: the licence of what they were trained from is carried by it.

        Raises:
            UserError: the folder can't be written.
        """
        self._put(CARD, card)

    def add_start(self, start: Start) -> None:
        """Add an entry to the record of the run's starts, with what has changed since the last one; say which versions.

        Call it before :meth:`write_config`: the folder still has the settings of the last start.

        Raises:
            UserError: the record is not as this has written it, or can't be written.
        """
        now = dataclasses.asdict(start)
        try:
            starts = json.loads(self._read(STARTS_FILE) or "[]")
            changed = differing(starts[-1]["versions"], now["versions"]) if starts else []
            if starts:
                machine = [
                    {key: one[key] for key in ("world_size", "device")} for one in (starts[-1], now)
                ]
                now["changed"] = [*self._changed_settings(), *differing(*machine), *changed]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.uri}/{STARTS_FILE} is no list of this run's starts; move it away"
            ) from None
        if changed and start.batch:
            print(
                f"since the last start other versions were installed: {'; '.join(changed)}",
                flush=True,
            )
        self._put(STARTS_FILE, json.dumps([*starts, now], indent=2) + "\n")

    def _changed_settings(self) -> list[str]:
        """What the folder's configuration and this start's differ in; not what tells a start from a run."""
        before = self._read(CONFIG_FILE)
        if before is None:
            return []
        defaults = _flatten(_plain(to_yaml(RunConfig())))
        return differing(
            defaults | _flatten(_plain(before)), defaults | _flatten(_plain(to_yaml(self.config)))
        )

    def _put(self, name: str, text: str) -> None:
        try:
            self.files.write_text(name, text)
        except StorageError as error:
            raise UserError(f"save_folder={self.uri} can't be written: {error.why}") from None

    def _read(self, name: str) -> str | None:
        return self.files.read_text_optional(name)

    def has_checkpoint(self) -> bool:
        """Whether a run has saved anything here, whole or not."""
        return bool(self.latest_target() or self.checkpoints())

    def checkpoints(self) -> dict[str, int]:
        """The names of the checkpoints in the folder, whether or not ``latest`` knows them, and their batches.

        Empty where the key may not list the bucket.
        """
        try:
            names = (
                self.files.names()
                if self.remote
                else {path.name for path in Path(self.uri).glob("*")}
            )
        except StorageError as error:
            if not is_denied(error):
                raise
            names = set()
        found = {name: self.batch_of(name) for name in names}
        return {name: batch for name, batch in found.items() if batch is not None}

    def batch_of(self, name: str) -> int | None:
        """The batch in a checkpoint's name, such as ``ep1-ba200-rank0.pt``; None where it is no checkpoint's name."""
        found = re.match(r"ep\d+-ba(?P<batch>\d+)\b", name) or self._named.fullmatch(name)
        return int(found["batch"]) if found and "/" not in name else None

    def latest_target(self) -> str:
        """The name of the checkpoint that ``latest`` points at, which may be gone; nothing without a ``latest``.

        In a bucket ``latest`` is an object ``….symlink`` that holds a key. Such a file stands for it in a folder, too,
        where the file system has no links. A folder that was copied with its links followed has a checkpoint of that
        name.
        """
        if self.remote:
            key = self.files.read_optional(f"{self.latest}.symlink") or b""
            prefix = urlparse(self.uri).path.strip("/")
            return key[:4096].decode("utf-8", errors="replace").strip().removeprefix(f"{prefix}/")
        link = Path(self.uri, self.latest)
        if link.is_symlink():
            return os.path.relpath(link.parent / link.readlink(), self.uri)
        if link.exists():
            return self.latest
        pointer = link.with_name(f"{link.name}.symlink")
        text = (
            pointer.read_bytes()[:4096].decode("utf-8", errors="replace").strip()
            if pointer.is_file()
            else ""
        )
        return (
            os.path.relpath(link.parent / text.rpartition("/")[2], self.uri)
            if text.isprintable() and text
            else ""
        )

    def point_latest(self, name: str) -> None:
        """Have ``latest`` point at a checkpoint: at any time at the old one or the new one.

        Raises:
            StorageError: the folder can't be written.
        """
        if self.remote:
            prefix = urlparse(self.uri).path.strip("/")
            self.files.write_text(f"{self.latest}.symlink", f"{prefix}/{name}" if prefix else name)
            return
        link = Path(self.uri, self.latest)
        pointer, made = (
            link.with_name(f"{link.name}.symlink"),
            link.with_name(f".{link.name}.partial"),
        )
        target = os.path.relpath(Path(self.uri, name), link.parent)
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            made.unlink(missing_ok=True)
            made.symlink_to(target)
            made.replace(link)
            pointer.unlink(missing_ok=True)
        except OSError:  # each file system without links has an error of its own
            with suppress(OSError):
                made.unlink(missing_ok=True)
            write_text_whole(pointer, target)
            link.unlink(missing_ok=True)

    def expect(self, name: str, size: int) -> None:
        """Remember a checkpoint that this process uploads: known to be whole once the bucket has all of it."""
        self._sizes[name] = size

    def damage(self, name: str, download: Path | None = None) -> str | None:
        """Say why a checkpoint is not as it was written, or None; what has not changed since is not read again.

        Args:
            name: of the checkpoint.
            download: where a bucket's checkpoint shall lie on this machine afterwards.

        Raises:
            StorageError: the bucket can't be read.
        """
        if self.remote:
            return self._damage_in_bucket(name, download)
        path = Path(self.uri, name)
        try:
            status = path.stat()
        except OSError as error:
            gone = isinstance(error, FileNotFoundError)
            return (
                checkpoint_file.GONE if gone else f"{checkpoint_file.UNREADABLE}: {error.strerror}"
            )
        seen = (status.st_size, status.st_mtime_ns, status.st_ino)
        if name not in self._seen or self._seen[name][0] != seen:
            self._seen[name] = (seen, checkpoint_file.damage(path))
        return self._seen[name][1]

    def rotate(self, keep: int) -> list[str]:
        """Delete all checkpoints but the newest ``keep`` whole ones; never what ``latest`` names, nor any newer.

        A whole one goes only where as many newer ones were read, are whole, and in a folder are on the disk: a power
        cut empties the memory that they may have been read from.

        Returns:
            the names deleted.

        Raises:
            UserError, OSError: the folder can't be read or changed.
        """
        names = self.checkpoints()
        newest = self.batch_of(self.latest_target())
        if newest is None:
            return []
        kept, deleted = list[str](), list[str]()
        for batch in sorted({batch for batch in names.values() if batch <= newest}, reverse=True):
            same = sorted(name for name in names if names[name] == batch)
            if len(kept) < max(keep, 1):
                kept += [name for name in same if self.damage(name) is None][:1]
            else:
                deleted += same
        if deleted and not self.remote:
            for name in (*kept, ""):
                to_disk(Path(self.uri, name))
        for name in deleted:
            self.files.delete(name)
        return deleted

    def _damage_in_bucket(self, name: str, download: Path | None) -> str | None:
        try:
            if (
                download is None
                and name in self._sizes
                and self.files.size(name) in (None, self._sizes[name])
            ):
                return None
            with tempfile.TemporaryDirectory(prefix="alignclip-") as folder:
                path = download or Path(folder, "checkpoint.pt")
                self.files.download(name, path)
                if (why := checkpoint_file.damage(path)) is None:
                    self._sizes[name] = path.stat().st_size
                return why
        except StorageError as error:
            if not is_absent(error):
                raise
            return checkpoint_file.GONE

    def keep_file(self, source: Path, name: str) -> None:
        """Move a local file into the folder, where it appears complete or not at all."""
        self.files.put(source, name)
        source.unlink()


def _batch_in(config: RunConfig) -> re.Pattern[str]:
    """What finds the batch in a name that ``save_filename`` makes."""
    pattern = ""
    for text, field in re.findall(r"([^{]*)(?:{(\w*)[^{}]*})?", config.save_filename):
        digits = r"(?P<batch>\d+)" if field == "batch" and "<batch>" not in pattern else r"\d+"
        pattern += re.escape(text) + (
            re.escape(config.run_name) if field == "run_name" else digits if field else ""
        )
    return re.compile(pattern if "<batch>" in pattern else r"(?P<batch>\d+)(?!)")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes two configurations two different runs, as ``key: before → now``.

    A setting that did not exist yet when ``before`` was written had what is its default now.
    """
    defaults = _flatten(_plain(to_yaml(RunConfig())))
    old, new = defaults | _flatten(before), defaults | _flatten(now)

    def fixed(key: str) -> bool:
        return key.split(".")[0] in FIXED and key not in FREE and not _is_cache_path(key, new)

    return differing(
        {k: v for k, v in old.items() if fixed(k)}, {k: v for k, v in new.items() if fixed(k)}
    )


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two flat dicts differ in, as ``key: old → new``."""
    unset = "not set"  # which null is not
    # a text is the same with and without quotation marks: earlier versions took some texts for numbers
    keys = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key, unset) != new.get(key, unset)
        and str(old.get(key, unset)) != str(new.get(key, unset))
    ]
    return [f"{key}: {old.get(key, unset)} → {new.get(key, unset)}" for key in keys]


def _plain(text: str) -> dict[str, Any]:
    """YAML text as nested dicts."""
    values = natural(parse(text))
    assert isinstance(values, dict)
    return values


def _is_cache_path(key: str, values: dict[str, Any]) -> bool:
    """Whether a key is the local copy of a remote stream, which may move; without a remote it is the set itself."""
    stream, _, name = key.rpartition(".")
    return (
        stream.startswith("data.streams.")
        and name == "local"
        and bool(values.get(f"{stream}.remote"))
    )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
