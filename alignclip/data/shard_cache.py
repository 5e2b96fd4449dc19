"""Shards kept in a local folder: only what this program put there, and can put there again, is ever deleted.

Streaming deletes whatever lies where it reads: with a cache limit the only copy of a set, and at the start what it
takes for left-overs. Here every file that was downloaded or decompressed is written down in a hidden file beside the
shards. Other files are never deleted and don't count towards the limit: a set without a remote, a remote that is the
same folder, a copy that somebody made by hand, a folder named by mistake.

Streaming 0.13: ``Stream.prepare_shard``, ``Stream.get_shards``, ``Stream.get_index_size``, ``Stream._download_file``,
``Reader.set_up_local``, ``Reader.get_max_size``, ``Reader._evict_raw`` and ``Reader._evict_zip`` are replaced or used.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from streaming import Stream
from streaming.base.format import FileInfo, Reader
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.world import World

from alignclip.data.mds_index import INDEX, read_shards
from alignclip.data.mds_reader import decompress_to

NOTE = ".alignclip-cache"  # a line of JSON for each file: name, time of change in ns, bytes
_reading = threading.Lock()  # of notes: Streaming's threads ask at the same time
os.register_at_fork(
    before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release
)
Seal = tuple[int, int]  # time of change in ns and bytes, by which a file is known again


class ShardCache:
    """The files of a folder that were put there by this program, of this or an earlier run.

    Args:
        folder: where the shards lie.
        source: path or URL of the folder that they come from; None where they come from nowhere.
        is_own: whether the whole folder is this program's own, whatever lies there.
    """

    def __init__(self, folder: str, source: str | None, is_own: bool) -> None:
        self.folder, self.source, self.is_own = Path(folder), source, is_own
        self._seals: dict[str, Seal] = {}
        self._read = 0  # bytes of the note

    def add(self, name: str) -> None:
        """Write down a file that was just put there."""
        if (seal := self._seal(name)) is None:
            return
        line = json.dumps([name, *seal]) + "\n"
        with suppress(OSError):  # then the file stays: that is the safe side
            descriptor = os.open(self.folder / NOTE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line.encode())  # in one piece: other processes write, too
            finally:
                os.close(descriptor)

    def may_delete(self, name: str, made_from: str | None = None) -> bool:
        """Whether a file is there, was put there by this program, and can be put there again.

        Args:
            name: of the file.
            made_from: name of the compressed file from which it can be made as well.
        """
        seal = self._seal(name)
        if seal is None or not (self.is_own or self._known(name) == seal):
            return False
        if self._can_be_fetched(name):
            return True
        return made_from is not None and (
            self._can_be_fetched(made_from) or (self.folder / made_from).is_file()
        )

    def forget_what_is_gone(self) -> None:
        """Shorten the note to the files that are still there; before anybody reads from the folder."""
        self._known("")
        kept = {name: seal for name, seal in self._seals.items() if self._seal(name) == seal}
        if kept == self._seals:
            return
        lines = "".join(json.dumps([name, *seal]) + "\n" for name, seal in kept.items())
        partial = self.folder / f"{NOTE}.{os.getpid()}"
        with suppress(OSError):
            partial.write_text(lines, encoding="utf-8")
            partial.replace(self.folder / NOTE)
            self._seals, self._read = kept, len(lines.encode())

    def _seal(self, name: str) -> Seal | None:
        """What a file is known by; None where there is no file, or a link to one elsewhere."""
        try:
            stat = os.lstat(self.folder / name)
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size) if Path(self.folder / name).is_file() else None

    def _known(self, name: str) -> Seal | None:
        """The seal that the note has of a file; other processes may have added to the note."""
        with _reading, suppress(OSError), (self.folder / NOTE).open("rb") as note:
            note.seek(self._read)
            lines = note.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            self._read += len(lines)
            for line in lines.splitlines():
                with suppress(ValueError, TypeError):  # half a line of a machine that went down
                    known, changed, size = json.loads(line)
                    self._seals[known] = changed, size
        return self._seals.get(name)

    def _can_be_fetched(self, name: str) -> bool:
        """Whether the file's source is somewhere else."""
        if self.source is None or urlparse(self.source).scheme:
            return self.source is not None
        source, here = Path(self.source, name), self.folder / name
        try:
            return source.is_file() and not (here.exists() and source.samefile(here))
        except OSError:
            return False


class CachedShard(MDSReader):
    """A shard of which only the files in ``cache`` are counted and deleted."""

    cache: ShardCache

    def set_up_local(self, listing: set[str], safe_keep_zip: bool) -> int:
        """Bytes of its files that the cache may delete. Nothing is deleted, as Streaming would."""
        return sum(info.bytes for info in self._deletable())

    def get_max_size(self) -> int:
        """Bytes by which preparing the shard makes the cache grow at most."""
        raw, compressed = self.raw_data, self.zip_data
        if self.is_foreign():
            return 0
        return raw.bytes + (
            compressed.bytes if compressed and not self._is_foreign(compressed) else 0
        )

    def can_be_evicted(self) -> bool:
        """Whether evicting the shard would delete anything."""
        return bool(self._deletable())

    def is_foreign(self) -> bool:
        """Whether somebody else put the uncompressed shard there."""
        return self._is_foreign(self.raw_data)

    def _is_foreign(self, info: FileInfo) -> bool:
        return (self.cache.folder / info.basename).is_file() and info not in self._deletable()

    def _deletable(self) -> list[FileInfo]:
        compressed = self.zip_data
        found = []
        if self.cache.may_delete(
            self.raw_data.basename, compressed.basename if compressed else None
        ):
            found.append(self.raw_data)
        if compressed and self.cache.may_delete(compressed.basename):
            found.append(compressed)
        return found

    def _evict_raw(self) -> int:
        return self._delete(self.raw_data)

    def _evict_zip(self) -> int:
        return self._delete(self.zip_data) if self.zip_data else 0

    def _delete(self, info: FileInfo) -> int:
        """Delete a file that the cache may delete; return its bytes according to the index."""
        if info not in self._deletable():
            return 0
        (self.cache.folder / info.basename).unlink(missing_ok=True)
        return info.bytes


