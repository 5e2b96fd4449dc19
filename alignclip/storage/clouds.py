"""Reach object stores: S3 by boto3, every other one by Streaming's clients.

Streaming's classes are the right ones here. Training reads its sets by them, so what alignclip
writes by them can be trained on, with the same URLs and credentials: Google's service accounts,
Azure, Azure Data Lake, OCI, Hugging Face, DBFS, Alipan, SFTP. The packages of fsspec for
these stores would be further dependencies, and s3fs holds botocore back. S3 has a client
of its own, because Streaming's asks for the bucket itself, which needs the right to list.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from alignclip.errors import UserError, nearest
from alignclip.storage.endpoint import expect_plain_s3, in_profile
from alignclip.storage.store import Folder, Store
from alignclip.storage.temporary import make_temporary_folder
from alignclip.storage.trouble import is_absent, is_denied
from alignclip.storage.words import StorageError

# boto3 and Streaming are imported where they are used: that takes seconds, and a mistyped command
# should not.

READ_TIMEOUT = 60.0  # seconds without a byte
SECONDS_TO_CONNECT = 10.0  # seconds
TRIES = 3  # of a request by boto3 itself, unless AWS_MAX_ATTEMPTS says otherwise
# Files from this size on come in parts side by side. A shard comes in one piece: the threads of
# its parts would take Python's interpreter from a worker that decodes.
IN_PARTS = 256 * 2**20  # bytes
# Variables that a client is made from
CLIENT_VARIABLES = re.compile(r"AWS_|S3_|GCS_|BOTO|HOME$|.*_PROXY$|.*_CA_BUNDLE$", re.IGNORECASE)
MACHINE = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
BUCKET_PROBE = f".alignclip-probe-{MACHINE}"


def open_store(place: str) -> Store:
    """Open the folder or URL ``place``; nothing is asked of it yet."""
    if "://" not in place:
        return Folder(place)
    scheme = urlparse(place).scheme
    google_by_s3 = scheme == "gs" and {"GCS_KEY", "GCS_SECRET"} <= os.environ.keys()
    return S3(place) if scheme == "s3" or google_by_s3 else Streamed(place)


def check_scheme(place: str) -> None:
    """Refuse a URL of an unknown storage.

    Raises:
        ValueError: names the scheme, and the one that may be meant.
    """
    scheme = urlparse(place).scheme
    if scheme == "s3":
        return
    from streaming.base.storage.download import DOWNLOADER_MAPPINGS

    known = {*filter(None, DOWNLOADER_MAPPINGS)}  # without a scheme, Streaming copies a local file
    if scheme not in known:
        hint = nearest(scheme, known)
        raise ValueError(f"no storage is known as '{scheme}'; {hint}")


def open_file(place: str) -> tuple[Store, str]:
    """Open the store that the file at a path or URL lies in; give also the file's name there."""
    if "://" in place:
        folder, _, name = place.rpartition("/")
        return open_store(folder), name
    path = Path(place).expanduser()
    return Folder(str(path.parent)), path.name


def read_text(place: str) -> str:
    """Read a small text file at a path or URL.

    Raises:
        UserError: the file isn't there, can't be read, or is no text.
    """
    store, name = open_file(place)
    return store.read_text(name)


class Bucket(Store):
    """The objects below a URL of an object store."""

    is_remote = True

    def check_writable(self) -> None:
        """See :class:`Store`."""
        self.write_text(
            BUCKET_PROBE, "written to see whether the key may write; it can be removed\n"
        )
        try:
            self.read_bytes(BUCKET_PROBE)
        except StorageError as error:
            if not is_absent(error):  # another process has removed it
                # the file was just written: that it isn't there is no reason
                denied = "access denied: the key may write, and may not read (s3:GetObject)"
                why = denied if is_denied(error) else error.why
                raise StorageError("read", self.place, why) from error
        finally:
            with suppress(UserError):  # the right to delete is only needed to remove old files
                self.delete(BUCKET_PROBE)


class S3(Bucket):
    """Amazon's S3 and what resembles it, Google's S3 interface among them."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        parts = urlparse(url)
        self.bucket, path = parts.netloc, parts.path.strip("/")
        self.is_google = parts.scheme == "gs"
        self.prefix = f"{path}/" if path else ""
        expect_plain_s3()

    def _get(self, name: str, path: Path) -> None:
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import ClientError

        whole = TransferConfig(multipart_threshold=IN_PARTS, num_download_attempts=2)
        # as Streaming reads it
        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(",")
        pays = self.bucket in [payer.strip() for payer in payers]
        more = {"RequestPayer": "requester"} if pays else {}
        try:
            self._client.download_file(
                self.bucket, self.prefix + name, str(path), ExtraArgs=more, Config=whole
            )
        except ClientError as error:
            raise self._in_its_words(error, name) from error

    def _put(self, path: Path, name: str) -> None:
        more = {"ACL": os.environ["S3_CANNED_ACL"]} if "S3_CANNED_ACL" in os.environ else {}
        self._client.upload_file(str(path), self.bucket, self.prefix + name, ExtraArgs=more)

    def _names(self) -> Iterator[str]:
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(self.prefix)

    def _size(self, name: str) -> int | None:
        from botocore.exceptions import ClientError

        try:
            head = self._client.head_object(Bucket=self.bucket, Key=self.prefix + name)
        except ClientError as error:
            raise self._in_its_words(error, name) from error
        return int(head["ContentLength"])

    def _delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    @property
    def _client(self) -> Any:
        # by names, because other threads change the environment while an upload goes on beside them
        names = [name for name in os.environ if CLIENT_VARIABLES.match(name)]
        settings = frozenset((name, os.environ.get(name, "")) for name in names)
        return _s3_client(self.is_google, settings, _state_of_settings())

    def _in_its_words(self, error: Any, name: str) -> Exception:
        """Ask for the store's own word: HEAD, with which downloads begin, is answered without."""
        from botocore.exceptions import ClientError

        if str(error.response.get("Error", {}).get("Code")).isdecimal():
            try:
                self._client.get_object(
                    Bucket=self.bucket, Key=self.prefix + name, Range="bytes=0-0"
                )
            except ClientError as better:
                return better
            except Exception:  # no answer to this question: the first answer counts
                return error
        return error


