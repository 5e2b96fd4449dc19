"""Tars of image–caption pairs, as img2dataset and webdataset write them: finding, fetching and reading them."""

from __future__ import annotations

import glob
import io
import json
import re
import shutil
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from gzip import BadGzipFile
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from PIL import Image

from alignclip.errors import UserError, describe_storage_error
from convert.storage import list_remote

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# What may lie behind these extensions. Nothing else is tried: some of PIL's other formats start programs.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
FETCH_TIMEOUT = 600.0  # seconds, for a whole tar from object storage
HTTP_TIMEOUT = 60.0  # seconds without a byte
HTTP_ATTEMPTS = 4  # 1, 2 and 4 s apart

MISSING_IMAGE = "missing image"
MISSING_CAPTION = "missing caption"
EMPTY_CAPTION = "empty caption"
UNDECODABLE_IMAGE = "undecodable image"
IMAGE_TOO_LARGE = "image too large"
TRUNCATED_TAR = "truncated tar"


@dataclass(frozen=True)
class Sample:
    """One pair: the key it has in its tar, the image file's bytes as they are, the caption."""

    key: str
    image: bytes
    caption: str


@dataclass(frozen=True)
class Skipped:
    """A sample left out, or with :data:`TRUNCATED_TAR` the unreadable rest of a tar, and why.

    ``texts``: with :data:`MISSING_CAPTION` the entries of the ``json`` member that could have been captions.
    """

    key: str
    reason: str
    texts: tuple[str, ...] = field(default=(), compare=False)


