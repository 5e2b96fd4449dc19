"""The figures in a ``results.json`` of ``evaluate.py`` that are of the model which is exported, for its card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from alignclip.errors import UserError, one_line

Metrics = dict[str, float | None]  # metric → value; None is none that is finite


@dataclass(frozen=True)
class Figures:
    """What evaluations have measured.

    Attributes:
        file: where this was read.
        results: checkpoint → evaluator → metrics.
        weights: checkpoint → digest of its weights; empty in files of versions that kept none.
        places: checkpoint → where it lay.
    """

    file: str
    results: dict[str, dict[str, Metrics]]
    weights: dict[str, str]
    places: dict[str, str]

    def of(self, digest: str, source: str) -> tuple[Figures, str | None]:
        """The figures of the checkpoint whose weights these are, and a sentence where nobody can tell.

        Args:
            digest: :func:`alignclip.weights.state_dicts.weights_digest` of the exported model.
            source: where that was read, for messages.

        Raises:
            UserError: the figures are of other weights.
        """
        if not self.weights:
            note = f"{self.file} is of an earlier version, which kept no digest of the weights: nobody can tell "
            return self, note + "whether its figures are this model's"
        again = f"evaluate it first (composer evaluate.py … checkpoint={source}), or leave --metrics out"
        if not (same := [name for name, found in self.weights.items() if found == digest]):
            of = " and ".join(self.places.get(name, name) for name in self.weights)
            raise UserError(
                f"--metrics {self.file}: its figures are of {of}, not of the weights in {source}; {again}"
            )
        chosen = next((name for name in same if self.results.get(name)), None)
        if chosen is None:
            raise UserError(f"--metrics {self.file} holds no figures of {source} yet; {again}")
        return Figures(
            self.file, {chosen: self.results[chosen]}, {chosen: digest}, self.places
        ), None

    def table(self) -> str:
        """A row a metric, a column a checkpoint, in Markdown; numbers in names count as such: recall@5, recall@10."""
        lines = [f"| | {' | '.join(self.results)} |", "|---" * (len(self.results) + 1) + "|"]
        rows = {
            (evaluator, metric): None
            for found in self.results.values()
            for evaluator, metrics in found.items()
            for metric in metrics
        }
        for evaluator, metric in sorted(rows, key=lambda row: (row[0], _natural(row[1]))):
            values = [found.get(evaluator, {}).get(metric) for found in self.results.values()]
            cells = " | ".join("" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| {evaluator}: {metric} | {cells} |")
        return "\n".join(lines)


def read_figures(file: str) -> Figures:
    """What a ``results.json`` holds.

    Raises:
        UserError: it is none, or can't be read.
    """
    wrong = f"--metrics {file} is no results.json of evaluate.py: "
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{wrong}{one_line(error)}") from None
    if not isinstance(content, dict) or not _is_results(content.get("results")):
        raise UserError(f"{wrong}it has no results by checkpoints, evaluators and metrics")
    weights, places = (_texts(content.get(key)) for key in ("weights", "checkpoints"))
    return Figures(file, content["results"], weights, places)


def _is_results(found: object) -> bool:
    """Whether it is checkpoint → evaluator → metric → number or null."""
    return _is_mapping(
        found, lambda one: _is_mapping(one, lambda metrics: _is_mapping(metrics, _is_value))
    )


def _is_mapping(found: object, of: Callable[[object], bool]) -> bool:
    return isinstance(found, dict) and all(map(of, found.values()))


def _is_value(found: object) -> bool:
    return found is None or isinstance(found, int | float)


def _texts(found: object) -> dict[str, str]:
    """The texts of a mapping, if it is one."""
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str) and value}


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts digits as the numbers that they are."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
