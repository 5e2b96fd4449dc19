"""Overrides ``key.sub=value`` of a command line → keys, values, and trees that hold both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from alignclip.config.keys import keys_of, named_sections, section_of
from alignclip.config.setting import Rule
from alignclip.config.typed import convert_line
from alignclip.config.yaml_text import Tree
from alignclip.errors import UserError

Parts = Sequence[str]  # of a key: data.streams in two
OverrideLine = Sequence[tuple[Parts, Any]]  # the overrides: keys, and their values as trees


def refuse_dashes(overrides: Sequence[str]) -> None:
    """Refuse options, which people who come from open_clip may type."""
    for item in overrides:
        if item.startswith("-") and "=" in item:
            raise UserError(f"override '{item}': write '{item.lstrip('-')}', without dashes")
        if item.startswith("-"):
            flags = "docs/migration.md says what open_clip's flags are here"
            raise UserError(
                f"override '{item}': settings are key.sub=value, without dashes; {flags}"
            )


def read_line(overrides: Sequence[str], schema: type) -> Iterator[tuple[Parts, Any]]:
    """Yield the key of each override, in parts, and its value as the tree of a YAML."""
    for item in overrides:
        if "=" not in item:
            raise UserError(f"override '{item}' is not of the form key.sub=value")
        key, _, text = item.partition("=")
        found = re.findall(r"\[[^\]]*\]|[^.\[\]]+", key.strip())
        parts = tuple(part.strip("[]") for part in found)
        if not parts:
            raise UserError(f"override '{item}' has no key before the '='")
        hint, rule = setting_at(schema, parts)
        yield parts, convert_line(text, hint, key.strip(), is_path=rule.place)


def setting_at(schema: Any, parts: Parts) -> tuple[Any, Rule]:
    """Return the annotation and the rule of a key; Any where no schema says what the key holds."""
    hint, rule = schema, Rule()
    for part in parts:
        if (section := section_of(hint)) is None:
            hint = named_sections(hint)
        elif part in (keys := keys_of(section)):
            hint, rule = keys[part].hint, keys[part].rule
        else:
            hint = None
        if hint is None:
            return Any, Rule()
    return hint, rule


def put(tree: Tree, parts: Parts, value: Any) -> None:
    """Set a key below others; a section is added to what is there."""
    for part in parts[:-1]:
        inner = tree.get(part)
        tree[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        tree = inner
    before = tree.get(parts[-1])
    if isinstance(before, dict) and isinstance(value, dict):
        tree[parts[-1]] = before = dict(before)  # an anchor of the YAML may stand in two places
        for key, inner in value.items():
            put(before, (key,), inner)
    else:
        tree[parts[-1]] = value


def get(tree: Any, parts: Parts, default: Any = None) -> Any:
    """Return what a tree has at a key."""
    for part in parts:
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree
