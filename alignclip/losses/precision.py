"""Matrix products in full precision: bf16 logits at s = 100 are off by 0.4."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute fp32 matrix products in fp32: without autocast, without TF32."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _MatmulTransposed(torch.autograd.Function):
    """a @ b.T; the backward pass runs outside of the forward's contexts, so it sets its own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device.type):
            return a @ b.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        (grad,) = grads
        with full_precision(grad.device.type):
            return (
                grad @ b if ctx.needs_input_grad[0] else None,
                grad.T @ a if ctx.needs_input_grad[1] else None,
            )


def matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Multiply ``[n, d]`` by the transpose of ``[m, d]`` in full precision: ``[n, m]``."""
    product = _MatmulTransposed.apply(a, b)
    assert isinstance(product, Tensor)
    return product