def expand(patterns: Sequence[str]) -> list[str]:
    """The tars that ``patterns`` name: local absolute paths or URLs, each once, in the order of the patterns.

    A pattern is a path or URL; a folder, which stands for every ``.tar`` in it; with ``{00000..00123}`` or ``{a,b}``
    each of these; with ``*``, ``?`` or ``[]`` those that exist. Folders and wildcards also work in the object stores
    that Streaming can list (S3, GCS, OCI).

    Raises:
        UserError: a pattern matches nothing, or a tar that is named does not exist.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    missing: list[str] = []
    unseen: list[str] = []  # URLs of single tars
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"unbalanced braces in '{pattern}'") from None
        for name in names:
            found += _expand_remote(name, unseen) if "://" in name else _expand_local(name, missing)
    missing += _missing_remote(unseen)
    if missing:
        raise UserError(f"{len(missing)} of {len(found)} tars do not exist, the first is {missing[0]}")
    if not found:
        raise UserError("no input tars")
    return list(dict.fromkeys(found))


def _expand_local(name: str, missing: list[str]) -> list[str]:
    """What one path stands for; a single file that isn't there is put on the list ``missing``."""
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        tars = sorted(str(tar) for tar in path.glob("*.tar"))
        if not tars:
            raise UserError(f"no *.tar in the folder {path}")
        return tars
    if path.exists() or not glob.has_magic(name):
        if not path.exists():
            missing.append(str(path))
        return [str(path)]
    tars = sorted(str(tar) for tar in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not tars:
        raise UserError(f"no file matches '{name}'")
    return tars


def _expand_remote(url: str, unseen: list[str]) -> list[str]:
    """What one URL stands for; a single tar, which has not been looked for, is put on the list ``unseen``."""
    is_http = urlparse(url).scheme in ("http", "https")
    is_pattern = not is_http and glob.has_magic(url)
    if is_http or (not is_pattern and Path(url).suffix in (".tar", ".tgz", ".gz")):
        if not is_http:
            unseen.append(url)
        return [url]
    folder, pattern = url.rsplit("/", 1) if is_pattern else (url.rstrip("/"), "*.tar")
    if glob.has_magic(folder):
        raise UserError(f"a wildcard in '{url}' may stand in the last part only; use braces for the folders")
    tars = sorted(f"{folder}/{name}" for name in list_remote(folder) if "/" not in name and fnmatch(name, pattern))
    if not tars:
        raise UserError(f"nothing matches '{folder}/{pattern}'")
    return tars


def _missing_remote(tars: Sequence[str]) -> list[str]:
    """Which of these URLs a listing of their folders lacks; folders that can't be listed are taken on trust."""
    missing: list[str] = []
    for folder in dict.fromkeys(tar.rsplit("/", 1)[0] for tar in tars):
        try:
            names = list_remote(folder)
        except UserError:  # Azure, or a public bucket that may be read but not listed: fetching will tell
            continue
        missing += [tar for tar in tars if tar.rsplit("/", 1)[0] == folder and tar.rsplit("/", 1)[1] not in names]
    return missing


@contextmanager
def local_copy(tar: str) -> Iterator[Path]:
    """The tar as a local file: itself, or a temporary copy of a remote one.

    Raises:
        UserError: it cannot be fetched.
    """
    if "://" not in tar:
        yield Path(tar)
        return
    with tempfile.TemporaryDirectory(prefix="alignclip-") as folder:
        path = Path(folder) / "input.tar"
        try:
            if urlparse(tar).scheme in ("http", "https"):
                _fetch_http(tar, path)
            else:
                from streaming.base.storage import CloudDownloader

                CloudDownloader.direct_download(tar, str(path), FETCH_TIMEOUT)
        except Exception as error:  # every provider has its own
            raise UserError(f"cannot fetch {tar}: {describe_storage_error(error)}") from error
        yield path


def _fetch_http(url: str, path: Path) -> None:
    """Download a file, from its start again where the server or the line fails for the moment.

    Raises:
        OSError, HTTPException: it cannot be fetched, or fewer bytes came than were announced.
    """
    for attempt in range(HTTP_ATTEMPTS):
        try:
            with urllib.request.urlopen(url, timeout=HTTP_TIMEOUT) as answer, path.open("wb") as file:
                shutil.copyfileobj(answer, file)
            announced = answer.headers.get("Content-Length")
            if announced and path.stat().st_size != int(announced):
                raise OSError(f"the connection broke after {path.stat().st_size} of {announced} bytes")
            return
        except (OSError, HTTPException) as error:
            lasting = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code not in (408, 429)
            if lasting or attempt == HTTP_ATTEMPTS - 1:
                raise
            time.sleep(2**attempt)


def read_samples(path: Path, caption_key: str | None = None) -> Iterator[Sample | Skipped]:
    """Stream through a tar (plain or gzipped) and yield its samples in order, one in memory at a time.

    Consecutive members with one key belong together; the key is webdataset's, the path up to the first dot of the file
    name. The caption is the ``txt`` member, or else ``caption`` in the ``json`` member; with a ``caption_key`` it is
    that entry of the ``json`` member. Invalid UTF-8 becomes U+FFFD. A broken tar yields what is whole before the break.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers every header
                match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", member.name)
                if match is None or not member.isfile():
                    continue
                if match[1] != key:
                    if key is not None:
                        yield _sample(key, members, caption_key)
                    key, members = match[1], {}
                extension = match[2].lower()
                if extension in (*IMAGE_EXTENSIONS, "txt", "json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    members[extension] = content.read()
            whole = _ends_properly(tar)
    except (tarfile.TarError, BadGzipFile, EOFError, zlib.error):
        yield Skipped(key or "", TRUNCATED_TAR)  # together with the sample in which it breaks
        return
    if key is not None:
        yield _sample(key, members, caption_key)
    if not whole:
        yield Skipped(key or "", TRUNCATED_TAR)


def _ends_properly(tar: tarfile.TarFile) -> bool:
    """Whether iteration stopped at the zero block that ends a tar; tarfile also stops, silently, at a bad header."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    return tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _sample(key: str, members: dict[str, bytes], caption_key: str | None) -> Sample | Skipped:
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if not image:
        return Skipped(key, MISSING_IMAGE)
    caption = _caption(members, caption_key)
    if caption is None:
        return Skipped(key, MISSING_CAPTION, _texts(members))
    if not caption.strip():
        return Skipped(key, EMPTY_CAPTION)
    return Sample(key, image, caption)


def _caption(members: dict[str, bytes], caption_key: str | None) -> str | None:
    if caption_key is None and "txt" in members:
        return members["txt"].decode("utf-8", errors="replace")
    try:
        caption = json.loads(members["json"].decode("utf-8", errors="replace"))[caption_key or "caption"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(caption, str):
        return None
    return caption.encode("utf-8", errors="replace").decode("utf-8")  # JSON's \ud800 has no UTF-8 form


def _texts(members: dict[str, bytes]) -> tuple[str, ...]:
    """The keys of the ``json`` member's strings."""
    try:
        entries = json.loads(members["json"].decode("utf-8", errors="replace")).items()
    except (KeyError, AttributeError, ValueError):
        return ()
    return tuple(key for key, value in entries if isinstance(value, str) and key.isprintable())


def check_image(image: bytes) -> str | None:
    """Decode an image file and return why it is unusable (a reason of this module), or None when it is whole."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image), formats=IMAGE_FORMATS) as picture:
                # a JPEG's coefficients are all read at any scale, and at an eighth that is all the work there is
                picture.draft(None, (1, 1))
                picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return IMAGE_TOO_LARGE
    except Exception:  # PIL's decoders raise nearly anything on broken files
        return UNDECODABLE_IMAGE
    return None
