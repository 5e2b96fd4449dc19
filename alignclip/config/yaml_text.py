"""YAML in which a scalar stays the text that was typed, until a schema says what it is.

YAML 1.1 reads ``0123`` as 83, ``no`` as false, ``1:30`` as 90 and ``1e400000`` as infinity. A run may have any of these
names. :func:`parse` therefore guesses no types.
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
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}


class Plain(str):
    """A scalar without quotation marks: the text itself, or the number or boolean that it looks like."""

    __slots__ = ()


def parse(text: str) -> Any:
    """The dicts, lists and scalars of one YAML document; a scalar is None, :class:`Plain`, or ``str`` where quoted.

    Raises:
        ValueError: the text is not YAML, has a key twice, a tag that names a type of Python, or holds itself.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _build(node, ())
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def parse_line(text: str) -> Any:
    """The scalar, list or mapping of an override, as far as it is one.

    ``[…]``, ``{…}`` and quotation marks are YAML's. All else, and what begins so and is no YAML, is a text.
    """
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return parse(text)
        except ValueError:
            return Plain(text)
    return None if text in NULLS else Plain(text)


def unquoted(text: str) -> str:
    """A text setting's value as it was typed; quotation marks around the whole of it are taken off."""
    if text[:1] in ("'", '"'):
        try:
            value = parse(text)
        except ValueError:
            return text
        if isinstance(value, str) and not isinstance(value, Plain):
            return value
    return text


def natural(value: Any) -> Any:
    """What plain scalars look like, where no type is known: decimal numbers, ``true``, ``false``, else text."""
    if isinstance(value, dict):
        return {key: natural(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [natural(inner) for inner in value]
    if not isinstance(value, Plain):
        return value
    if value in _BOOLEANS:
        return _BOOLEANS[value]
    found: float | None = as_integer(value)
    if found is None and not value.lstrip("+-").isdigit():
        found = as_float(value)
    return str(value) if found is None or not math.isfinite(found) else found


def as_integer(text: str) -> int | None:
    """The decimal integer that a text is: not octal (``017``), hexadecimal (``0x1F``) or grouped (``1_000``)."""
    return int(text) if _INTEGER.fullmatch(text) and len(text) < 20 else None


def as_float(text: str) -> float | None:
    """The decimal number that a text is; infinite where it is too large for a float."""
    return float(text) if _FLOAT.fullmatch(text) else None


def dump(values: dict[str, Any]) -> str:
    """YAML text that :func:`parse`, and any other reader of YAML, reads back as these values."""
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


def _build(node: yaml.Node, above: tuple[yaml.Node, ...]) -> Any:
    """A node's value; ``above``: the nodes that it lies in."""
    if node in above:
        raise ValueError(f"line {node.start_mark.line + 1}: an anchor that holds itself")
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        return [_build(item, (*above, node)) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        return _build_mapping(node, above)
    kind = node.tag.removeprefix(_TAG)
    if not isinstance(node, yaml.ScalarNode) or kind not in (
        _PLAIN,
        "merge",
        "str",
        "int",
        "float",
        "bool",
        "null",
    ):
        raise ValueError(f"line {node.start_mark.line + 1}: the tag {node.tag} has no meaning here")
    text = str(node.value)
    if kind == "str":
        return text
    return None if kind == "null" or (kind == _PLAIN and text in NULLS) else Plain(text)


def _build_mapping(node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
    """A mapping, whose keys are texts; ``<<`` merges others into it."""
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError(f"{where}: a key must be a text")
        value = _build(value_node, (*above, node))
        if key_node.tag == f"{_TAG}merge":
            for layer in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(layer, dict):
                    raise ValueError(f"{where}: << merges mappings only")
                merged |= layer
            continue
        if key_node.value in own:
            raise ValueError(f"{where}: the key '{key_node.value}' is there twice")
        own[str(key_node.value)] = value
    return merged | own


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes every text that some reader of YAML would take for something else."""

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
