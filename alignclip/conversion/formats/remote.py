"""Many small files from folders and buckets: read side by side, handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import lru_cache
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from alignclip.conversion.formats.columns import local_image
from alignclip.conversion.samples import MISSING_IMAGE, Skipped
from alignclip.errors import UserError
from alignclip.storage import StorageError, Store, is_absent, is_denied, open_store, patiently
from alignclip.storage.clouds import check_scheme
from alignclip.storage.copies import fetched

AT_ONCE = 16  # files read at a time, of which none is larger than MAX_IMAGE_BYTES

T = TypeVar("T")


def read_ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield what the jobs return, in their order; so many run at a time as :data:`AT_ONCE`.

    Nothing waits for jobs whose results nobody takes, as after Ctrl-C: a job may wait ten minutes
    for its storage. So the threads are daemons, which an executor's are not.
    """
    todo: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()

    def work() -> None:
        while given := todo.get():
            future, job = given
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

    def submit(job: Callable[[], T]) -> Future[T]:
        future = Future[T]()
        todo.put((future, job))
        return future

    waiting = iter(jobs)
    running = deque(map(submit, islice(waiting, AT_ONCE)))
    threads = len(running)
    for _ in range(threads):
        Thread(target=work, daemon=True).start()
    try:
        while running:
            result = running.popleft().result()
            running.extend(map(submit, islice(waiting, 1)))
            yield result
    finally:
        for future in running:
            future.cancel()
        for _ in range(threads):
            todo.put(None)


def read_object(place: str) -> bytes:
    """Read a file at a URL, and wait while the storage is away.

    Raises:
        UserError: the file can't be fetched; its cause is the storage's own exception.
        ValueError: no storage is known by the URL's scheme.
    """
    if place.startswith(("http://", "https://")):
        with fetched(place) as path:
            return path.read_bytes()
    scheme, _, rest = place.partition("://")
    bucket, _, key = rest.partition("/")
    folder, slash, file = key.rpartition("/")
    name = f"{folder.strip('/')}{slash}{file}".lstrip("/")
    store = store_at(f"{scheme}://{bucket}")
    try:
        return patiently(lambda: store.read_bytes(name), place)
    except StorageError as error:
        raise UserError(f"cannot fetch {place}: {error.why}") from error


def read_image(place: str, key: str) -> bytes | Skipped:
    """Return the bytes of an image at a path or URL, or why there are none.

    Raises:
        UserError: the storage is away.
    """
    if "://" not in place:
        return local_image(Path(place), key)
    try:
        return read_object(place)
    except ValueError as error:
        return Skipped(key, MISSING_IMAGE, f"{error}: {place}")
    except UserError as error:
        # a store answers that access is denied instead of 404 to a key that may not list
        if is_absent(error) or is_denied(error):
            return Skipped(key, MISSING_IMAGE, str(error))
        raise


@lru_cache(64)
def store_at(bucket: str) -> Store:
    """Return the store of a bucket's URL; opening a client takes longer than reading a file.

    Raises:
        ValueError: no storage is known by the URL's scheme.
    """
    check_scheme(bucket)
    return open_store(bucket)
