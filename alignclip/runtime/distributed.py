"""Processes that find one another."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from alignclip.errors import UserError, one_line
from alignclip.ranks import wait_at_most
from alignclip.runtime import attendance, launcher

SECONDS_UNTIL_TOLD = 30.0
OPEN_FILES = 65536


def join_ranks(backend: str, timeout: float) -> None:
    """Wait for the other processes of the run, and make them one group.

    Meanwhile a signal ends the process at once: Python's handlers would run after the wait. After
    :data:`SECONDS_UNTIL_TOLD` a line says who is waited for.

    Args:
        backend: of torch.distributed, as the device asks for it: ``gloo`` or ``nccl``.
        timeout: seconds.

    Raises:
        UserError: the others haven't come, or the port is taken.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    allow_many_connections()
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    told = threading.Timer(SECONDS_UNTIL_TOLD, _tell_waiting, [place])
    told.daemon = True
    told.start()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (dist.DistError, TimeoutError, ValueError) as error:
        raise UserError(
            f"the processes of this run can't meet at {place}: {one_line(error)}"
        ) from None
    finally:
        told.cancel()
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    wait_at_most(timeout)
    attendance.take_part(timeout)


def allow_many_connections() -> None:
    """Raise the number of files that this process may open, as far as the system allows.

    Rank 0 has three connections to each rank and more with NCCL; the usual number is 1024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a bound besides
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _tell_waiting(place: str) -> None:
    here = launcher.siblings(os.environ) if "LOCAL_WORLD_SIZE" in os.environ else None
    running = ""
    if here is not None:
        running = f", of {os.environ['LOCAL_WORLD_SIZE']} on this machine {here} run"
    print(
        f"process {os.environ.get('RANK', 0)} of {os.environ['WORLD_SIZE']} (numbers begin at 0) "
        f"waits for the others at {place} (MASTER_ADDR:MASTER_PORT){running}; "
        "are all started, and can they reach it?",
        file=sys.stderr,
        flush=True,
    )
