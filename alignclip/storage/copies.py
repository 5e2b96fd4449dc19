"""Remote files as local ones for a while: fetched patiently, into folders that are removed even after a kill."""

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
from alignclip.storage import describe_storage_error, open_file, patiently

HTTP_TIMEOUT = 60.0  # seconds without a byte, from the web


def machine() -> str:
    """A short name of this machine or container: process ids mean something there only, and TMPDIR may be shared."""
    namespace = Path("/proc/self/ns/pid")
    processes = namespace.readlink() if namespace.exists() else ""
    return hashlib.blake2b(
        f"{socket.gethostname()} {processes}".encode(), digest_size=4
    ).hexdigest()


HOST = machine()
TEMPORARY = f"alignclip-{HOST}-{os.getpid()}-"  # folders in TMPDIR, which a process that is killed can't remove


@contextmanager
def fetched(place: str) -> Iterator[Path]:
    """The file at a path or URL as a local file: itself, or a temporary copy of a remote one.

    Raises:
        UserError: it cannot be fetched.
    """
    if "://" not in place:
        yield Path(place)
        return
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        path = Path(folder, place.rsplit("/", 1)[1] or "file")
        try:
            if urlparse(place).scheme in ("http", "https"):
                patiently(lambda: _fetch_http(place, path), place)
            else:
                store, name = open_file(place)
                patiently(lambda: store.download(name, path), place)
        except Exception as error:  # every provider has its own
            raise UserError(f"cannot fetch {place}: {describe_storage_error(error)}") from error
        yield path


def _fetch_http(url: str, path: Path) -> None:
    """Download a file.

    Raises:
        OSError, HTTPException: it cannot be fetched, or fewer bytes came than were announced.
    """
    with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT) as answer, path.open("wb") as file:
        shutil.copyfileobj(answer, file)
    announced = answer.headers.get("Content-Length")
    if announced and path.stat().st_size != int(announced):
        raise ConnectionError(
            f"the connection broke after {path.stat().st_size} of {announced} bytes"
        )


def check_web(urls: Iterable[str]) -> None:
    """Ask each web server for one of these once, without patience: a mistyped name is told at once.

    Raises:
        UserError: there is no such server, none listens, or its certificate is wrong. What it answers doesn't matter.
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
    """Remove temporary folders of this machine's processes that were killed, an hour after they were last used."""
    for folder in Path(tempfile.gettempdir()).glob(f"alignclip-{HOST}-*-*"):
        pid = folder.name.split("-")[2]
        with suppress(OSError):
            if (
                pid.isdecimal()
                and not _is_alive(int(pid))
                and time.time() - folder.stat().st_mtime > 3600
            ):
                shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
