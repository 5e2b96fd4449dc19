"""The names of the authors' release files, as the names our models use: renamed tensors, nothing computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# a tensor of theirs that serves both towers, and the prefixes it has in ours, the parameter's own name first
_SHARED = {
    "projection": ("text_projection", "visual.proj"),
    "ln_post.": ("ln_final.", "visual.ln_post."),
    "transformer.": ("transformer.", "visual.transformer."),
    "text.token_embedding.": ("token_embedding.",),
    "text.positional_embedding": ("positional_embedding",),
    "text.text_projection": (),  # a parameter that their code never uses
}


def our_names(theirs: str) -> list[str]:
    """Every name in our state dict of what the release calls ``theirs``."""
    for prefix, ours in _SHARED.items():
        if theirs.startswith(prefix):
            return [new + theirs.removeprefix(prefix) for new in ours]
    return [theirs]


def renamed(theirs: Mapping[str, T]) -> dict[str, T]:
    """A mapping with the release's names, with ours."""
    return {ours: value for name, value in theirs.items() for ours in our_names(name)}
