"""The ranks of a run: who they are, and every way in which they wait for one another.

All functions but the first five are collective: call them on every rank, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from alignclip.errors import UserError, one_line

T = TypeVar("T")
_longest_wait: timedelta | None = None  # of the hosts; None: as torch has it


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Return the number of ranks of a group, or of the run; 1 before the ranks have met."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Return this process's number in a group, or in the run; 0 before the ranks have met."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def local_rank() -> int:
    """Return this process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that FSDP2 has spread; another tensor as it is.

    A spread tensor is a DTensor. Newer versions of torch import sympy with that class, and every
    command would wait for sympy.
    """
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP2 has spread as a whole; another tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather(share: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Gather ``[n, d]`` of each rank to ``[ranks, n, d]`` on all ranks; no gradient."""
    if world_size(group) == 1:
        return share[None]
    shares = [torch.empty_like(share) for _ in range(world_size(group))]
    dist.all_gather(shares, share.contiguous(), group=group)
    return torch.stack(shares)


def gather_objects(share: list[T]) -> list[T]:
    """Join the lists of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return share
    shares: list[list[T]] = [[]] * world_size()
    dist.all_gather_object(shares, share)
    return [item for one in shares for item in one]


def true_on_any_rank(flags: Tensor) -> list[bool]:
    """Say which of the ``[n]`` flags are true on at least one rank.

    Args:
        flags: on the device that the ranks communicate through; or of the host, and then no rank
            waits for a device.
    """
    return [bool(flag) for flag in largest_of_all_ranks(flags.to(torch.int32)).tolist()]


def largest_of_all_ranks(values: Tensor) -> Tensor:
    """Replace each of the ``[n]`` values by the largest of all ranks, where the values are."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_group_of(values))
    return values


def sum_over_ranks(values: list[float]) -> list[float]:
    """Add up numbers of the hosts, each in fp64; no rank waits for a device."""
    sums = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(sums, group=_group_of(sums))
    return sums.tolist()


def wait_at_most(seconds: float) -> None:
    """Bound the time for which the hosts wait for one another; before they do for the first time.

    The group in which the ranks have met has a bound of its own.
    """
    global _longest_wait
    _longest_wait = timedelta(seconds=seconds)


def _group_of(values: Tensor) -> dist.ProcessGroup | None:
    """Return the group that tensors of this device travel in; None: the default group."""
    through_devices = dist.get_backend() != dist.Backend.GLOO
    return _hosts(dist.group.WORLD) if through_devices and values.device.type == "cpu" else None


@cache
def _hosts(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """Make the group in which the hosts of all ranks talk, beside the devices' own.

    Raises:
        UserError: the hosts don't find one another.
    """
    try:
        group = dist.new_group(backend=dist.Backend.GLOO, timeout=_longest_wait)
    except RuntimeError as error:
        raise UserError(
            f"the machines of this run can't talk to one another: {one_line(error)}; "
            "GLOO_SOCKET_IFNAME names the network interface that they share"
        ) from None
    assert isinstance(group, dist.ProcessGroup)
    return group


def raise_on_all_ranks(error: Exception | None) -> None:
    """Raise an error of one rank on all ranks: the others must not wait for a rank that has ended.

    Args:
        error: of this rank, or None.

    Raises:
        Exception: ``error`` itself, where this rank has one.
        UserError: the error of the first rank that has one, on the ranks that have none. Where that
            is another exception than UserError, its name and first line.
    """
    shared = error
    if error is not None and not isinstance(error, UserError):
        shared = UserError(f"rank {rank()}: {type(error).__name__}: {one_line(error)}")
    errors = [one for one in gather_objects([shared]) if one is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]


@contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Run a block on every rank; an exception in one rank's block is raised on all ranks.

    Raises:
        UserError: see :func:`raise_on_all_ranks`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure)


def run_on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0, and return its result on every rank.

    Raises:
        UserError: see :func:`raise_on_all_ranks`.
    """
    results: list[Any] = [None]
    with errors_on_all_ranks():
        if rank() == 0:
            results = [action()]
    if world_size() > 1:
        dist.broadcast_object_list(results)
    result: T = results[0]
    return result


def run_once_per_machine(action: Callable[[], T]) -> T:
    """Run ``action`` on each machine's first rank, and return the result to all ranks of it.

    Raises:
        UserError: see :func:`raise_on_all_ranks`.
    """
    result: list[Any] = [None]
    with errors_on_all_ranks():
        if local_rank() == 0:
            result = [action()]
    found: T = gather_objects(result)[rank() - local_rank()]
    return found


def local_rank_zero_first(action: Callable[[], T]) -> T:
    """Run ``action`` on each machine's first rank, then on the others, which find its downloads.

    Raises:
        UserError: see :func:`raise_on_all_ranks`.
    """
    results: list[T] = []
    for is_first in (True, False):
        with errors_on_all_ranks():
            if (local_rank() == 0) == is_first:
                results.append(action())
    return results[0]


def wait_for_all_ranks() -> None:
    """Return once every rank has come here."""
    if world_size() > 1:
        dist.barrier()
