"""``${key}`` and ``${oc.env:NAME}`` in a configuration → what OmegaConf finds there."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from omegaconf import OmegaConf

from alignclip.config.plugged import LOSS_TERMS, TASKS, settings_of
from alignclip.config.schema import EvaluatorConfig, LossConfig
from alignclip.config.setting import rule_of
from alignclip.config.typed import members_of, named_sections

Tree = dict[str, Any]


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


def _with_defaults(tree: Tree, schema: type) -> Tree:
    """Add the keys that a section lacks, with their defaults, at any depth and below all names."""
    values, hints = dict(tree), typing.get_type_hints(schema)
    for one in dataclasses.fields(schema):
        rule, hint = rule_of(one), hints[one.name]
        if rule.plugged:
            continue
        value = tree.get(one.name)
        section = next(filter(dataclasses.is_dataclass, members_of(hint)), None)
        below = named_sections(hint)
        if isinstance(value, dict) and section is not None:
            values[one.name] = _with_defaults(value, typing.cast(type, section))
        elif isinstance(value, dict) and dataclasses.is_dataclass(below):
            values[one.name] = {
                name: _with_defaults(inner, typing.cast(type, below))
                if isinstance(inner, dict)
                else inner
                for name, inner in value.items()
            }
        elif one.name not in tree and one.default is not dataclasses.MISSING:
            values[one.name] = one.default
        elif one.name not in tree and one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
            is_section = dataclasses.is_dataclass(default)
            values[one.name] = _with_defaults({}, type(default)) if is_section else default
    return _with_plugged(values, schema)


def _with_plugged(values: Tree, schema: type) -> Tree:
    """Add the defaults of an evaluator's task, or of a loss's terms."""
    if schema is EvaluatorConfig and str(values["task"]) in TASKS:
        return _with_defaults(values, settings_of(TASKS, values["task"], "task"))
    if schema is LossConfig:
        for name in LOSS_TERMS.keys() & values.keys():
            if isinstance(values[name], dict):
                values[name] = _with_defaults(values[name], settings_of(LOSS_TERMS, name, "loss"))
    return values
