"""Mend how Streaming 0.13's datasets find, open and close their shared memory.

Two runs can take the same shared memory, and nobody knows whose memory it is. Two threads that open
shared memory can break the process's record of semaphores.

``tests/test_contracts.py`` says whether an upgrade has changed one of the names.
"""

from __future__ import annotations

import copyreg
import os
import threading
from collections.abc import Callable
from functools import wraps
from multiprocessing import resource_tracker
from typing import Any

import streaming.base.dataset
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from alignclip.data import shared_memory
from alignclip.ranks import gather_objects

_swapping = threading.RLock()  # while Streaming's functions stand in the resource tracker's place
os.register_at_fork(
    before=_swapping.acquire, after_in_parent=_swapping.release, after_in_child=_swapping.release
)


def install_patches() -> None:
    """Replace how a dataset finds and opens its shared memory; a second call changes nothing."""
    prefix.SharedMemory = GlimpsedMemory  # type: ignore[misc]
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


class GlimpsedMemory(SharedMemory):
    """Shared memory that is only looked at: closed with the last reference.

    On its way to a free prefix a dataset opens the memory of all others. Streaming's own class
    keeps it open to the end of the process: a thousand files with some fifteen sets, as many as
    most shells allow.

    Raises:
        PermissionError: the memory is another container's, alive or not. Streaming then takes the
            next prefix; looking at the memory, it would fail where the two have the same cache.
    """

    def __init__(
        self,
        name: str | None = None,
        create: bool | None = None,
        size: int = 0,
        auto_cleanup: bool = True,
    ) -> None:
        if shared_memory.is_another_containers(str(name)):
            raise PermissionError(f"{name} is another container's")
        super().__init__(name, create, size, auto_cleanup and create is not False)


def take_prefix(
    streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Find shared memory for a dataset, in place of Streaming's ``get_shm_prefix``.

    Streaming's own search lets two runs find the same prefix. Here one process of this user
    searches at a time, and the first rank of a machine does so for all of its ranks.

    Raises:
        ValueError: another dataset, of a live run, has the same cache; on every rank.
        FileExistsError: datasets without this patch took every prefix that was found free.
    """
    prefix._check_self(streams_local)
    number, memory, error = None, None, None
    if world.is_local_leader:
        try:
            with shared_memory.lock():
                for left in reversed(range(1 + retry)):
                    number = _find_free(streams_local, streams_remote, retry)
                    try:
                        memory = _create_locals(streams_local, number)
                        break
                    except FileExistsError:
                        if not left:
                            raise
        except (ValueError, FileExistsError) as raised:
            error = raised
    everybody = gather_objects([(world.node, number, error)])
    if first := next((error for _, _, error in everybody if error is not None), None):
        raise first
    number = next(taken for node, taken, _ in everybody if node == world.node and taken is not None)
    if memory is None:
        memory = SharedMemory(prefix._get_path(number, LOCALS), False)
    return number, memory


def _find_free(streams_local: list[str], streams_remote: list[str | None], retry: int) -> int:
    """Find a prefix of which no segment exists.

    Streaming looks for the first number that each kind of segment has free, and takes the largest
    of these. Another kind may be taken there: a killed dataset's segments have holes.

    Raises:
        ValueError: another dataset, of a live run, has the same cache.
    """
    number = max(
        prefix._check_and_find_retrying(streams_local, streams_remote, name, retry)
        for name in SHM_TO_CLEAN
    )
    while any(_is_taken(prefix._get_path(number, name)) for name in SHM_TO_CLEAN):
        number += 1
    return number


def _is_taken(segment: str) -> bool:
    """Return whether a segment exists, another user's or another container's among them."""
    try:
        GlimpsedMemory(segment, False)
    except FileNotFoundError:
        return False
    except PermissionError:
        pass
    return True


def _create_locals(streams_local: list[str], number: int) -> SharedMemory:
    """Create the first segment of a prefix, with the owner's note before the segment.

    Raises:
        FileExistsError: a dataset without this patch, and so without the lock, was faster.
    """
    data = prefix._pack_locals(streams_local, number)
    note = shared_memory.claim(number)
    try:
        memory = SharedMemory(prefix._get_path(number, LOCALS), True, len(data))
    except FileExistsError:
        note.unlink(missing_ok=True)
        raise
    memory.buf[: len(data)] = data
    return memory
