"""The results of ``evaluate.py``: the table, ``results.json``, and the folder that holds them."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from alignclip.checked_json import has_type, parse_json
from alignclip.config.metrics import arrow, better, metric_named, sets_of
from alignclip.config.schema import EvaluateConfig, EvaluatorConfig
from alignclip.evaluation.history import EvaluationRecord, judge_since
from alignclip.evaluation.json_lines import with_nan, without_nan
from alignclip.evaluation.verdict import Verdict
from alignclip.runtime.environment import versions
from alignclip.storage import write_text_whole

RESULTS = "results.json"
PLOTS = ("cosines", "embeddings", "spectra", "recall", "classes", "gap")
SHOWN_AS_ZERO = 5e-5  # the least number that four decimals tell from 0
WIDTH = 118  # of the lines below the table
KEY = (
    "↑ higher is better, ↓ lower is better, * the numbers to watch; "
    "chance: features that say nothing"
)

Scores = dict[str, float]


@dataclass
class Compared:
    """A checkpoint of a comparison.

    Attributes:
        place: its path or URL.
        digest: of the weights.
        batch: how many batches its run had trained, where that is known.
        history: the evaluations of its run in training.
    """

    place: str
    digest: str
    batch: int | None = None
    history: Sequence[EvaluationRecord] = ()


class ComparisonReport:
    """The results of one comparison, and the folder ``out`` that they are written to. Rank 0 alone.

    A folder that holds results of the same comparison – the same weights by the same names, the
    same precision, no evaluator of one name on two sets – is added to. Results of another
    comparison are moved to ``out/earlier-N``.

    Args:
        config: what is evaluated.
        checkpoints: by the names that they have in tables and plots.
    """

    def __init__(self, config: EvaluateConfig, checkpoints: Mapping[str, Compared]) -> None:
        self.config, self.checkpoints = config, checkpoints
        self.out = Path(config.out)
        self.results: dict[str, dict[str, Scores]] = {name: {} for name in checkpoints}
        self.chance: dict[str, Scores] = {}
        self.notes: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self._weights = {name: one.digest for name, one in checkpoints.items()}
        self._evaluators = {name: _about(one) for name, one in config.evaluators.items()}

    def add(
        self,
        checkpoint: str,
        evaluator: str,
        metrics: Scores,
        chance: Scores,
        note: str | None = None,
    ) -> None:
        """Take the figures of an evaluator, and write all figures so far: no failure loses them.

        ``note``: in what the evaluator's set differs from the one that published figures are of.
        """
        if not any(self.results.values()):
            self._look_at_earlier()
        if note:
            self.notes[evaluator] = note
        self.results[checkpoint][evaluator] = metrics
        self.chance[evaluator] = chance
        self.write(complete=False)

    def measured(self) -> Iterator[tuple[str, str, Scores]]:
        """Yield checkpoint, evaluator and metrics of all results."""
        for checkpoint, found in self.results.items():
            for evaluator, metrics in found.items():
                yield checkpoint, evaluator, metrics

    def verdicts(self) -> dict[str, dict[str, Verdict]]:
        """Return checkpoint → evaluator → what its figures mean."""
        verdicts: dict[str, dict[str, Verdict]] = {}
        for checkpoint, name, metrics in self.measured():
            one, chance = self.checkpoints[checkpoint], self.chance.get(name, {})
            verdict = judge_since(one.history, one.batch, name, metrics, chance)
            if verdict is not None:
                verdicts.setdefault(checkpoint, {})[name] = verdict
        return verdicts

    def write(self, complete: bool) -> None:
        """Write ``results.json``; NaN is null there. ``complete``: nothing will be added."""
        self.out.mkdir(parents=True, exist_ok=True)
        names = sorted({name for _, _, metrics in self.measured() for name in metrics})
        content = {
            "complete": complete,
            "checkpoints": checkpoint_places(self.config),
            "weights": self._weights,
            "precision": self.config.precision,
            "evaluators": self._evaluators,
            "results": self.results,
            "chance": self.chance,
            "better": {name: better(name) for name in names},
            "verdicts": {
                checkpoint: {name: vars(one) for name, one in found.items()}
                for checkpoint, found in self.verdicts().items()
            },
            "notes": self.notes,
            "failed": self.failed,
            "versions": versions(),
        }
        text = json.dumps(without_nan(content), indent=2, allow_nan=False)
        write_text_whole(self.out / RESULTS, text)

    def _look_at_earlier(self) -> None:
        """Look at what the folder holds already, and say what becomes of it."""
        earlier = _earlier_results(self.out / RESULTS)
        if earlier is None:
            return
        if why := self._difference(earlier):
            held = f"{self.out} held the results of another comparison ({why})"
            print(f"{held}: they are in {_move_away(self.out)} now", flush=True)
            return
        known, mine = earlier["evaluators"], self._evaluators
        kept = [name for name in known if name not in mine]
        again = [name for name in known if name in mine]
        self._evaluators = known | mine
        self.chance = dict(earlier["chance"])
        notes = earlier["notes"]
        self.notes = {name: notes[name] for name in kept if name in notes}
        for checkpoint, found in earlier["results"].items():
            self.results[checkpoint] = {name: with_nan(figures) for name, figures in found.items()}
        said = [(kept, "kept"), (again, "measured again")]
        words = ", ".join(f"{' and '.join(names)} {what}" for names, what in said if names)
        print(f"{self.out} holds results of the same weights: {words}", flush=True)

    def _difference(self, earlier: dict[str, Any]) -> str:
        """Say why a folder's results are of another comparison; empty: they are of this one."""
        if not has_type(earlier, _Results):
            return "of an earlier version"
        weights, known = earlier["weights"], earlier["evaluators"]
        if weights.keys() != self._weights.keys():
            return f"of {', '.join(weights)}"
        if weights != self._weights:
            return "of other weights"
        if earlier.get("precision") != self.config.precision:
            return f"in {earlier.get('precision')}"
        for name, about in self._evaluators.items():
            if name in known and _sets_in(known[name]) != _sets_in(about):
                return f"{name} was another set"
        return ""


