"""YAML in which a scalar stays the text that was typed, until a schema says what it is.

YAML 1.1 reads ``0123`` as 83, ``no`` as false, ``1:30`` as 90 and ``1e400000`` as infinity. A run
may have any of these names. :func:`parse` therefore guesses no types.
:mod:`alignclip.config.typed` converts texts by the type of their setting.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.constructor import BaseConstructor

Tree = dict[str, Any]  # a section: texts, lists and sections by their keys
NULLS = ("", "~", "null", "Null", "NULL")
MOST_VALUES = 100_000  # of a text, whose aliases may repeat lists of aliases
_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")


class Plain(str):
    """A scalar without quotation marks: a text, or the number or boolean that it looks like."""

    __slots__ = ()


def parse(text: str) -> Any:
    """Return the dicts, lists and scalars of one YAML document.

    A scalar is None, :class:`Plain`, or ``str`` where the text is quoted.

    Raises:
        ValueError: the text is not YAML, has a key twice, a tag that names a type of Python, or
            holds itself.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
        if isinstance(value, (dict, list)) and _values_in(value) > MOST_VALUES:
            raise ValueError("its aliases repeat lists or mappings too often")
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("lists or mappings lie too deep in one another") from None
    return value


def _values_in(value: Any, left: int = MOST_VALUES) -> int:
    """Count values with all that they hold, an alias each time, up to some more than ``left``."""
    count = 1
    for inner in value.values() if isinstance(value, dict) else value:
        count += _values_in(inner, left - count) if isinstance(inner, (dict, list)) else 1
        if count > left:
            break
    return count


def parse_line(text: str) -> Any:
    """Return the scalar, list or mapping of an override.

    ``[…]``, ``{…}`` and quotation marks are YAML's. A text that is no YAML is a text, even where it
    begins like these.
    """
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return parse(text)
        except ValueError:
            return Plain(text)
    return None if text in NULLS else Plain(text)


def unquoted(text: str) -> str:
    """Return a text setting's value as it was typed, without quotation marks around the whole."""
    if text[:1] in ("'", '"'):
        try:
            value = parse(text)
        except ValueError:
            return text
        if isinstance(value, str) and not isinstance(value, Plain):
            return value
    return text


def natural(value: Any) -> Any:
    """Replace plain scalars, at any depth, by the numbers and booleans that they look like."""
    if isinstance(value, dict):
        return {key: natural(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [natural(inner) for inner in value]
    if not isinstance(value, Plain):
        return value
    if value in (*_TRUE, *_FALSE):
        return value in _TRUE
    found: float | None = as_integer(value)
    if found is None and not value.lstrip("+-").isdigit():
        found = as_float(value)
    return str(value) if found is None or not math.isfinite(found) else found


def as_integer(text: str) -> int | None:
    """Return the decimal integer that a text is; None for ``017``, ``0x1F`` and ``1_000``, too."""
    return int(text) if _INTEGER.fullmatch(text) and len(text) < 20 else None


def as_float(text: str) -> float | None:
    """Return the decimal number that a text is; infinite where it is too large for a float."""
    return float(text) if _FLOAT.fullmatch(text) else None


def dump(values: dict[str, Any]) -> str:
    """Return YAML text that :func:`parse`, and any reader of YAML, reads back as these values."""
    return str(
        yaml.dump(
            values, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
        )
    )


class _Loader(yaml.SafeLoader):
    """PyYAML's loader, which guesses no types."""

    def resolve(self, kind: type, value: str | None, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            if not implicit[0]:
                return f"{_TAG}str"
            return f"{_TAG}merge" if value == "<<" else _PLAIN
        return str(super().resolve(kind, value, implicit))


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    """Return a mapping, whose keys are texts; ``<<`` merges others into it."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"line {node.start_mark.line + 1}: the tag {node.tag} has no meaning here")
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, inner in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{line}: a key must be a text")
        value = loader.construct_object(inner, deep=True)
        if key.tag == f"{_TAG}merge":
            for layer in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(layer, dict):
                    raise ValueError(f"{line}: << merges mappings only")
                merged |= layer
        elif key.value in own:
            raise ValueError(f"{line}: the key '{key.value}' is there twice")
        else:
            own[str(key.value)] = value
    return merged | own


def _sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node, deep=True))


def _quoted_scalar(loader: _Loader, node: yaml.ScalarNode) -> str:
    # SafeLoader's own takes a mapping, too, and returns the value of the mapping's key "="
    return str(BaseConstructor.construct_scalar(loader, node))


def _plain_scalar(loader: _Loader, node: yaml.ScalarNode) -> Plain | None:
    text = _quoted_scalar(loader, node)
    is_null = node.tag == f"{_TAG}null" or (node.tag == _PLAIN and text in NULLS)
    return None if is_null else Plain(text)


_Loader.yaml_constructors = {
    None: yaml.SafeLoader.construct_undefined,
    f"{_TAG}map": _mapping,
    f"{_TAG}seq": _sequence,
    f"{_TAG}str": _quoted_scalar,
    _PLAIN: _plain_scalar,
    **{f"{_TAG}{kind}": _plain_scalar for kind in ("merge", "int", "float", "bool", "null")},
}


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes every text that some reader takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        float(text)  # 1e5, inf, 1_000
        style: str | None = "'"
    except ValueError:
        style = (
            "'" if isinstance(natural(Plain(text)), bool) or text in ("y", "Y", "n", "N") else None
        )
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


def _represent_plain(dumper: yaml.SafeDumper, text: Plain) -> yaml.Node:
    """Write a scalar as it was typed, and not quoted."""
    return dumper.represent_scalar(
        dumper.resolve(yaml.ScalarNode, str(text), (True, False)), str(text)
    )


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Plain, _represent_plain)
