"""Fetch remote files as local ones for a while, into folders that go even after a kill."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from alignclip.errors import UserError
from alignclip.storage.clouds import open_file
from alignclip.storage.patience import patiently
from alignclip.storage.words import cannot, describe_storage_error

HTTP_TIMEOUT = 60.0  # seconds without a byte, from the web
STALE = 3600.0  # seconds since a folder of a process that is gone was used


def _this_machine() -> str:
    """Name this machine or container, as only there a process id counts; TMPDIR may be shared."""
    namespace = Path("/proc/self/ns/pid")
    name = f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}"
    return hashlib.blake2b(name.encode(), digest_size=4).hexdigest()


HOST = _this_machine()
# Begins the names of folders in TMPDIR, which a process that is killed can't remove
TEMPORARY = f"alignclip-{HOST}-{os.getpid()}-"


@contextmanager
def temporary_folder(below: Path | None = None, prefix: str = TEMPORARY) -> Iterator[Path]:
    """Give an empty folder that goes when the block ends.

    Args:
        below: the folder that it is made in, and that is made before; TMPDIR where it isn't given.
            On one file system, a rename is all that is left to do.
        prefix: begins its name.

    Raises:
        UserError: the folder can't be made.
    """
    with cannot(f"write to {below or tempfile.gettempdir()}"):
        if below:
            below.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=prefix, dir=below, ignore_cleanup_errors=True)
    with made as folder:
        yield Path(folder)


@contextmanager
def fetched(place: str) -> Iterator[Path]:
    """Give the file at a path or URL as a local file: itself, or a temporary copy of a remote one.

    Raises:
        UserError: the file cannot be fetched.
    """
    if "://" not in place:
        yield Path(place)
        return
    with temporary_folder() as folder:
        path = folder / (place.rsplit("/", 1)[1] or "file")
        try:
            patiently(lambda: _fetch(place, path), place)
        except Exception as error:  # every provider has its own
            raise UserError(f"cannot fetch {place}: {describe_storage_error(error)}") from error
        yield path


def _fetch(url: str, path: Path) -> None:
    """Download a file.

    Raises:
        StorageError: an object store refuses.
        OSError, HTTPException: a web server refuses, or sends fewer bytes than it announced.
    """
    if urlparse(url).scheme not in ("http", "https"):
        store, name = open_file(url)
        store.download(name, path)
        return
    with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)
    size, announced = path.stat().st_size, answer.headers.get("Content-Length")
    if announced and size != int(announced):
        raise ConnectionError(f"the connection broke after {size} of {announced} bytes")


def check_web(urls: Iterable[str]) -> None:
    """Ask each web server for one of these once, without patience: a mistyped name is told at once.

    Raises:
        UserError: there is no such server, none listens, or its certificate is wrong. What the
            server answers doesn't matter.
    """
    first: dict[str, str] = {}
    for url in urls:
        first.setdefault(urlparse(url).netloc, url)
    for url in first.values():
        try:
            urllib.request.urlopen(url, timeout=HTTP_TIMEOUT).close()
        except urllib.error.HTTPError:
            continue
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(f"cannot fetch {url}: {describe_storage_error(error)}") from error


def remove_stale_copies() -> None:
    """Remove the temporary folders of this machine's killed processes, an hour after their use."""
    import psutil

    for folder in Path(tempfile.gettempdir()).glob(f"alignclip-{HOST}-*-*"):
        pid = folder.name.split("-")[2]
        with suppress(OSError):
            is_old = time.time() - folder.stat().st_mtime > STALE
            if pid.isdecimal() and is_old and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
