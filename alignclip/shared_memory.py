"""Streaming's shared memory: what a killed run left is removed, what a live one uses is never touched.

Streaming keeps its state in ``/dev/shm/NNNNNN_…``, NNNNNN being a run's prefix, and can't tell whose it is. So each
run leaves a note beside its segments that says which process owns the prefix.

On its way to a free prefix a dataset opens the memory of all others; importing this module has it closed again.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from streaming.base.shared import SharedMemory, prefix

SHM = Path("/dev/shm")
NOTE = "alignclip_owner"


class _Glimpsed(SharedMemory):
    """Shared memory that is closed with the last reference, where this process has not created it.

    Streaming's own stays open to the end of the process: a thousand files with some fifteen sets, as many as most
    shells allow.
    """

    def __init__(
        self, name: str | None = None, create: bool | None = None, size: int = 0, auto_cleanup: bool = True
    ) -> None:
        super().__init__(name, create, size, auto_cleanup and create is not False)


prefix.SharedMemory = _Glimpsed  # type: ignore[misc]  # what the search for a free prefix opens


def claim(prefix_int: int) -> None:
    """Note this process as the owner of a streaming prefix until it exits.

    Args:
        prefix_int: ``StreamingDataset._shm_prefix_int``.
    """
    if SHM.is_dir():
        note = SHM / f"{prefix_int:06}_{NOTE}"
        note.write_text(json.dumps(_identity(os.getpid())))
        atexit.register(note.unlink, missing_ok=True)


def remove_stale() -> list[int]:
    """Remove the segments and lock files of every prefix whose owner is dead; other users' notes stay.

    No lock: a prefix with a dead owner's note is nobody's, and Streaming gives it to nobody while its files are there.
    Does nothing where shared memory is not a folder (macOS).

    Returns:
        the prefixes that were removed.
    """
    removed = []
    for note in sorted(SHM.glob(f"*_{NOTE}")):
        try:
            owner = json.loads(note.read_text())
            if note.stat().st_uid != os.getuid():
                continue
        except (OSError, ValueError):
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


def _identity(pid: int) -> dict[str, str | int] | None:
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
