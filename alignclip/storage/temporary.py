"""Temporary folders. Those in TMPDIR go even after a kill: a later process removes them."""

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
    machine, namespace = Path("/etc/machine-id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(machine.read_text("utf-8"))
    with suppress(OSError):
        parts.append(str(namespace.readlink()))
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=4).hexdigest()


HOST = _this_machine()


def own_prefix() -> str:
    """Return what the names of this process's folders begin with, and tell a later process whose
    they are.
    """
    return f"alignclip-{HOST}-{os.getpid()}-"


def make_temporary_folder(
    below: Path | None = None, prefix: str | None = None
) -> tempfile.TemporaryDirectory[str]:
    """Make an empty folder that goes with the object that is returned.

    Args:
        below: the folder that it is made in, and that is made before; TMPDIR where it isn't given.
            On one file system, a rename is all that is left to do.
        prefix: begins the folder's name; :func:`own_prefix` where it isn't given.

    Raises:
        UserError: the folder can't be made.
    """
    if below is None:
        remove_stale_folders()
    with cannot(f"write to {below or _tmpdir()}"):
        if below:
            below.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(
            prefix=prefix or own_prefix(), dir=below, ignore_cleanup_errors=True
        )


@contextmanager
def temporary_folder(below: Path | None = None, prefix: str | None = None) -> Iterator[Path]:
    """Give an empty folder that goes when the block ends.

    Args:
        below, prefix: as of :func:`make_temporary_folder`.

    Raises:
        UserError: the folder can't be made.
    """
    with make_temporary_folder(below, prefix) as folder:
        yield Path(folder)


def _tmpdir() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:  # the disk of each is full, or read-only
        return "any temporary folder"


@cache
def remove_stale_folders() -> None:
    """Remove this machine's folders in TMPDIR whose processes were killed an hour ago or earlier.

    A killed process can't remove its folders, and each may hold a checkpoint. A process looks for
    them once.
    """
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"alignclip-{HOST}-*-*"):
            _remove_if_stale(folder)


def _remove_if_stale(folder: Path) -> None:
    import psutil  # which takes time, and most TMPDIRs hold no such folder

    pid = folder.name.split("-")[2]
    with suppress(OSError):
        is_old = time.time() - folder.stat().st_mtime > STALE
        if pid.isdecimal() and is_old and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
