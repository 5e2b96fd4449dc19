"""Streaming's shared memory: what a killed run left is removed, what a live one uses is never touched.

Streaming keeps its state in ``/dev/shm/NNNNNN_…``, NNNNNN being a dataset's prefix, and can't tell whose it is. So a
note beside the segments says which process owns the prefix. Importing this module has every dataset leave one before
its first segment is there, and take its prefix under a lock: Streaming's own search lets two runs find the same one.

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

import streaming.base.dataset
import torch.distributed as dist
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

SHM = Path("/dev/shm")
NOTE = "alignclip_owner"
Owner = dict[str, Any]


class _Glimpsed(SharedMemory):
    """Memory that is only looked at: closed with the last reference.

    Streaming's own stays open to the end of the process: a thousand files with some fifteen sets, as many as most
    shells allow.
    """

    def __init__(
        self,
        name: str | None = None,
        create: bool | None = None,
        size: int = 0,
        auto_cleanup: bool = True,
    ) -> None:
        owner = _read(SHM / f"{str(name).partition('_')[0]}_{NOTE}")
        if owner is not None and owner.get("namespace") != _namespace():
            # Another container's, alive or not: not ours to judge, and no reason to fail, as Streaming would where it
            # had the same cache. Of a prefix that it may not look at, it takes the next one.
            raise PermissionError(f"{name} is another container's")
        super().__init__(name, create, size, auto_cleanup and create is not False)


def take_prefix(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Streaming's ``get_shm_prefix``, one process of this user at a time; the first rank of a machine takes it for all.

    Raises:
        ValueError: another dataset, of a live run, has the same cache; on every rank.
    """
    prefix._check_self(streams_local)
    number, memory, error = None, None, None
    if world.is_local_leader:
        data = b""
        try:
            with _lock():
                number = max(
                    prefix._check_and_find_retrying(
                        streams_local, streams_remote, shm_name=name, retry=retry
                    )
                    for name in SHM_TO_CLEAN
                )
                data = prefix._pack_locals(streams_local, number)
                if SHM.is_dir():
                    _claim(SHM / f"{number:06}_{NOTE}")
                memory = SharedMemory(prefix._get_path(number, LOCALS), True, len(data))
                memory.buf[: len(data)] = data
        except ValueError as raised:
            error = raised
    everybody: list[Any] = [(world.node, number, error)]
    if dist.is_available() and dist.is_initialized():
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, (world.node, number, error))
    if first := next((error for _, _, error in everybody if error is not None), None):
        raise first
    number = next(taken for node, taken, _ in everybody if node == world.node and taken is not None)
    if memory is None:
        memory = SharedMemory(prefix._get_path(number, LOCALS), False)
    return number, memory


prefix.SharedMemory = _Glimpsed  # type: ignore[misc]
streaming.base.dataset.get_shm_prefix = take_prefix


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
            for path in [
                *SHM.glob(f"{owned}_*"),
                *Path(tempfile.gettempdir()).glob(f"{owned}_*filelock"),
            ]:
                if path != note:
                    with suppress(OSError):
                        path.unlink()
            with suppress(
                OSError
            ):  # last: a cleaner that is killed half-way is followed by one that finishes
                note.unlink()
                removed.append(int(owned))
    return removed


@contextmanager
def _lock() -> Iterator[None]:
    """One at a time, of this user's processes that take a prefix or clean up."""
    folder = SHM if SHM.is_dir() else Path(tempfile.gettempdir())
    with (folder / f"alignclip-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _claim(note: Path) -> None:
    """Note this process as the owner of a prefix until it exits."""
    note.write_text(json.dumps(_identity(os.getpid())), encoding="utf-8")
    atexit.register(_disclaim, note)


def _disclaim(note: Path) -> None:
    """Remove a note, unless another process has the prefix by now. What is left behind, the next start removes."""
    with suppress(OSError), _lock():  # as the process ends: a second error would hide the first
        if _read(note) == _identity(os.getpid()):
            note.unlink()


def _read(note: Path) -> Owner | None:
    """Who a prefix belongs to; None where nobody says so."""
    try:
        owner = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _identity(pid: int) -> Owner | None:
    """A process, told apart from a later one of the same number by its start time; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
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
