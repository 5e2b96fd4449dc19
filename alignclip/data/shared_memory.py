"""Say which process owns Streaming's shared memory, and remove what killed runs have left.

Streaming keeps its state in ``/dev/shm/N_…``, N being a dataset's prefix, and can't tell whose
state it is. So a note beside the segments names the process that owns the prefix. The note is
there before the first segment: see :func:`alignclip.data.streaming_memory.take_prefix`.
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

SHM = Path("/dev/shm")
OWNER_NOTE = "alignclip_owner"
Owner = dict[str, Any]  # pid, started: clock ticks since boot, namespace: of the process numbers


def remove_stale() -> list[int]:
    """Remove the segments and lock files of every prefix whose owner is dead.

    Other users' notes stay. Where shared memory is not a folder (macOS), nothing is done.

    Returns:
        the prefixes that were removed.
    """
    removed: list[int] = []
    if not SHM.is_dir():
        return removed
    with lock():
        for note in sorted(SHM.glob(f"*_{OWNER_NOTE}")):
            if not _is_stale(note):
                continue
            prefix = note.name.split("_")[0]
            for path in {*SHM.glob(f"{prefix}_*"), *_locks_of(prefix)} - {note}:
                with suppress(OSError):
                    path.unlink()
            with suppress(OSError):  # the note goes last: the next start finishes a broken cleaning
                note.unlink()
                removed.append(int(prefix))
    return removed


def _is_stale(note: Path) -> bool:
    """Return whether a note is this user's and its process, seen from here, is dead."""
    owner = _read_owner(note)
    try:
        if owner is None or note.stat().st_uid != os.getuid():
            return False
    except OSError:
        return False
    return owner["namespace"] == _namespace() and owner != _identity(owner["pid"])


@contextmanager
def lock() -> Iterator[None]:
    """Let one of this user's processes at a time take a prefix or clean up."""
    folder = SHM if SHM.is_dir() else Path(tempfile.gettempdir())
    with (folder / f"alignclip-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(prefix: int) -> None:
    """Note this process as the owner of a prefix until it exits.

    Streaming leaves its lock files, which go with the note.
    """
    note = SHM / f"{prefix:06}_{OWNER_NOTE}"
    if SHM.is_dir():
        note.write_text(json.dumps(_identity(os.getpid())), encoding="utf-8")
        atexit.register(_disclaim, note)


def is_another_containers(segment: str) -> bool:
    """Return whether a segment's note says that its owner can't be seen from this container."""
    owner = _read_owner(SHM / f"{segment.partition('_')[0]}_{OWNER_NOTE}")
    return owner is not None and owner.get("namespace") != _namespace()


def _disclaim(note: Path) -> None:
    """Remove a note and the prefix's lock files, unless another process has the prefix by now."""
    with suppress(OSError), lock():  # as the process ends, a second error would hide the first
        if _read_owner(note) == _identity(os.getpid()):
            for path in (note, *_locks_of(note.name.split("_")[0])):
                path.unlink(missing_ok=True)


def _locks_of(prefix: str) -> list[Path]:
    """Return Streaming's lock files of a prefix."""
    return [*Path(tempfile.gettempdir()).glob(f"{prefix}_*filelock")]


def _read_owner(note: Path) -> Owner | None:
    """Return the owner that a note names; None where there is no such note."""
    try:
        owner = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _identity(pid: int) -> Owner | None:
    """Describe a live process; its start time tells it from a later one of the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] == "Z":  # killed, not yet reaped
        return None
    return {"pid": pid, "started": int(fields[19]), "namespace": _namespace()}


def _namespace() -> str:
    """Name the namespace of process numbers, which mean nothing in another container."""
    try:
        return Path("/proc/self/ns/pid").readlink().name
    except OSError:
        return ""
