"""A run and its save folder: what is there, whether it is this run's, and what of it may go.

The folder is local or an object store's URI. Beside the checkpoints lie ``config.yaml``, the resolved configuration,
and ``starts.json``, an entry for each start of the run (:class:`alignclip.environment.Start`).
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from composer.utils import maybe_create_object_store_from_uri, parse_uri
from composer.utils.object_store import ObjectStore

from alignclip.config import RunConfig, StartConfig
from alignclip.config_file import to_yaml
from alignclip.environment import Start
from alignclip.errors import UserError
from alignclip.fetching import CARD
from alignclip.storage import describe_storage_error
from alignclip.yaml_text import natural, parse

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
            raise UserError(f"save_folder={config.save_folder} may hold {{run_name}}, and no other braces") from None
        self.config = config
        backend, _, path = parse_uri(self.uri)
        self.remote = backend != ""
        self.prefix = path.strip("/")
        self.latest = str(config.save_latest_filename).format(run_name=config.run_name, rank=0)
        self.store: ObjectStore | None = None

    def open(self) -> None:
        """Connect, or make the local folder, and see that it can be read.

        Raises:
            UserError: no such bucket, no credentials, no connection; no such place on this machine.
        """
        try:
            if self.remote:
                self.store = maybe_create_object_store_from_uri(self.uri)
                assert self.store is not None
                self.store.list_objects(self._key(CONFIG_FILE))
            else:
                Path(self.uri).mkdir(parents=True, exist_ok=True)
        except Exception as error:
            local = not self.remote and isinstance(error, OSError)
            why = str(error.strerror) if local else describe_storage_error(error)  # type: ignore[attr-defined]
            raise UserError(f"save_folder={self.uri}: {why}") from None

    def check_config(self) -> None:
        """Refuse to go on with another run's checkpoints.

        Raises:
            UserError: the folder holds a run that was configured differently (with the differences), or a run at all
                when ``autoresume`` is off.
        """
        before = self._read(CONFIG_FILE)
        has_checkpoint = self.has_checkpoint()
        if not self.config.autoresume and (has_checkpoint or self._checkpoint_files()):
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
                print(f"max_duration: {old.get('max_duration')} → {now['max_duration']}; the learning rate follows it")

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
        """Add an entry to the record of the run's starts, and say which versions are not those of the last one.

        Raises:
            UserError: the record is not as this has written it, or can't be written.
        """
        now = dataclasses.asdict(start)
        try:
            starts = json.loads(self._read(STARTS_FILE) or "[]")
            changed = differing(starts[-1]["versions"], now["versions"]) if starts else []
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.uri}/{STARTS_FILE} is no list of this run's starts; move it away") from None
        if changed and start.batch:
            print(f"since the last start other versions were installed: {'; '.join(changed)}", flush=True)
        self._put(STARTS_FILE, json.dumps([*starts, now], indent=2) + "\n")

    def _put(self, name: str, text: str) -> None:
        try:
            self._write(name, text)
        except Exception as error:  # of the file system, or any cloud's
            raise UserError(f"save_folder={self.uri} can't be written: {describe_storage_error(error)}") from None

    def has_checkpoint(self) -> bool:
        """Whether there is a latest checkpoint to go on from."""
        if self.remote:
            return self._read(f"{self.latest}.symlink") is not None
        return Path(self.uri, self.latest).exists()

    def restore_latest_link(self) -> None:
        """Local folder only: a run killed while it moved ``latest`` leaves none; point it at the newest whole file."""
        link = Path(self.uri, self.latest)
        if self.remote or link.is_symlink() or link.exists() or not link.parent.is_dir():
            return  # a plain file: the folder was copied with what its links point at
        found = [link.parent / name for name in self._checkpoint_files()]
        whole = [p for p in found if zipfile.is_zipfile(p)]  # one that was being written lacks the directory at its end
        if whole:
            link.symlink_to(max(whole, key=lambda p: _batch_of(p.name) or 0).name)

    def remove_downloaded(self) -> None:
        """Remove Composer's download of an earlier ``latest`` (each node's local rank 0).

        Composer keeps it under ``<working directory>/s3:/<bucket>/…`` and would resume from it for ever.
        """
        if self.remote:
            pattern = re.sub(r"rank0", "rank*", self.latest)
            for path in Path(self.uri.replace("://", ":/")).resolve().glob(pattern):
                path.unlink(missing_ok=True)  # nodes may share the working directory

    def rotate(self, keep: int) -> list[str]:
        """Delete the oldest checkpoints but ``keep``; never the one that ``latest`` names, nor any newer.

        Returns:
            the names deleted.
        """
        newest = _batch_of(self._latest_target().rpartition("/")[2])
        if newest is None:
            return []
        by_batch: dict[int, list[str]] = {}
        for name in self._checkpoint_files():
            batch = _batch_of(name)
            if batch is not None and batch <= newest:
                by_batch.setdefault(batch, []).append(name)
        old = sorted(by_batch)[: -max(keep, 1)]
        deleted = [name for batch in old for name in by_batch[batch]]
        for name in deleted:
            if self.store is not None:
                _delete(self.store, self._key(name))
            else:
                Path(self.uri, name).unlink(missing_ok=True)
        return deleted

    def _latest_target(self) -> str:
        """What ``latest`` points at, or nothing."""
        if self.remote:
            return self._read(f"{self.latest}.symlink") or ""
        link = Path(self.uri, self.latest)
        return str(link.readlink()) if link.is_symlink() else ""

    def _checkpoint_files(self) -> list[str]:
        """Names of checkpoints in the folder, whether or not ``latest`` knows them."""
        if self.store is not None:
            keys = self.store.list_objects(f"{self.prefix}/" if self.prefix else None)
            names = {key.removeprefix(self.prefix).lstrip("/").split("/")[0] for key in keys}
        else:
            folder = Path(self.uri)
            names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return sorted(name for name in names if _batch_of(name) is not None)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _read(self, name: str) -> str | None:
        if self.store is None:
            path = Path(self.uri, name)
            return path.read_text(encoding="utf-8") if path.is_file() else None
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "file")
            try:
                self.store.download_object(self._key(name), str(target))
            except FileNotFoundError:
                return None
            return target.read_text(encoding="utf-8")

    def _write(self, name: str, text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, name)
            source.write_text(text, encoding="utf-8")
            self.keep_file(source, name)

    def keep_file(self, source: Path, name: str) -> None:
        """Move a local file into the folder, where it appears complete or not at all."""
        if self.store is not None:
            self.store.upload_object(self._key(name), str(source))
            source.unlink()
            return
        Path(self.uri).mkdir(parents=True, exist_ok=True)
        partial = Path(self.uri, f".{name}.partial")
        shutil.move(source, partial)
        partial.replace(Path(self.uri, name))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What makes two configurations two different runs, as ``key: before → now``.

    A setting that did not exist yet when ``before`` was written had what is its default now.
    """
    defaults = _flatten(_plain(to_yaml(RunConfig())))
    old, new = defaults | _flatten(before), defaults | _flatten(now)

    def fixed(key: str) -> bool:
        return key.split(".")[0] in FIXED and key not in FREE and not _is_cache_path(key, new)

    return differing({k: v for k, v in old.items() if fixed(k)}, {k: v for k, v in new.items() if fixed(k)})


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What two flat dicts differ in, as ``key: old → new``."""
    unset = "not set"  # which null is not
    # a text is the same with and without quotation marks: earlier versions took some texts for numbers
    keys = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key, unset) != new.get(key, unset) and str(old.get(key, unset)) != str(new.get(key, unset))
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
    return stream.startswith("data.streams.") and name == "local" and bool(values.get(f"{stream}.remote"))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _batch_of(name: str) -> int | None:
    """The batch count in a checkpoint's name (``ep1-ba200-rank0.pt``)."""
    found = re.match(r"ep\d+-ba(\d+)\b", name)
    return int(found.group(1)) if found else None


def _delete(store: ObjectStore, key: str) -> None:
    """Composer's object stores can't delete; their clients can.

    Raises:
        UserError: a store whose client is not known here.
    """
    kind = type(store).__name__
    if kind == "S3ObjectStore":
        store.client.delete_object(Bucket=store.bucket, Key=key)  # type: ignore[attr-defined]
    elif kind == "GCSObjectStore":
        store.bucket.blob(key).delete()  # type: ignore[attr-defined]
    else:
        raise UserError(
            f"save_num_checkpoints_to_keep can't delete from a {kind}; set it to -1 and use a lifecycle rule"
        )
