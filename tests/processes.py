"""Run a function on several processes of a gloo group, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SLOW_IMPORTS = ["torch", "torch.distributed.fsdp", "open_clip", "timm", "composer", "streaming"]


def run(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(*args)`` on ``n`` fresh processes that form the default gloo group; return their results by rank.

    ``fn`` must be a function at the top level of a module, and it, ``args`` and results must pickle. Each process has
    one thread, this process's environment, and the launcher's variables (RANK, WORLD_SIZE, LOCAL_RANK, ...).

    Raises:
        RuntimeError: a process raised, with its traceback, died, or didn't end within ``timeout`` seconds. No process
            is left behind.
    """
    with tempfile.TemporaryDirectory() as folder:
        # forked from a server that has imported the slow packages once and has no threads, nor anything of ours
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])
        environment = dict(os.environ) | _launcher_environment(n)
        processes = [
            context.Process(target=_work, args=(rank, n, environment, folder, timeout, fn, args))
            for rank in range(n)
        ]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), timeout)
            # results travel in files: tensors in a queue would live in the memory of a process that has ended
            return [
                torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(n)
            ]
        finally:
            for process in processes:
                if process.pid is not None:  # it was started
                    process.kill()
                    process.join()


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    """Until all have ended well; raise at the first that has not."""
    deadline = time.monotonic() + timeout
    while True:
        for rank, process in enumerate(processes):
            if process.exitcode not in (None, 0):
                # the earliest report is the cause, the others' are of the lost connection
                reports = sorted(
                    folder.glob("*.error"), key=lambda report: report.stat().st_mtime_ns
                )
                if reports:
                    raise RuntimeError(
                        f"rank {reports[0].stem} of {len(processes)} failed:\n{reports[0].read_text()}"
                    )
                raise RuntimeError(
                    f"rank {rank} of {len(processes)} ended with exit status {process.exitcode}"
                )
        if all(process.exitcode == 0 for process in processes):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(processes) if process.exitcode is None]
            raise RuntimeError(f"ranks {alive} of {len(processes)} still ran after {timeout:.0f} s")
        time.sleep(0.02)


def _launcher_environment(n: int) -> dict[str, str]:
    """What a launcher sets alike on all ``n`` processes of a node."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    size = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "NODE_RANK": "0"}
    return size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _work(
    rank: int,
    n: int,
    environment: dict[str, str],
    folder: str,
    timeout: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's, as old as its first use
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        # a file for the rendezvous: unlike a port, nobody else can take it meanwhile
        store = f"file://{folder}/rendezvous"
        dist.init_process_group("gloo", store, timedelta(seconds=timeout), world_size=n, rank=rank)
        torch.save(fn(*args), Path(folder, f"{rank}.result"))
        dist.barrier()
        sys.stdout.flush()
        # a gloo group that is destroyed can wait for a thread of its own that waits for Python's lock
        os._exit(0)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        # no clean-up, which could wait for the others
        os._exit(1)
