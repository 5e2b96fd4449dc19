"""Pretrain CLIP models with a small modality gap, streamed from object storage.

The method is AlignCLIP's: "Mitigate the Gap: Improving Cross-Modal Alignment in CLIP", ICLR 2025,
https://arxiv.org/abs/2406.17639.

``alignclip.load(path)`` gives a trained model with its image transform and tokenizer,
``alignclip.evaluate(model, …)`` its metrics, and ``alignclip.dataset(path)`` the samples of a set
to look at.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alignclip.runtime.stand_ins import stand_ins

if TYPE_CHECKING:
    from alignclip.config.schema import ModelConfig
    from alignclip.errors import UserError
    from alignclip.evaluation.notebook import Pair, Pairs, dataset, evaluate
    from alignclip.losses import AlignCLIPLoss
    from alignclip.model.encoders import CLIP
    from alignclip.weights.load import load

__all__ = [
    "CLIP",
    "AlignCLIPLoss",
    "ModelConfig",
    "Pair",
    "Pairs",
    "UserError",
    "dataset",
    "evaluate",
    "load",
]
__version__ = "0.1.0"

# Where each public name lives. Each module is imported when the name is asked for: torch takes
# seconds, and a typo in a command line should not.
_HOMES = {
    "CLIP": "model.encoders",
    "AlignCLIPLoss": "losses",
    "ModelConfig": "config.schema",
    "Pair": "evaluation.notebook",
    "Pairs": "evaluation.notebook",
    "UserError": "errors",
    "dataset": "evaluation.notebook",
    "evaluate": "evaluation.notebook",
    "load": "weights.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    with stand_ins():
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Offer the public names, imported or not, and none of what this file needs itself."""
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
