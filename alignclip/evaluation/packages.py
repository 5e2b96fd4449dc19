"""Packages that come with the extra ``evaluate``."""

from __future__ import annotations

import importlib
from typing import Any

from alignclip.errors import UserError, one_line

# threadpoolctl comes with scikit-learn
PACKAGE_NAMES = {"scipy": "SciPy", "matplotlib": "matplotlib"}


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
