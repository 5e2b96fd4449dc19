"""MDS shards → batches: one StreamingDataset of uint8 images, token ids and caption embeddings.

Every random draw of a sample comes from (shuffle_seed, epoch, sample id), so that a run that was killed in the middle
of an epoch goes on with the very batches it would have had.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from torch import Tensor
from torch.utils.data import default_collate

import alignclip.data.shared_memory  # noqa: F401  # whose datasets leave a note of their owner
from alignclip.config.schema import DataConfig
from alignclip.data.shard_cache import CachedShard, CachedStream
from alignclip.data.streams import cached_stream
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.data.transforms import decode_image, random_resized_crop
from alignclip.errors import UserError

# DataConfig's own part; every other field of it is an argument of StreamingDataset
NOT_STREAMING = {
    "streams",
    "scale",
    "ratio",
    "num_workers",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory",
}


LONGEST_STARVATION = 60.0  # seconds that a shard waits for room in the cache
ZEROS_NAMED = 5  # samples with a caption embedding of zeros that a worker names


class ReleasingDataset(StreamingDataset):
    """A StreamingDataset of cached streams in which a failed download is nobody's.

    Streaming's own readers wait for such a shard for ever.

    Args:
        arguments: of StreamingDataset.
    """

    _starved_since: float | None = None  # since when there is nothing to evict

    def __init__(self, **arguments: Any) -> None:
        self._locks: dict[int, FileLock] = {}  # by the process, because a lock can't be inherited
        super().__init__(**arguments)

    @property
    def _cache_filelock(self) -> FileLock:
        """The lock of the cache, one for all threads of a process.

        Streaming means to make one lock, and makes one at each call, because it asks for an attribute of another name.
        A thread that made room then let go of another thread's lock, and both waited for ever.
        """
        process = os.getpid()
        return self._locks.get(process) or self._locks.setdefault(
            process, FileLock(self._cache_filelock_path)
        )

    @_cache_filelock.setter
    def _cache_filelock(self, lock: FileLock) -> None:
        """Leave the lock that Streaming makes."""

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Download a shard; one that fails goes back to 'remote', so that sibling workers don't wait for it."""
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException:
            if self._cache_filelock.is_locked:  # it failed while it made room
                self._cache_filelock.release()
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE
            raise

    def _evict_coldest_shard(self) -> None:
        """Delete the shard that wasn't read for the longest time, of those that the cache may delete.

        Raises:
            RuntimeError: there is none.
        """
        states = self._shard_states.numpy()
        local = np.flatnonzero(states == _ShardState.LOCAL)
        for shard_id in local[np.argsort(self._shard_access_times.numpy()[local])]:
            shard = self.shards[shard_id]
            if isinstance(shard, CachedShard) and shard.can_be_evicted():
                self._starved_since = None
                self._evict_shard(int(shard_id))
                return
        since = self._starved_since = self._starved_since or time.monotonic()
        others = (
            np.count_nonzero(states == _ShardState.PREPARING) > 1
        )  # one is the shard that wants the room
        if not others or time.monotonic() - since > LONGEST_STARVATION:
            raise RuntimeError(
                f"a cache limit of {self.cache_limit:,} bytes is too small to read from; raise it"
            )
        # what others are about to have can be evicted when they have it, for which they need the lock
        self._cache_filelock.release()
        time.sleep(TICK)
        self._cache_filelock.acquire()

    def _ready_thread(self, it: _Iterator) -> None:
        """Count the samples whose shards are there, which may be read.

        Streaming's own waits until a shard is there, and for ever where another thread has evicted the shard by the
        time that it looks again: a cache limit of a few shards ended in a run that stood still.
        """
        while not (it.should_exit() or it.ready_index == it.total or self._event.is_set()):
            if self.predownload is not None and it.ready_index - it.yield_index > self.predownload:
                time.sleep(TICK)
                continue
            sample_id = it.sample_ids[it.ready_index]
            if sample_id != -1:
                shard_id, _ = self.spanner[sample_id]
                if self._shard_states[shard_id] == _ShardState.REMOTE:
                    self.prepare_shard(shard_id, False)
                if self._shard_states[shard_id] != _ShardState.LOCAL:
                    time.sleep(TICK)
                    continue
            it.ready_index += 1
        it.on_exit()

    def release(self) -> None:
        """Give back what processes that were killed had begun to download; while nobody else reads."""
        states = self._shard_states
        for shard_id in range(self.num_shards):
            if states[shard_id] == _ShardState.PREPARING:
                states[shard_id] = _ShardState.REMOTE


