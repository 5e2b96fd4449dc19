"""What ``evaluate.py`` leaves: the table, ``results.json``, and the plots of one comparison in one folder."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignclip.config.metrics import arrow, better, metric_named
from alignclip.config.schema import EvaluateConfig, EvaluatorConfig
from alignclip.evaluation.history import Record, numbers
from alignclip.evaluation.verdict import Verdict, judge
from alignclip.runtime.environment import versions
from alignclip.storage import write_text_whole

RESULTS = "results.json"
PLOTS = ("cosines", "embeddings", "spectra", "recall", "classes", "gap")
LEAST = 5e-5  # the least number that four decimals tell from 0
_SET = ("task", "remote", "local", "split")  # what makes an evaluator of one name the same one

Metrics = dict[str, float]
Results = dict[str, dict[str, Metrics]]  # checkpoint → evaluator → metric → value


class Report:
    """The results of one comparison, and the folder ``out`` that they are written to. Rank 0 alone.

    A folder that holds results of the same comparison – the same weights by the same names, the same precision, no
    evaluator of one name on two sets – is added to. Results of another comparison are moved to ``out/earlier-N``.

    Args:
        config: what is evaluated.
        weights: a digest of the weights by the names of the checkpoints.
        before: checkpoint → evaluator → the first evaluation of its run, earlier than the checkpoint.
        batches: how many batches the checkpoints' runs had trained, where that is known.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        weights: dict[str, str],
        before: Mapping[str, Mapping[str, Record]] | None = None,
        batches: Mapping[str, int | None] | None = None,
    ) -> None:
        self.config, self.weights, self.before = config, weights, before or {}
        self.batches = batches or {}
        self.out = Path(config.out)
        self.results: Results = {name: {} for name in weights}
        self.chance: dict[str, Metrics] = {}
        self.notes: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._evaluators = {
            name: _settings(evaluator) for name, evaluator in config.evaluators.items()
        }
        self._opened = False

    def add(
        self,
        checkpoint: str,
        evaluator: str,
        metrics: Metrics,
        chance: Metrics,
        note: str | None = None,
    ) -> None:
        """Take the figures of an evaluator, and write all there are: none is lost with the rest.

        ``note``: in what the evaluator's set is not the one that published figures are of.
        """
        self._open()
        self.notes |= {evaluator: note} if note else {}
        self.results[checkpoint][evaluator] = metrics
        self.chance[evaluator] = chance
        self.write(complete=False)

    def verdicts(self) -> dict[str, dict[str, Verdict]]:
        """Checkpoint → evaluator → what its figures mean."""
        found: dict[str, dict[str, Verdict]] = {}
        for checkpoint, evaluators in self.results.items():
            for name, metrics in evaluators.items():
                chance, first = self.chance.get(name, {}), self.before.get(checkpoint, {}).get(name)
                if (
                    first is not None and first["chance"] == chance
                ):  # of another set, it would be another one
                    verdict = judge(
                        metrics, chance, numbers(first["metrics"]), f"batch {first['batch']}"
                    )
                else:
                    verdict = judge(metrics, chance)
                if verdict is not None:
                    found.setdefault(checkpoint, {})[name] = verdict
        return found

    def write(self, complete: bool) -> None:
        """Write ``results.json``; a number that is none is null there. ``complete``: nothing will be added."""
        self.out.mkdir(parents=True, exist_ok=True)
        measured = {
            name
            for found in self.results.values()
            for metrics in found.values()
            for name in metrics
        }
        content = {
            "complete": complete,
            "checkpoints": places(self.config),
            "weights": self.weights,
            "precision": self.config.precision,
            "evaluators": self._evaluators,
            "results": {
                checkpoint: {evaluator: _finite(metrics) for evaluator, metrics in found.items()}
                for checkpoint, found in self.results.items()
            },
            "chance": self.chance,
            "better": {name: better(name) for name in sorted(measured)},
            "verdicts": {
                checkpoint: {
                    evaluator: dataclasses.asdict(verdict) for evaluator, verdict in found.items()
                }
                for checkpoint, found in self.verdicts().items()
            },
            "notes": self.notes,
            "failed": self.failed,
            "versions": versions(),
        }
        write_text_whole(self.out / RESULTS, json.dumps(content, indent=2, allow_nan=False))

    def _open(self) -> None:
        """Look at what the folder holds already, once, and say what becomes of it."""
        if self._opened:
            return
        self._opened = True
        earlier = _read(self.out / RESULTS)
        if earlier is None:
            return
        if why := self._other(earlier):
            folder = _move_away(self.out)
            print(
                f"{self.out} held the results of another comparison ({why}): they are in {folder} now",
                flush=True,
            )
            return
        kept = [name for name in earlier["evaluators"] if name not in self._evaluators]
        again = [name for name in earlier["evaluators"] if name in self._evaluators]
        self._evaluators = earlier["evaluators"] | self._evaluators
        self.chance = {
            name: earlier["chance"][name] for name in [*kept, *again] if name in earlier["chance"]
        }
        notes = earlier.get("notes") or {}
        self.notes = {name: notes[name] for name in kept if name in notes}
        for checkpoint, found in earlier["results"].items():
            for name, metrics in found.items():
                self.results[checkpoint][name] = {
                    k: math.nan if v is None else float(v) for k, v in metrics.items()
                }
        words = [
            f"{' and '.join(names)} {what}"
            for names, what in ((kept, "kept"), (again, "measured again"))
            if names
        ]
        print(f"{self.out} holds results of the same weights: {', '.join(words)}", flush=True)

    def _other(self, earlier: dict[str, Any]) -> str:
        """In what the results of a folder are another comparison's; empty where they are this one's."""
        weights, known = earlier.get("weights"), earlier.get("evaluators")
        if (
            not isinstance(weights, dict)
            or not isinstance(known, dict)
            or not isinstance(earlier.get("chance"), dict)
        ):
            return "of an earlier version"
        if weights.keys() != self.weights.keys():
            return f"of {', '.join(weights)}"
        if weights != self.weights:
            return "of other weights"
        if earlier.get("precision") != self.config.precision:
            return f"in {earlier.get('precision')}"
        moved = [
            name
            for name in self._evaluators
            if name in known and known[name] != self._evaluators[name]
        ]
        return f"{moved[0]} was another set" if moved else ""


