"""A setting's text → a value of the type that its annotation names."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from alignclip.config.yaml_text import (
    NULLS,
    Plain,
    as_float,
    as_integer,
    natural,
    parse,
    parse_line,
    unquoted,
)
from alignclip.errors import UserError

SCALARS = (str, int, float, bool)
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}
_LARGEST = 2**63  # of an integer in C


def convert(value: Any, hint: Any, key: str) -> Any:
    """A tree of :func:`alignclip.config.yaml_text.parse` as values of an annotation; a dataclass's as a dict.

    Interpolations (``${seed}``) stay as they are: OmegaConf resolves them.

    Raises:
        UserError: the value is of another type; the message begins with ``key``.
    """
    members = members_of(hint)
    if value is None:
        if type(None) in members or Any in members:
            return None
        quoted = "; for the text null, put it in quotes: 'null'" if str in members else ""
        raise UserError(f"{key}: null leaves it unset, and it must be set{quoted}")
    if isinstance(value, str) and "${" in value:
        return str(value)
    if isinstance(value, Mapping):
        return _convert_mapping(value, members, key)
    if isinstance(value, list):
        return _convert_list(value, members, key)
    if not isinstance(value, str):
        return value
    return _convert_scalar(value, members, key)


def convert_line(text: str, hint: Any, key: str, is_path: bool = False) -> Any:
    """The text of an override ``key=text`` as the tree that :func:`convert` takes.

    Raises:
        UserError: a section or a list that is not YAML.
    """
    members = members_of(hint)
    if str in members and not any(typing.get_origin(m) for m in members):
        if text == "~" and is_path:  # the shell leaves it to us
            return text
        if text == "~" and type(None) not in members:
            return text
        return None if text in NULLS[1:] or (not text and type(None) in members) else unquoted(text)
    if any(scalar in members for scalar in SCALARS):
        return parse_line(text.strip())
    if Any in members:
        return parse_line(text)
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"{key}={text} is not YAML: {error}") from None


def members_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, NoneType among them; anything else alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in members_of(part))
    return (hint,)


def dataclass_in(hint: Any) -> type | None:
    """The dataclass that an annotation (X, Optional[X] or dict[str, X]) holds, if it holds one."""
    candidates = [c for member in members_of(hint) for c in (member, *typing.get_args(member))]
    return next(
        (c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None
    )


def _convert_mapping(value: Mapping[str, Any], members: Sequence[Any], key: str) -> dict[str, Any]:
    for member in members:
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            hints = typing.get_type_hints(member)
            return {
                name: convert(inner, hints.get(name, Any), f"{key}.{name}")
                for name, inner in value.items()
            }
        if _origin(member) in (dict, Mapping):
            inner_hint = (*typing.get_args(member), Any, Any)[1]
            return {
                name: convert(inner, inner_hint, f"{key}.{name}") for name, inner in value.items()
            }
    if any(member in (str, int, float, bool) for member in members) and not _takes_anything(
        members
    ):
        raise UserError(
            f"{key}: Value {dict(value)} is no {_names(members)}, but keys and values; quotes make it a text"
        )
    return {name: natural(inner) for name, inner in value.items()}


def _convert_list(value: list[Any], members: Sequence[Any], key: str) -> list[Any]:
    for member in members:
        if _origin(member) in (list, tuple, set, Sequence, Iterable):
            item_hint = (*typing.get_args(member), Any)[0]
            return [convert(item, item_hint, f"{key}[{i}]") for i, item in enumerate(value)]
    if not _takes_anything(members):
        raise UserError(f"{key}: Value {value} is a list; quotes make it a {_names(members)}")
    return [natural(item) for item in value]


def _convert_scalar(value: str, members: Sequence[Any], key: str) -> Any:
    text = str(value)
    plain = isinstance(value, Plain) or str not in members
    if plain:
        stripped = text.strip()
        if bool in members and (
            len(members) - (type(None) in members) == 1 or stripped.lower() in ("true", "false")
        ):
            return _boolean(stripped, key)
        if (
            int in members
            and (integer := as_integer(stripped)) is not None
            and abs(integer) < _LARGEST
        ):
            return integer
        if float in members and (number := _number(stripped, key, str in members)) is not None:
            return number
    if str in members:
        return text
    if any(scalar in members for scalar in SCALARS):
        raise UserError(
            f"{key}: Value '{text}' is no {_names(members)}{_why(text.strip(), members)}"
        )
    if any(
        _origin(member) in (list, dict, tuple, set) for member in members
    ) and not _takes_anything(members):
        raise UserError(f"{key}: Value '{text}' is no {_names(members)}")
    return natural(value)


def _boolean(text: str, key: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise UserError(f"{key}: Value '{text}' is neither true nor false") from None


def _number(text: str, key: str, or_text: bool) -> float | None:
    """The number, NaN and infinity by their names included: :mod:`alignclip.config.checks` refuses these."""
    if text.lower().lstrip("+-").removeprefix(".") in ("inf", "nan"):
        return None if or_text else float(text.lower().replace(".", ""))
    number = as_float(text)
    if number is None or or_text:
        return number if number is not None and math.isfinite(number) else None
    if math.isinf(number):
        raise UserError(f"{key} must be a finite number, and {text} is too large for one")
    if number == 0 and any(digit in "123456789" for digit in text.lower().partition("e")[0]):
        raise UserError(f"{key}: {text} is too close to 0 to be told from it")
    return number


def _why(text: str, members: Sequence[Any]) -> str:
    """What of a number's notation is not taken: YAML would read it as something else than it looks like."""
    if int in members and text.lstrip("+-")[:1].isdigit():
        digits = text.lstrip("+-").replace("_", "")
        return f": write it in decimal digits, without leading zeros, as in {int(digits) if digits.isdecimal() else 16}"
    if float in members and text.lstrip("+-")[:1].isdigit():
        return ": write it in decimal digits, as in 0.001 or 1e-3"
    return ""


def _names(members: Sequence[Any]) -> str:
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    found = [words.get(m) or {list: "list", dict: "section"}.get(_origin(m)) for m in members]
    return " or ".join(dict.fromkeys(word for word in found if word)) or "such value"


def _origin(member: Any) -> Any:
    return typing.get_origin(member) or member


def _takes_anything(members: Sequence[Any]) -> bool:
    """Whether there is an alternative that is no type of a YAML's own, e.g. a class of Composer's."""
    known = (*SCALARS, type(None))
    return any(
        member not in known and _origin(member) not in (list, dict, tuple, set)
        for member in members
    )
