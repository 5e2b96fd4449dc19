"""Weights whose numbers are not finite: told before they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from alignclip.errors import UserError, few
from alignclip.ranks import local_part


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors with a NaN or an infinity in them."""
    return [
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and not local_part(tensor).isfinite().all()
    ]


def check_finite(weights: Mapping[str, Any], what: str, way_out: str = "") -> None:
    """Refuse weights that nothing can be trained from, nor computed with.

    Args:
        weights: by name.
        what: the subject of the sentence, e.g. ``pretrained: epoch_30.pt``.
        way_out: a sentence that is added.

    Raises:
        UserError: names the tensors with numbers that are not finite.
    """
    if bad := not_finite(weights):
        names = few(short_name(name) for name in bad)
        hint = f". {way_out}" if way_out else ""
        raise UserError(
            f"{what} holds numbers that are not finite (NaN or infinite), "
            f"in {len(bad)} of {len(weights)} tensors: {names}{hint}"
        )


def short_name(name: str) -> str:
    """Return a parameter's name without those of what wraps the encoders."""
    return name.removeprefix("module.").removeprefix("encoders.")
