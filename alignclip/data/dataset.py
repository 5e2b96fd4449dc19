"""MDS shards → batches: one StreamingDataset of uint8 images, token ids and caption embeddings.

Every random draw of a sample comes from (shuffle_seed, epoch, sample id). So a run that was
killed in the middle of an epoch goes on with the very batches it would have had.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignclip.config.schema import DataConfig
from alignclip.data.batch import Batch, empty_images, longest_text
from alignclip.data.image_files import TRAINING_FORMATS
from alignclip.data.mds_index import dimension_of
from alignclip.data.row import Row, stack_embeddings
from alignclip.data.streams import cached_stream
from alignclip.data.workers import die_with_parent
from alignclip.errors import UserError
from alignclip.ranks import world_size
from alignclip.runtime.stand_ins import stand_ins
from alignclip.storage import patience

with stand_ins():  # also in a data worker that is spawned: there this module is the first one
    from streaming import StreamingDataLoader

    from alignclip.data.shard_cache import CachedShard
    from alignclip.data.streaming_patches import CachedDataset
    from alignclip.data.tokenizer import SimpleTokenizer
    from alignclip.data.transforms import decode_image, random_resized_crop

# DataConfig's own part; every other field of it is an argument of StreamingDataset
NOT_STREAMING = {
    "streams",
    "scale",
    "ratio",
    "num_workers",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory",
}
ZEROS_NAMED = 5  # samples with a caption embedding of zeros that a worker names
MOST_PASSED_OVER = 100  # samples in a row
USUAL_DIMENSION = 1024  # of a caption embedding, at most


class StreamSize(NamedTuple):
    """The size of a stream's set: samples, shards, and bytes of the shards on a disk."""

    samples: int
    shards: int
    stored: int


class ImageTextDataset(CachedDataset):
    """Image–text pairs from the MDS columns ``image``, ``caption`` and, if asked, ``semantic``.

    A sample is a dict: ``image`` uint8 ``[3, size, size]``, ``text`` int64 ``[context_length]``,
    ``sample`` int64 ``[]``, the sample's id (see :meth:`key_of`), and, with ``semantic=True``,
    ``semantic`` float16 ``[dimension]``.

    By iteration the samples' ids come, which a loader makes batches of by :meth:`batch_of`.

    Raises:
        NotReadError: a shard could not be had; the message names the shard and the cause.
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
        fields = {field.name for field in dataclasses.fields(config)} - NOT_STREAMING
        streams = [
            cached_stream(name, stream, **dataclasses.asdict(stream))
            for name, stream in config.streams.items()
        ]
        arguments = {name: getattr(config, name) for name in fields}
        super().__init__(streams=streams, batch_size=batch_size, **arguments)
        self.image_size = image_size
        self.scale, self.ratio = config.scale, config.ratio
        self.semantic = semantic
        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self._zeros = 0
        self._told: set[object] = set()

    def __getitem__(self, at: int) -> dict[str, Tensor]:  # type: ignore[override]  # one sample
        """Return the sample with id ``at``, or the next one that can be trained on."""
        batch = self.batch_of([int(at)])
        return {name: one[0] for name, one in batch.items() if isinstance(one, Tensor)}

    def batch_of(self, ids: Sequence[int]) -> Batch:
        """Read samples, or for each that can't be trained on the next one that can.

        All images are read and decoded, then all captions tokenised: a caption after a caption
        takes a sixth of the time of a caption after an image, which has filled the processor's
        caches. An image's bytes are let go once they are decoded.

        Raises:
            NotReadError: as by iteration.
        """
        with self.naming_failures():
            rows, seeds = [], [self._seeds(at) for at in ids]
            images = empty_images(len(ids), self.image_size)
            for i, at in enumerate(ids):
                row, image = self._readable(at)
                del row.columns["image"]
                rows.append(row)
                images[i] = random_resized_crop(
                    image, self.image_size, self.scale, self.ratio, seeds[i][0]
                )
            drawn = [row.draw(seed) for row, (_, seed) in zip(rows, seeds, strict=True)]
            embeddings = (
                stack_embeddings([one for _, one in drawn], rows) if self.semantic else None
            )
        text = self.tokenizer([caption for caption, _ in drawn])
        batch: Batch = {
            "image": images,
            "text": text,
            "sample": torch.tensor([row.sample_id for row in rows]),
        }
        if embeddings is not None:
            self._tell_zeros(embeddings, rows)
            batch["semantic"] = torch.from_numpy(embeddings)
        batch["text_length"] = longest_text(text)
        return batch

    def _seeds(self, at: int) -> list[int]:
        """Return the seeds of a sample's draws in this epoch: of its crop, and of its caption."""
        sequence = np.random.SeedSequence([self.shuffle_seed, self.epoch, at])
        seeds: list[int] = sequence.generate_state(2).tolist()
        return seeds

    def _readable(self, first: int) -> tuple[Row, Tensor]:
        """Return a sample and its image, or the next one that can be trained on.

        A sample that is passed over is told.

        Raises:
            UserError: too many samples in a row are passed over.
        """
        most = min(MOST_PASSED_OVER, self.size)
        for step in range(most):
            row = self._row((first + step) % self.size if step else first)
            if (flaw := row.flaw()) is None:
                try:
                    return row, decode_image(row.columns["image"])
                except OSError as error:
                    flaw = f"has no readable image ({error})"
            self._tell_once(row.key, flaw)
        raise UserError(
            f"none of {most} samples in a row, from sample {first} on, can be trained on: the last "
            f"one {flaw}"
        )

    def _row(self, at: int) -> Row:
        columns = self.get_item(at)
        if not self.semantic:
            columns.pop("semantic", None)
        return Row(at, columns)

    @property
    def dimension(self) -> int:
        """Numbers of a caption embedding, for estimates."""
        if not self.semantic:
            return 0
        first = self.shards[0]
        assert isinstance(first, CachedShard)
        columns = dict(zip(first.column_names, first.column_encodings, strict=True))
        return dimension_of(columns) or USUAL_DIMENSION

    def stream_sizes(self) -> list[StreamSize]:
        """Return the size of each stream, in the configuration's order."""
        sizes, shards = [], iter(self.shards)
        counts = zip(self.streams, self.samples_per_stream, self.shards_per_stream, strict=True)
        for stream, samples, count in counts:
            own = itertools.islice(shards, int(count))
            stored = sum(shard.get_persistent_size(stream.keep_zip) for shard in own)
            sizes.append(StreamSize(int(samples), int(count), stored))
        return sizes

    def _tell_zeros(self, embeddings: np.ndarray, rows: Sequence[Row]) -> None:
        """Name the first samples whose caption embedding is all zeros.

        To the loss such a caption is unlike all others.
        """
        for at in np.flatnonzero(~embeddings.any(axis=1)):
            if self._zeros < ZEROS_NAMED:
                self._zeros += 1
                what = "has a caption embedding of zeros: convert it again"
                self._tell_once(rows[at].key, what)

    def _tell_once(self, key: object, what: str) -> None:
        """Print one line of a sample. Python's warnings have two, the second of PyTorch's code."""
        if key not in self._told:
            self._told.add(key)
            print(f"sample '{key}' {what}", file=sys.stderr, flush=True)

    def key_of(self, sample_id: int) -> str:
        """Return the key of a sample; its id where the sample can't be read any more."""
        try:
            return str(super().__getitem__(sample_id)["key"])
        except Exception:  # of storage, or a set without keys
            return str(sample_id)

    def side_of(self, sample_id: int) -> int | None:
        """Return the shorter side of a stored image, in pixels; None where it can't be read."""
        try:
            stored = io.BytesIO(super().__getitem__(sample_id)["image"])
            with Image.open(stored, formats=TRAINING_FORMATS) as picture:
                return min(picture.size)
        except Exception:  # of storage, or of PIL's decoders
            return None


