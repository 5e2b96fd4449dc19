"""Fetch remote files as local ones for a while."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from alignclip.errors import UserError
from alignclip.storage.clouds import open_file
from alignclip.storage.patience import patiently
from alignclip.storage.temporary import temporary_folder
from alignclip.storage.words import describe_storage_error

HTTP_TIMEOUT = 60.0  # seconds without a byte, from the web


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
