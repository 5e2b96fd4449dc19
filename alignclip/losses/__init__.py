"""The loss of a run: CLIP's contrastive term, AlignCLIP's separation, and terms that the YAML adds.

A further term is a module of its own. :data:`alignclip.config.plugged.LOSS_TERMS` lists these
modules. Such a module has a dataclass ``Settings`` (the term's section of the YAML) and a function
``compute(features, settings)``. Importing this package imports no torch, so that the configuration
reads the settings at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignclip.losses.alignclip_loss import AlignCLIPLoss

__all__ = ["AlignCLIPLoss"]


def __getattr__(name: str) -> Any:
    """Import the loss, and torch, when the loss is asked for."""
    if name != "AlignCLIPLoss":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from alignclip.losses.alignclip_loss import AlignCLIPLoss

    return AlignCLIPLoss
