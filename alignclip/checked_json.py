"""JSON of files that somebody else may have written: parsed, and compared with types.

A reader says by types what it takes: ``has_type(content, dict[str, list[str]])``. Types are those
of JSON, lists, tuples of a length, dicts with texts as keys, unions, ``TypedDict`` and dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

Fields = tuple[dict[str, Any], frozenset[str]]  # types by name, and the names that have to be there


def parse_json(content: str | bytes, constant: Callable[[str], Any] | None = None) -> Any:
    """Return what a JSON text says.

    Args:
        content: the text, or its bytes as UTF-8.
        constant: makes values of ``NaN`` and ``Infinity``, which are no JSON; None: floats.

    Raises:
        ValueError: it is no JSON, or is nested too deeply.
    """
    text = content.decode("utf-8") if isinstance(content, bytes) else content
    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError("lists or objects lie too deep in one another") from None


def has_type(value: Any, expected: Any) -> bool:
    """Say whether parsed JSON is of a type, with all that it holds.

    A boolean is no number, a whole number is a float. Objects may have further entries.
    """
    origin, inner = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return any(has_type(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(has_type(one, inner[0]) for one in value)
    if origin is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) == len(inner)
        return is_list and all(map(has_type, value, inner))
    if origin is dict:
        return isinstance(value, dict) and all(has_type(one, inner[1]) for one in value.values())
    if is_typeddict(expected) or dataclasses.is_dataclass(expected):
        hints, needed = _fields(expected)
        return (
            isinstance(value, dict)
            and needed <= value.keys()
            and all(has_type(value[name], hints[name]) for name in hints.keys() & value.keys())
        )
    return _is_plain(value, expected)


def _is_plain(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    if isinstance(value, bool):
        return expected is bool
    if expected is float:
        return isinstance(value, (int, float))
    return isinstance(value, NoneType if expected is None else expected)


@cache
def _fields(expected: Any) -> Fields:
    hints = get_type_hints(expected)
    if is_typeddict(expected):
        return hints, expected.__required_keys__
    needed = [
        one.name
        for one in dataclasses.fields(expected)
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    return hints, frozenset(needed)
