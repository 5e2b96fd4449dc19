"""Runs in which a number goes wrong, and a set that makes one do so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Callback, State
from composer.loggers import Logger
from runs import jpeg
from small_runs import SmallRuns
from streaming import MDSWriter

from alignclip.model.optimization import build_optimizer
from alignclip.training import build

COUNT, DIMENSION = 64, 16
FIXED = (
    "max_duration=12ba",
    "save_interval=1ba",
    "data.num_canonical_nodes=1",
    "data.shuffle=false",
)
# clipping by the norm spreads one NaN to all gradients
NORM = "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 1.0}"


def write_embeddings(out: Path, change: Callable[[int, np.ndarray], None]) -> None:
    """A set of 64 pairs; ``change`` edits the caption embedding of a sample."""
    rng = np.random.default_rng(0)
    columns = {"key": "str", "image": "bytes", "caption": "str"}
    columns["semantic"] = f"ndarray:float16:{DIMENSION}"
    with MDSWriter(out=str(out), columns=columns) as writer:
        for i in range(COUNT):
            semantic = rng.normal(size=DIMENSION).astype(np.float16)
            change(i, semantic)
            pair = {"key": f"k{i}", "image": jpeg(rng), "caption": f"{i} dots"}
            writer.write(pair | {"semantic": semantic})


def sound(i: int, semantic: np.ndarray) -> None:
    """All embeddings are finite."""


def bad(value: float, *samples: int) -> Callable[[int, np.ndarray], None]:
    """One number of these samples' embeddings is another."""

    def change(i: int, semantic: np.ndarray) -> None:
        if i in samples:
            semantic[3] = value

    return change


class At(Callback):
    """Does something to a run in the middle of a batch."""

    def __init__(self, event: str, batch: int, action: Callable[[State], None]) -> None:
        self.batch, self.action = batch, action
        setattr(self, event, self._run)

    def _run(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.batch:
            self.action(state)


def runs_on(
    tmp_path: Path, change: Callable[[int, np.ndarray], None] = sound, *settings: str
) -> SmallRuns:
    """Runs on a set whose embeddings are changed."""
    write_embeddings(tmp_path / "set", change)
    return SmallRuns(tmp_path, tmp_path / "set", tmp_path / "runs", *FIXED, *settings)


def look_later(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have the host look at a batch while the next one is trained."""
    replace(build, "can_check_later", lambda *_: True)
    replace(build, "build_optimizer", lambda config, model, _: build_optimizer(config, model, True))
