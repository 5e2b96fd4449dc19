"""Many input shards side by side, on any ``concurrent.futures`` executor, under one progress bar."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized

from tqdm import tqdm

from alignclip.errors import UserError, one_line
from convert import patience
from convert.options import ConvertOptions, Counts
from convert.shards import convert_shard

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


def _start_worker(progress: Progress, threads: int | None) -> None:
    global _progress
    _progress = progress
    patience.share(progress.outage)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of a sentence encoder; torch reads it when it is imported
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """A worker whose parent was killed would go on, and might replace what the next run has finished."""
    parent.join()
    os._exit(1)


def _work(source: str, name: str, columns: dict[str, str], options: ConvertOptions) -> Counts:
    return convert_shard(source, name, columns, options, _progress.add if _progress else _nobody)


def _nobody(written: int, skipped: int) -> None:
    """A cluster's workers are heard when they have finished an input."""


@contextmanager
def _executor(options: ConvertOptions, number: int, progress: Progress) -> Iterator[Executor]:
    """A Dask cluster's, or a pool of processes of this machine."""
    if options.scheduler:
        with _dask(options.scheduler) as cluster:
            yield cluster
        return
    processes = min(options.processes, number)
    threads = max(1, (os.cpu_count() or 1) // processes)
    pool: Executor
    if processes == 1:
        pool = ThreadPoolExecutor(1, initializer=_start_worker, initargs=(progress, None))
    else:
        # spawn: CUDA and the object stores' clients do not survive a fork
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(processes, spawn, initializer=_start_worker, initargs=(progress, threads))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _dask(scheduler: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--scheduler needs Dask: pip install 'alignclip[dask]', here and on the workers") from None
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


def convert_all(
    todo: dict[str, str],
    done: dict[str, Counts],
    columns: dict[str, str],
    options: ConvertOptions,
    check: Callable[[dict[str, Counts]], None],
) -> None:
    """Convert these input shards side by side; the first failure ends the run.

    Args:
        todo: sub-folder name -> input shard.
        done: what earlier runs have converted; what this one has finished is added, up to an error.
        columns: of the MDS shards.
        options: see there.
        check: looks at ``done`` each time that something was finished, and raises where that is enough.

    Raises:
        UserError: of :func:`convert_shard` or ``check``; a worker was killed.
    """
    if not todo:
        return
    progress = Progress()
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants fewer lines
    bar = tqdm(unit=" samples", smoothing=0.05, mininterval=interval, disable=not options.progress, desc="converting")
    now: dict[str, Counts] = {}
    with _executor(options, len(todo), progress) as executor:
        try:
            running: dict[Future[Counts], str] = {
                executor.submit(_work, source, name, columns, options): name for name, source in todo.items()
            }
            while running:
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    name = running.pop(future)
                    now[name] = done[name] = future.result()
                _show(bar, progress, now, len(todo))
                if finished:
                    check(done)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for its memory; run again with fewer --processes"
            ) from None
        except Exception as error:
            if type(error).__name__ == "KilledWorker":  # Dask's
                raise UserError(f"Dask gave up: {one_line(error)}") from None
            raise
        finally:
            bar.close()


def _show(bar: tqdm, progress: Progress, now: dict[str, Counts], inputs: int) -> None:
    """Update the bar; what is left is reckoned from the inputs that are finished."""
    finished = sum(counts.written for counts in now.values())
    # a cluster's workers only say what they have finished
    written = max(finished, progress.written.value)
    skipped = max(sum(counts.bad for counts in now.values()), progress.skipped.value)
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
