"""Mend Streaming 0.13's dataset and its shared memory.

- A failed download, a cache without room and an evicted shard end in a run that stands still, or in
  a short epoch without a word: :class:`CachedDataset`.
- Two runs can take the same shared memory, and nobody knows whose memory it is. Two threads that
  open shared memory can break the process's record of semaphores: :func:`install_patches`.

Streaming's insides are used here, in :mod:`alignclip.data.streaming_epoch` and in
:mod:`alignclip.data.shard_cache` alone.
``tests/test_contracts.py`` says whether an upgrade has changed one of the names.
"""

from __future__ import annotations

import copyreg
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import streaming.base.dataset
from filelock import FileLock
from streaming.base.constant import LOCALS, SHM_TO_CLEAN, TICK
from streaming.base.dataset import _ShardState
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from alignclip.data import shared_memory
from alignclip.data.shard_cache import CachedShard
from alignclip.data.streaming_epoch import EpochDataset
from alignclip.ranks import gather_objects

LONGEST_STARVATION = 60.0  # seconds that a shard waits for room in the cache


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
                    number = max(
                        prefix._check_and_find_retrying(streams_local, streams_remote, name, retry)
                        for name in SHM_TO_CLEAN
                    )
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


class CachedDataset(EpochDataset):
    """A StreamingDataset of :class:`CachedStream`, whose failures end with an error, and at once.

    Args:
        arguments: of StreamingDataset.

    Raises:
        RuntimeError: by iteration, a shard could not be downloaded; the message names the shard and
            the cause. Streaming itself ends the epoch early.
    """

    _starved_since: float | None = None  # since when there is nothing to evict
    _failure: BaseException | None = None  # of a download thread
    epoch = 0

    def __init__(self, **arguments: Any) -> None:
        install_patches()
        self._locks: dict[int, FileLock] = {}  # by the process, because a lock can't be inherited
        super().__init__(**arguments)
        for stream in self.streams:  # forked workers must not share a connection to the bucket
            if stream._downloader is not None:
                stream._downloader.clean_up()
        if self.cache_limit and self._unique_rank_world.is_local_leader:
            self._tell_foreign_shards()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker that is spawned gets: all but locks and threads of this process."""
        of_this_process = {"_reads", "_iterator", "_executor", "_event"}
        state = {name: one for name, one in vars(self).items() if name not in of_this_process}
        return state | {"_locks": {}}

    def _tell_foreign_shards(self) -> None:
        """Print how many shards of a set that has a remote are not the cache's."""
        begins = zip(self.shard_offset_per_stream, self.shards_per_stream, strict=True)
        for (begin, count), stream in zip(begins, self.streams, strict=True):
            shards = self.shards[begin : begin + count]
            foreign = sum(
                isinstance(shard, CachedShard) and shard.is_foreign(shard.raw_data)
                for shard in shards
            )
            if foreign and stream.remote is not None:
                print(
                    f"{Path(stream.local, stream.split)}: {foreign:,} of {count:,} shards were put "
                    "there by somebody else; they stay, and data.cache_limit doesn't count them",
                    file=sys.stderr,
                )

    @property
    def _cache_filelock(self) -> FileLock:
        """The lock of the cache, one for all threads of a process.

        Streaming means to make one lock, and makes one at each call, because it asks for an
        attribute of another name. A thread that made room then let go of another thread's lock,
        and both waited for ever.
        """
        process = os.getpid()
        return self._locks.get(process) or self._locks.setdefault(
            process, FileLock(self._cache_filelock_path)
        )

    @_cache_filelock.setter
    def _cache_filelock(self, lock: FileLock) -> None:
        """Leave the lock that Streaming makes."""

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard; put one that fails back to 'remote', so that nobody waits for it."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            if self._cache_filelock.is_locked:  # it failed while it made room
                self._cache_filelock.release()
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def release(self) -> None:
        """Give back what killed processes had begun to download, while nobody else reads."""
        for shard_id in range(self.num_shards):
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE

    def _evict_coldest_shard(self) -> None:
        """Delete the shard that nobody has read for the longest time, of those that may be deleted.

        Raises:
            RuntimeError: there is none.
        """
        states = self._shard_states.numpy()
        local = np.flatnonzero(states == _ShardState.LOCAL)
        for shard_id in local[np.argsort(self._shard_access_times.numpy()[local])]:
            shard = self.shards[shard_id]
            if isinstance(shard, CachedShard) and shard.deletable():
                self._starved_since = None
                self._evict_shard(int(shard_id))
                return
        since = self._starved_since = self._starved_since or time.monotonic()
        # one of the shards in preparation is the one that wants the room
        others = np.count_nonzero(states == _ShardState.PREPARING) > 1
        if not others or time.monotonic() - since > LONGEST_STARVATION:
            raise RuntimeError(
                f"a cache limit of {self.cache_limit:,} bytes is too small to read from; raise it"
            )
        # the others need the lock to finish; what they have then can be evicted
        self._cache_filelock.release()
        time.sleep(TICK)
        self._cache_filelock.acquire()

    def on_exception(self, future: Future[None]) -> None:
        """Keep a download thread's exception for :meth:`__iter__`: raised, it reaches a log."""
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()
            self._iterator.on_exit()  # a thread that raises doesn't say that it has exited

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """Raise what a download thread failed at, instead of what came of it.

        Raises:
            RuntimeError: a download thread has failed.
        """
        try:
            yield
        except RuntimeError:
            if self._failure is None:
                raise
        if (cause := self._failure) is not None:
            where = ", ".join(stream.remote or stream.local for stream in self.streams)
            text = f"reading {where} failed: {type(cause).__name__}: {cause}"
            raise RuntimeError(text) from cause

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # no samples
        """Yield the ids of this worker's samples of the epoch."""
        with self.naming_failures():
            yield from super().__iter__()

    def _resume_incr_epoch(self) -> tuple[int, int]:
        """Note the epoch that begins, from which the draws of its samples come."""
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self.epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return where to go on after ``num_samples`` of the epoch.

        Between two epochs the Trainer counts 0 samples of the coming one, and Streaming takes them
        for the past one's: a run that resumed from there would see the same epoch again.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = self.next_epoch
        return state
