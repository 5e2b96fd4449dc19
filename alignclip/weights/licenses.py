"""The licence of weights: in the model card (README.md) beside them, and with everything that is made of them."""

from __future__ import annotations

import re

from huggingface_hub import ModelCard, ModelCardData

from alignclip.weights.state_dicts import RELEASE

PUBLISHED = "cc-by-nc-nd-4.0"  # of the weights that the AlignCLIP authors have released, in whose files it isn't


def license_of(card: str | None, kind: str) -> str | None:
    """The licence's identifier, as the Hugging Face Hub writes it, where it is known.

    Args:
        card: the text of the README.md beside the weights.
        kind: of the weights, one of those in :mod:`alignclip.weights.state_dicts`; files in the
            authors' format are taken for the authors', unless the card names a licence:
            any README.md may lie beside a download.
    """
    return named_license(card) or (PUBLISHED if kind == RELEASE else None)


def named_license(card: str | None) -> str | None:
    """The licence that a card's metadata name; several are joined by commas, ``other`` is what it is called there."""
    text = (card or "").lstrip("\ufeff \t\r\n")
    if not text.startswith("---"):
        return None
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # somebody else's YAML
        return None
    given = data.get("license")
    names = [
        name.strip()
        for name in (given if isinstance(given, list) else [given])
        if isinstance(name, str)
    ]
    own = data.get("license_name")
    if isinstance(own, str) and own.strip():
        names = [own.strip() if name.lower() == "other" else name for name in names]
    return ", ".join(name for name in names if name) or None


def forbids_derivatives(name: str) -> bool:
    """Whether what is made of the weights must not be passed on: one of Creative Commons' ND licences, as spelled."""
    return (
        re.search(r"(?<![a-z])(nd|no-?derivatives|no-?derivs)(?![a-z])", name.lower()) is not None
    )


def card_of_run(name: str, license: str, start: str) -> str:
    """A README.md for the checkpoints of a run that started from weights under this licence."""
    data = ModelCardData(license=license, tags=["clip", "alignclip"])
    text = f"# {name}\n\nStarted from `{start}`, whose licence, {license}, holds here, too.\n"
    return f"---\n{data.to_yaml()}\n---\n\n{text}"
