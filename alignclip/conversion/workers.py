"""Many input shards side by side, on any ``concurrent.futures`` executor."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext

from tqdm import tqdm

from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.progress import Progress
from alignclip.conversion.records import Counts
from alignclip.conversion.shards import convert_shard
from alignclip.errors import UserError, one_line
from alignclip.runtime.threads import set_thread_defaults
from alignclip.storage import patience
from alignclip.storage.staging import OutputFolder
from alignclip.storage.temporary import temporary_folder

CONNECT_TIMEOUT = 30  # seconds

# Where this process counts, set as a worker starts: a pool hands its workers nothing but arguments
# that can be pickled, and shared numbers can't. On a cluster there is none.
_progress: Progress | None = None


def convert_all(
    todo: dict[str, str],
    done: dict[str, Counts],
    columns: dict[str, str],
    options: ConvertOptions,
    mark: str,
    check: Callable[[], None],
    executor: Executor | None = None,
) -> None:
    """Convert these input shards side by side; the first failure ends the run.

    Args:
        todo: sub-folder name -> input shard.
        done: what earlier runs have converted; what this run finishes is added, up to an error.
        columns: of the MDS shards.
        options: of the run.
        mark: of the run, in ``options.out``; tasks elsewhere look at it.
        executor: instead of ``options.processes`` or ``options.scheduler``.
        check: is called each time that something was finished, and raises where that is enough.

    Raises:
        UserError: of :func:`convert_shard` or ``check``; a worker was killed.
    """
    if not todo:
        return
    progress = Progress()
    now: dict[str, Counts] = {}
    try:
        with (
            progress.bar(now, len(todo), options.progress),
            _converting(todo, columns, options, mark, progress, executor) as results,
        ):
            for name, counts in results:
                now[name] = done[name] = counts
                check()
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
def _converting(
    todo: dict[str, str],
    columns: dict[str, str],
    options: ConvertOptions,
    mark: str,
    progress: Progress,
    given: Executor | None,
) -> Iterator[Iterator[tuple[str, Counts]]]:
    """Give each input's name and counts as it is finished."""
    processes = min(options.processes, len(todo))
    elsewhere = given is not None or bool(options.scheduler)
    if processes == 1 and not elsewhere:
        _count_in(progress)
        # in this thread, so that Ctrl-C ends it
        yield ((name, _work(source, name, columns, options)) for name, source in todo.items())
        return
    if given is not None:
        at_work: AbstractContextManager[Executor] = nullcontext(given)
    else:
        at_work = _dask(options.scheduler) if options.scheduler else _pool(processes, progress)
    with at_work as executor:
        with _no_interrupts():
            running = {
                executor.submit(
                    _work, source, name, columns, options, mark if elsewhere else None
                ): name
                for name, source in todo.items()
            }
        yield ((running[future], future.result()) for future in as_completed(running))


def _work(
    source: str,
    name: str,
    columns: dict[str, str],
    options: ConvertOptions,
    mark: str | None = None,
) -> Counts:
    """Convert an input shard in this process; ``mark`` is the run's, where this is elsewhere."""
    store = OutputFolder(options.out, mark)
    store.check_mark()
    show = _progress.add if _progress else lambda written, skipped: None
    try:
        return convert_shard(source, name, columns, options, show, store)
    except UserError as error:
        message = str(error)
    # Alone: Dask sends the cause of an error along, which must pickle then; an HTTP error doesn't.
    raise UserError(message)


def _count_in(progress: Progress) -> None:
    """Count there what this process converts."""
    global _progress
    _progress = progress
    patience.share(progress.outage)


@contextmanager
def _pool(processes: int, progress: Progress) -> Iterator[Executor]:
    """Start processes; what they have begun is finished after an error, but not after Ctrl-C."""
    others = set(multiprocessing.active_children())
    threads = max(1, (os.cpu_count() or 1) // processes)
    # spawn: CUDA and the object stores' clients do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    # a worker that is killed leaves its copies behind
    with temporary_folder() as temporary:
        pool = ProcessPoolExecutor(
            processes, spawn, _start_worker, (progress, threads, str(temporary))
        )
        try:
            yield pool
        except KeyboardInterrupt:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(progress: Progress, threads: int, temporary: str) -> None:
    tempfile.tempdir = temporary  # which the parent removes, whatever becomes of this process
    set_thread_defaults()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported
    tqdm.set_lock(
        threading.RLock()
    )  # tqdm's own is a semaphore, which would outlive a killed worker
    _count_in(progress)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process with its parent: it might replace what the next run has finished."""
    parent.join()
    os._exit(1)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hear Ctrl-C afterwards, and never in processes that are started meanwhile."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _dask(scheduler: str) -> Iterator[Executor]:
    """Connect to a Dask cluster.

    Raises:
        UserError: Dask isn't installed, or there is no scheduler at the address.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError(
            "--scheduler needs Dask: pip install 'alignclip[dask]', here and on the workers"
        ) from None
    for name in ("distributed.client", "tornado.application"):
        # stack traces of a lost connection, which is raised, too
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
