"""Keys that a section of a YAML may have, those of loss terms and of tasks among them."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import MISSING, dataclass
from functools import cache
from typing import Any, Union

from alignclip.config.plugged import LOSS_TERMS, TASKS, plugged_settings
from alignclip.config.schema import EvaluatorConfig, LossConfig
from alignclip.config.setting import Rule, rule_of


@dataclass(frozen=True)
class Key:
    """A key of a section.

    Attributes:
        hint: the annotation of the value.
        rule: what the value may be.
        field: of the dataclass; None for a loss term.
    """

    hint: Any
    rule: Rule = dataclasses.field(default_factory=Rule)
    field: dataclasses.Field[Any] | None = None

    def default(self) -> Any:
        """Return the value where a section lacks the key; MISSING where there is none."""
        if self.field is None or self.field.default_factory is MISSING:
            return MISSING if self.field is None else self.field.default
        return self.field.default_factory()


def keys_of(schema: Any, task: str | None = None) -> dict[str, Key]:
    """Return the keys of a section by their names.

    Args:
        schema: the section's dataclass.
        task: an evaluator's, which has keys of its own; None for the keys of all tasks.
    """
    hints, found = _hints(schema), dict[str, Key]()
    if schema is LossConfig:
        found = {
            name: Key(plugged_settings(LOSS_TERMS, name, "loss") | None) for name in LOSS_TERMS
        }
    if schema is EvaluatorConfig:
        for name in TASKS if task is None else TASKS.keys() & {task}:
            found = keys_of(plugged_settings(TASKS, name, "task")) | found
    rules = {one.name: (rule_of(one), one) for one in dataclasses.fields(schema)}
    own = {name: Key(hints[name], *both) for name, both in rules.items() if not both[0].plugged}
    return found | own


@cache
def _hints(schema: Any) -> dict[str, Any]:
    """Return a dataclass's annotations; evaluating them takes longer than reading a YAML."""
    return typing.get_type_hints(schema)


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, NoneType among them; anything else alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in members_of(part))
    return (hint,)


def section_of(hint: Any) -> Any:
    """Return the dataclass of an annotation, an optional one too; None where there is none."""
    return next(filter(dataclasses.is_dataclass, members_of(hint)), None)


def named_sections(hint: Any) -> Any:
    """Return X of an annotation ``dict[str, X]``, also where it is optional; None of any other."""
    found = next((m for m in members_of(hint) if typing.get_origin(m) is dict), None)
    return (*typing.get_args(found), Any, Any)[1] if found is not None else None
