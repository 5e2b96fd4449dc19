"""Streaming's shared memory: what a killed run left is removed, what a live one uses is never touched.

Streaming keeps its state in ``/dev/shm/NNNNNN_…``, NNNNNN being a dataset's prefix, and can't tell whose it is. So a
note beside the segments says which process owns the prefix. Importing this module has every dataset leave one, before
its first segment is there; a lock keeps those who take a prefix from those who clean up.

On its way to a free prefix a dataset opens the memory of all others; importing this module has it closed again.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from streaming.base.constant import LOCALS
from streaming.base.shared import SharedMemory, prefix

SHM = Path("/dev/shm")
NOTE = "alignclip_owner"
Owner = dict[str, Any]


class _PrefixMemory(SharedMemory):
    """What Streaming finds a free prefix with, and takes it.

    Memory that this process has not created is closed with the last reference. Streaming's own stays open to the end
    of the process: a thousand files with some fifteen sets, as many as most shells allow.
    """

    def __init__(
        self, name: str | None = None, create: bool | None = None, size: int = 0, auto_cleanup: bool = True
    ) -> None:
        number, _, kind = str(name).partition("_")
        if create and kind == LOCALS and SHM.is_dir():
            with _lock():
                if not (SHM / str(name)).exists():
                    _claim(number)
                super().__init__(name, create, size, auto_cleanup)
            return
        owner = _read(SHM / f"{number}_{NOTE}")
        if owner is not None and owner.get("namespace") != _namespace():
            # Another container's, alive or not: not ours to judge, and no reason to fail, as Streaming would where it
            # had the same cache. Of a prefix that it may not look at, it takes the next one.
            raise PermissionError(f"{name} is another container's")
        super().__init__(name, create, size, auto_cleanup and create is not False)


prefix.SharedMemory = _PrefixMemory  # type: ignore[misc]


def remove_stale() -> list[int]:
    """Remove the segments and lock files of every prefix whose owner is dead; other users' notes stay.

    Does nothing where shared memory is not a folder (macOS).

    Returns:
        the prefixes that were removed.
    """
    removed: list[int] = []
    if not SHM.is_dir():
        return removed
    with _lock():
        for note in sorted(SHM.glob(f"*_{NOTE}")):
            owner = _read(note)
            try:
                if owner is None or note.stat().st_uid != os.getuid():
                    continue
            except OSError:
                continue
            if owner["namespace"] != _namespace() or owner == _identity(owner["pid"]):
                continue  # out of sight, or alive
            owned = note.name.split("_")[0]
            for path in [*SHM.glob(f"{owned}_*"), *Path(tempfile.gettempdir()).glob(f"{owned}_*filelock")]:
                if path != note:
                    with suppress(OSError):
                        path.unlink()
            with suppress(OSError):  # last: a cleaner that is killed half-way is followed by one that finishes
                note.unlink()
                removed.append(int(owned))
    return removed


@contextmanager
def _lock() -> Iterator[None]:
    """One at a time, of this user's processes that take a prefix or clean up."""
    with (SHM / f"alignclip-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _claim(number: str) -> None:
    """Note this process as the owner of a prefix until it exits."""
    note = SHM / f"{number}_{NOTE}"
    note.write_text(json.dumps(_identity(os.getpid())))
    atexit.register(_disclaim, note)


def _disclaim(note: Path) -> None:
    """Remove a note, unless another process has the prefix by now."""
    with _lock():
        if _read(note) == _identity(os.getpid()):
            note.unlink()


def _read(note: Path) -> Owner | None:
    """Who a prefix belongs to; None where nobody says so."""
    try:
        owner = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _identity(pid: int) -> Owner | None:
    """A process, told apart from a later one of the same number by its start time; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":  # killed, not yet reaped
        return None
    return {"pid": pid, "started": int(fields[19]), "namespace": _namespace()}


def _namespace() -> str:
    """Process ids mean nothing in another container that shares /dev/shm with this one."""
    try:
        return Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return ""
