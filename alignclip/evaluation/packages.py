"""Packages that come with the extra ``evaluate``, and tensors that the metrics are computed of."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from alignclip.errors import UserError, one_line

PACKAGE_NAMES = {
    "scipy": "SciPy",
    "matplotlib": "matplotlib",
}  # threadpoolctl comes with scikit-learn


def library(module: str, what: str = "this needs") -> Any:
    """Import a module of scikit-learn, SciPy or matplotlib.

    Raises:
        UserError: the package is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGE_NAMES.get(module.partition(".")[0], "scikit-learn")
        raise UserError(
            f"{what} {package}: pip install 'alignclip[evaluate]' ({one_line(error)})"
        ) from None


def check_two_features(
    first: Tensor, second: Tensor, shapes: str = "[N, d] and [M, d]", named: str = "features"
) -> None:
    """Refuse features that are not finite, or not [N, d] and [M, d].

    Args:
        first: features.
        second: features that are compared with the first ones.
        shapes: how the message calls the two shapes.
        named: how the message calls the two.

    Raises:
        ValueError: says which shapes they have instead.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        found = f"{list(first.shape)} and {list(second.shape)}"
        raise ValueError(f"features must be {shapes}, not {found}")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise ValueError(f"{named} hold NaN or infinity")
