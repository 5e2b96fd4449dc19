"""Texts of a YAML → values of the types that annotations name, dataclasses included."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Union

from alignclip.config.plugged import LOSS_TERMS, TASKS, settings_of
from alignclip.config.schema import EvaluatorConfig, LossConfig, SetConfig
from alignclip.config.setting import rule_of
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
from alignclip.errors import UserError, nearest
from alignclip.paths import expand

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_CONTAINERS = {list: "list", dict: "section", tuple: None, set: None}
_LISTS = (list, tuple, set, Sequence, Iterable)
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}
_LARGEST = 2**63  # of an integer in C


class SettingError(UserError):
    """A value of another type than its setting's; ``key`` is the setting."""

    def __init__(self, key: str, message: str) -> None:
        # an exception is sent to another process as its arguments
        super().__init__(key, message)
        self.key, self.message = key, message

    def __str__(self) -> str:
        return self.message


class UnknownKeyError(SettingError):
    """A key that a section doesn't have; ``valid`` are the keys that it has."""

    def __init__(self, key: str, valid: Iterable[str]) -> None:
        self.valid = list(valid)
        super().__init__(key, f"unknown key '{key}'; {nearest(key.rpartition('.')[2], self.valid)}")
        self.args = key, self.valid


def convert(value: Any, hint: Any, key: str) -> Any:
    """Convert a tree of :func:`alignclip.config.yaml_text.parse` to an annotation's type.

    Raises:
        SettingError: the value is of another type; the message begins with ``key``.
    """
    members = members_of(hint)
    if value is None:
        if type(None) in members or Any in members:
            return None
        quoted = "; for the text null, put it in quotes: 'null'" if str in members else ""
        raise SettingError(key, f"{key}: null leaves it unset, and it must be set{quoted}")
    if dataclasses.is_dataclass(value):  # converted before
        return value
    if (schema := next(filter(dataclasses.is_dataclass, members), None)) is not None:
        return convert_section(value, schema, key)
    if isinstance(value, Mapping):
        return _convert_mapping(value, members, key)
    if isinstance(value, list):
        return _convert_list(value, members, key)
    # of a resolver of OmegaConf's
    return _convert_scalar(value if isinstance(value, str) else Plain(value), members, key)


def convert_section(values: Any, schema: Any, key: str) -> Any:
    """Make a dataclass of a mapping; a key that the mapping lacks has the dataclass's default.

    Args:
        values: the mapping.
        schema: the dataclass.
        key: of the section in the whole configuration; empty for the whole.

    Raises:
        UnknownKeyError: the dataclass lacks a key.
        SettingError: a value of another type, or no mapping.
    """
    if not isinstance(values, Mapping):
        words = "is a section with keys of its own, not the value"
        raise SettingError(key, f"'{key}' {words} {values!r}")
    hints = typing.get_type_hints(schema)
    rules = {one.name: rule_of(one) for one in dataclasses.fields(schema)}
    names = {name for name, rule in rules.items() if not rule.plugged}
    others = {name: value for name, value in values.items() if name not in names}
    found = _read_plugged(schema, others, values, key)
    for name in filter(names.__contains__, values):
        full = _join(key, name)
        if rules[name].raw:
            _check_arguments(values[name], full)
            found[name] = values[name]
            continue
        inner = convert(values[name], hints[name], full)
        found[name] = _expand(inner, full) if rules[name].place else inner
    return schema(**found)


def _read_plugged(
    schema: type, others: Mapping[str, Any], values: Mapping[str, Any], key: str
) -> dict[str, Any]:
    """Convert the keys that are no fields of a section: of its loss terms, or of its task.

    Raises:
        UserError: a key that nothing plugged in has.
    """
    names = [one.name for one in dataclasses.fields(schema) if not rule_of(one).plugged]
    if schema is LossConfig:
        for name in others:
            if name not in LOSS_TERMS:
                raise UnknownKeyError(_join(key, name), [*names, *LOSS_TERMS])
        return {
            "terms": {
                name: convert_section(value, settings_of(LOSS_TERMS, name, key), _join(key, name))
                for name, value in others.items()
                if value is not None
            }
        }
    if schema is EvaluatorConfig:
        return _task_settings(str(values.get("task")), others, key, names)
    for name in others:
        raise UnknownKeyError(_join(key, name), names)
    return {}


