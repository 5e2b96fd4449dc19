"""A batch: tensors of a row a sample, and what the host has to know about them."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Batch(TypedDict, total=False):
    """A batch of a rank.

    Attributes:
        image: uint8 ``[n, 3, size, size]``, a pixel's three bytes together. It comes first:
            Streaming's loader counts the samples of the first entry.
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


def empty_images(count: int, size: int) -> Tensor:
    """Return memory for images: uint8 ``[count, 3, size, size]``.

    The bytes lie as those of crops do, a pixel's three together: making planes of crops takes ten
    times as long. In a loader worker the memory is shared, because PyTorch would copy any other
    when the worker hands the batch over.
    """
    number = count * size * size * 3
    if get_worker_info() is None:
        pixels = torch.empty(number, dtype=torch.uint8)
    else:
        storage = torch.UntypedStorage._new_shared(number, device="cpu")
        pixels = torch.empty(0, dtype=torch.uint8).set_(storage)
    return pixels.view(count, size, size, 3).permute(0, 3, 1, 2)


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
