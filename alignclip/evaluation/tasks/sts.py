"""Semantic textual similarity: does the text encoder rank pairs of sentences as people do?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.metrics import Metric

if TYPE_CHECKING:
    from alignclip.evaluation.evaluator import Evaluator, TaskResult
    from alignclip.evaluation.sts import SentencePairs

COLUMN = None  # a file of the STS benchmark
METRICS = {
    "spearman": Metric("higher", "rank correlation with people's scores", watch=True, chart="score")
}


@dataclass
class Settings:
    """The task has no keys of its own."""


def prepare(evaluator: Evaluator) -> SentencePairs:
    """Read the file, and note which split of the benchmark it is.

    Raises:
        UserError: the file can't be read or holds something else.
    """
    from alignclip.evaluation.sts import read_sts, split_note

    config = evaluator.config
    rows = read_sts(str(config.remote or config.local))
    evaluator.note = split_note(len(rows[0]))
    return rows


def run(evaluator: Evaluator) -> TaskResult:
    """Encode each sentence once, on all ranks."""
    from alignclip.evaluation.sts import similarity, unique

    rows: SentencePairs = evaluator.prepared
    features = evaluator.encoder.texts(unique(rows), f"{evaluator.name}: sentences")
    return evaluator.result(lambda: similarity(features, rows), {"spearman": 0.0})