def places(config: EvaluateConfig) -> dict[str, str]:
    """The checkpoints to evaluate, by the names that they have in tables and plots."""
    return {"model": config.checkpoint} if config.checkpoint else config.checkpoints


def table(report: Report) -> str:
    """Metrics in rows, checkpoints in columns; which way is better, which to watch, and what chance would score."""
    results, names = report.results, list(report.results)
    rows = [["", *names, "chance"]]
    evaluators = {
        name: found for one in results.values() for name, found in one.items()
    }  # one may lack another's
    for evaluator in evaluators:
        rows.append([evaluator, *[""] * len(names), ""])
        for metric in evaluators[evaluator]:
            mark = "*" if metric_named(metric).watch else " "
            values = [_number(results[name].get(evaluator, {}).get(metric)) for name in names]
            chance = report.chance.get(evaluator, {}).get(metric)
            label = f"{mark} {arrow(metric)} {metric}"
            rows.append([label, *values, "" if chance is None else _number(chance)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    lines += [
        "",
        "↑ higher is better, ↓ lower is better, * the numbers to watch; chance: features that say nothing",
    ]
    for checkpoint, found in report.verdicts().items():
        for evaluator, verdict in found.items():
            what = f"{checkpoint} · {evaluator}" if len(names) > 1 else evaluator
            lines += textwrap.wrap(
                f"{what}: {verdict.text}", 118, subsequent_indent="  ", break_on_hyphens=False
            )
    for evaluator, note in report.notes.items():
        lines += textwrap.wrap(
            f"{evaluator}: {note}", 118, subsequent_indent="  ", break_on_hyphens=False
        )
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None) -> str:
    """A figure in four decimals; two digits of one that four decimals would make 0. ``results.json`` has them all."""
    if value is None:
        return "–"
    if 0 < abs(value) < LEAST:
        return f"{value:.2g}"
    return f"{value:.4f}" if abs(value) < 1e3 else f"{value:g}"


def _finite(metrics: Metrics) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _settings(evaluator: EvaluatorConfig) -> dict[str, Any]:
    """The task and the sets of an evaluator; how fast they are read is no part of it."""
    found: dict[str, Any] = {key: getattr(evaluator, key) for key in _SET}
    for part in ("train", "outliers"):
        if (other := getattr(evaluator, part)) is not None:
            found[part] = {key: getattr(other, key) for key in _SET if key != "task"}
    # where a set is cached says nothing of the set
    for place in (found, *(value for value in found.values() if isinstance(value, dict))):
        if place["remote"]:
            place["local"] = None
    return found


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a ``results.json``; an empty one where it is none, and None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _move_away(out: Path) -> Path:
    """Move the results of a folder and their plots into one of their own below it: the first free ``earlier-N``."""
    number = 1
    while True:
        folder = out / f"earlier-{number}"
        try:
            folder.mkdir()
            break
        except FileExistsError:
            number += 1
    for name in (RESULTS, *(f"{plot}.png" for plot in PLOTS)):
        if (out / name).exists():
            (out / name).replace(folder / name)
    return folder