class CachedStream(Stream):
    """A Stream whose folder is a :class:`ShardCache`; with Streaming's arguments.

    Args:
        is_own: whether the whole local folder is this program's own, whatever lies there.
    """

    def __init__(self, *, is_own: bool = False, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]
        self.is_own = is_own

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Fetch the index and check it; return its shards.

        Raises:
            ValueError: a shard can't be read, or not safely.
        """
        super().get_shards(world, allow_unsafe_types)
        path = Path(self.local, self.split, INDEX)
        source = None if self.remote is None else f"{self.remote}/{self.split}"
        self.cache = ShardCache(str(path.parent), source, self.is_own)
        if world.is_local_leader:
            self.cache.forget_what_is_gone()
        try:
            entries = read_shards(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        shards: list[Reader] = []
        for entry in entries:
            shard = CachedShard.from_json(self.local, self.split, dict(entry))
            shard.cache = self.cache
            shards.append(shard)
        return shards

    def foreign_shards(self, shards: Sequence[Reader]) -> str:
        """Say how many shards of a set that has a remote are no cache; empty where all are."""
        count = sum(isinstance(shard, CachedShard) and shard.is_foreign() for shard in shards)
        if not count or self.remote is None:
            return ""
        return (
            f"{self.cache.folder}: {count:,} of {len(shards):,} shards were put there by somebody else; they stay, and "
            "data.cache_limit doesn't count them"
        )

    def get_index_size(self) -> int:
        """Bytes of the index that count towards the cache limit: none where the set is no cache."""
        return 0 if self.remote is None else super().get_index_size()

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch and decompress a shard as far as its files aren't there.

        Returns:
            bytes by which the cache has grown.

        Raises:
            ValueError: a file isn't what the index says; one that was fetched is gone again.
            Exception: of the storage's client.
        """
        assert isinstance(shard, CachedShard)
        grown = 0
        raw, compressed = shard.raw_data, shard.zip_data
        if not self._is_there(raw):
            stored = compressed or raw
            if not self._is_there(stored):
                grown += self._fetch(stored)
            if compressed:
                grown += self._decompress(raw, compressed, str(shard.compression))
        if compressed and not self.safe_keep_zip:
            grown -= shard._evict_zip()
        return grown

    def _is_there(self, info: FileInfo) -> bool:
        """Whether a file is there; one of the cache that was cut off is removed.

        Raises:
            ValueError: the file has another size than the index says, and can't be fetched again.
        """
        path = self.cache.folder / info.basename
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if size != info.bytes and self.cache.may_delete(info.basename):
            path.unlink(missing_ok=True)
            return False
        if size != info.bytes:
            raise ValueError(
                f"{path} has {size:,} bytes, and the set's index says {info.bytes:,}; remove the file"
            )
        return True

    def _fetch(self, info: FileInfo) -> int:
        """Download a file; return its bytes."""
        self._check_place(info)
        path = self.cache.folder / info.basename
        self._download_file(info.basename)
        try:
            self._check(info, path)
        except ValueError:
            path.unlink(missing_ok=True)  # or the next run would take it for whole
            raise
        self.cache.add(info.basename)
        return info.bytes

    def _decompress(self, raw: FileInfo, compressed: FileInfo, algorithm: str) -> int:
        """Decompress a shard beside its compressed file; return the bytes written."""
        self._check_place(raw)
        source, target = self.cache.folder / compressed.basename, self.cache.folder / raw.basename
        self._check(compressed, source)
        try:
            data = decompress_to(raw.bytes, algorithm, source.read_bytes())
        except ValueError as error:
            raise ValueError(f"{source} {error}") from None
        partial = Path(f"{target}.tmp")
        partial.unlink(missing_ok=True)
        partial.write_bytes(data)
        partial.replace(target)
        self.cache.add(raw.basename)
        return raw.bytes

    def _check(self, info: FileInfo, path: Path) -> None:
        """Compare a file with the index.

        Raises:
            ValueError: size or hash differ, or the index has no such hash.
        """
        if (size := path.stat().st_size) != info.bytes:
            raise ValueError(f"{path} has {size:,} bytes, and the set's index says {info.bytes:,}")
        if self.validate_hash:
            if self.validate_hash not in info.hashes:
                raise ValueError(
                    f"the set has no hashes {self.validate_hash} (data.validate_hash) but {sorted(info.hashes)}"
                )
            if get_hash(self.validate_hash, path.read_bytes()) != info.hashes[self.validate_hash]:
                raise ValueError(f"Checksum failure: {path}")

    def _check_place(self, info: FileInfo) -> None:
        """Nothing is written through a link that leads out of the folder.

        Raises:
            ValueError: a link does.
        """
        folder = self.cache.folder.resolve()
        path = self.cache.folder / info.basename
        if not path.parent.resolve().is_relative_to(folder):
            raise ValueError(f"{path.parent} is a link to another folder; nothing is written there")
        partial = Path(f"{path}.tmp")
        if partial.is_symlink():
            partial.unlink()
