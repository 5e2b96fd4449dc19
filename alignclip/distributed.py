"""Where a collective of this stack is not what it says it is."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives


def mend_gloo_fsdp_average() -> bool:
    """Make FSDP2's gradients on CPU the average over ranks.

    FSDP2 asks for reduce-scatter(AVG), and gloo of torch 2.7 sums: gradients come out world size times too large,
    which Adam hides. A probe decides, so that a mended gloo is left alone. For CPU runs only; call it on every rank.

    Returns:
        Whether anything had to be mended.
    """
    world = dist.get_world_size()
    ones = torch.ones(world)
    share = torch.empty(1)
    dist.reduce_scatter_tensor(share, ones, op=dist.ReduceOp.AVG)
    if share.item() == 1:
        return False
    # the factors that FSDP2 divides by before and after a plain sum
    _fsdp_collectives._get_gradient_divide_factors = lambda *args, **kwargs: (1.0, float(world))
    return True
