"""Rules of settings, which a dataclass's field has besides its type.

A rule says a setting's range, its choices, its unit of time, and its flag on a command line.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alignclip.config.yaml_text import as_float
from alignclip.errors import UserError, check_place, nearest

Time = Literal["schedule", "interval"]
# The schedule counts epochs or batches; Composer's intervals can be more.
_SCHEDULE = {"ep": "epochs", "ba": "batches"}
_INTERVAL = _SCHEDULE | {"sp": "samples", "sec": "seconds", "dur": "a share of the run"}
MOST_COUNTED = 2.0**63  # of batches, epochs and so on: counters have 64 bits
_UNITS: dict[Time, dict[str, str]] = {"schedule": _SCHEDULE, "interval": _INTERVAL}


@dataclass(frozen=True)
class Rule:
    """The values that a setting may have, and its flag on a command line.

    Attributes:
        at_least: the smallest value; ``above`` is smaller than all values.
        at_most: the largest value; ``below`` is larger than all values.
        or_all: -1 is a value, too, and means all.
        choices: the only values.
        any_case: a choice may have capitals, too.
        time: the setting is a number with a unit: of the schedule, or of an interval.
        place: the setting is a path or URL, whose ``~`` is home.
        name: the setting is a name that a person chooses.
        raw: the setting is kept as it was typed, for its texts are converted later.
        plugged: the field holds settings of what is plugged in (:mod:`alignclip.config.plugged`).
        help: what ``--help`` says of a command's option; a setting without it is no such option.
        flags: how the option is spelt, the first as messages name it; a name without dashes has a
            place among the arguments instead. Default: the field's name.
        metavar: the option's value in ``--help``.
        group: the title of the option and of those that follow in ``--help``.
        off: the flag by which the option is None, and what ``--help`` says of it.
        unless_typed: the option's value on a command line without it; None: the field's default.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_all: bool = False
    choices: Sequence[str] = ()
    any_case: bool = False
    time: Time | None = None
    place: bool = False
    name: bool = False
    raw: bool = False
    plugged: bool = False
    help: str | None = None
    flags: Sequence[str] = ()
    metavar: str | None = None
    group: str | None = None
    off: tuple[str, str] | None = None
    unless_typed: Any = None


def setting(
    default: Any = dataclasses.MISSING,
    factory: Callable[[], Any] | None = None,
    **rule: Any,
) -> Any:
    """Make a dataclass's field with a :class:`Rule`.

    Args:
        default: of the field.
        factory: makes the default, where it is a list, a dict or a dataclass.
        **rule: the fields of the rule.
    """
    metadata = {"rule": Rule(**rule)}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def rule_of(one: dataclasses.Field[Any]) -> Rule:
    """Return the rule of a field; one that allows everything where the field has none."""
    return one.metadata.get("rule", _ANYTHING)


_ANYTHING = Rule()


def flags_of(one: dataclasses.Field[Any]) -> Sequence[str]:
    """Return how a command's option is spelt."""
    return rule_of(one).flags or [f"--{one.name.replace('_', '-')}"]


def check_settings(section: Any, prefix: str = "", unused: Collection[str] = ()) -> None:
    """Check every setting of a dataclass, and of the dataclasses and names below it, by its rule.

    ``unused``: keys that have no effect, and may have any value.

    Raises:
        UserError: the first value that is not finite, out of its range, none of its choices, no
            time, or a URL with one slash.
    """
    for key, value, rule in walk(section, prefix):
        if key in unused:
            continue
        if rule.time and value is not None:
            _check_time(key, value, rule)
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if rule.place and one is not None:
                check_place(key, str(one))
            if isinstance(one, float) and not math.isfinite(one):
                raise UserError(f"{key} must be a finite number, not {one}")
            if isinstance(one, int | float) and not _is_in_range(one, rule):
                raise UserError(f"{key}{_range_in_words(one, rule)}")
            choice = one.lower() if rule.any_case and one else one
            if rule.choices and choice is not None and choice not in rule.choices:
                raise UserError(f"{key}={one}: {nearest(one, rule.choices)}")


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """Yield the key, value and rule of every setting of a dataclass, at any depth."""
    for one in dataclasses.fields(section):
        value, rule = getattr(section, one.name), rule_of(one)
        key = flags_of(one)[0] if rule.help else f"{prefix}{one.name}"
        below = f"{prefix}" if rule.plugged else f"{key}."
        if dataclasses.is_dataclass(value):
            yield from walk(value, below)
        elif isinstance(value, dict) and not rule.raw:
            for name, inner in value.items():
                if dataclasses.is_dataclass(inner):
                    yield from walk(inner, f"{below}{name}.")
                else:
                    yield f"{below}{name}", inner, rule
        else:
            yield key, value, rule


def _check_time(key: str, text: str, rule: Rule) -> None:
    """Refuse a time without a number and a unit that it may have.

    Composer would take a number without a unit for seconds or epochs.
    """
    units = _UNITS[rule.time or "interval"]
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([a-z]*)", text.strip().lower())
    number = as_float(found[1]) if found else None
    if found is None or number is None or number >= MOST_COUNTED or found[2] not in ("", *units):
        names = ", ".join(f"{unit} ({name})" for unit, name in units.items())
        raise UserError(f"{key}={text} is no time: write a number and a unit, {names}")
    if not found[2]:
        raise UserError(f"{key}={text} has no unit: {text}ep (epochs) or {text}ba (batches)?")
    if found[2] != "dur" and number != int(number):
        raise UserError(f"{key}={text}: the number before {found[2]} must be whole")
    if number <= 0 and rule.above is not None:
        raise UserError(f"{key}={text} must be positive")


def _is_in_range(value: float, rule: Rule) -> bool:
    if rule.or_all and value == -1:
        return True
    return not (
        (rule.at_least is not None and value < rule.at_least)
        or (rule.above is not None and value <= rule.above)
        or (rule.at_most is not None and value > rule.at_most)
        or (rule.below is not None and value >= rule.below)
    )


def _range_in_words(value: float, rule: Rule) -> str:
    """Return the end of the sentence that a value is out of its range."""
    if rule.or_all:
        return f"={value} must be -1 (all) or at least {rule.at_least}"
    if rule.at_most is None and rule.below is None:
        if rule.above == 0:
            return f" must be positive, not {value}"
        if rule.at_least == 0:
            return f" must not be negative, but is {value}"
        return f" must be at least {rule.at_least}, not {value}"
    left = f"[{rule.at_least}" if rule.at_least is not None else f"({rule.above}"
    right = f"{rule.at_most}]" if rule.at_most is not None else f"{rule.below})"
    return f" must lie in {left}, {right}, not {value}"
