"""A digest that tells the weights of one model from all others."""

from __future__ import annotations

import torch
import xxhash
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """Hash names, shapes, types and every bit of the numbers."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"xxh3:{digest.hexdigest()}"
