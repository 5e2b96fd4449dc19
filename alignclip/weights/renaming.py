"""Names of tensors and types in another program's words."""

from __future__ import annotations

from collections.abc import Mapping


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace how a name begins, by the first prefix of the table that fits."""
    found = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(found, "") + name.removeprefix(found)


def inverted(prefixes: Mapping[str, str]) -> dict[str, str]:
    """Return the table of the way back."""
    return {new: old for old, new in prefixes.items()}
