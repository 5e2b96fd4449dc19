"""Keep shards in a local folder, and delete only what this program can put there again.

Streaming 0.13 deletes whatever lies where it reads: with a cache limit the only copy of a set,
and at the start whatever looks like a left-over. Here every file that was downloaded or
decompressed is written down in a hidden note beside the shards. Other files are never deleted and
don't count towards the limit: a set without a remote, a remote that is the same folder, a copy that
somebody made by hand, a folder named by mistake.
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

from streaming.base.format import FileInfo
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import _get_coder

from alignclip.checked_json import parse_json

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
