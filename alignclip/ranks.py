"""What the ranks tell one another: features, and whether all of them can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignclip.errors import UserError

T = TypeVar("T")


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which one this is."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(share: Tensor) -> Tensor:
    """[n, d] on each rank → [ranks, n, d] on all."""
    if world() == 1:
        return share[None]
    shares = [torch.empty_like(share) for _ in range(world())]
    dist.all_gather(shares, share.contiguous())
    return torch.stack(shares)


def gather_objects(share: list[Any]) -> list[Any]:
    """The ranks' lists, one behind the other."""
    if world() == 1:
        return share
    shares: list[list[Any]] = [[]] * world()
    dist.all_gather_object(shares, share)
    return [item for one in shares for item in one]


def agree(error: UserError | None) -> None:
    """Go on together, or not at all: what one rank can't do, the others must not wait for.

    Raises:
        UserError: the error of the first rank that has one, on all of them.
    """
    errors = [one for one in gather_objects([error]) if one is not None]
    if errors:
        raise errors[0]


def from_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0, and return its result on every rank.

    Raises:
        UserError: the error of rank 0, on every rank.
    """
    found: list[Any] = [None]
    failure: UserError | None = None
    if rank() == 0:
        try:
            found = [action()]
        except UserError as error:
            failure = error
    agree(failure)
    if world() > 1:
        dist.broadcast_object_list(found)
    result: T = found[0]
    return result
