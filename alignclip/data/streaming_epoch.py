"""Read an epoch of Streaming 0.13 with threads that don't hold up the worker that decodes.

Streaming's two threads of a worker look at one sample after the other: whether its shard is there,
under a lock that is a file. Then they sleep for 7 ms and look again, as long as the epoch lasts.
Each look takes Python's one interpreter from the decoding of images, and took a third of a worker's
time. Here the threads look at each shard once for many samples, and wait until enough samples were
read.

``tests/test_contracts.py`` says whether an upgrade has changed one of the names.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState

LOOKS = 8  # at the coming samples, while ``predownload`` samples are read
LONGEST_WAIT = 0.1  # seconds until a waiting thread looks whether its epoch was given up


class EpochDataset(StreamingDataset):
    """A StreamingDataset whose threads look at many coming samples at a time.

    Args:
        arguments: of StreamingDataset.
    """

    _reads: threading.Condition  # in the process that reads; tells the threads of some more reads

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # no samples
        """Yield the ids of this worker's samples of the epoch, once their shards are there.

        Streaming yields the samples. Who has ids reads many samples together.
        """
        if hasattr(self, "_iterator"):
            self._iterator.exit()  # an epoch that was given up
        if not hasattr(self, "_event"):
            self._event = threading.Event()
            self._executor = ThreadPoolExecutor()
        elif self._event.is_set():
            raise RuntimeError("a thread has failed in an earlier epoch")
        self._reads = threading.Condition()
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        sample_ids = self._get_work(*self._resume_incr_epoch())
        if not len(sample_ids):  # the run goes on from the epoch's end
            return
        self._iterator = it = _Iterator(sample_ids)
        threads = [self._executor.submit(f, it) for f in (self._prepare_thread, self._ready_thread)]
        for thread in threads:
            thread.add_done_callback(self.on_exception)
        yield from self._each_sample_id(it)
        wait(threads, return_when="FIRST_EXCEPTION")
        it.exit()

    def _prepare_thread(self, it: _Iterator) -> None:
        """Download the shards of the coming samples, up to ``predownload`` samples ahead."""
        unpacked: set[int] = set()  # shards that need no look at their files, unless evicted
        while not self._is_over(it) and it.total not in (it.prepare_index, it.ready_index):
            end = self._end_of_look(it, it.prepare_index)
            for shard_id in dict.fromkeys(self._shards_of(it, it.prepare_index, end).tolist()):
                if self._is_over(it):
                    break
                if shard_id in unpacked and self._shard_states[shard_id] == _ShardState.LOCAL:
                    self._shard_access_times[shard_id] = time.time_ns()
                elif shard_id >= 0:
                    self.prepare_shard(shard_id, False)
                    if self._shard_states[shard_id] == _ShardState.LOCAL:
                        unpacked.add(shard_id)
            it.prepare_index = end
        it.on_exit()

    def _ready_thread(self, it: _Iterator) -> None:
        """Count the samples whose shards are there, which may be read.

        Streaming's own thread waits until a shard is there, and for ever where another thread has
        evicted the shard by the time that it looks again: with a cache limit of a few shards a run
        stood still.
        """
        while not self._is_over(it) and it.ready_index != it.total:
            end = self._end_of_look(it, it.ready_index)
            shards = self._shards_of(it, it.ready_index, end)
            is_there = self._shard_states.numpy()[shards] == _ShardState.LOCAL
            missing = np.flatnonzero(~is_there & (shards >= 0))
            if not missing.size:
                it.ready_index = end
                continue
            it.ready_index += int(missing[0])
            shard_id = int(shards[missing[0]])
            if self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, False)
            if self._shard_states[shard_id] != _ShardState.LOCAL:
                time.sleep(TICK)
        it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """Yield the ids of the samples that are ready, and tell the threads of every few reads."""
        while not self._is_over(it) and it.yield_index != it.total:
            ready = it.sample_ids[it.yield_index : it.ready_index].tolist()
            if not ready:
                time.sleep(TICK)
            for sample_id in ready:
                if sample_id != -1:  # an epoch's share is filled up with these
                    yield sample_id
                    if self._is_over(it):
                        break
                it.yield_index += 1
                if it.yield_index % self._look == 0:
                    with self._reads:
                        self._reads.notify_all()
        it.on_exit()

    @property
    def _look(self) -> int:
        """Samples that a thread looks at together."""
        return max(1, (self.predownload or 0) // LOOKS)

    def _is_over(self, it: _Iterator) -> bool:
        """Say whether the epoch was given up, or a thread or the reader has failed."""
        return bool(it.should_exit() or self._event.is_set())

    def _end_of_look(self, it: _Iterator, begin: int) -> int:
        """Wait until the sample at ``begin`` may be looked at; return where this look ends.

        Returns:
            ``begin`` where the epoch is over.
        """
        end, ahead = begin, it.total if self.predownload is None else self.predownload
        with self._reads:
            while not self._is_over(it):
                end = min(it.total, it.yield_index + ahead + 1, begin + self._look)
                if end > begin:
                    break
                self._reads.wait(LONGEST_WAIT)
        return max(begin, end)

    def _shards_of(self, it: _Iterator, begin: int, end: int) -> np.ndarray:
        """Return the number of each sample's shard; -1 where the share is filled up."""
        bounds = self.spanner.shard_bounds
        return np.searchsorted(bounds, it.sample_ids[begin:end], side="right") - 1
