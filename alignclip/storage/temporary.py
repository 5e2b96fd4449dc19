"""Temporary folders, which go even after a kill: a later process of this machine removes them."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from alignclip.storage.words import cannot

STALE = 3600.0  # seconds since a folder of a process that is gone was used


def _this_machine() -> str:
    """Name this machine or container, as only there a process id counts; TMPDIR may be shared."""
    namespace = Path("/proc/self/ns/pid")
    name = f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}"
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


HOST = _this_machine()


def prefix() -> str:
    """Return what begins the names of this process's folders, by which a later one knows them."""
    return f"alignclip-{HOST}-{os.getpid()}-"


def temporary_directory(
    below: Path | None = None, name: str | None = None
) -> tempfile.TemporaryDirectory[str]:
    """Make an empty folder that goes with the object that is returned.

    Args:
        below: the folder that it is made in, and that is made before; TMPDIR where it isn't given.
            On one file system, a rename is all that is left to do.
        name: begins the folder's name; :func:`prefix` where it isn't given.

    Raises:
        UserError: the folder can't be made.
    """
    remove_stale_folders()
    with cannot(f"write to {below or tempfile.gettempdir()}"):
        if below:
            below.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(
            prefix=name or prefix(), dir=below, ignore_cleanup_errors=True
        )


@contextmanager
def temporary_folder(below: Path | None = None, name: str | None = None) -> Iterator[Path]:
    """Give an empty folder that goes when the block ends.

    Args:
        below, name: as of :func:`temporary_directory`.

    Raises:
        UserError: the folder can't be made.
    """
    with temporary_directory(below, name) as folder:
        yield Path(folder)


@cache
def remove_stale_folders() -> None:
    """Remove the folders of this machine's killed processes, an hour after their use; only once.

    A process that is killed can't remove its folders, and each may hold a checkpoint.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"alignclip-{HOST}-*-*"):
        import psutil

        pid = folder.name.split("-")[2]
        with suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > STALE
            if pid.isdecimal() and is_old and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
