"""A run's save folder, local or an object store's URI: its checkpoints and ``latest``.

:mod:`alignclip.training.run_record` keeps there whose run it is.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

from alignclip.config.schema import RunConfig
from alignclip.errors import UserError
from alignclip.runtime.environment import Start
from alignclip.storage import (
    StorageError,
    is_absent,
    is_denied,
    open_store,
    patiently,
    to_disk,
    write_text_whole,
)
from alignclip.storage.temporary import temporary_folder
from alignclip.weights import checkpoint_file

FileState = tuple[int, int, int]  # size, time of change, inode


class SaveFolder:
    """The folder of one run. Its methods are for rank 0 alone, except :meth:`damage`.

    Args:
        config: of the run; ``save_folder`` and ``save_latest_filename`` may hold ``{run_name}``.
    """

    def __init__(self, config: RunConfig) -> None:
        assert config.save_folder
        self.uri = config.save_folder.format(run_name=config.run_name).rstrip("/")
        self.config = config
        self.files = open_store(self.uri)
        self.remote = self.files.is_remote
        self.latest = str(config.save_latest_filename).format(run_name=config.run_name, rank=0)
        self._name_pattern = _checkpoint_names(config)
        # the damage of local files, by their state when they were read
        self._damages: dict[str, tuple[FileState, str | None]] = {}
        self.start: Start | None = None  # of the run, once this process has recorded it
        self._whole_sizes: dict[str, int] = {}  # of whole checkpoints in a bucket

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
        """Remove the half-written files of a run that was killed; after
        :func:`alignclip.training.run_record.check_config`.

        A start that is refused leaves the folder of another run, which may be at work, as it is.
        """
        if not self.remote:
            for partial in Path(self.uri).glob(".*.partial"):
                with suppress(OSError):
                    partial.unlink()

    def has_checkpoint(self) -> bool:
        """Say whether a run has saved anything here, whole or not."""
        return bool(self.latest_target() or self.checkpoints())

    def checkpoints(self) -> dict[str, int]:
        """List the checkpoints in the folder, known to ``latest`` or not: name → batch.

        Empty where the key may not list the bucket. A checkpoint in Composer's sharded form is a
        folder.

        Raises:
            StorageError: the folder can't be listed.
        """
        try:
            names = self.files.first_level()
        except StorageError as error:
            if not is_denied(error):
                raise
            return {}
        found = {name: self.batch_of(name) for name in names}
        return {name: batch for name, batch in found.items() if batch is not None}

    def batch_of(self, name: str) -> int | None:
        """Read the batch in a name such as ``ep1-ba200-rank0.pt``; None for other names."""
        found = re.match(r"ep\d+-ba(?P<batch>\d+)\b", name) or self._name_pattern.fullmatch(name)
        return int(found["batch"]) if found and "/" not in name else None

    def latest_target(self) -> str:
        """Return the name of the checkpoint that ``latest`` points at, or "".

        The checkpoint may be gone. In a bucket ``latest`` is an object ``….symlink`` that holds a
        key. Such a file takes the place of the link in a folder, too, where the file system has no
        links. A folder that was copied with its links followed has a checkpoint of that name.
        """
        if self.remote:
            key = _pointer_text(self.files.read_optional(f"{self.latest}.symlink") or b"")
            prefix = urlparse(self.uri).path.strip("/")
            return key.removeprefix(f"{prefix}/")
        link = Path(self.uri, self.latest)
        if link.is_symlink():
            return os.path.relpath(link.parent / link.readlink(), self.uri)
        if link.exists():
            return self.latest
        pointer = link.with_name(f"{link.name}.symlink")
        text = _pointer_text(pointer.read_bytes()) if pointer.is_file() else ""
        if not text or not text.isprintable():
            return ""
        return os.path.relpath(link.parent / text.rpartition("/")[2], self.uri)

    def point_latest(self, name: str) -> None:
        """Have ``latest`` point at a checkpoint: at any time at the old one or the new one.

        Raises:
            StorageError: the folder can't be written.
        """
        if self.config.save_latest_filename is None:
            return
        if self.remote:
            prefix = urlparse(self.uri).path.strip("/")
            self.files.write_text(f"{self.latest}.symlink", f"{prefix}/{name}" if prefix else name)
            return
        link = Path(self.uri, self.latest)
        pointer = link.with_name(f"{link.name}.symlink")
        new_link = link.with_name(f".{link.name}.partial")
        target = os.path.relpath(Path(self.uri, name), link.parent)
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            new_link.unlink(missing_ok=True)
            new_link.symlink_to(target)
            new_link.replace(link)
            pointer.unlink(missing_ok=True)
        except OSError:  # each file system without links has an error of its own
            with suppress(OSError):
                new_link.unlink(missing_ok=True)
            write_text_whole(pointer, target)
            link.unlink(missing_ok=True)

    def bring(self, path: Path, name: str, overwrite: bool = True) -> None:
        """Upload a checkpoint; wait while the bucket is away.

        Raises:
            StorageError: the bucket refuses, or has been away for too long; the name is taken and
                ``overwrite`` is off.
        """
        place = self.files.at(name)
        if not overwrite and patiently(lambda: self._is_in_bucket(name), place):
            raise StorageError("write", place, "it is there already; set save_overwrite=true")
        patiently(lambda: self.files.put(path, name), place)
        self._whole_sizes[name] = path.stat().st_size

    def _is_in_bucket(self, name: str) -> bool:
        try:
            # a kind of store that doesn't tell sizes lists its names
            return self.files.size(name) is not None or name in self.files.names()
        except StorageError as error:
            # a store refuses an absent object, too, to a key that can't list
            if is_absent(error) or is_denied(error):
                return False
            raise

    def damage(self, name: str, download: Path | None = None) -> str | None:
        """Say why a checkpoint is not as it was written, or None; unchanged files are read once.

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
        except FileNotFoundError:
            return checkpoint_file.GONE
        except OSError as error:
            return f"{checkpoint_file.CANT_BE_READ}: {error.strerror}"
        now = (status.st_size, status.st_mtime_ns, status.st_ino)
        before, why = self._damages.get(name, (None, None))
        if now != before:
            why = checkpoint_file.damage(path)
            self._damages[name] = now, why
        return why

    def _damage_in_bucket(self, name: str, download: Path | None) -> str | None:
        def look() -> str | None:
            size = self._whole_sizes.get(name) if download is None else None
            if size is not None and self.files.size(name) in (None, size):
                return None
            with temporary_folder() as folder:
                path = download or folder / "checkpoint.pt"
                self.files.download(name, path)
                why = checkpoint_file.damage(path)
                if why is None:
                    self._whole_sizes[name] = path.stat().st_size
                return why

        try:
            return patiently(look, self.uri)
        except StorageError as error:
            if not is_absent(error):
                raise
            return checkpoint_file.GONE

    def rotate(self, keep: int) -> list[str]:
        """Delete all checkpoints but the newest ``keep`` whole ones.

        The checkpoint of ``latest`` and newer ones always stay. A whole checkpoint is deleted only
        where ``keep`` newer ones were read and are whole, and in a folder are on the disk: a power
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
            patiently(partial(self.files.delete, name), self.uri)
        return deleted


def _pointer_text(content: bytes) -> str:
    return content[:4096].decode("utf-8", errors="replace").strip()


def _checkpoint_names(config: RunConfig) -> re.Pattern[str]:
    """Build the pattern of the names that ``save_filename`` makes, with the group ``batch``."""
    pattern = ""
    for text, field in re.findall(r"([^{]*)(?:{(\w*)[^{}]*})?", config.save_filename):
        pattern += re.escape(text)
        if field == "run_name":
            pattern += re.escape(config.run_name)
        elif field:
            is_batch = field == "batch" and "<batch>" not in pattern
            pattern += r"(?P<batch>\d+)" if is_batch else r"\d+"
    return re.compile(pattern if "<batch>" in pattern else r"(?P<batch>\d+)(?!)")
