"""A file that is there as a whole or not at all: written beside its place, then renamed; and whether there is room."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignclip.errors import one_line
from alignclip.storage.trouble import FULL_ERRORS, chain
from alignclip.storage.words import StorageError

PARTIAL = ".{name}.partial"  # a file in the making, beside its place; a killed process leaves it to the next one
UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EBADF,
}  # by fsync, where it can't be had
# by rename over a file, on network drives and in buckets that are mounted
NO_RENAME = {
    errno.EEXIST,
    errno.EPERM,
    errno.EACCES,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EXDEV,
}
# PyTorch, safetensors and PIL have words of their own for a full disk
FULL_WORDS = re.compile(
    r"file write failed|unexpected pos|No space left|os error (28|122|27)|Disk quota exceeded"
)


@contextmanager
def write_whole(path: Path, needed: int | None = None, durable: bool = True) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; the file appears at ``path`` when the block ends.

    Where the block raises, ``path`` is as it was, and nothing is left beside it.

    Args:
        path: where the file will be; its folder is made.
        needed: bytes, where they are known, for the message about a full disk.
        durable: have the bytes on the disk before the name is: a rename may survive a power cut that what
            it names does not.

    Raises:
        StorageError: the disk is full or may not be written to; with the place, free and needed bytes.
        Exception: any other of the block.
    """
    partial = path.with_name(PARTIAL.format(name=path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        yield partial
        if durable:
            to_disk(partial)
        _rename(partial, path)
        if durable:
            to_disk(path.parent)
    except BaseException as error:
        needed = needed or _size(partial)
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, Exception) and _is_about(error, (partial, path, path.parent)):
            raise StorageError("write", str(path), why_not_written(error, path, needed)) from error
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all.

    Raises:
        StorageError: the disk is full or may not be written to.
    """
    with write_whole(path, len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8")


def why_not_written(error: BaseException, path: Path, needed: int | None = None) -> str:
    """Say in one line why a local file couldn't be written, with the free bytes where the disk is full.

    Args:
        error: of whatever library was writing.
        path: what was being written.
        needed: bytes of the file, or those that were written before it failed.
    """
    wants = f", {_bytes(needed)} needed" if needed else ""
    for one in chain(error):
        number = one.errno if isinstance(one, OSError) else None
        text = one_line(one)
        if number == errno.EDQUOT or "Disk quota" in text:
            return f"the quota of the file system of {path.parent} is used up{wants}"
        if number == errno.EFBIG or "File too large" in text:
            return f"File too large: more than a limit of {path.parent} or of this process (ulimit -f) allows{wants}"
        if number == errno.ENOSPC or (number is None and FULL_WORDS.search(str(one))):
            return f"no space left in {path.parent}: {_bytes(free_bytes(path))} free{wants}"
    return str(getattr(error, "strerror", None) or one_line(error))


def free_bytes(path: Path) -> int:
    """The bytes that are free where a path lies or would lie."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def check_folder_writable(folder: Path) -> None:
    """Write a real file into a folder, or where the folder would be made, and remove it again.

    Raises:
        StorageError: the folder can't be made or written to.
    """
    there = next(
        one for one in (folder, *folder.absolute().parents) if one.exists() or one.is_symlink()
    )
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file, not a folder")
        with tempfile.TemporaryDirectory(prefix=".alignclip-", dir=there) as probe:
            before = Path(probe, "a")
            before.write_bytes(b"\0" * 4096)  # a full disk makes empty files still
            to_disk(before)
            before.replace(Path(probe, "b"))
    except OSError as error:
        raise StorageError("write", str(folder), why_not_written(error, there / "probe")) from None


@contextmanager
def leaving_nothing(place: str | None) -> Iterator[None]:
    """Remove the folder ``place`` and its parents that the block has made and left empty, where the block raises.

    Args:
        place: a folder that need not exist. A URL and None are left alone.
    """
    path = Path(place) if place and "://" not in place else None
    new = [one for one in (path, *path.parents) if not one.exists()] if path else []
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first folder that holds something, or was never made
            for one in new:
                one.rmdir()
        raise


def to_disk(path: Path) -> None:
    """Have the system write a file or a folder out, where it can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _rename(partial: Path, path: Path) -> None:
    """Put a file in its place. Some file systems can't rename over a file, and some can't rename at all."""
    try:
        partial.replace(path)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        path.unlink(missing_ok=True)
        try:
            partial.rename(path)
        except OSError:
            shutil.copyfile(partial, path)
            partial.unlink()


def _is_about(error: Exception, paths: tuple[Path, ...]) -> bool:
    """Whether the file system of what is written is to blame, and not what was to be written."""
    if (
        isinstance(error, OSError)
        and error.filename is not None
        and Path(os.fsdecode(error.filename)) in paths
    ):
        return True
    return any(
        (isinstance(one, OSError) and one.errno in FULL_ERRORS)
        or (not isinstance(one, OSError) and FULL_WORDS.search(str(one)))
        for one in chain(error)
    )


def _size(path: Path) -> int | None:
    """The bytes that have been written, where any have."""
    try:
        return path.stat().st_size or None
    except OSError:
        return None


def _bytes(count: int | None) -> str:
    """A number of bytes for people: the number itself below a megabyte."""
    value = float(count or 0)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
