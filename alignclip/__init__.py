"""Pretrain CLIP models with a small modality gap, streamed from object storage.

The method is AlignCLIP's: "Mitigate the Gap: Improving Cross-Modal Alignment in CLIP", ICLR 2025,
https://arxiv.org/abs/2406.17639.

``alignclip.load(path)`` gives a trained model with its image transform and tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignclip.loading import load

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load``, imported when it is asked for: torch takes seconds, and a typo in a command line should not."""
    if name == "load":
        from alignclip.loading import load

        return load
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
