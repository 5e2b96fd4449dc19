"""Many small files from folders and buckets: read side by side, handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar
from urllib.parse import quote

from alignclip.conversion import text_tables
from alignclip.conversion.formats.columns import local_image
from alignclip.conversion.formats.declaration import is_web
from alignclip.conversion.samples import MISSING_IMAGE, Skipped, as_utf8
from alignclip.errors import UserError
from alignclip.storage import cannot, is_about_name, open_store, patiently
from alignclip.storage.clouds import check_scheme
from alignclip.storage.copies import fetched

AT_ONCE = 16  # files read at a time, of which none is larger than MAX_IMAGE_BYTES
IN_ADDRESSES = "/%?&=:@+,;~!$'()*"  # stay as they are in a web address

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


def image_place(name: object, folder: str) -> str:
    """Return the path or URL of an image that a list in a folder names.

    A list that comes from elsewhere may be a stranger's. Such a list names no file of this machine.

    Args:
        name: as the list has it.
        folder: path or URL of the list's folder, without a slash at its end.

    Raises:
        ValueError: there is no such place, or the list may not name it.
    """
    if not isinstance(name, str) or not name or text_tables.is_web_address(name):
        raise ValueError("no path")
    is_url, is_local_list = "://" in name, "://" not in folder
    if is_local_list and not is_url:
        return str(Path(f"{folder}/", name))  # the root's name is empty
    if as_utf8(name) != name:
        raise ValueError("no storage has such a name")
    if is_url:
        check_scheme(name)
        return name
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError("a list that is no local file names what lies below it, or URLs")
    return f"{folder}/{quote(name, IN_ADDRESSES) if is_web(folder) else name}"


def read_image(place: str, key: str) -> bytes | Skipped:
    """Return the bytes of an image at a path or URL, or why this image can't be had.

    Raises:
        UserError: the storage is away; see :func:`read_object`.
    """
    return read_object(place, key) if "://" in place else local_image(Path(place), key)


def read_object(place: str, key: str) -> bytes | Skipped:
    """Read a file at a URL, and wait while the storage is away; say why one can't be had.

    Raises:
        UserError: no file can be fetched; its cause is the storage's own exception.
    """
    try:
        with cannot(f"fetch {place}"):
            if is_web(place):
                with fetched(place) as path:
                    return path.read_bytes()
            scheme, _, rest = place.partition("://")
            bucket, _, name = rest.partition("/")
            folder, slash, file = name.rpartition("/")
            name = f"{folder.strip('/')}{slash}{file}".lstrip("/")
            store = open_store(f"{scheme}://{bucket}")
            return patiently(lambda: store.read_bytes(name), place)
    except UserError as error:
        if is_about_name(error):
            return Skipped(key, MISSING_IMAGE, str(error))
        raise
