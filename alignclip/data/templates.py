"""Prompt templates, as ``a photo of a {c}.``, and their prompts."""

from __future__ import annotations

from string import Formatter

from alignclip.errors import UserError

PLACES = ("c", "", "0")  # names of the class name's place: clip_benchmark's, open_clip's


def fill_template(template: str, name: str) -> str:
    """Put a class name into a template.

    A template may come from a stranger. In Python's own format strings a place could name
    attributes, or a width that fills the memory.

    Raises:
        UserError: no place for the class name, or a place for anything else.
    """
    parts, is_filled = [], False
    try:
        for text, place, width, conversion in Formatter().parse(template):
            parts.append(text)
            if place is None:
                continue
            if place not in PLACES or width or conversion:
                raise ValueError(f"a place for '{place}'")
            parts.append(name)
            is_filled = True
    except ValueError as error:
        raise UserError(
            f"template '{template}': {error}; the class name's place is {{c}}"
        ) from None
    if not is_filled:
        raise UserError(f"template '{template}' has no place for the class name: write {{c}}")
    return "".join(parts)
