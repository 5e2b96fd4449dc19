"""The figures of an exported model in a ``results.json`` of ``evaluate.py``, for its card."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from alignclip.checked_json import has_type, parse_json
from alignclip.errors import UserError, one_line

# checkpoint → evaluator → metric → value; None is none that is finite
Measured = dict[str, dict[str, dict[str, float | None]]]


@dataclass(frozen=True)
class ResultsFile:
    """The results of evaluations.

    Attributes:
        file: where this was read.
        results: of all checkpoints.
        weights: checkpoint → digest of its weights; empty in files of versions that kept none.
        places: checkpoint → where it lay.
    """

    file: str
    results: Measured
    weights: dict[str, str]
    places: dict[str, str]

    def of(self, digest: str, source: str) -> tuple[Measured, str | None]:
        """Return the results of these weights, and a sentence where nobody can tell.

        Args:
            digest: :func:`alignclip.weights.finite.weights_digest` of the exported model.
            source: where that was read, for messages.

        Raises:
            UserError: the figures are of other weights.
        """
        if not self.weights:
            return self.results, (
                f"{self.file} is of an earlier version, which kept no digest of the weights: "
                "nobody can tell whether its figures are this model's"
            )
        again = (
            f"evaluate it first (composer evaluate.py … checkpoint={source}), "
            "or leave --metrics out"
        )
        same = [name for name, found in self.weights.items() if found == digest]
        if not same:
            of = " and ".join(self.places.get(name, name) for name in self.weights)
            raise UserError(
                f"--metrics {self.file}: its figures are of {of}, "
                f"not of the weights in {source}; {again}"
            )
        chosen = {name: self.results[name] for name in same if self.results.get(name)}
        if not chosen:
            raise UserError(f"--metrics {self.file} holds no figures of {source} yet; {again}")
        name = next(iter(chosen))
        return {name: chosen[name]}, None


def results_table(results: Measured) -> str:
    """Write a row a metric and a column a checkpoint, in Markdown: recall@5, then recall@10."""
    lines = [f"| | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    rows = {
        (evaluator, metric)
        for found in results.values()
        for evaluator, metrics in found.items()
        for metric in metrics
    }
    for evaluator, metric in sorted(rows, key=lambda row: (row[0], _natural(row[1]))):
        values = [found.get(evaluator, {}).get(metric) for found in results.values()]
        cells = " | ".join("" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"| {evaluator}: {metric} | {cells} |")
    return "\n".join(lines)


def read_figures(file: str) -> ResultsFile:
    """Read a ``results.json``.

    Raises:
        UserError: it is none, or can't be read.
    """
    wrong = f"--metrics {file} is no results.json of evaluate.py: "
    try:
        content = parse_json(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{wrong}{one_line(error)}") from None
    if not isinstance(content, dict) or not has_type(content.get("results"), Measured):
        raise UserError(f"{wrong}it has no results by checkpoints, evaluators and metrics")
    weights, places = (_only_texts(content.get(key)) for key in ("weights", "checkpoints"))
    return ResultsFile(file, content["results"], weights, places)


def _only_texts(found: object) -> dict[str, str]:
    """Return the texts of a mapping, if it is one."""
    items = found.items() if isinstance(found, dict) else ()
    return {name: value for name, value in items if isinstance(value, str) and value}


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts digits as the numbers that they are."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
