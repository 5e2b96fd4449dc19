"""The licence of weights: where it is known from, and what it asks of everything made of them.

It is named in the model card (README.md) beside the weights. Files in the AlignCLIP authors' format
that come without one are taken for the authors'.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData

from alignclip.errors import UserError
from alignclip.weights.formats.base import Format
from alignclip.weights.publishing import public_place


@dataclass(frozen=True)
class License:
    """A licence's identifier as the Hugging Face Hub writes it, and what a person has to know."""

    name: str | None
    notes: list[str]


def license_of(card: str | None, form: Format) -> str | None:
    """Return the licence's identifier, where it is known.

    Args:
        card: the text of the README.md beside the weights. Any README.md may lie beside a download,
            so one that names no licence says nothing.
        form: of the weights.
    """
    return named_license(card) or form.license


def named_license(card: str | None) -> str | None:
    """Return the licence that a card's metadata name: several joined by commas, or its own name."""
    text = (card or "").lstrip("\ufeff \t\r\n")
    if not text.startswith("---"):
        return None
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's YAML
        return None
    given, own = data.get("license"), data.get("license_name")
    names = given if isinstance(given, list) else [given]
    names = [name.strip() for name in names if isinstance(name, str)]
    if isinstance(own, str) and own.strip():
        names = [own.strip() if name.lower() == "other" else name for name in names]
    return ", ".join(name for name in names if name) or None


def forbids_derivatives(name: str) -> bool:
    """Tell whether it is one of Creative Commons' ND licences: nothing derived is passed on."""
    found = re.search(r"(?<![a-z])(nd|no-?derivatives|no-?derivs)(?![a-z])", name.lower())
    return found is not None


def card_of_run(name: str, license: str, start: str) -> str:
    """Write the README.md of a run that started from weights under this licence."""
    data = ModelCardData(license=license, tags=["clip", "alignclip"])
    text = f"# {name}\n\nStarted from `{start}`, whose licence, {license}, holds here, too.\n"
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def choose_license(
    card: str | None, form: Format, place: str, given: str | None, start: str | None
) -> License:
    """Choose the licence of an export.

    Args:
        card: beside the source.
        form: of the source.
        place: of the source.
        given: by ``--license``.
        start: what the model's training started from.

    Raises:
        UserError: ``given`` would replace a licence that forbids derivatives.
    """
    carried = license_of(card, form)
    notes = []
    known = public_place(place)  # notes are printed, and published in the card
    if carried and named_license(card) is None:  # it may be somebody's own training
        theirs = f"{known} is in the AlignCLIP authors' format, and their weights are {carried}"
        if given:
            notes.append(f"{theirs}: --license {given} is for weights that you trained yourself")
            carried = None
        else:
            notes.append(f"{theirs}; weights of your own: --license")
    if carried and given and carried.lower() != given.lower():
        if forbids_derivatives(carried):
            raise UserError(
                f"--license {given}: {place} is {carried}, which its derivatives can't leave"
            )
        notes.append(f"{known} says {carried}; the export says {given}")
    name = given or carried
    if name and forbids_derivatives(name):
        notes.append(
            f"{name} forbids passing on derivatives: "
            "converted or fine-tuned, keep these weights to yourself"
        )
    if start and carried is None:
        notes.append(
            f"this model started from {public_place(start)}, whose licence holds for it, too"
        )
    if name is None:
        notes.append(
            "no licence: nobody else may use the model until you name one (--license apache-2.0)"
        )
    return License(name, notes)
