"""Figures of today beside a baseline: the JSON of earlier runs on the same hardware.

A baseline is ``baselines/HARDWARE.json``, which holds the record of each script.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from measuring import Figure, Record, json_text

BASELINES = Path(__file__).parent / "baselines"
FALL = 0.1  # the share by which a figure may get worse
# A rate that is half of what it was fell, however much its runs differ: nothing falls by more than
# all of it, and the runs may differ by more than that.
MOST_NOISE = 0.5


@dataclass
class Comparison:
    """The figures of a script's run beside the baseline's, a line each.

    Attributes:
        fell: worse by more than :data:`FALL`, and by more than the runs differ among themselves.
        noisy: worse by more than :data:`FALL`, but the runs differ by as much.
        rose: better by more than :data:`FALL`, and by more than the runs differ.
        missing: only the baseline has them.
        new: only this run has them.
        same: number of the others.
        refused: why nothing is compared; "" where it is.
    """

    fell: list[str] = field(default_factory=list)
    noisy: list[str] = field(default_factory=list)
    rose: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    same: int = 0
    refused: str = ""


def compare(before: Record, now: Record) -> Comparison:
    """Compare a script's figures with the baseline's."""
    if before.settings != now.settings:
        names = before.settings.keys() | now.settings.keys()
        changed = [
            f"{name} {before.settings.get(name)} → {now.settings.get(name)}"
            for name in sorted(names)
            if before.settings.get(name) != now.settings.get(name)
        ]
        return Comparison(refused=f"the baseline has other settings: {', '.join(changed)}")
    found = Comparison()
    for name, old in before.figures.items():
        new = now.figures.get(name)
        if new is None or new.unit != old.unit:
            found.missing.append(name)
        elif new.compared and old.compared and old.median:
            _sort_in(found, name, old, new)
    found.new = [
        name
        for name, new in now.figures.items()
        if name not in before.figures or before.figures[name].unit != new.unit
    ]
    return found


def _sort_in(found: Comparison, name: str, old: Figure, new: Figure) -> None:
    """Add a figure to the list that it belongs to."""
    worse, spread = worse_by(old, new), min(max(old.spread, new.spread), MOST_NOISE)
    much = f"{abs(worse):.0%} {'worse' if worse > 0 else 'better'}"
    line = f"{name}: {digits(old.median)} → {digits(new.median)} {new.unit} ({much})"
    if worse > FALL:
        if worse > spread:
            found.fell.append(line)
        else:
            found.noisy.append(f"{line}, and its runs differ by ±{spread:.0%}")
    elif worse < -max(FALL, spread):
        found.rose.append(line)
    else:
        found.same += 1


def worse_by(old: Figure, new: Figure) -> float:
    """Return the share by which a figure got worse; below 0 where it got better."""
    change = new.median / old.median - 1
    return change if new.better == "lower" else -change


def digits(number: float) -> str:
    """Write a number with three digits, or all of its whole ones."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def comparison_lines(script: str, found: Comparison) -> Iterable[str]:
    """Yield what a comparison found, a line each."""
    if found.refused:
        yield f"{script}: not compared, {found.refused}"
        return
    for title in ("fell", "noisy", "rose", "missing", "new"):
        for line in getattr(found, title):
            yield f"{script}: {title:8}{line}"
    yield f"{script}: {found.same} within {FALL:.0%}"


def read_baseline(path: Path) -> dict[str, Record]:
    """Return the records of a baseline by script; none where there is no such file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {script: Record.parse(record) for script, record in content.items()}


def save_baseline(records: Iterable[Record], folder: Path) -> list[Path]:
    """Write records into the baselines of their hardware; records of other scripts stay."""
    folder.mkdir(exist_ok=True)
    by_hardware: dict[str, dict[str, Record]] = {}
    for record in records:
        by_hardware.setdefault(record.hardware, {})[record.script] = record
    paths = []
    for hardware, new in by_hardware.items():
        path = folder / f"{hardware}.json"
        whole = {script: asdict(one) for script, one in (read_baseline(path) | new).items()}
        path.write_text(json_text(dict(sorted(whole.items()))), encoding="utf-8")
        paths.append(path)
    return paths