def _task_settings(
    task: str, others: Mapping[str, Any], key: str, names: list[str]
) -> dict[str, Any]:
    """Convert an evaluator's keys that are its task's own; none where the task is unknown.

    Raises:
        UserError: a key that the task doesn't have, or a key that the task needs is missing.
    """
    hints = {one: typing.get_type_hints(settings_of(TASKS, one, f"{key}.task")) for one in TASKS}
    own = hints.get(task, {})
    for name in [name for name in others if name not in own]:
        owners = [one for one in TASKS if name in hints[one]]
        if not owners:
            raise UnknownKeyError(_join(key, name), [*names, *own])
        # earlier versions wrote null for the sets that other tasks have
        if task in TASKS and others[name] is not None:  # alignclip.config.checks tells a wrong task
            words = f"has no use for {name}{_of_its_own(hints[owners[0]][name])}"
            raise UserError(f"{key}: {task} {words}")
    if task not in TASKS:
        return {}
    schema = settings_of(TASKS, task, f"{key}.task")
    for one in dataclasses.fields(schema):
        is_needed = one.default is dataclasses.MISSING is one.default_factory
        if is_needed and others.get(one.name) is None:
            raise UserError(f"{key}: {task} needs {one.name}{_of_its_own(own[one.name])}")
    values = {name: value for name, value in others.items() if name in own}
    return {"settings": convert_section(values, schema, key)}


def _of_its_own(hint: Any) -> str:
    return ", a set of its own" if SetConfig in members_of(hint) else ""


def convert_line(text: str, hint: Any, key: str, is_path: bool = False) -> Any:
    """Read the text of an override ``key=text`` as the tree that :func:`convert` takes.

    Raises:
        UserError: a section or a list that is not YAML.
    """
    members = members_of(hint)
    if str in members and not any(typing.get_origin(m) for m in members):
        if text == "~" and (is_path or type(None) not in members):  # the shell leaves it to us
            return text
        return None if text in NULLS[1:] or (not text and type(None) in members) else unquoted(text)
    if Any in members:
        return parse_line(text)
    if any(scalar in members for scalar in _WORDS):
        return parse_line(text.strip())
    try:
        return parse(text)
    except ValueError as error:
        raise UserError(f"{key}={text} is not YAML: {error}") from None


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, NoneType among them; anything else alone."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in typing.get_args(hint) for member in members_of(part))
    return (hint,)


def named_sections(hint: Any) -> Any:
    """Return X of an annotation ``dict[str, X]``, also where it is optional; None of any other."""
    found = next((m for m in members_of(hint) if typing.get_origin(m) is dict), None)
    return (*typing.get_args(found), Any, Any)[1] if found is not None else None


def _check_arguments(value: Any, key: str) -> None:
    """Refuse anything but names of classes, each with its arguments by their names, or null."""
    if not isinstance(value, dict):
        words = "holds names of classes with arguments below each, not"
        raise SettingError(key, f"'{key}' {words} {value!r}")
    for name, arguments in value.items():
        if not isinstance(arguments, dict | None):
            words = "holds arguments with their names, not"
            raise SettingError(key, f"'{key}.{name}' {words} {arguments!r}")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _expand(value: Any, key: str) -> Any:
    """Write out ``~`` in a place, or in a dict of places."""
    if isinstance(value, dict):
        return {name: expand(inner, f"{key}.{name}") for name, inner in value.items()}
    return value and expand(value, key)


