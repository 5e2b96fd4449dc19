"""Formats of weights, a file each: one list for loading, ``pretrained`` and exporting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignclip.weights.formats.base import Format, Weights
from alignclip.weights.formats.composer import Composer
from alignclip.weights.formats.hugging_face import HuggingFace
from alignclip.weights.formats.open_clip import OpenClip
from alignclip.weights.formats.release import Release
from alignclip.weights.weight_files import read

# A file is in the first format that detects it; open_clip's takes every state dict.
FORMATS: dict[str, Format] = {
    form.name: form for form in (Composer(), Release(), HuggingFace(), OpenClip())
}


def open_weights(file: Path, place: str, known: Mapping[str, Any] | None = None) -> Weights:
    """Read a file of weights.

    Args:
        file: where it is on this machine.
        place: what the person calls it, for errors.
        known: see :class:`alignclip.weights.weight_files.Content`.

    Raises:
        UserError: it holds no model's weights, or code.
    """
    content = read(file, place)
    content.known = known or {}
    return next(form for form in FORMATS.values() if form.detect(content)).read(content)
