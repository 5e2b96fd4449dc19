"""Keep shards in a local folder, and delete only what this program can put there again.

Streaming 0.13 deletes whatever lies where it reads: with a cache limit the only copy of a set,
and at the start whatever looks like a left-over. Here every file that was downloaded or
decompressed is written down in a hidden note beside the shards. Other files are never deleted and
don't count towards
the limit: a set without a remote, a remote that is the same folder, a copy that somebody made by
hand, a folder named by mistake.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from streaming import Stream
from streaming.base.format import FileInfo, Reader
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import _get_coder
from streaming.base.hashing import get_hash
from streaming.base.world import World

from alignclip.checked_json import parse_json
from alignclip.data.mds_index import INDEX, read_shards
from alignclip.data.mds_reader import decompress_to
from alignclip.errors import UserError
from alignclip.storage import PATIENCE, open_store, patiently, slowness_said

NOTE = ".alignclip-cache"  # a line of JSON for each file: name, time of change in ns, bytes
_reading = threading.Lock()  # of notes: Streaming's threads ask at the same time
os.register_at_fork(
    before=_reading.acquire, after_in_parent=_reading.release, after_in_child=_reading.release
)
_BOUNDS, _SIZE = struct.Struct("<2I"), struct.Struct("<I")  # as MDS writes them
Seal = tuple[int, int]  # time of change in ns and bytes, by which a file is known again


class ShardCache:
    """The files of a folder that this program has put there, in this or an earlier run.

    Args:
        folder: where the shards lie.
        source: path or URL of the folder that they come from; None where they come from nowhere.
        is_own: whether the whole folder is this program's own, whatever lies there.
    """

    def __init__(self, folder: Path, source: str | None, is_own: bool) -> None:
        self.folder, self.source, self.is_own = folder, source, is_own
        self._seals: dict[str, Seal] = {}
        self._read = 0  # bytes of the note

    def add(self, name: str) -> None:
        """Write down a file that was just put there."""
        if (seal := self._seal(name)) is None:
            return
        # a file without a note stays: that is the safe side
        with suppress(OSError), (self.folder / NOTE).open("ab", buffering=0) as note:
            note.write(_note_line(name, seal).encode())  # in one piece: other processes write, too

    def may_delete(self, name: str, made_from: str | None = None) -> bool:
        """Return whether this program has put a file there and can put it there again.

        Args:
            name: of the file.
            made_from: name of the compressed file from which it can be made as well.
        """
        seal = self._seal(name)
        if seal is None or not (self.is_own or self._known(name) == seal):
            return False
        if made_from and ((self.folder / made_from).is_file() or self._can_be_fetched(made_from)):
            return True
        return self._can_be_fetched(name)

    def forget_what_is_gone(self) -> None:
        """Shorten the note to the files that are still there, before anybody reads."""
        self._known("")
        kept = {name: seal for name, seal in self._seals.items() if self._seal(name) == seal}
        if kept == self._seals:
            return
        lines = "".join(_note_line(name, seal) for name, seal in kept.items())
        partial = self.folder / f"{NOTE}.{os.getpid()}"
        with suppress(OSError):
            partial.write_text(lines, encoding="utf-8")
            partial.replace(self.folder / NOTE)
            self._seals, self._read = kept, len(lines.encode())

    def _seal(self, name: str) -> Seal | None:
        """Return how a file, or the link to it, looks now; None where there is no file."""
        path = self.folder / name
        try:
            stat = path.lstat()
        except OSError:
            return None
        return (stat.st_mtime_ns, stat.st_size) if path.is_file() else None

    def _known(self, name: str) -> Seal | None:
        """Return how the note describes a file; other processes may have added lines."""
        with _reading, suppress(OSError), (self.folder / NOTE).open("rb") as note:
            note.seek(self._read)
            lines = note.read()
            lines = lines[: lines.rfind(b"\n") + 1]
            self._read += len(lines)
            for line in lines.splitlines():
                with suppress(ValueError, TypeError):  # half a line of a machine that went down
                    known, changed, size = parse_json(line)
                    self._seals[known] = changed, size
        return self._seals.get(name)

    def _can_be_fetched(self, name: str) -> bool:
        """Return whether the file's source is somewhere else."""
        if self.source is None or urlparse(self.source).scheme:
            return self.source is not None
        source, here = Path(self.source, name), self.folder / name
        try:
            return source.is_file() and not (here.exists() and source.samefile(here))
        except OSError:
            return False


