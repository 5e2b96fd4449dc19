"""Texts of a YAML → values of the types that annotations name, dataclasses included."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignclip.config.keys import Key, keys_of, members_of, named_sections, section_of
from alignclip.config.plugged import LOSS_TERMS, TASKS, plugged_settings
from alignclip.config.schema import EvaluatorConfig, LossConfig, SetConfig
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
from alignclip.errors import UserError, nearest, printable
from alignclip.paths import expand

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_CONTAINERS = {list: "list", dict: "section", tuple: None, set: None}
_LISTS = (list, tuple, set, Sequence, Iterable)
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "y", "1"), True),
    **dict.fromkeys(("false", "no", "off", "n", "0"), False),
}
_LARGEST = 2**63  # of an integer in C
# Keys without effect, which earlier versions wrote into config.yaml
RETIRED = {"data.download_retry", "data.download_timeout"}


class SettingError(UserError):
    """A value of another type than its setting's; ``key`` is the setting."""

    def __init__(self, key: str, message: str) -> None:
        # an exception is sent to another process as its arguments
        super().__init__(key, message)
        if len(message) > 1500:  # the value is a whole section: its middle is left out
            message = f"{message[:1000]} … {message[-300:]}"
        self.key, self.message = key, message

    def __str__(self) -> str:
        return printable(self.message)


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
    if (schema := section_of(hint)) is not None:
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
    task = None
    if schema is EvaluatorConfig:
        task = str(values.get("task"))
        _check_task(values, task, key)
    keys, found = keys_of(schema, task), {}
    for name, value in values.items():
        full = _join(key, name)
        if name in keys:
            found[name] = _convert_key(value, keys[name], full)
        elif full not in RETIRED and name not in keys_of(schema):
            raise UnknownKeyError(full, keys)
    if schema is LossConfig:
        terms = {name: found.pop(name) for name in [*found] if name in LOSS_TERMS}
        found["terms"] = {name: term for name, term in terms.items() if term is not None}
    if task in TASKS:
        settings = plugged_settings(TASKS, task, f"{key}.task")
        own = found.keys() & keys_of(settings)
        found["settings"] = settings(**{name: found.pop(name) for name in own})
    return schema(**found)


def _convert_key(value: Any, key: Key, full: str) -> Any:
    if key.rule.raw:
        _check_class_section(value, full)
        return value
    found = convert(value, key.hint, full)
    return _expand(found, full) if key.rule.place else found


def _check_task(values: Mapping[str, Any], task: str, key: str) -> None:
    """Refuse keys that an evaluator's task has no use for, and a task without what it needs."""
    if task not in TASKS:  # alignclip.config.checks tells a wrong task
        return
    own, all_keys = keys_of(EvaluatorConfig, task), keys_of(EvaluatorConfig)
    # earlier versions wrote null for the sets that other tasks have
    given = [name for name, value in values.items() if value is not None]
    for name in given:
        if name in all_keys and name not in own:
            raise UserError(f"{key}: {task} has no use for {name}{_of_its_own(all_keys[name])}")
    for name, one in own.items():
        if one.default() is dataclasses.MISSING and name not in given:
            raise UserError(f"{key}: {task} needs {name}{_of_its_own(one)}")


def _of_its_own(key: Key) -> str:
    return ", a set of its own" if SetConfig in members_of(key.hint) else ""


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


def _check_class_section(value: Any, key: str) -> None:
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
        if (
            float in members
            and (number := _finite_number(stripped, key, str in members)) is not None
        ):
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


def _finite_number(text: str, key: str, or_text: bool) -> float | None:
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
    """Say whether an alternative is no type of a YAML's own, e.g. a class of Composer's."""
    known = {*_WORDS, *_CONTAINERS, type(None)}
    return any(_origin(member) not in known for member in members)
