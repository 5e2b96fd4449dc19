"""Many input shards side by side, on any ``concurrent.futures`` executor, under one progress bar."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from tqdm import tqdm

from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts
from alignclip.conversion.shards import convert_shard
from alignclip.errors import UserError, one_line
from alignclip.runtime.threads import set_thread_defaults
from alignclip.storage import patience
from alignclip.storage.copies import TEMPORARY, remove_stale_copies
from alignclip.storage.staging import OutputFolder

CONNECT_TIMEOUT = 30  # seconds


class Progress:
    """Numbers that the workers on this machine count up and the parent shows."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.written: Synchronized[int] = spawn.Value("q", 0)
        self.skipped: Synchronized[int] = spawn.Value("q", 0)
        self.outage: Synchronized[int] = spawn.Value("q", 0)

    def add(self, written: int, skipped: int) -> None:
        """So many more."""
        for number, counter in ((written, self.written), (skipped, self.skipped)):
            if number:
                with counter.get_lock():
                    counter.value += number


_progress: Progress | None = None  # a worker's handle, set as it starts; on a cluster there is none


def _start_worker(progress: Progress, threads: int, temporary: str) -> None:
    tempfile.tempdir = temporary
    set_thread_defaults()
    os.environ["OMP_NUM_THREADS"] = str(
        threads
    )  # of a sentence encoder; torch reads it when it is imported
    tqdm.set_lock(
        threading.RLock()
    )  # its own is a semaphore, which would outlive a worker that is killed
    _count_in(progress)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _count_in(progress: Progress) -> None:
    """What this process converts is counted there."""
    global _progress
    _progress = progress
    patience.share(progress.outage)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A worker whose parent was killed would go on, and might replace what the next run has finished."""
    parent.join()
    os._exit(1)


def _work(
    source: str,
    name: str,
    columns: dict[str, str],
    options: ConvertOptions,
    witness: str | None = None,
) -> Counts:
    if witness and not Path(witness).is_file():
        raise UserError(
            f"the worker on {socket.gethostname()} does not see {options.out}, where this command writes: a local "
            "--out has to be a folder that all workers share; or write to a bucket"
        )
    if _progress is None:
        _tidy()
    try:
        return convert_shard(
            source, name, columns, options, _progress.add if _progress else _nobody
        )
    except UserError as error:
        message = str(error)
    # alone: Dask sends what caused an error along, which must pickle then; an HTTP error, which has a socket, does not
    raise UserError(message)


@cache
def _tidy() -> None:
    """Once in a process of a cluster: this machine's driver does it for its own."""
    remove_stale_copies()


def _nobody(written: int, skipped: int) -> None:
    """A cluster's workers are heard when they have finished an input."""


@contextmanager
def _pool(processes: int, progress: Progress) -> Iterator[Executor]:
    """Processes of this machine; what they have begun is finished after an error, but not after Ctrl-C."""
    others = set(multiprocessing.active_children())
    threads = max(1, (os.cpu_count() or 1) // processes)
    # spawn: CUDA and the object stores' clients do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(
        prefix=TEMPORARY
    ) as temporary:  # a worker that is killed leaves its copies behind
        pool = ProcessPoolExecutor(processes, spawn, _start_worker, (progress, threads, temporary))
        try:
            yield pool
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C is heard afterwards, and never by processes that are started meanwhile: a terminal sends it to all."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _dask(scheduler: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise UserError(
            "--scheduler needs Dask: pip install 'alignclip[dask]', here and on the workers"
        ) from None
    for name in (
        "distributed.client",
        "tornado.application",
    ):  # stack traces of a lost connection, which is raised, too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        client = Client(scheduler, timeout=CONNECT_TIMEOUT)
    except (OSError, ValueError, TimeoutError) as error:
        raise UserError(f"--scheduler {scheduler}: {one_line(error)}") from None
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        print(f"{len(workers)} Dask workers at {client.scheduler.address}", file=sys.stderr)
        executor = client.get_executor(pure=False)
        try:
            yield executor
        finally:
            executor.shutdown(wait=False)  # cancels what is still running


