"""Losses, rate and scale of a run across all of its starts, and the page of learning curves.

What evaluators found is kept by :mod:`alignclip.evaluation.history`.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from composer.callbacks import CheckpointSaver
from composer.core import State, Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from alignclip.evaluation import history as evaluations
from alignclip.storage import describe_storage_error
from alignclip.training import curves
from alignclip.training.evaluation_callback import EvaluationCallback
from alignclip.training.save_folder import SaveFolder

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
PAGE = "curves.html"
POINTS = 2000  # lines of a whole run: what a curve shows, and quickly uploaded
LOSS = "loss/train/"
KEPT = ("lr", "logit_scale")

Line = dict[str, Any]


class History(LoggerDestination):
    """Keeps losses, rate and scale as :data:`HISTORY` in the save folder, each batch once.

    A line is appended as soon as it is known, so that a kill loses nothing. A start that goes on drops the lines behind
    its checkpoint: their batches are trained again. Object stores can't append: there the file is uploaded beside each
    checkpoint. When a start ends (done, stopped or failed), :data:`PAGE` is drawn. Trouble with either is reported,
    and the training goes on. Works on rank 0.

    Args:
        folder: of the run.
        total: batches of the whole run.
    """

    def __init__(self, folder: SaveFolder, total: int) -> None:
        self._folder = folder
        self._every = max(1, total // POINTS)
        self._values: dict[str, float] = {}
        self._file: TextIO | None = None
        self._path: Path | None = None
        self._downloads: tempfile.TemporaryDirectory[str] | None = None
        self._uploader = ThreadPoolExecutor(1)
        self._uploaded: Time | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Go on with what earlier starts have left."""
        if dist.get_global_rank() == 0:
            self._guarded(lambda: self._begin(state.timestamp.batch.value))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember a step's values."""
        self._values |= {k: float(v) for k, v in metrics.items() if k.startswith(LOSS) or k in KEPT}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the batch down where it is one to keep."""
        batch = state.timestamp.batch.value
        if batch % self._every == 0 or batch == 1:
            self._keep(batch)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """In a bucket: what goes on from this checkpoint finds the history up to it."""
        if self._file is None or not self._folder.remote:
            return
        saved = next(
            (c.last_checkpoint_batch for c in state.callbacks if isinstance(c, CheckpointSaver)),
            None,
        )
        if saved is not None and saved != self._uploaded:
            self._uploaded = saved
            assert self._path is not None
            text = self._path.read_text(encoding="utf-8")
            self._uploader.submit(
                self._guarded, lambda: self._folder.files.write_text(HISTORY, text)
            )

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """As :meth:`batch_checkpoint`."""
        self.batch_checkpoint(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Draw the page."""
        if self._file is None:
            return
        self._keep(state.timestamp.batch.value)
        self._file.close()
        self._file = None
        self._uploader.shutdown()
        self._guarded(lambda: self._finish(state))

    def _begin(self, batch: int) -> None:
        lines = [
            line
            for line in read_lines(self._folder.files.read_text_optional(HISTORY) or "")
            if line["batch"] <= batch
        ]
        text = "".join(
            json.dumps(line) + "\n" for line in [*lines, {"batch": batch, "start": True}]
        )
        if self._folder.remote:
            self._downloads = tempfile.TemporaryDirectory(prefix="alignclip-")
            self._path = Path(self._downloads.name, HISTORY)
            self._path.write_text(text, encoding="utf-8")
        else:
            self._path = Path(self._folder.uri, HISTORY)
            self._folder.files.write_text(HISTORY, text)
        self._file = self._path.open("a", encoding="utf-8")

    def _keep(self, batch: int) -> None:
        if self._values and self._file is not None:
            losses = {
                k.removeprefix(LOSS): v for k, v in self._values.items() if k.startswith(LOSS)
            }
            self._write(
                {"batch": batch, "losses": losses}
                | {k: self._values[k] for k in KEPT if k in self._values}
            )
            self._values = {}

    def _write(self, line: Line) -> None:
        def write() -> None:
            assert self._file is not None
            self._file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
            self._file.flush()

        self._guarded(write)

    def _finish(self, state: State) -> None:
        assert self._path is not None
        text = self._path.read_text(encoding="utf-8")
        if self._folder.remote:
            self._folder.files.write_text(HISTORY, text)
        lines = read_lines(text) + self._evaluations(state)
        self._folder.files.write_text(PAGE, curves.page(str(state.run_name), lines))

    def _evaluations(self, state: State) -> list[Line]:
        """What this start's evaluators, or else earlier ones, have found."""
        callback = next((c for c in state.callbacks if isinstance(c, EvaluationCallback)), None)
        records: list[evaluations.Record] = (
            callback.history.records
            if callback
            else evaluations.parse(self._folder.files.read_text_optional(evaluations.FILE) or "")
        )
        return [
            {"batch": one["batch"]}
            | {
                part: {f"{one['evaluator']}/{k}": v for k, v in one[part].items()}
                for part in ("metrics", "chance")
            }
            for one in records
            if one["batch"] <= state.timestamp.batch.value
        ]

    def _guarded(self, action: Callable[[], None]) -> None:
        """Curves are no reason to end a run."""
        try:
            action()
        except Exception as error:  # of the file system, or any cloud's
            log.warning(
                f"could not keep the learning curves in {self._folder.uri}: {describe_storage_error(error)}"
            )


def read_lines(text: str) -> list[Line]:
    """The lines of a history; one that a kill has cut off is left out."""
    lines = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict) and isinstance(read.get("batch"), int):
            lines.append(read)
    return lines


def _plain(value: Any) -> Any:
    """Numbers that are not finite as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