def _note_line(name: str, seal: Seal) -> str:
    return json.dumps([name, *seal]) + "\n"


class CachedShard(MDSReader):
    """A shard of which only the files that ``cache`` may delete are counted and deleted."""

    cache: ShardCache

    @cached_property
    def _place(self) -> str:
        return str(self.cache.folder / self.raw_data.basename)

    @cached_property
    def _columns(self) -> list[tuple[str, Any, int | None]]:
        """Name, decoder and fixed size of each column; Streaming makes the decoders anew."""
        parts = zip(self.column_names, self.column_encodings, self.column_sizes, strict=True)
        return [(name, _get_coder(encoding), size) for name, encoding, size in parts]

    def get_sample_data(self, idx: int) -> bytes:
        """Return the bytes of a sample, by half of the system's calls that Streaming makes.

        Raises:
            FileNotFoundError: the shard is not there.
            IndexError: the shard has no such sample.
        """
        file = os.open(self._place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            begin, end = _BOUNDS.unpack(os.pread(file, _BOUNDS.size, 4 * (1 + idx)))
            data = os.pread(file, end - begin, begin)
        except struct.error:  # behind the end of the file
            data = b""
        finally:
            os.close(file)
        if not data:
            raise IndexError(f"{self._place} has no sample {idx}")
        return data

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """Decode the columns of a sample."""
        begin, sizes = 0, []
        for _, _, size in self._columns:
            if not size:
                (size,) = _SIZE.unpack_from(data, begin)
                begin += _SIZE.size
            sizes.append(size)
        sample = {}
        for (name, decoder, _), size in zip(self._columns, sizes, strict=True):
            sample[name] = decoder.decode(data[begin : begin + size])
            begin += size
        return sample

    def deletable(self) -> list[FileInfo]:
        """Return the shard's files that the cache may delete."""
        raw, compressed = self.raw_data, self.zip_data
        made_from = compressed.basename if compressed else None
        found = [raw] if self.cache.may_delete(raw.basename, made_from) else []
        if compressed and self.cache.may_delete(compressed.basename):
            found.append(compressed)
        return found

    def is_foreign(self, info: FileInfo) -> bool:
        """Return whether somebody else put a file of the shard there."""
        return (self.cache.folder / info.basename).is_file() and info not in self.deletable()

    def set_up_local(self, listing: set[str], safe_keep_zip: bool) -> int:
        """Return the bytes of the shard's files that the cache may delete, and delete none."""
        return sum(info.bytes for info in self.deletable())

    def get_max_size(self) -> int:
        """Return the bytes by which preparing the shard makes the cache grow at most."""
        if self.is_foreign(self.raw_data):
            return 0
        files = [self.raw_data, self.zip_data]
        return sum(info.bytes for info in files if info and not self.is_foreign(info))

    def evict(self) -> int:
        """Delete the shard's files that the cache may delete; return their bytes."""
        return sum(map(self.delete, self.deletable()))

    def delete(self, info: FileInfo) -> int:
        """Delete a file; return its bytes according to the index."""
        (self.cache.folder / info.basename).unlink(missing_ok=True)
        return info.bytes


class CachedStream(Stream):
    """A Stream whose folder is a :class:`ShardCache`; with Streaming's arguments.

    Args:
        is_own: whether the whole local folder is this program's own, whatever lies there.
    """

    def __init__(self, *, is_own: bool = False, **arguments: Any) -> None:
        # the other ranks of a machine wait for the index, which the first one waits for
        super().__init__(**arguments, download_timeout=2 * PATIENCE)
        self.is_own = is_own

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Fetch the index and check it; return its shards.

        Raises:
            ValueError: a shard can't be read, or not safely.
        """
        super().get_shards(world, allow_unsafe_types)
        path = Path(self.local, self.split, INDEX)
        source = None if self.remote is None else f"{self.remote}/{self.split}".rstrip("/")
        self.cache = ShardCache(path.parent, source, self.is_own)
        if world.is_local_leader:
            self.cache.forget_what_is_gone()
        try:
            entries = read_shards(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        shards = [CachedShard.from_json(self.local, self.split, {**entry}) for entry in entries]
        for shard in shards:
            shard.cache = self.cache
        return [*shards]

    def get_index_size(self) -> int:
        """Return the bytes of the index that count towards the limit: none without a remote."""
        return 0 if self.remote is None else super().get_index_size()

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch and decompress a shard as far as its files aren't there.

        Returns:
            bytes by which the cache has grown.

        Raises:
            UserError: a file isn't what the index says, and one that was fetched is gone again; or
                as :meth:`_download_file`.
        """
        assert isinstance(shard, CachedShard)
        grown = 0
        raw, compressed = shard.raw_data, shard.zip_data
        stored = compressed or raw
        if not self._is_there(raw):
            if not self._is_there(stored):
                grown += self._fetch(stored)
            if compressed:
                grown += self._decompress(raw, compressed, str(shard.compression))
        if compressed and not self.safe_keep_zip and compressed in shard.deletable():
            grown -= shard.delete(compressed)
        return grown

    def _is_there(self, info: FileInfo) -> bool:
        """Return whether a file is there; remove one of the cache that was cut off.

        Raises:
            UserError: the file has another size than the index says, and can't be fetched again.
        """
        path = self.cache.folder / info.basename
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if size == info.bytes:
            return True
        if not self.cache.may_delete(info.basename):
            raise UserError(f"{path} {_wrong_size(size, info)}; remove the file")
        path.unlink(missing_ok=True)
        return False

    def _fetch(self, info: FileInfo) -> int:
        """Download a file, once more where it arrives damaged; return its bytes."""
        path, where = self._place_for(info), f"{self.cache.source}/{info.basename}"
        for is_last in (False, True):
            self._download_file(info.basename)
            if (why := self._damage(info, path)) is None:
                break
            path.unlink(missing_ok=True)  # or the next run would take it for whole
            if is_last:
                raise UserError(f"{where} is damaged, fetched twice: {why}")
        self.cache.add(info.basename)
        return info.bytes

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Download a file of the set, and wait where its store is away.

        Streaming asks so many times, whatever is wrong: minutes for a shard that isn't there, and
        two minutes only for a store that is away.

        Raises:
            UserError: the file isn't there or may not be read; or the store is away for too long.
        """
        path = Path(self.local, self.split, to_basename or from_basename)
        if path.exists():
            return str(path)
        if self.remote is None:
            raise UserError(f"{path} is not there, and the set has no remote")
        store = open_store(f"{self.remote}/{self.split}")

        def download() -> None:
            with slowness_said(store.place):
                store.download(from_basename, path)

        patiently(download, store.place)
        return str(path)

    def _decompress(self, raw: FileInfo, compressed: FileInfo, algorithm: str) -> int:
        """Decompress a shard beside its compressed file; return the bytes written."""
        source, target = self.cache.folder / compressed.basename, self._place_for(raw)
        if why := self._damage(compressed, source):
            raise UserError(f"{source} is damaged: {why}")
        try:
            data = decompress_to(raw.bytes, algorithm, source.read_bytes())
        except ValueError as error:
            raise UserError(f"{source} {error}") from None
        partial = Path(f"{target}.tmp")
        partial.write_bytes(data)
        partial.replace(target)
        self.cache.add(raw.basename)
        return raw.bytes

    def _damage(self, info: FileInfo, path: Path) -> str | None:
        """Say how a file differs from what the index says, or None.

        Raises:
            UserError: the index has no such hash.
        """
        if (size := path.stat().st_size) != info.bytes:
            return _wrong_size(size, info)
        if not self.validate_hash:
            return None
        if (expected := info.hashes.get(self.validate_hash)) is None:
            raise UserError(
                f"the set has no hashes {self.validate_hash} (data.validate_hash) "
                f"but {sorted(info.hashes)}"
            )
        is_whole = get_hash(self.validate_hash, path.read_bytes()) == expected
        return None if is_whole else f"its {self.validate_hash} is not the index's"

    def _place_for(self, info: FileInfo) -> Path:
        """Return the path of a file to write, through no link that leads out of the folder.

        Raises:
            UserError: the folder of the file is a link to another folder.
        """
        path = self.cache.folder / info.basename
        if not path.parent.resolve().is_relative_to(self.cache.folder.resolve()):
            raise UserError(f"{path.parent} is a link to another folder; nothing is written there")
        Path(f"{path}.tmp").unlink(missing_ok=True)
        return path


def _wrong_size(size: int, info: FileInfo) -> str:
    return f"has {size:,} bytes, and the set's index says {info.bytes:,}"