@contextmanager
def _converting(
    todo: dict[str, str],
    columns: dict[str, str],
    options: ConvertOptions,
    progress: Progress,
    given: Executor | None,
) -> Iterator[Iterator[tuple[str, Counts]]]:
    """Each input's name and counts as it is finished."""
    processes = min(options.processes, len(todo))
    if processes == 1 and not options.scheduler and given is None:
        _count_in(progress)
        # in this thread, so that Ctrl-C ends it
        yield ((name, _work(source, name, columns, options)) for name, source in todo.items())
        return
    if given is not None:
        at_work: AbstractContextManager[Executor] = nullcontext(given)
    else:
        at_work = _dask(options.scheduler) if options.scheduler else _pool(processes, progress)
    elsewhere = given is not None or options.scheduler
    with (
        at_work as executor,
        OutputFolder(options.out).witness() if elsewhere else nullcontext() as witness,
    ):
        with _no_interrupts():
            running = {
                executor.submit(_work, source, name, columns, options, witness): name
                for name, source in todo.items()
            }
        yield ((running[future], future.result()) for future in as_completed(running))


def convert_all(
    todo: dict[str, str],
    done: dict[str, Counts],
    columns: dict[str, str],
    options: ConvertOptions,
    check: Callable[[dict[str, Counts]], None],
    executor: Executor | None = None,
) -> None:
    """Convert these input shards side by side; the first failure ends the run.

    Args:
        todo: sub-folder name -> input shard.
        done: what earlier runs have converted; what this one has finished is added, up to an error.
        columns: of the MDS shards.
        options: see there.
        executor: instead of ``options.processes`` or ``options.scheduler``.
        check: looks at ``done`` each time that something was finished, and raises where that is enough.

    Raises:
        UserError: of :func:`convert_shard` or ``check``; a worker was killed.
    """
    if not todo:
        return
    progress = Progress()
    now: dict[str, Counts] = {}
    try:
        with (
            _bar(progress, now, len(todo), options.progress),
            _converting(todo, columns, options, progress, executor) as results,
        ):
            for name, counts in results:
                now[name] = done[name] = counts
                check(done)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for its memory; run again with fewer --processes"
        ) from None
    except CancelledError:  # of Dask's client, where the connection is lost
        raise UserError(
            f"the Dask scheduler at {options.scheduler} is gone; start it and run again"
        ) from None
    except Exception as error:
        if type(error).__name__ == "KilledWorker":  # Dask's
            raise UserError(f"Dask gave up: {one_line(error)}") from None
        raise


@contextmanager
def _bar(progress: Progress, now: dict[str, Counts], inputs: int, is_shown: bool) -> Iterator[None]:
    """A progress bar that a thread keeps up to date: the main one may be converting."""
    if not is_shown:
        yield
        return
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants fewer lines
    bar = tqdm(unit=" samples", smoothing=0.05, mininterval=interval, desc="converting")
    end = threading.Event()

    def keep() -> None:
        while not end.wait(0.5):
            _show(bar, progress, now, inputs)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        _show(bar, progress, now, inputs)
        bar.close()


def _show(bar: tqdm, progress: Progress, now: dict[str, Counts], inputs: int) -> None:
    """Update the bar; what is left is reckoned from the inputs that are finished."""
    now = dict(now)  # the other thread adds to it
    finished = sum(counts.written for counts in now.values())
    # a cluster's workers only say what they have finished. No lock: a worker that is killed may have it
    written = max(finished, progress.written.get_obj().value)
    skipped = max(sum(counts.bad for counts in now.values()), progress.skipped.get_obj().value)
    if now:
        bar.total = max(written, round(finished / len(now) * inputs))
    reasons: dict[str, int] = {}
    for counts in now.values():
        for reason, number in counts.skipped.items():
            reasons[reason] = reasons.get(reason, 0) + number
    often = sorted(reasons, key=lambda reason: -reasons[reason])[:3]
    bar.set_postfix_str(
        f"inputs {len(now)}/{inputs}, skipped {skipped}"
        + (f" ({', '.join(f'{reason} {reasons[reason]}' for reason in often)})" if often else ""),
        refresh=False,
    )
    bar.update(written - bar.n)
