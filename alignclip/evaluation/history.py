"""The evaluations of a run: one line of JSON each, ``evaluations.jsonl`` beside its checkpoints."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from alignclip.errors import UserError
from alignclip.evaluation.verdict import judge
from alignclip.storage import describe_storage_error, open_store
from alignclip.weights.locate import NAMES, WEIGHT_FILES

if TYPE_CHECKING:
    from alignclip.training.save_folder import SaveFolder

log = logging.getLogger(__name__)

FILE = "evaluations.jsonl"


class Record(TypedDict):
    """One evaluator at one batch; a metric that is not finite is None."""

    batch: int
    evaluator: str
    metrics: dict[str, float | None]
    chance: dict[str, float]
    verdict: str | None


class History:
    """The evaluations of a run so far.

    The checkpoint holds the records, so that a run which goes on has those of its own past, and none of a future that
    was lost. Rank 0 writes the file anew after each evaluation; into a bucket beside the training. A file that can't be
    written is told and ends no run.

    Args:
        folder: the run's; None keeps the records in memory alone.
    """

    def __init__(self, folder: SaveFolder | None) -> None:
        self.folder = folder
        self.records: list[Record] = []
        self._writer = ThreadPoolExecutor(1)

    def add(
        self, batch: int, evaluator: str, metrics: dict[str, float], chance: dict[str, float]
    ) -> Record:
        """Record what an evaluator found, with its verdict against the run's first evaluation before this batch."""
        first = first_before(self.records, batch).get(evaluator)
        before = {} if first is None else numbers(first["metrics"])
        verdict = judge(
            metrics, chance, before or None, "" if first is None else f"batch {first['batch']}"
        )
        record = Record(
            batch=batch,
            evaluator=evaluator,
            metrics={
                name: value if math.isfinite(value) else None for name, value in metrics.items()
            },
            chance=chance,
            verdict=None if verdict is None else verdict.text,
        )
        self.records.append(record)
        return record

    def write(self) -> None:
        """Write the file; rank 0 alone."""
        if self.folder is None:
            return
        text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in self.records)
        written = self._writer.submit(self._write, text)
        if not self.folder.remote:
            written.result()

    def finish(self) -> None:
        """Wait until the file is where it belongs; may be called again."""
        self._writer.shutdown()

    def _write(self, text: str) -> None:
        assert self.folder is not None
        try:
            self.folder.files.write_text(FILE, text)
        except Exception as error:  # of the file system, or any cloud's
            log.warning(
                f"could not write {self.folder.uri}/{FILE}: {describe_storage_error(error)}"
            )


def first_before(records: Iterable[Record], batch: int | None) -> dict[str, Record]:
    """The first evaluation by each evaluator, where a run had trained less then than at ``batch``.

    A model is not compared with itself, nor with what became of it later; where its batch is not known, with nothing.
    """
    found: dict[str, Record] = {}
    for record in records:
        if batch is not None and record["batch"] < batch:
            found.setdefault(record["evaluator"], record)
    return found


def numbers(metrics: dict[str, float | None]) -> dict[str, float]:
    """Metrics as they were measured: None is NaN."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def parse(text: str) -> list[Record]:
    """The records of a file's text; a line that is none, as a copy that was cut off has one, is left out."""
    return list(_records(text.splitlines()))


def _records(lines: Iterable[str]) -> Iterable[Record]:
    for line in lines:
        try:
            value = json.loads(line)
            record = Record(
                batch=int(value["batch"]),
                evaluator=str(value["evaluator"]),
                metrics={
                    str(name): None if v is None else float(v)
                    for name, v in value["metrics"].items()
                },
                chance={str(name): float(v) for name, v in value.get("chance", {}).items()},
                verdict=value.get("verdict"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        yield record


def history_beside(place: str) -> list[Record]:
    """The evaluations of the run that a checkpoint is of, where there are such.

    Args:
        place: a run's folder or a file in it, a path or a URL.
    """
    folder = run_folder(place)
    try:
        store = open_store(folder if "://" in folder else str(Path(folder).expanduser()))
        return parse(store.read_text_optional(FILE) or "")
    except (
        UserError,
        OSError,
    ):  # the record may not be read, or is no text: the figures don't need it
        return []


def run_folder(place: str) -> str:
    """The folder of the run that a checkpoint is of: the place itself where that is the folder."""
    folder, _, name = place.rstrip("/").rpartition("/")
    is_file = Path(name).suffix in WEIGHT_FILES or (
        NAMES.fullmatch(name) and not Path(place).expanduser().is_dir()
    )
    return (folder or ".") if is_file else place.rstrip("/")
