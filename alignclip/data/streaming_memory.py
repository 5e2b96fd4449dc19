"""Mend how Streaming 0.13's datasets find, open and close their shared memory.

Two runs can take the same shared memory, one after the other or together, and nobody knows whose
memory it is. Two threads that open shared memory can break the process's record of semaphores.

``tests/test_contracts.py`` says whether an upgrade has changed one of the names.
"""

from __future__ import annotations

import copyreg
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import streaming.base.dataset
from streaming.base.constant import LOCALS, TICK
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from alignclip.data import shared_memory
from alignclip.ranks import gather_objects

PREFIXES = 10**6, 10**9  # that are drawn; Streaming's own search begins with 0
_swapping = threading.RLock()  # while Streaming's functions stand in the resource tracker's place
os.register_at_fork(
    before=_swapping.acquire, after_in_parent=_swapping.release, after_in_child=_swapping.release
)


def install_patches() -> None:
    """Replace how a dataset finds and opens its shared memory; a second call changes nothing."""
    streaming.base.dataset.get_shm_prefix = take_prefix
    copyreg.pickle(SharedMemory, _attached)
    if SharedMemory.fix_register is not _register_all_but_memory:
        SharedMemory.fix_register = _register_all_but_memory  # type: ignore[method-assign]
        SharedMemory.fix_unregister = _unregister_all_but_memory  # type: ignore[method-assign]
        SharedMemory.__init__ = _one_at_a_time(SharedMemory.__init__)  # type: ignore[method-assign]
        SharedMemory.cleanup = _one_at_a_time(SharedMemory.cleanup)  # type: ignore[method-assign]


def _one_at_a_time(method: Callable[..., None]) -> Callable[..., None]:
    """Let one thread at a time run a method that swaps a function of the resource tracker.

    A thread that finds another thread's function there would put that function back at its end, for
    the rest of the process.
    """

    @wraps(method)
    def alone(*arguments: Any, **named: Any) -> None:
        with _swapping:
            method(*arguments, **named)

    return alone


def _attached(memory: SharedMemory) -> tuple[type[SharedMemory], tuple[str, bool]]:
    """Pickle shared memory by its name, for a worker that is spawned.

    The worker attaches to the memory and leaves its end to the process that made it. Memory that
    Python unpickles counts as the worker's own, and is deleted when the last process of this rank
    ends, though other ranks use the memory, too.
    """
    return SharedMemory, (memory.shm.name, False)


def _register_all_but_memory(self: SharedMemory, name: str, rtype: str) -> None:
    """Register what another thread makes meanwhile; Streaming's own passes an argument too many."""
    if rtype != "shared_memory":
        resource_tracker._resource_tracker.register(name, rtype)


def _unregister_all_but_memory(self: SharedMemory, name: str, rtype: str) -> None:
    if rtype != "shared_memory":
        resource_tracker._resource_tracker.unregister(name, rtype)


def take_prefix(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Draw a prefix for a dataset's shared memory, in place of Streaming's ``get_shm_prefix``.

    Streaming takes the first prefix that is free: as a rule the one of a run that has just been
    killed. What outlives that run's first rank (another rank, Python's cleaner of shared memory)
    makes and removes segments by name. The next run lost segments while it started, and stood
    still; or it took the killed run's place in the epoch for its own. One of a thousand million
    prefixes doesn't come twice. Programs without this patch don't look so far: they don't see that
    a run has their cache.

    One process of this user at a time looks whether a cache is in use, and the first rank of a
    machine does so for all of its ranks.

    Raises:
        ValueError: another dataset, of a live run, has the same cache; on every rank.
        OSError: the first segment can't be made; on every rank.
    """
    prefix._check_self(streams_local)
    number, memory, error = None, None, None
    if world.is_local_leader:
        try:
            with shared_memory.lock():
                _check_caches(streams_local, streams_remote, retry)
                number = random.SystemRandom().randrange(*PREFIXES)
                memory = _create_locals(streams_local, number)
        except (ValueError, OSError) as raised:
            error = raised
    everybody = gather_objects([(world.node, number, error)])
    if first := next((error for _, _, error in everybody if error is not None), None):
        raise first
    number = next(taken for node, taken, _ in everybody if node == world.node and taken is not None)
    if memory is None:
        memory = SharedMemory(prefix._get_path(number, LOCALS), False)
    return number, memory


def _check_caches(streams_local: list[str], streams_remote: list[str | None], retry: int) -> None:
    """Check that no live dataset has one of these caches; nobody can on macOS.

    Raises:
        ValueError: one has, and still has after ``retry`` looks more: a dataset of this process may
            be about to go.
    """
    caches = {local for local, remote in zip(streams_local, streams_remote, strict=True) if remote}
    for left in reversed(range(1 + retry)):
        used = _locals_in_use()
        if not (both := sorted(caches & used.keys())):
            return
        if left:
            time.sleep(TICK)
    raise ValueError(
        f"another dataset is read through {both[0]} ({used[both[0]]} says so; remove that file if "
        "no program reads there); give this one another local folder"
    )


def _locals_in_use() -> dict[str, Path]:
    """Return the local folders of all datasets on this machine, and what says so.

    Those of other containers are left out: whether they are alive can't be seen from here.
    """
    found: dict[str, Path] = {}
    for path in shared_memory.SHM.glob(f"*_{LOCALS}"):
        if shared_memory.is_another_containers(path.name):
            continue
        with suppress(OSError, ValueError, IndexError):  # gone again, another user's, half-written
            found |= dict.fromkeys(prefix._unpack_locals(path.read_bytes())[0], path)
    return found


def _create_locals(streams_local: list[str], number: int) -> SharedMemory:
    """Create the first segment of a prefix, with the owner's note before the segment.

    Raises:
        OSError: there is no room.
    """
    data = prefix._pack_locals(streams_local, number)
    shared_memory.claim(number)
    memory = SharedMemory(prefix._get_path(number, LOCALS), True, len(data))
    memory.buf[: len(data)] = data
    return memory