class ImageTextDataset(ReleasingDataset):
    """Image–text pairs from MDS columns ``image``, ``caption`` and, where the loss needs it, ``semantic``.

    Yields dicts: ``image`` uint8 ``[3, size, size]``, ``text`` int64 ``[context_length]``, ``sample`` int64 ``[]``,
    the sample's id (see :meth:`key_of`), and, with ``semantic=True``, ``semantic`` float16 ``[dimension]``.

    Raises:
        RuntimeError: a shard could not be downloaded, naming it and the cause. (StreamingDataset itself ends the
            epoch early instead, without a word.)
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        batch_size: int,
        image_size: int,
        context_length: int,
        semantic: bool,
    ) -> None:
        streaming_arguments = {
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(config)
            if f.name not in NOT_STREAMING
        }
        streams = [
            cached_stream(name, stream, **dataclasses.asdict(stream))
            for name, stream in config.streams.items()
        ]
        super().__init__(streams=streams, batch_size=batch_size, **streaming_arguments)
        if self.cache_limit and self._unique_rank_world.is_local_leader:
            for begin, count, stream in zip(
                self.shard_offset_per_stream, self.shards_per_stream, self.streams, strict=True
            ):
                assert isinstance(stream, CachedStream)
                if said := stream.foreign_shards(self.shards[begin : begin + count]):
                    print(said, file=sys.stderr)
        # Forked workers must not share the parent's connection to the bucket.
        for stream in self.streams:
            if stream._downloader is not None:
                stream._downloader.clean_up()
        self.image_size = image_size
        self.scale, self.ratio = config.scale, config.ratio
        self.semantic = semantic
        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.epoch = 0
        self._failure: BaseException | None = None
        self._zeros = 0

    def _resume_incr_epoch(self) -> tuple[int, int]:
        self.epoch, sample_in_epoch = super()._resume_incr_epoch()
        return self.epoch, sample_in_epoch

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where to go on after ``num_samples`` of the epoch.

        Between two epochs the Trainer counts 0 samples of the coming one, and Streaming takes them for the past one's:
        a run that resumed from there would see the same epoch again.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = self.next_epoch
        return state

    def __getitem__(self, at: int) -> dict[str, Tensor]:  # type: ignore[override]  # one sample at a time
        """The sample with id ``at``; one whose image can't be decoded is replaced by the next, with a warning."""
        sample_id = int(at)
        for _ in range(100):
            raw = super().__getitem__(sample_id)
            try:
                image = decode_image(raw["image"])
                break
            except OSError as error:
                warnings.warn(
                    f"sample '{raw.get('key', sample_id)}' has no readable image ({error})",
                    stacklevel=2,
                )
                sample_id = (sample_id + 1) % self.size
        else:
            raise RuntimeError(f"100 samples in a row from sample {at} have no readable image")
        seeds = np.random.SeedSequence([self.shuffle_seed, self.epoch, int(at)]).generate_state(2)
        caption, semantic = raw["caption"], raw.get("semantic")
        if isinstance(caption, list):  # several captions: draw one, with its row of the embeddings
            drawn = int(seeds[1]) % len(caption)
            caption, semantic = caption[drawn], None if semantic is None else semantic[drawn]
        sample = {
            "image": random_resized_crop(
                image, self.image_size, self.scale, self.ratio, int(seeds[0])
            ),
            "text": self.tokenizer(caption)[0],
            "sample": torch.tensor(sample_id),
        }
        if self.semantic:
            with np.errstate(
                over="ignore"
            ):  # out of float16's range is infinite, and the run says so
                embedding = np.array(semantic, dtype=np.float16)
            self._warn_of_zeros(embedding, raw.get("key", sample_id))
            sample["semantic"] = torch.from_numpy(embedding)
        return sample

    @property
    def dimension(self) -> int:
        """Numbers of a caption embedding, for estimates: what most sentence encoders have where the set doesn't say."""
        if not self.semantic:
            return 0
        first = self.shards[0]
        assert isinstance(first, CachedShard)
        encoding = dict(zip(first.column_names, first.column_encodings, strict=True))["semantic"]
        shape = encoding.split(":")[2:]
        return int(np.prod([int(n) for n in shape[0].split(",")])) if shape else 1024

    def _warn_of_zeros(self, embedding: np.ndarray, key: object) -> None:
        """Name the first samples whose caption embedding is all zeros: the loss takes them for unlike all others."""
        if not embedding.any() and self._zeros < ZEROS_NAMED:
            self._zeros += 1
            warnings.warn(
                f"sample '{key}' has a caption embedding of zeros: convert it again", stacklevel=2
            )

    def key_of(self, sample_id: int) -> str:
        """The key of the sample with an id; the id where the sample can't be read any more."""
        try:
            return str(super().__getitem__(sample_id)["key"])
        except Exception:  # of storage, or a set without keys
            return str(sample_id)

    def on_exception(self, future: Future[None]) -> None:
        """Keep a download thread's exception for :meth:`__iter__`; raised here it would only reach a log."""
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()
            self._iterator.on_exit()  # a thread that raises doesn't say that it has exited; both may, and be waited for

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """This worker's samples of the epoch."""
        try:
            yield from super().__iter__()
        except RuntimeError:
            if self._failure is None:
                raise
        if self._failure is not None:
            where = ", ".join(stream.remote or stream.local for stream in self.streams)
            cause = self._failure
            raise RuntimeError(
                f"reading {where} failed: {type(cause).__name__}: {cause}"
            ) from cause


def build_dataloader(
    dataset: ImageTextDataset, config: DataConfig, pin_memory: bool
) -> StreamingDataLoader:
    """The resumable loader of a dataset, in whole batches only.

    Raises:
        UserError: the dataset has fewer samples than one batch.
    """
    _say_workers(config.num_workers)
    loader = StreamingDataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
        persistent_workers=config.persistent_workers and config.num_workers > 0,
        pin_memory=pin_memory,
        drop_last=True,
        collate_fn=default_collate,
        # its own: a loader that starts draws once, and from torch's global generator a resumed run would draw again
        generator=torch.Generator().manual_seed(config.shuffle_seed),
    )
    if len(loader) == 0:
        world = dist.get_world_size() if dist.is_initialized() else 1
        size = int(dataset.epoch_size)
        what = (
            "the set has"
            if size == dataset.size
            else "an epoch (data.epoch_size, repeat, choose, proportion) has"
        )
        raise UserError(
            f"{what} {size} samples, fewer than one batch; lower global_train_batch_size to "
            f"{size // world * world} or less (it is {int(dataset.batch_size or 0) * world})"
        )
    return loader


def _say_workers(count: int) -> None:
    """Say once a machine, with the setting's name, what torch would say in a paragraph on every rank, twice."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    if count > cores and os.environ.get("LOCAL_RANK", "0") in ("", "0"):
        says = f"data.num_workers={count}, but a process may use {cores} cores; lower it if loading is slow"
        print(says, file=sys.stderr, flush=True)
