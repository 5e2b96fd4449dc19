"""Losses, rate and scale of a run across all of its starts, and the page of learning curves.

:mod:`alignclip.evaluation.history` keeps what evaluators found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State, Time
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from alignclip.evaluation.history import EVALUATIONS, records_in
from alignclip.evaluation.json_lines import RecordFile, RecordLine, lines_in, text_of, without_nan
from alignclip.storage.temporary import temporary_folder
from alignclip.training.curve_page import page, save_picture
from alignclip.training.display import LOSS
from alignclip.training.evaluation_callback import EvaluationCallback
from alignclip.training.save_folder import SaveFolder

HISTORY = "history.jsonl"
PAGE = "curves.html"
PICTURE = "curves.png"
POINTS = 2000  # lines of a whole run: what a curve shows, and quickly uploaded
KEPT = ("lr", "logit_scale")


class History(LoggerDestination):
    """Keeps losses, rate and scale as :data:`HISTORY` in the save folder, each batch once.

    A line is appended as soon as it is known, so that a kill loses nothing. A start that goes on
    drops the lines behind its checkpoint: their batches are trained again. Object stores can't
    append: there the file is uploaded beside each checkpoint. When a start ends (done, stopped or
    failed), :data:`PAGE` and :data:`PICTURE` are drawn. Trouble with any of these is reported, and
    the training goes on. Works on rank 0.

    Args:
        folder: of the run.
        total: batches of the whole run.

    Attributes:
        is_drawn: whether the page and the picture are in the folder.
    """

    def __init__(self, folder: SaveFolder, total: int) -> None:
        self._store = folder.files
        complaint = f"could not keep the learning curves in {folder.uri}"
        self._file = RecordFile(self._store, HISTORY, complaint)
        self._every = max(1, total // POINTS)
        self._values: dict[str, float] = {}  # of the batch that is trained
        self._pending: RecordLine | None = None  # of the last batch that has ended
        self._kept = 0  # the last batch that was written down, or trained by earlier starts
        self._lines: list[RecordLine] | None = None  # as long as the training goes on
        self._uploaded: Time | None = None
        self.is_drawn = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Go on with what earlier starts have left."""
        if dist.get_global_rank() == 0:
            self._file.reported(lambda: self._begin(state.timestamp.batch.value))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Remember a step's values."""
        self._values |= {k: float(v) for k, v in metrics.items() if k.startswith(LOSS) or k in KEPT}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write the batch down where one is due; it is the next one whose losses are logged."""
        if not any(name.startswith(LOSS) for name in self._values):
            return
        batch = state.timestamp.batch.value
        values, self._values = self._values, {}
        losses = {k.removeprefix(LOSS): v for k, v in values.items() if k.startswith(LOSS)}
        kept = {k: values[k] for k in KEPT if k in values}
        self._pending = without_nan({"batch": batch, "losses": losses, **kept})
        if batch == 1 or batch // self._every > self._kept // self._every:
            self._keep()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Upload the history to a bucket: a run that goes on from this checkpoint finds it."""
        if self._lines is None or not self._store.is_remote:
            return
        savers = (one for one in state.callbacks if isinstance(one, CheckpointSaver))
        saved = next((saver.last_checkpoint_batch for saver in savers), None)
        if saved is not None and saved != self._uploaded:
            self._uploaded = saved
            self._file.write(self._lines)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        """See :meth:`batch_checkpoint`."""
        self.batch_checkpoint(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """Draw the page and the picture."""
        if self._lines is None:
            return
        self._keep()
        lines, self._lines = self._lines, None
        if self._store.is_remote:
            self._file.write(lines)
        self._file.finish()
        self._file.reported(lambda: self._draw(state, lines))

    def _begin(self, batch: int) -> None:
        self._kept = batch
        earlier = lines_in(self._store.read_text_optional(HISTORY) or "")
        lines: list[RecordLine] = [line for line in earlier if line["batch"] <= batch]
        lines.append({"batch": batch, "start": True})
        if not self._store.is_remote:
            self._store.write_text(HISTORY, text_of(lines))
        self._lines = lines

    def _keep(self) -> None:
        if self._pending is None or self._lines is None:
            return
        line, self._pending = self._pending, None
        self._kept = line["batch"]
        self._lines.append(line)
        if not self._store.is_remote:
            self._file.reported(lambda: self._append(text_of([line])))

    def _append(self, text: str) -> None:
        with Path(self._store.at(HISTORY)).open("a", encoding="utf-8") as file:
            file.write(text)

    def _draw(self, state: State, lines: list[RecordLine]) -> None:
        lines = [*lines, *self._evaluations(state)]
        self._store.write_text(PAGE, page(str(state.run_name), lines))
        with temporary_folder() as temporary:
            drawn = temporary / PICTURE
            save_picture(drawn, lines)
            self._store.put(drawn, PICTURE)
        self.is_drawn = True

    def _evaluations(self, state: State) -> list[RecordLine]:
        """Return what this start's evaluators, or else earlier ones, have found."""
        callback = next((c for c in state.callbacks if isinstance(c, EvaluationCallback)), None)
        if callback is not None:
            records = callback.history.records
        else:
            records = records_in(self._store.read_text_optional(EVALUATIONS) or "")
        return [
            {"batch": one["batch"]}
            | {
                part: {f"{one['evaluator']}/{name}": value for name, value in values.items()}
                for part, values in (("metrics", one["metrics"]), ("chance", one["chance"]))
            }
            for one in records
            if one["batch"] <= state.timestamp.batch.value
        ]
