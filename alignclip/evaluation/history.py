"""The evaluations of a run: one line of JSON each, ``evaluations.jsonl`` beside its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from alignclip.errors import UserError
from alignclip.evaluation.json_lines import RecordFile, lines_in, with_nan, without_nan
from alignclip.evaluation.verdict import Verdict, judge
from alignclip.storage import Store, open_store
from alignclip.weights.locate import NAMES, WEIGHT_FILES

EVALUATIONS = "evaluations.jsonl"


class EvaluationRecord(TypedDict):
    """The figures of an evaluator at a batch; a metric that is not finite is None."""

    batch: int
    evaluator: str
    metrics: dict[str, float | None]
    chance: dict[str, float]
    verdict: str | None


class EvaluationRecords:
    """The evaluations of a run so far.

    The checkpoint holds the records, so that a run which goes on has those of its own past, and
    none of a future that was lost. Rank 0 writes the file anew after each evaluation; into a bucket
    beside the training. A file that can't be written is told and ends no run.

    Args:
        store: the run's folder; None keeps the records in memory alone.
    """

    def __init__(self, store: Store | None) -> None:
        self.records: list[EvaluationRecord] = []
        self._file = (
            RecordFile(store, EVALUATIONS, f"could not write {store.at(EVALUATIONS)}")
            if store
            else None
        )

    def add(
        self, batch: int, evaluator: str, metrics: dict[str, float], chance: dict[str, float]
    ) -> EvaluationRecord:
        """Record what an evaluator found, judged against the run's first evaluation."""
        verdict = judge_since(self.records, batch, evaluator, metrics, chance)
        record = EvaluationRecord(
            batch=batch,
            evaluator=evaluator,
            metrics=without_nan(metrics),
            chance=chance,
            verdict=verdict.text if verdict else None,
        )
        self.records.append(record)
        return record

    def write(self) -> None:
        """Write the file; rank 0 alone."""
        if self._file is not None:
            self._file.write(self.records)

    def finish(self) -> None:
        """Wait until the file is where it belongs; may be called again."""
        if self._file is not None:
            self._file.finish()


def judge_since(
    records: Iterable[EvaluationRecord],
    batch: int | None,
    evaluator: str,
    metrics: Mapping[str, float],
    chance: Mapping[str, float],
) -> Verdict | None:
    """Judge an evaluation against the run's first one by the evaluator, where there is one.

    A model is not compared with itself, nor with what became of it later; where its batch is not
    known, or another chance says that the set was another one, with nothing.
    """
    for first in records:
        if batch is not None and first["batch"] < batch and first["evaluator"] == evaluator:
            if first["chance"] != chance:
                break
            return judge(metrics, chance, with_nan(first["metrics"]), f"batch {first['batch']}")
    return judge(metrics, chance)


def records_in(text: str) -> list[EvaluationRecord]:
    """Return the records of a file's text without lines that are none, as a cut-off copy has."""
    records = []
    for line in lines_in(text):
        try:
            record = EvaluationRecord(
                batch=line["batch"],
                evaluator=str(line["evaluator"]),
                metrics=without_nan(with_nan(line["metrics"])),
                chance=with_nan(line.get("chance", {})),
                verdict=line.get("verdict"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        records.append(record)
    return records


def history_beside(place: str) -> list[EvaluationRecord]:
    """Return the evaluations of the run that a checkpoint is of, where the run has such.

    Args:
        place: a run's folder or a file in it, a path or a URL.
    """
    try:
        return records_in(open_store(run_folder(place)).read_text_optional(EVALUATIONS) or "")
    except (UserError, OSError):  # not readable, or no text: the figures don't need the record
        return []


def run_folder(place: str) -> str:
    """Return the folder of a checkpoint's run: the place itself where that is the folder."""
    folder, _, name = place.rstrip("/").rpartition("/")
    is_file = Path(name).suffix in WEIGHT_FILES or (
        NAMES.fullmatch(name) and not Path(place).expanduser().is_dir()
    )
    return (folder or ".") if is_file else place.rstrip("/")
