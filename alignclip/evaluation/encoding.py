"""Features of a whole set, encoded by all ranks together, in the set's order.

Every rank encodes an equal share, the last sample repeated to fill it up: ranks with fewer calls
than others would leave these waiting where the model itself is spread over ranks (FSDP).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from alignclip.data import workers
from alignclip.data.shared_memory_room import affordable_workers, batch_bytes
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.data.transforms import normalize
from alignclip.errors import UserError, one_line
from alignclip.model.encoders import CLIP
from alignclip.ranks import (
    gather,
    gather_objects,
    raise_on_all_ranks,
    rank,
    whole_tensor,
    world_size,
)
from alignclip.runtime import attendance


def image_size(model: CLIP) -> int:
    """Return the pixels a side of the images that a model takes."""
    size = model.visual.image_size
    return int(size[0] if isinstance(size, tuple | list) else size)


class Interrupted(Exception):
    """The evaluation is given up because the run is to stop; on every rank, at the same batch."""


@dataclass
class Encoder:
    """A model and how it is run.

    Attributes:
        model: in whatever mode it is; it is put into eval mode while it encodes and back
            afterwards.
        device: where it is.
        dtype: of autocast while encoding, e.g. ``torch.bfloat16``; None runs in the model's own.
        batch_size: samples a rank encodes at a time.
        progress: show a bar on rank 0.
        interrupted: asked before each batch, on every rank; where it says so, :class:`Interrupted`
            is raised.
        known: features that several evaluators want, by set; valid as long as the model stays as it
            is.
    """

    model: CLIP
    device: torch.device
    dtype: torch.dtype | None = None
    batch_size: int = 256
    progress: bool = True
    interrupted: Callable[[], bool] | None = None
    known: dict[tuple[str, ...], Any] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return image_size(self.model)

    @property
    def tokenizer(self) -> SimpleTokenizer:
        """CLIP's, at this model's context length."""
        return SimpleTokenizer(context_length=self.model.context_length)

    @property
    def logit_scale(self) -> Tensor:
        """exp(logit_scale), [1]."""
        scale = self.model.logit_scale.detach()
        return whole_tensor(scale).exp()

    def images(
        self, samples: Dataset[Any], num_workers: int = 0, name: str = "images"
    ) -> tuple[Tensor, list[Any]]:
        """Encode the images of a map-style dataset.

        Args:
            samples: N items ``(image, other)``: ``[3, size, size]``, uint8 or floats that are
                normalised already, and anything that can be pickled.
            num_workers: processes of this rank that read and decode.
            name: of the progress bar.

        Returns:
            [N, d] L2-normalised float32 on the device, and the N others; on every rank, in the
            dataset's order.

        Raises:
            UserError: on every rank, where one of them can't read or encode a sample.
        """
        count = len(samples)  # type: ignore[arg-type]
        share = -(-count // world_size())
        mine = [min(i, count - 1) for i in range(rank() * share, (rank() + 1) * share)]
        loader = self._loader(samples, mine, num_workers)
        others: list[Any] = []
        failures: list[str] = []

        def batches() -> Iterator[Tensor]:
            batches: Iterator[tuple[Tensor, list[Any]]] = iter(loader)
            for _ in range(len(loader)):
                try:
                    attendance.note(f"waits for {name} to encode", "its storage and workers")
                    with workers.deaths_explained():
                        images, other = next(batches)
                    attendance.note(f"encodes {name}")
                    others.extend(other)
                except Exception as error:  # go on as if, and tell the others when they listen
                    # a worker's error has a stack trace in its text, and ends with what it was
                    failures.append((str(error).strip().splitlines() or [type(error).__name__])[-1])
                    _end_workers(batches)
                    batches = iter(())
                    images = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8)
                yield images

        def encode(images: Tensor) -> Tensor:
            images = images.to(self.device)
            return self.model.encode_image(
                normalize(images) if images.dtype == torch.uint8 else images
            )

        features = self._encode(encode, batches(), len(loader), name)
        if failures := gather_objects(failures[:1]):
            raise UserError(failures[0])
        return gather(features).flatten(0, 1)[:count], gather_objects(others)[:count]

    def _loader(self, samples: Dataset[Any], mine: list[int], num_workers: int) -> DataLoader[Any]:
        """Make the loader of this rank's samples, with the workers for which there is room."""
        # more only wait for one another, and PyTorch warns of them
        num_workers = min(num_workers, os.cpu_count() or 1)
        batch = batch_bytes(min(self.batch_size, len(mine)), self.image_size)
        num_workers = affordable_workers(num_workers, batch, -(-len(mine) // self.batch_size))
        return DataLoader(
            Subset(samples, mine),
            batch_size=self.batch_size,
            num_workers=num_workers,
            collate_fn=_collate,
            worker_init_fn=workers.die_with_parent,
            generator=torch.Generator(),  # its own: in training the global one must not notice
        )

    def texts(self, texts: Sequence[str], name: str = "texts") -> Tensor:
        """Encode captions, short ones together: a batch is computed up to its longest caption.

        Args:
            texts: M captions, the same on every rank.
            name: of the progress bar.

        Returns:
            [M, d] L2-normalised float32 on the device, on every rank, in the given order.

        Raises:
            UserError: on every rank, where one of them can't encode them.
        """
        tokens = self.tokenizer(list(texts)).int()
        # longest first, so that a batch that is too large fails at once
        order = tokens.argmax(-1).argsort(descending=True, stable=True)
        # dealt out like cards, so that every rank has as much to compute
        share = -(-len(texts) // world_size())
        mine = order[[min(i * world_size() + rank(), len(texts) - 1) for i in range(share)]]
        batches = tokens[mine].split(self.batch_size)

        def encode(tokens: Tensor) -> Tensor:
            return self.model.encode_text(tokens.long().to(self.device))

        gathered = gather(self._encode(encode, batches, len(batches), name))
        features = torch.empty(len(texts), gathered.shape[-1], device=self.device)
        features[order.to(self.device)] = gathered.transpose(0, 1).flatten(0, 1)[: len(texts)]
        return features

    def _encode(
        self, encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor], total: int, name: str
    ) -> Tensor:
        """Encode this rank's batches to normalised features; every rank has as many batches."""
        bar = tqdm(
            batches, total=total, desc=name, unit="batch", disable=not self.progress or rank() != 0
        )
        autocast: AbstractContextManager[Any] = (
            torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext()
        )
        was_training = self.model.training
        self.model.eval()
        parts: list[Tensor] = []
        failure: UserError | None = None
        try:
            with torch.no_grad(), autocast:
                for batch in bar:
                    if self.interrupted is not None and self.interrupted():
                        raise Interrupted
                    try:
                        if failure is None:
                            with workers.deaths_explained():  # PyTorch tells it at any moment
                                parts.append(F.normalize(encode(batch).float(), dim=-1))
                    except Exception as error:
                        # out of memory? keep step with the others, then tell
                        why = UserError(f"{name}: {type(error).__name__}: {one_line(error)}")
                        failure = error if isinstance(error, UserError) else why
                        parts.clear()
        finally:
            self.model.train(was_training)
        features = torch.cat(parts) if failure is None else torch.empty(0)
        if not features.isfinite().all():  # they would compare as the best of all
            failure = UserError(f"{name}: features hold NaN or infinity")
        raise_on_all_ranks(failure)
        return features


def _end_workers(batches: Any) -> None:
    """End a loader's processes now: one in a long download would outlive its loader."""
    workers = getattr(batches, "_workers", [])
    if workers:
        # asks, waits some seconds, and no longer takes their end for a failure
        batches._shutdown_workers()
    for worker in workers:
        worker.kill()
        worker.join()


def _collate(items: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    return torch.stack([image for image, _ in items]), [other for _, other in items]
