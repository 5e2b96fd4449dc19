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

NULLS = ("", "~", "null", "Null", "NULL")
_TAG = "tag:yaml.org,2002:"
_PLAIN = "plain"
_SCALARS = (_PLAIN, "merge", "str", "int", "float", "bool", "null")
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")


class Plain(str):
    """A scalar without quotation marks: the text itself, or the number or boolean that it looks like."""

    __slots__ = ()


def parse(text: str) -> Any:
    """Return the dicts, lists and scalars of one YAML document.

    A scalar is None, :class:`Plain`, or ``str`` where the text is quoted.

    Raises:
        ValueError: the text is not YAML, has a key twice, a tag that names a type of Python, or
            holds itself.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder().build(node)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


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
    """Replace plain scalars by the decimal numbers and booleans that they look like, at any depth."""
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


class _Builder:
    """Makes the value of each node, once: an anchor's value stands at all of its places."""

    def __init__(self) -> None:
        self._open: set[yaml.Node] = set()
        self._values: dict[yaml.Node, Any] = {}

    def build(self, node: yaml.Node) -> Any:
        if node in self._open:
            raise ValueError(f"{_line(node)}: an anchor that holds itself")
        if node not in self._values:
            self._open.add(node)
            self._values[node] = self._value(node)
            self._open.remove(node)
        return self._values[node]

    def _value(self, node: yaml.Node) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.build(item) for item in node.value]
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node)
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            raise ValueError(f"{_line(node)}: the tag {node.tag} has no meaning here")
        if kind == "str":
            return str(node.value)
        is_null = kind == "null" or (kind == _PLAIN and node.value in NULLS)
        return None if is_null else Plain(node.value)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """Return a mapping, whose keys are texts; ``<<`` merges others into it."""
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, inner in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{_line(key)}: a key must be a text")
            value = self.build(inner)
            if key.tag == f"{_TAG}merge":
                for layer in reversed(value if isinstance(value, list) else [value]):
                    if not isinstance(layer, dict):
                        raise ValueError(f"{_line(key)}: << merges mappings only")
                    merged |= layer
            elif key.value in own:
                raise ValueError(f"{_line(key)}: the key '{key.value}' is there twice")
            else:
                own[str(key.value)] = value
        return merged | own


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


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
    """As it was typed, and not quoted."""
    return dumper.represent_scalar(
        dumper.resolve(yaml.ScalarNode, str(text), (True, False)), str(text)
    )


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(Plain, _represent_plain)
