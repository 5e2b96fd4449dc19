"""Processes that find one another, and a collective of this stack that is not what it says it is."""

from __future__ import annotations

import os
import signal
import sys
import threading

import torch
import torch.distributed as dist
from composer.devices import Device
from composer.utils import dist as composer_dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from alignclip.errors import UserError, one_line
from alignclip.runtime import launcher

TOLD_AFTER = 30.0  # seconds


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


def join_ranks(device: Device, timeout: float) -> None:
    """Wait for the other processes of the run, and make them one group.

    A signal ends the process at once meanwhile: Python's handlers would run after the wait. After :data:`TOLD_AFTER`
    seconds a line says who is waited for.

    Args:
        device: of this process.
        timeout: seconds.

    Raises:
        UserError: the others haven't come, or the port is taken.
    """
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = threading.Timer(TOLD_AFTER, _tell_waiting, [place])
    told.daemon = True
    handlers = {}
    if composer_dist.get_world_size() > 1:
        told.start()
        if threading.current_thread() is threading.main_thread():
            handlers = {
                n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGINT)
            }
    try:
        composer_dist.initialize_dist(device, timeout=timeout)
    except (dist.DistError, TimeoutError, ValueError) as error:
        raise UserError(
            f"the processes of this run can't meet at {place}: {one_line(error)}"
        ) from None
    finally:
        told.cancel()
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _tell_waiting(place: str) -> None:
    world = composer_dist.get_world_size()
    here = launcher.siblings(os.environ) if "LOCAL_WORLD_SIZE" in os.environ else None
    running = (
        f", of {os.environ['LOCAL_WORLD_SIZE']} on this machine {here} run"
        if here is not None
        else ""
    )
    print(
        f"process {composer_dist.get_global_rank()} of {world} (numbers begin at 0) waits for the others at {place} "
        f"(MASTER_ADDR:MASTER_PORT){running}; are all started, and can they reach it?",
        file=sys.stderr,
        flush=True,
    )
