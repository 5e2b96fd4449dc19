"""Mend Streaming 0.13's dataset.

A failed download, a cache without room and an evicted shard end in a run that stands still, or in a
short epoch without a word: :class:`CachedDataset`.

Streaming's insides are used here, in :mod:`alignclip.data.streaming_memory`, in
:mod:`alignclip.data.streaming_epoch`, in :mod:`alignclip.data.shard_cache` and in
:mod:`alignclip.data.cached_stream` alone.
``tests/test_contracts.py`` says whether an upgrade has changed one of the names.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState

from alignclip.data.shard_cache import CachedShard
from alignclip.data.streaming_epoch import EpochDataset
from alignclip.data.streaming_memory import install_patches
from alignclip.errors import NotReadError, UserError, one_line

LONGEST_STARVATION = 60.0  # seconds that a shard waits for room in the cache


class CachedDataset(EpochDataset):
    """A StreamingDataset of :class:`CachedStream`, whose failures end with an error, and at once.

    Args:
        arguments: of StreamingDataset.

    Raises:
        NotReadError: by iteration, a shard could not be had; the message names the shard and the
            cause. Streaming itself ends the epoch early.
    """

    _starved_since: float | None = None  # since when there is nothing to evict
    _failure: BaseException | None = None  # of a download thread
    epoch = 0

    def __init__(self, **arguments: Any) -> None:
        install_patches()
        self._locks: dict[int, FileLock] = {}  # by the process, because a lock can't be inherited
        super().__init__(**arguments)
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
            UserError: there is none.
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
            raise UserError(
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
        """Raise what a download thread or this one failed at, instead of what came of it.

        Raises:
            NotReadError: storage refuses or is away, or a shard is damaged.
            RuntimeError: a download thread has failed of anything else.
        """
        cause: BaseException | None = None
        try:
            yield
        except NotReadError:  # of an iterator within
            raise
        except UserError as error:
            cause = error
        except RuntimeError:
            if self._failure is None:
                raise
        if (cause := cause or self._failure) is not None:
            if isinstance(cause, UserError):
                raise NotReadError(one_line(cause)) from None
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
