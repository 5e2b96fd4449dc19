"""Command lines, made of the dataclasses that hold a command's options.

A field that :func:`alignclip.config.setting.setting` gives a ``help`` is an option. The field's
type says what the option takes: a bool takes nothing, a sequence takes several values.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from alignclip import paths
from alignclip.config.setting import Rule, flags_of, rule_of
from alignclip.runtime.arguments import Parser

T = TypeVar("T")
# what argparse calls both a parser and one of its titled groups
_Group = argparse._ActionsContainer


def read_options(
    kind: type[T],
    arguments: Sequence[str] | None,
    prog: str,
    description: str | None,
    examples: str | None = None,
) -> T:
    """Read a command line and return its options; None for the arguments of this process.

    Ranges are :func:`alignclip.config.setting.check_settings`'s, for callers of the command's
    function have them as well.

    Raises:
        SystemExit: with status 2, the arguments are wrong; or with 0, ``--help`` was shown.
    """
    parser = Parser(prog, description, examples)
    _add_options(kind, parser, parser)
    return _filled(kind, vars(parser.parse_args(arguments)))


def _add_options(kind: Any, parser: Parser, group: _Group) -> _Group:
    """Add the options of a dataclass and of its fields' dataclasses; return the last group."""
    hints = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        rule, hint = rule_of(one), hints[one.name]
        if rule.group:
            group = parser.add_argument_group(rule.group)
        if dataclasses.is_dataclass(hint):
            group = _add_options(hint, parser, group)
        elif rule.help:
            _add_option(one, rule, hint, group)
    return group


def _add_option(one: dataclasses.Field[Any], rule: Rule, hint: Any, group: _Group) -> None:
    flags, is_required = flags_of(one), one.default is dataclasses.MISSING
    if hint is bool:
        action = "store_false" if one.default else "store_true"
        group.add_argument(*flags, dest=one.name, action=action, help=rule.help)
        return
    default = one.default if rule.unless_typed is None else rule.unless_typed
    # str, X | None, Sequence[X]: the first type that isn't None, and of a sequence its members'
    value, *_ = [inner for inner in (*typing.get_args(hint), hint) if inner is not NoneType]
    several = "+" if is_required else "*"
    how: dict[str, Any] = {
        "type": paths.path_option if value is Path else paths.option if rule.place else value,
        "nargs": several if typing.get_origin(hint) is Sequence else None,
        "choices": rule.choices or None,
        "default": None if is_required else default,
        "metavar": rule.metavar,
        "help": rule.help,
    }
    if flags[0].startswith("-"):
        how |= {"dest": one.name, "required": is_required}
    if rule.off is not None:
        group = group.add_mutually_exclusive_group()
    group.add_argument(*flags, **how)
    if rule.off is not None:
        flag, text = rule.off
        group.add_argument(flag, dest=one.name, action="store_const", const=None, help=text)


def _filled(kind: type[T], values: dict[str, Any]) -> T:
    """Make a dataclass, and the dataclasses in its fields, of the values by the fields' names."""
    hints, given = typing.get_type_hints(kind), {}
    for one in dataclasses.fields(kind):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(hints[one.name]):
            given[one.name] = _filled(hints[one.name], values)
        elif one.name in values:
            given[one.name] = values[one.name]
    return kind(**given)