def _convert_mapping(value: Mapping[str, Any], members: Sequence[Any], key: str) -> dict[str, Any]:
    for member in members:
        if _origin(member) in (dict, Mapping):
            hint = (*typing.get_args(member), Any, Any)[1]
            return {name: convert(inner, hint, f"{key}.{name}") for name, inner in value.items()}
    if any(member in _WORDS for member in members) and not _takes_anything(members):
        kind = f"no {_names(members)}, but keys and values; quotes make it a text"
        raise SettingError(key, f"{key}: Value {dict(value)} is {kind}")
    return {name: natural(inner) for name, inner in value.items()}


def _convert_list(value: list[Any], members: Sequence[Any], key: str) -> list[Any]:
    for member in members:
        if _origin(member) in _LISTS:
            hint = (*typing.get_args(member), Any)[0]
            return [convert(item, hint, f"{key}[{i}]") for i, item in enumerate(value)]
    if (inner := next(filter(None, map(named_sections, members)), None)) is not None:
        of = "settings" if dataclasses.is_dataclass(inner) else "values"
        raise SettingError(key, f"'{key}' holds names with {of} below each, not {value!r}")
    if not _takes_anything(members):
        kind = f"is a list; quotes make it a {_names(members)}"
        raise SettingError(key, f"{key}: Value {value} {kind}")
    return [natural(item) for item in value]


def _convert_scalar(value: str, members: Sequence[Any], key: str) -> Any:
    text, stripped = str(value), value.strip()
    if isinstance(value, Plain) or str not in members:
        alone = len(members) - (type(None) in members) == 1
        if bool in members and (alone or stripped.lower() in ("true", "false")):
            if (found := _BOOLEANS.get(stripped.lower())) is None:
                raise SettingError(key, f"{key}: Value '{stripped}' is neither true nor false")
            return found
        integer = as_integer(stripped) if int in members else None
        if integer is not None and abs(integer) < _LARGEST:
            return integer
        if float in members and (number := _number(stripped, key, str in members)) is not None:
            return number
    if str in members:
        return text
    if any(dataclasses.is_dataclass(named_sections(member)) for member in members):
        words = "holds names with settings below each, not"
        raise SettingError(key, f"'{key}' {words} {text!r}")
    containers = any(_origin(member) in _CONTAINERS for member in members)
    if any(m in members for m in _WORDS) or (containers and not _takes_anything(members)):
        why = _why(stripped, members)
        raise SettingError(key, f"{key}: Value '{text}' is no {_names(members)}{why}")
    return natural(value)


def _number(text: str, key: str, or_text: bool) -> float | None:
    """Return the number that a text is, NaN and infinity by their names included."""
    if text.lower().lstrip("+-").removeprefix(".") in ("inf", "nan"):
        return None if or_text else float(text.lower().replace(".", ""))
    number = as_float(text)
    if number is None or or_text:
        return number if number is not None and math.isfinite(number) else None
    if math.isinf(number):
        why = f"{key} must be a finite number, and {text} is too large for one"
        raise SettingError(key, why)
    if number == 0 and any(digit in "123456789" for digit in text.lower().partition("e")[0]):
        raise SettingError(key, f"{key}: {text} is too close to 0 to be told from it")
    return number


def _why(text: str, members: Sequence[Any]) -> str:
    """Say how a number is written, where YAML reads the text as another one than it looks like."""
    digits = text.lstrip("+-").replace("_", "")
    if not text.lstrip("+-")[:1].isdigit():
        return ""
    if int in members:
        example = int(digits) if digits.isdecimal() else 16
        return f": write it in decimal digits, without leading zeros, as in {example}"
    return ": write it in decimal digits, as in 0.001 or 1e-3" if float in members else ""


def _names(members: Sequence[Any]) -> str:
    found = [_WORDS.get(m) or _CONTAINERS.get(_origin(m)) for m in members]
    return " or ".join(dict.fromkeys(word for word in found if word)) or "such value"


def _origin(member: Any) -> Any:
    return typing.get_origin(member) or member


def _takes_anything(members: Sequence[Any]) -> bool:
    """Whether an alternative is no type of a YAML's own, e.g. a class of Composer's."""
    known = {*_WORDS, *_CONTAINERS, type(None)}
    return any(_origin(member) not in known for member in members)