def build_dataloader(
    dataset: ImageTextDataset, config: DataConfig, pin_memory: bool
) -> StreamingDataLoader:
    """Build the resumable loader of a dataset, in whole batches only.

    Raises:
        UserError: the dataset has fewer samples than one batch.
    """
    _tell_too_many_workers(config.num_workers)
    context = multiprocessing.get_context(config.multiprocessing_context)
    prepare = partial(_prepare_worker, context.Value("i", 0)) if config.num_workers else None
    loader = StreamingDataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=config.num_workers,
        multiprocessing_context=config.multiprocessing_context if config.num_workers else None,
        prefetch_factor=config.prefetch_factor if config.num_workers else None,
        persistent_workers=config.persistent_workers and config.num_workers > 0,
        pin_memory=pin_memory,
        drop_last=True,
        collate_fn=dataset.batch_of,
        worker_init_fn=prepare,
        # a loader that starts draws once: from torch's generator a resumed run would draw again
        generator=torch.Generator().manual_seed(config.shuffle_seed),
    )
    if len(loader) == 0:
        world, size = world_size(), int(dataset.epoch_size)
        what = "an epoch (data.epoch_size, repeat, choose, proportion)"
        raise UserError(
            f"{'the set' if size == dataset.size else what} has {size} samples, fewer than one "
            f"batch; lower global_train_batch_size to {size // world * world} or less "
            f"(it is {int(dataset.batch_size or 0) * world})"
        )
    return loader


def _prepare_worker(outage: Synchronized[int], worker: int) -> None:
    """Have a worker end with its rank, and say once with the others that storage is away."""
    die_with_parent()
    patience.share(outage)


def _tell_too_many_workers(count: int) -> None:
    """Say once a machine, with the setting's name, what torch says in a paragraph on every rank."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    if count > cores and os.environ.get("LOCAL_RANK", "0") in ("", "0"):
        print(
            f"data.num_workers={count}, but a process may use {cores} cores; lower it if loading "
            "is slow",
            file=sys.stderr,
            flush=True,
        )
