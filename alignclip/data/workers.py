"""Data workers: their end with the run's end, and what their death means."""

from __future__ import annotations

import gc
import multiprocessing
import re
import signal
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.data import _utils
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from alignclip.data.shared_memory_room import bus_error_in_words
from alignclip.errors import UserError, WorkerDiedError
from alignclip.ranks import rank
from alignclip.runtime import launcher

# what PyTorch says where a worker has died
KILLED = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]+)\.")
LEFT = re.compile(r"DataLoader worker \(pid\(s\) ([\d, ]+)\) exited unexpectedly")
# what PyTorch says where the thread that pins batches has met the broken connection
PIN_THREAD_ENDED = "Pin memory thread exited unexpectedly"
SEEN_WITHIN = 2.0  # seconds from the broken connection of a worker to the news of its death
MEMORY_EVENTS = Path("/sys/fs/cgroup/memory.events")


def die_with_parent(worker: int = 0) -> None:
    """Have Linux kill this process when the process that started it ends, however that ends.

    A worker that hangs, or was stopped, would stay for ever. A worker holds its rank's connections
    besides, and the other ranks wait until these are closed.

    Args:
        worker: its number; a DataLoader calls this in each worker.
    """
    launcher.signal_with_parents_death(signal.SIGKILL)


def kill_all() -> None:
    """Kill all data workers, and have PyTorch forget the loaders that they work for.

    Workers don't hear SIGTERM, and PyTorch waits five seconds for each that doesn't end by itself.
    Loaders that are made afterwards work: a program may call the command more than once.
    """
    # PyTorch's handler raises where a worker dies.
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        for batches in gc.get_objects():
            if type(batches) is _MultiProcessingDataLoaderIter:
                _forget(batches)
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _forget(batches: _MultiProcessingDataLoaderIter) -> None:
    """Have PyTorch ask no worker of a loader to end, and take no worker's death for an error."""
    batches._shutdown = True
    if batches.__dict__.get("_worker_pids_set"):
        _utils.signal_handling._remove_worker_pids(id(batches))
        batches._worker_pids_set = False
    if ended := batches.__dict__.get("_pin_memory_thread_done_event"):
        ended.set()


@contextmanager
def killed_by_a_failure() -> Iterator[None]:
    """Kill the data workers of a command that fails."""
    try:
        yield
    except Exception:
        kill_all()
        raise


@contextmanager
def deaths_explained() -> Iterator[None]:
    """Turn the death of a data worker into one line.

    Raises:
        UserError: a worker was killed, or shared memory couldn't be had.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        said = f"{error} {_death(error)}"
        if (why := bus_error_in_words(said)) is not None:
            raise UserError(why) from error
        killed, left = KILLED.search(said), LEFT.search(said)
        if killed is None and left is None:
            raise
        number = killed[1] if killed else left[1]  # type: ignore[index]
        who = f"data worker {number} of rank {rank()} on {socket.gethostname()}"
        if killed is None or killed[2] == "Killed":
            raise WorkerDiedError(f"{who} was killed; {_out_of_memory()}") from error
        raise WorkerDiedError(
            f"{who} died of a signal ({killed[2]}): data.num_workers=0 shows which sample is read"
        ) from error


def _death(error: Exception) -> str:
    """Return what PyTorch says, or would say, of the worker whose death is behind an error.

    The connection of a worker that is killed breaks before its death can be seen. PyTorch tells a
    death once, by an exception, and Python swallows an exception that is raised in a ``__del__``.
    So the workers of the loader that failed are asked, too.
    """
    asked = {
        worker
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if isinstance(loader := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter)
        for worker in loader._workers
    }
    is_cut = isinstance(error, (ConnectionError, EOFError)) or PIN_THREAD_ENDED in str(error)
    until = time.monotonic() + (SEEN_WITHIN if is_cut else 0.0)
    try:
        while True:
            _utils.signal_handling._error_if_any_worker_fails()
            for worker in asked:
                if worker.exitcode is not None and worker.exitcode < 0:
                    name = signal.strsignal(-worker.exitcode)
                    return f"DataLoader worker (pid {worker.pid}) is killed by signal: {name}."
            if time.monotonic() >= until:
                return ""
            time.sleep(0.05)
    except RuntimeError as death:  # PyTorch's handler of SIGCHLD raises, too
        return str(death)


def _out_of_memory() -> str:
    """Say what may have killed a process without a word, and where to look."""
    advice = "lower data.num_workers or data.prefetch_factor, or give the machine more memory"
    try:
        counts = dict(line.split() for line in MEMORY_EVENTS.read_text("utf-8").splitlines())
    except (OSError, ValueError):
        counts = {}
    if int(counts.get("oom_kill", 0)):
        return f"this container has been out of memory ({MEMORY_EVENTS}: oom_kill): {advice}"
    return f"the kernel kills where memory is short (dmesg -T | grep -i oom): {advice}"