@lru_cache(4)
def _s3_client(
    is_google: bool,
    environment: frozenset[tuple[str, str]],
    files: tuple[tuple[int, int] | None, ...],
) -> Any:
    """Make the client that all stores of this process share: making one takes a third of a second.

    Args:
        is_google: whether it is for Google's S3 interface.
        environment: of the process. Endpoint, keys, proxies and number of tries come from there.
        files: the state of AWS's own files. A client would keep keys that are replaced there.

    Raises:
        NoCredentialsError: there are no keys yet. A client that has none would never find any.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import NoCredentialsError

    settings = dict(environment)
    where = {"endpoint_url": settings.get("S3_ENDPOINT_URL")}
    if is_google:
        where = {
            "region_name": "auto",
            "endpoint_url": "https://storage.googleapis.com",
            "aws_access_key_id": settings["GCS_KEY"],
            "aws_secret_access_key": settings["GCS_SECRET"],
        }
    session = boto3.Session()
    if not is_google and session.get_credentials() is None:
        raise NoCredentialsError
    patience: dict[str, Any] = {"connect_timeout": SECONDS_TO_CONNECT, "read_timeout": READ_TIMEOUT}
    if "AWS_MAX_ATTEMPTS" not in settings and not in_profile("max_attempts"):
        patience["retries"] = {"total_max_attempts": TRIES}
    return session.client("s3", config=Config(**patience), **where)


def _state_of_settings() -> tuple[tuple[int, int] | None, ...]:
    """Return when AWS's files of keys and settings were written, and their sizes."""
    states: list[tuple[int, int] | None] = []
    for name, usual in (
        ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"),
        ("AWS_CONFIG_FILE", "~/.aws/config"),
    ):
        try:
            stat = Path(os.environ.get(name) or usual).expanduser().stat()
        except (OSError, RuntimeError):  # no such file; no home
            states.append(None)
        else:
            states.append((stat.st_mtime_ns, stat.st_size))
    return tuple(states)


@lru_cache(4)
def _downloader(place: str) -> Any:
    """Make Streaming's downloader that all stores of a place in this process share."""
    from streaming.base.storage import CloudDownloader

    return CloudDownloader.get(place)


def _forget_clients() -> None:
    """Leave the parent's connections to the parent."""
    _s3_client.cache_clear()
    _downloader.cache_clear()


os.register_at_fork(after_in_child=_forget_clients)


class Streamed(Bucket):
    """Every other store, by Streaming's downloaders and uploaders."""

    @property
    def can_list(self) -> bool:
        """See :class:`Store`; Streaming can't list Azure."""
        from streaming.base.storage import CloudUploader

        with self._told("list"):
            return type(self._uploader).list_objects is not CloudUploader.list_objects

    def _get(self, name: str, path: Path) -> None:
        check_scheme(self.place)
        try:
            _downloader(self.place).download(self.at(name), str(path), READ_TIMEOUT)
        except BaseException:
            _downloader.cache_clear()  # a new one may have new keys, or another connection
            raise

    def _put(self, path: Path, name: str) -> None:
        uploader = self._uploader
        staged = Path(uploader.local, name)  # Streaming uploads what lies below a folder of its own
        staged.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, staged)
        try:
            uploader.upload_file(name)
        finally:
            staged.unlink(missing_ok=True)

    def _names(self) -> Iterator[str]:
        prefix = urlparse(self.place).path.strip("/")
        for key in self._uploader.list_objects() or ():
            yield key[len(prefix) :].lstrip("/")

    def _size(self, name: str) -> int | None:
        """Streaming doesn't ask."""
        return None

    def _delete(self, name: str) -> None:
        """Streaming's client of Google can, others can't."""
        client = getattr(self._uploader, "gcs_client", None)
        if client is None:
            raise NotImplementedError("Streaming can't delete in this kind of store")
        parts = urlparse(self.at(name))
        blob = client.bucket(parts.netloc).blob(parts.path.lstrip("/"))
        if blob.exists():
            blob.delete()

    @cached_property
    def _uploader(self) -> Any:
        expect_plain_s3()
        from streaming.base.storage import CloudUploader
        from streaming.base.storage.upload import UPLOADERS

        if urlparse(self.place).scheme not in UPLOADERS:
            schemes = ", ".join(f"{name}://" for name in UPLOADERS if name and ":" not in name)
            raise UserError(
                f"cannot write to '{self.place}': Streaming knows {schemes} and local folders"
            )
        folder = make_temporary_folder()
        weakref.finalize(self, folder.cleanup)
        # patiently waits longer
        return CloudUploader.get((folder.name, self.place), keep_local=True, retry=1)
