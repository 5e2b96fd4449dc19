"""What a dataclass's field says of a setting besides its type: its range, choices, unit of time, meaning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from alignclip.errors import UserError, nearest

Time = Literal["schedule", "interval"]


@dataclass(frozen=True)
class Rule:
    """What a setting may be.

    Attributes:
        at_least: the smallest value; ``above`` is smaller than all values.
        at_most: the largest value; ``below`` is larger than all values.
        or_all: -1 is a value, too, and means all.
        choices: the only values.
        time: the setting is a number with a unit: of the schedule, or of an interval.
        place: the setting is a path or URL, whose ``~`` is home.
        name: the setting is a name that a person chooses.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    or_all: bool = False
    choices: Sequence[str] = ()
    time: Time | None = None
    place: bool = False
    name: bool = False


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


def check_rule(key: str, value: Any, rule: Rule) -> None:
    """Refuse a value that is not finite, out of its range or none of its choices; None is unset.

    Raises:
        UserError: the value, and what it must be.
    """
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, float) and not math.isfinite(one):
            raise UserError(f"{key} must be a finite number, not {one}")
        if isinstance(one, int | float) and not _is_in_range(one, rule):
            raise UserError(f"{key}{_range_in_words(one, rule)}")
        if rule.choices and one is not None and one not in rule.choices:
            raise UserError(f"{key}={one}: {nearest(one, rule.choices)}")


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
