"""A callback that counts the memory of a rank while it trains."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from measuring import highest_resident
from torch import Tensor

from alignclip.config.reading import load
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.ranks import local_part, rank
from alignclip.training.footprint import Footprint, Whole, footprint, tensor_bytes

DIMENSION = 384  # of the debug set's caption embeddings


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank.

    Attributes:
        parameters: of the whole model.
        weights: the rank's part of the parameters, and buffers.
        gradients: after the backward pass.
        optimizer: the optimizer's state.
        peak: resident memory of the whole step, above that of the process without a model.
        estimated: what the dry run says, by part.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    peak: int
    estimated: Footprint

    @property
    def held(self) -> int:
        """Return what the rank holds from step to step."""
        return self.weights + self.gradients + self.optimizer

    @classmethod
    def parse(cls, text: str) -> RankMemory:
        """Take it from JSON."""
        content = json.loads(text)
        return cls(**content | {"estimated": Footprint(**content["estimated"])})


class MemoryCounter(Callback):
    """Writes the memory of the first rank to a file, as JSON.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._gradients = self._baseline = 0
        self._estimated: Footprint | None = None

    def init(self, state: State, logger: Logger) -> None:
        """Estimate, and note what the process takes without a model."""
        config, model = load(sys.argv[1], sys.argv[2:]), state.model
        assert isinstance(model, AlignCLIPModel)
        whole, device = Whole.of(config, model), torch.device("cpu")
        self._estimated = footprint(config, model, whole, device, DIMENSION)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._baseline = highest_resident() - whole.weights

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Count the gradients, before the optimizer's step."""
        gradients = (one.grad for one in state.model.parameters() if one.grad is not None)
        self._gradients = held_bytes(gradients)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Count what stays, and write."""
        assert self._estimated is not None
        moments = (one for values in state.optimizers[0].state.values() for one in values.values())
        found = RankMemory(
            parameters=sum(map(tensor_bytes, state.model.parameters())),
            weights=held_bytes([*state.model.parameters(), *state.model.buffers()]),
            gradients=self._gradients,
            optimizer=held_bytes(one for one in moments if isinstance(one, Tensor)),
            peak=highest_resident() - self._baseline,
            estimated=self._estimated,
        )
        if rank() == 0:
            self._path.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of a rank's parts of tensors."""
    return sum(map(tensor_bytes, map(local_part, tensors)))