def checkpoint_places(config: EvaluateConfig) -> dict[str, str]:
    """Return the checkpoints to evaluate, by the names that they have in tables and plots."""
    return {"model": config.checkpoint} if config.checkpoint else config.checkpoints


def table(report: ComparisonReport) -> str:
    """Lay out metrics in rows and checkpoints in columns, with signs, chance and verdicts."""
    names = list(report.results)
    rows = [["", *names, "chance"]]
    evaluators = {evaluator: metrics for _, evaluator, metrics in report.measured()}
    for evaluator, metrics in evaluators.items():
        rows.append([evaluator, *[""] * len(names), ""])
        for metric in metrics:
            mark = "*" if metric_named(metric).watch else " "
            values = [report.results[name].get(evaluator, {}).get(metric) for name in names]
            chance = report.chance.get(evaluator, {}).get(metric)
            cells = [_four_decimals(value) for value in values]
            cells.append("" if chance is None else _four_decimals(chance))
            rows.append([f"{mark} {arrow(metric)} {metric}", *cells])
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = []
    for label, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([label.ljust(first), *aligned]))
    said = [(evaluator, note) for evaluator, note in report.notes.items()]
    judged = [
        (f"{checkpoint} · {name}" if len(names) > 1 else name, verdict.text)
        for checkpoint, found in report.verdicts().items()
        for name, verdict in found.items()
    ]
    lines += ["", KEY]
    for what, text in [*judged, *said]:
        line = f"{what}: {text}"
        lines += textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(line.rstrip() for line in lines)


def _four_decimals(value: float | None) -> str:
    """Show four decimals, or two digits of a figure that four decimals would make 0."""
    if value is None:
        return "–"
    if 0 < abs(value) < SHOWN_AS_ZERO:
        return f"{value:.2g}"
    return f"{value:.4f}" if abs(value) < 1e3 else f"{value:g}"


def _about(evaluator: EvaluatorConfig) -> dict[str, Any]:
    """Describe an evaluator by its task, its sets and the task's own settings.

    How fast a set is read is no part of the description.
    """
    own = vars(evaluator.settings) if evaluator.settings is not None else {}
    sets = {
        key: {
            "remote": one.remote,
            # where a set is cached says nothing of the set
            "local": None if one.remote else one.local,
            "split": one.split,
        }
        for key, one in sets_of(evaluator).items()
    }
    return {"task": evaluator.task, **own, **sets.pop(""), **sets}


def _sets_in(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the task and the sets of a description; earlier versions wrote nothing else."""
    own = {"task", "remote", "local", "split"}
    return {key: one for key, one in about.items() if key in own or isinstance(one, dict)}


class _Results(TypedDict):
    """The entries of a ``results.json`` from which a comparison goes on."""

    weights: dict[str, str]
    evaluators: dict[str, dict[str, Any]]
    results: dict[str, dict[str, dict[str, float | None]]]
    chance: dict[str, dict[str, float]]
    notes: dict[str, str]


def _earlier_results(path: Path) -> dict[str, Any] | None:
    """Read a ``results.json``: empty where the file is none, None where there is no file."""
    try:
        content = parse_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _move_away(out: Path) -> Path:
    """Move the results of a folder and their plots into its first free ``earlier-N``."""
    places = (out / f"earlier-{number}" for number in itertools.count(1))
    folder = next(place for place in places if not place.exists())
    folder.mkdir()
    for name in (RESULTS, *(f"{plot}.png" for plot in PLOTS)):
        if (out / name).exists():
            (out / name).replace(folder / name)
    return folder
