"""``${key}`` and ``${oc.env:NAME}`` in a configuration → what OmegaConf finds there."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import OmegaConf

from alignclip.config.keys import keys_of, named_sections, section_of
from alignclip.config.yaml_text import Tree


def resolved(tree: Tree, schema: type) -> Tree:
    """Replace ``${…}`` in a tree; a key that the tree lacks has its default there.

    Raises:
        OmegaConfBaseException: there is no such key, or no such variable.
    """
    if "${" not in str(tree):
        return tree
    whole = OmegaConf.create(_with_defaults(tree, schema), flags={"allow_objects": True})
    found: Any = OmegaConf.to_container(whole, resolve=True)
    return _keys_of(tree, found)


def _keys_of(tree: Tree, found: Tree) -> Tree:
    """Return what was found of the keys that a tree has itself."""
    return {
        key: _keys_of(value, found[key]) if isinstance(value, dict) else found[key]
        for key, value in tree.items()
    }


def _with_defaults(tree: Tree, schema: Any) -> Tree:
    """Add the keys that a section lacks, with their defaults, at any depth and below all names."""
    values = dict(tree)
    for name, key in keys_of(schema, str(tree.get("task"))).items():
        section, below = section_of(key.hint), named_sections(key.hint)
        value = tree[name] if name in tree else key.default()
        if dataclasses.is_dataclass(value):
            value = {}
        if isinstance(value, dict) and section is not None:
            value = _with_defaults(value, section)
        elif isinstance(value, dict) and dataclasses.is_dataclass(below):
            value = {
                one: _with_defaults(inner, below) if isinstance(inner, dict) else inner
                for one, inner in value.items()
            }
        if value is not dataclasses.MISSING:
            values[name] = value
    return values
