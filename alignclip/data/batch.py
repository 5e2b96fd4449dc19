"""Samples → batches: tensors of a row a sample, and what the host has to know about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor
from torch.utils.data import default_collate


class Batch(TypedDict, total=False):
    """A batch of a rank.

    Attributes:
        image: uint8 ``[n, 3, size, size]``.
        text: int64 ``[n, context_length]``.
        text_length: tokens of the longest text. The model cuts the padding there. Without this
            number the model asks the device, and the host waits for the answer.
        sample: int64 ``[n]``, the samples' ids.
        semantic: float16 ``[n, dimension]``.
    """

    image: Tensor
    text: Tensor
    text_length: int
    sample: Tensor
    semantic: Tensor


def collate(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """Stack samples to a batch."""
    batch: Batch = default_collate([*samples])
    batch["text_length"] = longest_text(batch["text"])
    return batch


def longest_text(tokens: Tensor) -> int:
    """Return the length of the longest text, up to its end-of-text token, which has the highest id.

    Non-zero ids don't tell the length: 0 is the token "!".

    Args:
        tokens: ids, ``[n, l]``. The host waits for their device.
    """
    return int(tokens.argmax(dim=-1).max()) + 1


def count_samples(batch: Batch) -> int:
    """Count the samples of a batch; Composer itself counts where a batch has tensors alone."""
    return len(batch["text"])
