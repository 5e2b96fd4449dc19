"""Write a local file as a whole or not at all: beside its place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignclip.storage.trouble import is_disk_full
from alignclip.storage.words import StorageError, why_not_written

# A file in the making lies beside its place. A killed process leaves it to the next one.
UNFINISHED = ".{name}.partial"
PROBE = ".alignclip-probe-"  # begins the name of a folder that tries whether a place is writable
STALE_PROBE = 3600.0  # seconds
# Errors of fsync where the file system has none
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF}
# Errors of a rename over a file, on network drives and in buckets that are mounted
NO_RENAME = {*UNSUPPORTED, errno.EEXIST, errno.EPERM, errno.EACCES, errno.EXDEV} - {errno.EBADF}


@contextmanager
def write_whole(path: Path, needed: int | None = None, durable: bool = True) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; the file appears at ``path`` when the block ends.

    Where the block raises, ``path`` is as it was, and nothing is left beside it.

    Args:
        path: where the file will be; its folder is made.
        needed: bytes, where they are known, for the message about a full disk.
        durable: have the bytes on the disk before the name. A rename may survive a power cut that
            the bytes don't survive.

    Raises:
        StorageError: the disk is full or may not be written to; with the place, free and needed
            bytes.
        Exception: any other of the block.
    """
    partial = path.with_name(UNFINISHED.format(name=path.name))
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
        with suppress(OSError):
            needed = needed or partial.stat().st_size
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        # another error is about the contents, not about the place
        named = error.filename if isinstance(error, OSError) else None
        is_place = named is not None and Path(os.fsdecode(named)) in (partial, path, path.parent)
        if isinstance(error, Exception) and (is_place or is_disk_full(error)):
            raise StorageError("write", str(path), why_not_written(error, path, needed)) from error
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all.

    Raises:
        StorageError: the disk is full or may not be written to.
    """
    with write_whole(path, len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def leaving_nothing(place: str | None) -> Iterator[None]:
    """Remove the empty folders that the block has made, where the block raises.

    Args:
        place: the folder that the block makes, with its parents. A URL and None are left alone.
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


def check_folder_writable(folder: Path) -> None:
    """Write a real file into a folder, or where the folder would be made, and remove it again.

    Raises:
        StorageError: the folder can't be made or written to.
    """
    ways = (folder, *folder.absolute().parents)
    there = next(one for one in ways if one.exists() or one.is_symlink())
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file, not a folder")
        _remove_stale_probes(there)
        with (
            tempfile.TemporaryDirectory(prefix=PROBE, dir=there) as probe,
            write_whole(Path(probe, "file")) as file,
        ):
            file.write_bytes(b"\0" * 4096)  # a full disk makes empty files still
    except (OSError, StorageError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        why = why_not_written(cause or error, there / "probe")
        raise StorageError("write", str(folder), why) from None


def _remove_stale_probes(folder: Path) -> None:
    """Remove the probes that killed processes have left; a probe of a live one is seconds old."""
    for probe in folder.glob(f"{PROBE}*"):
        with suppress(OSError):
            if time.time() - probe.stat().st_mtime > STALE_PROBE:
                shutil.rmtree(probe)


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
    """Put a file in its place. Some file systems can't rename over a file, others not at all."""
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
