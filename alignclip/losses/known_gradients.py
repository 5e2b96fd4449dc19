"""A loss whose gradients are computed with its value, so that nothing else is kept for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def with_gradients(
    loss: Tensor, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Tensor:
    """Return the scalar ``loss`` with its gradients by ``leaves``, where not None."""
    found = _WithGradients.apply(loss, *leaves, *gradients)
    assert isinstance(found, Tensor)
    return found


class _WithGradients(torch.autograd.Function):
    """The loss; the backward pass only multiplies."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *leaves_and_gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*leaves_and_gradients[len(leaves_and_gradients) // 2 :])
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        by_leaves = (None if one is None else grad * one for one in gradients)
        return (None, *by_leaves, *(None for _ in gradients))
