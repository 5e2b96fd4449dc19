"""The licence of weights: in the model card (README.md) beside them, and with everything that is made of them."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from alignclip.weights import RELEASE

PUBLISHED = "cc-by-nc-nd-4.0"  # of the weights that the AlignCLIP authors have released, in whose files it isn't


def license_of(card: str | None, kind: str) -> str | None:
    """The licence's identifier, as the Hugging Face Hub writes it, where it is known.

    Args:
        card: the text of the README.md beside the weights.
        kind: of the weights, one of those in :mod:`alignclip.weights`; without a card, files in the authors' format are
            taken for the authors'.
    """
    if card is None:
        return PUBLISHED if kind == RELEASE else None
    if not card.startswith("---"):
        return None
    try:
        name = ModelCard(card, ignore_metadata_errors=True).data.to_dict().get("license")
    except Exception:  # somebody else's YAML
        return None
    return name if isinstance(name, str) else None


def forbids_derivatives(name: str) -> bool:
    """Whether what is made of the weights must not be passed on: one of Creative Commons' ND licences."""
    return "-nd" in name.lower()


def card_of_run(name: str, license: str, start: str) -> str:
    """A README.md for the checkpoints of a run that started from weights under this licence."""
    data = ModelCardData(license=license, tags=["clip", "alignclip"])
    text = f"# {name}\n\nStarted from `{start}`, whose licence, {license}, holds here, too.\n"
    return f"---\n{data.to_yaml()}\n---\n\n{text}"
