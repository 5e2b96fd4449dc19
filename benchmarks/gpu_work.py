"""Parts that the steps of gpu.py share: sizes, the recipe, and time on the device."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import CHECKOUT, Figures, Record
from torch import Tensor

from alignclip.config.reading import load
from alignclip.config.schema import RunConfig
from alignclip.data.batch import Batch, longest_text

END_OF_TEXT = 49407
SEMANTIC = 768  # numbers of a caption embedding


class Failed(Exception):
    """A step's figure is not as it should be; the message is one line."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the steps.

    Attributes:
        recipe: file name of the recipe in ``yamls``.
        product: side of the matrices of a product.
        copied: bytes of a copy.
        batches: pairs of a step.
        compiled: pairs of a compiled step.
        chunked: pairs of a step in chunks, and of a chunk.
        loss: rows and columns of the loss alone.
        tiled: pairs of a loss that is computed in blocks.
        steps: warm-up, and timed.
        samples: of the drawn set, and the side of its pictures.
        workers: numbers of loader workers that are compared.
        loaded: pairs of a loader's batch.
        trained: batches of the whole run, and batches between two lines of its log.
    """

    recipe: str
    product: int
    copied: int
    batches: tuple[int, ...]
    compiled: tuple[int, ...]
    chunked: tuple[int, int]
    loss: tuple[int, int]
    tiled: int
    steps: tuple[int, int]
    samples: tuple[int, int]
    workers: tuple[int, ...]
    loaded: int
    trained: tuple[int, int]


LARGE = Sizes(
    recipe="alignclip",
    product=8192,
    copied=2**31,
    batches=(128, 256, 512, 1024),
    compiled=(512,),
    chunked=(512, 128),
    loss=(4096, 32768),
    tiled=8192,
    steps=(3, 12),
    samples=(20_000, 256),
    workers=(1, 8, 14),
    loaded=512,
    trained=(60, 20),
)
TINY = Sizes(
    recipe="debug",
    product=256,
    copied=2**20,
    batches=(8, 16),
    compiled=(8,),
    chunked=(16, 8),
    loss=(256, 2048),
    tiled=2304,
    steps=(1, 3),
    samples=(128, 64),
    workers=(1, 2),
    loaded=16,
    trained=(6, 2),
)


@dataclass(frozen=True)
class Work:
    """A step's device, sizes, folder and figures."""

    device: torch.device
    sizes: Sizes
    folder: Path
    figures: Figures

    @property
    def is_cuda(self) -> bool:
        """Say whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def set_folder(self) -> Path:
        """The place of the drawn set."""
        return self.folder / "set"

    def config(self, *overrides: str) -> RunConfig:
        """Return the recipe on the drawn set."""
        return load(CHECKOUT / "yamls" / f"{self.sizes.recipe}.yaml", self.words(*overrides))

    def words(self, *overrides: str) -> list[str]:
        """Return the recipe's settings on the drawn set, as words of a command."""
        name = "cc12m" if self.is_cuda else "scenes"
        return [
            "save_folder=null",
            f"data.streams.{name}.local={self.set_folder}",
            "autoresume=false",
            *overrides,
        ]

    def ceiling(self, name: str) -> float | None:
        """Return a figure of the step ``ceilings``; None where the step didn't run."""
        place = self.folder / "ceilings.json"
        if not place.is_file():
            return None
        figure = Record.parse(read_json(place)).figures.get(name)
        return figure.median if figure else None

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds_of(self, work: Callable[[], object], warm_up: int, runs: int) -> list[float]:
        """Return the seconds of each run of something, by events on a GPU."""
        for _ in range(warm_up):
            work()
        self.wait()
        if not self.is_cuda:
            return [_clocked(work) for _ in range(runs)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        self.wait()
        pairs = itertools.pairwise(marks)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]

    def peak(self) -> float:
        """Return the most memory of the GPU so far, in GiB, and count anew from here."""
        if not self.is_cuda:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak


def _clocked(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def captions_of(count: int, length: int) -> Tensor:
    """Draw captions whose lengths spread up to ``length`` token ids: int64 ``[count, length]``."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, END_OF_TEXT - 1, (count, length), generator=generator)
    ends = torch.randint(min(8, length - 1), length, (count,), generator=generator)
    ends[0] = length - 1
    places = torch.arange(length)
    tokens[places > ends[:, None]] = 0
    tokens[torch.arange(count), ends] = END_OF_TEXT
    return tokens


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def batch_of(work: Work, batch: int, side: int, context_length: int) -> Batch:
    """Draw a batch as the loader gives it, on the device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, generator=generator)
    pixels = pixels.permute(0, 3, 1, 2)
    embeddings = torch.randn(batch, SEMANTIC, generator=generator).half()
    text = captions_of(batch, context_length)
    return {
        "image": pixels.to(work.device),
        "text": text.to(work.device),
        "text_length": longest_text(text),
        "semantic": embeddings.to(work.device),
    }


def autocast(work: Work) -> torch.autocast:
    """Return the context of ``precision: amp_bf16``; on a CPU of fp32."""
    return torch.autocast(work.device.type, torch.bfloat16, enabled=work.is_cuda)
