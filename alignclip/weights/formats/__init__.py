"""Formats of weights, a file each: one list for loading, ``pretrained`` and exporting.

Nothing large is imported before a format is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignclip.weights.formats.base import Format, Weights

# The name in --to → the class, in a module beside this one. A file is in the last format that
# detects it; the first one takes every state dict.
FORMATS = {
    "open_clip": "open_clip.OpenClip",
    "huggingface": "hugging_face.HuggingFace",
    "release": "release.Release",
    "composer": "composer.Composer",
}


@cache
def format_named(name: str) -> Format:
    """Return the format that ``--to`` calls so."""
    module, _, kind = FORMATS[name].partition(".")
    form: Format = getattr(import_module(f"{__name__}.{module}"), kind)()
    return form


def open_weights(file: Path, place: str, known: Mapping[str, Any] | None = None) -> Weights:
    """Read a file of weights.

    Args:
        file: where it is on this machine.
        place: what the person calls it, for errors.
        known: see :class:`alignclip.weights.weight_files.Content`.

    Raises:
        UserError: it holds no model's weights, or code.
    """
    from alignclip.weights.weight_files import read

    content = read(file, place)
    content.known = known or {}
    forms = map(format_named, reversed(FORMATS))
    return next(form for form in forms if form.detect(content)).read(content)
