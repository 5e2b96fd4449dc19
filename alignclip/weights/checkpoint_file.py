"""A checkpoint as a file: the checksum at its end says whether the file is as it was written.

PyTorch writes a zip archive, and a zip archive may end with a comment. The comment here is
``alignclip sha256 `` and the SHA-256 of everything before these 64 digits. The checksum is in the
file because a second file could be older than the first, and get lost on the way. Every reader of
PyTorch's files reads these, too; ``head -c -64 FILE | sha256sum`` computes the digits.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from alignclip.errors import NOT_SAVED, UserError, one_line
from alignclip.storage import StorageError, why_not_written, write_whole

TAG = b"alignclip sha256 "
DIGITS = 64
END_RECORD = b"PK\x05\x06"  # starts the last 22 bytes of a zip archive without a comment
END_LENGTH = 22
# before each record of a zip archive: its signature, the lengths of its name and of an extra field
LOCAL_HEADER = struct.Struct("<4s22xHH")
DESCRIPTORS = {0, 16, 24}  # bytes that may follow a record
COMMENT = len(TAG) + DIGITS
CHUNK = 1 << 22  # bytes that are read at a time
GOES_ON = "What was saved before is whole, and the same command goes on from there"
GONE = "it is not there"
CANT_BE_READ = "it can't be read"  # and may be whole
WORTH_A_THREAD = 1 << 16  # bytes from which a thread is worth its while


class NotSavedError(UserError):
    """A checkpoint couldn't be written; the run can go on from the one before."""

    status = NOT_SAVED


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its checksum. The file is there as a whole or not at all.

    Raises:
        NotSavedError: the file system refuses, for instance because it is full; with free and
            needed bytes.
    """
    needed = 0
    try:
        # to wait for the disk takes seconds, and after a power cut the checksum tells
        with (
            write_whole(path, durable=False) as partial,
            partial.open("wb", buffering=0) as file,
            ThreadPoolExecutor(1) as pool,
        ):
            summed = _SummedFile(file, pool)
            torch.save(content, summed)  # type: ignore[arg-type]  # it writes and flushes alone
            needed = summed.size + COMMENT
            summed.finish()
    except (OSError, StorageError) as error:
        why = why_not_written(error, path, needed)
        raise NotSavedError(f"can't save {path}: {why}. {GOES_ON}") from error


def damage(path: Path) -> str | None:
    """Say why a file is not the checkpoint that was written; None where it is.

    A checkpoint of an earlier version has no checksum of its own. It is whole where it is a
    complete zip archive in which each record has the CRC that was written with it.
    """
    try:
        if (is_right := has_right_checksum(path)) is not None:
            return None if is_right else "its checksum is wrong"
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - END_LENGTH))
            end = file.read()
        if end.startswith(END_RECORD) and end.endswith(b"\0\0"):
            return _damaged_record(path)
        return "it is only a part of a checkpoint, or none" if size else "it is empty"
    except OSError as error:
        return f"{CANT_BE_READ}: {error.strerror or one_line(error)}"


def has_right_checksum(path: Path) -> bool | None:
    """Tell whether a file is as :func:`write_checkpoint` wrote it.

    None of a file without a checksum.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - COMMENT))
        comment = file.read()
        if not comment.startswith(TAG):
            return None
        file.seek(0)
        return _digest(file, size - DIGITS).encode() == comment[-DIGITS:]


def _digest(file: BinaryIO, length: int) -> str:
    digest = hashlib.sha256()
    while length and (chunk := file.read(min(length, CHUNK))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()


def _damaged_record(path: Path) -> str | None:
    """Check each record of an archive by its CRC, and that there is nothing between records."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            end, entries = 0, sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            for entry in entries:
                if (
                    entry.compress_type != zipfile.ZIP_STORED
                    or entry.compress_size != entry.file_size
                ):
                    return "it is a compressed archive, which PyTorch doesn't write"
                if entry.header_offset - end not in DESCRIPTORS:
                    return "a record is missing"
                file.seek(entry.header_offset)
                _, *lengths = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
                end = file.tell() + sum(lengths) + entry.file_size
            if archive.start_dir - end not in DESCRIPTORS:
                return "a record is missing"
            name = archive.testzip()
    except Exception as error:  # what a broken archive raises depends on where it is broken
        return f"it is broken: {one_line(error)}"
    return name and f"its record {name} is not as it was written"


class _SummedFile:
    """A file for ``torch.save``: counts, hashes and passes on, and keeps back the archive's end.

    The hash is computed beside the writing, in a thread. An error of the file system is raised by
    :meth:`finish`: PyTorch's writer is in C and can't let one through. What comes after it is
    counted, to say how much room is needed.
    """

    def __init__(self, file: FileIO, pool: ThreadPoolExecutor) -> None:
        self.size = 0
        self._file, self._pool = file, pool
        self._digest = hashlib.sha256()
        self._end = b""
        self._error: OSError | None = None

    def write(self, data: memoryview | bytes) -> int:
        """Take what comes next."""
        count = len(data)
        self.size += count
        if self._error is None:
            if count < END_LENGTH:
                data = self._end + bytes(data)
            else:
                self._put(self._end)
            self._put(memoryview(data)[:-END_LENGTH])
            self._end = bytes(data[-END_LENGTH:])
        return count

    def flush(self) -> None:
        """Do nothing: the file has no buffer."""

    def finish(self) -> None:
        """Write the archive's end with the checksum in its comment.

        Raises:
            OSError: of this write or an earlier one.
        """
        if self._error is not None:
            raise self._error
        assert self._end.startswith(END_RECORD), "PyTorch ends its archives with their end record"
        self._put(self._end[:-2] + COMMENT.to_bytes(2, "little") + TAG)
        if self._error is not None:
            raise self._error
        _write_all(self._file, self._digest.hexdigest().encode())

    def _put(self, data: memoryview | bytes) -> None:
        hashed = None
        if len(data) >= WORTH_A_THREAD:
            hashed = self._pool.submit(self._digest.update, data)
        else:
            self._digest.update(data)
        try:
            _write_all(self._file, data)
        except OSError as error:
            self._error = error
        if hashed is not None:
            hashed.result()


def _write_all(file: FileIO, data: memoryview | bytes) -> None:
    """Write it all: a file without a buffer may take only a part at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
