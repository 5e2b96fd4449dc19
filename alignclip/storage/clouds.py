"""What stores offer, each by its own library: download, upload, list, delete. Exceptions are the libraries' own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from alignclip.errors import UserError, nearest
from alignclip.storage.endpoint import expect_plain_s3

# boto3 and Streaming are imported where they are used: that takes seconds, and a mistyped command should not.

READ_TIMEOUT = 60.0  # seconds without a byte


class Cloud(Protocol):
    """The objects below one URL, by their names relative to the URL."""

    @property
    def can_list(self) -> bool:
        """Whether this kind of store can be listed."""

    @property
    def can_delete(self) -> bool:
        """Whether this kind of store can delete."""

    def download(self, name: str, path: Path) -> None:
        """Write an object to a file that doesn't exist yet."""

    def upload(self, path: Path, name: str) -> None:
        """Write a file as an object, which appears complete or not at all."""

    def names(self) -> Iterator[str]:
        """Every object below the URL."""

    def size(self, name: str) -> int | None:
        """Return the bytes of an object; None where the library doesn't tell."""

    def delete(self, name: str) -> None:
        """Remove an object; one that isn't there is no error."""


def cloud_at(url: str) -> Cloud:
    """The store that a URL belongs to; nothing is asked of the store yet.

    Raises:
        UserError: nobody knows the scheme.
    """
    scheme = urlparse(url).scheme
    if scheme == "s3" or (
        scheme == "gs" and "GCS_KEY" in os.environ and "GCS_SECRET" in os.environ
    ):
        return S3(url)
    return Streamed(url)


class S3:
    """Amazon's S3 and what resembles it, Google's S3 interface among them.

    Unlike Streaming's clients it asks nothing of the bucket itself, which needs the right to list; and it
    asks for the store's own word where a refusal came without one.
    """

    can_list = can_delete = True

    def __init__(self, url: str) -> None:
        parts = urlparse(url)
        self.scheme, self.bucket = parts.scheme, parts.netloc
        self.prefix = f"{parts.path.strip('/')}/" if parts.path.strip("/") else ""
        self._made: tuple[int, Any] | None = None

    def download(self, name: str, path: Path) -> None:
        """See :class:`Cloud`."""
        from botocore.exceptions import ClientError

        payers = os.environ.get("MOSAICML_STREAMING_AWS_REQUESTER_PAYS", "").split(
            ","
        )  # as Streaming reads it
        more = (
            {"RequestPayer": "requester"}
            if self.bucket in [payer.strip() for payer in payers]
            else {}
        )
        try:
            self._client.download_file(self.bucket, self.prefix + name, str(path), ExtraArgs=more)
        except ClientError as error:
            raise self._in_its_words(error, name) from error

    def upload(self, path: Path, name: str) -> None:
        """See :class:`Cloud`."""
        more = {"ACL": os.environ["S3_CANNED_ACL"]} if "S3_CANNED_ACL" in os.environ else {}
        self._client.upload_file(str(path), self.bucket, self.prefix + name, ExtraArgs=more)

    def names(self) -> Iterator[str]:
        """See :class:`Cloud`."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix
        )
        for page in pages:
            for entry in page.get("Contents", ()):
                yield entry["Key"].removeprefix(self.prefix)

    def size(self, name: str) -> int | None:
        """See :class:`Cloud`."""
        from botocore.exceptions import ClientError

        try:
            return int(
                self._client.head_object(Bucket=self.bucket, Key=self.prefix + name)[
                    "ContentLength"
                ]
            )
        except ClientError as error:
            raise self._in_its_words(error, name) from error

    def delete(self, name: str) -> None:
        """See :class:`Cloud`."""
        self._client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    @property
    def _client(self) -> Any:
        """A client of this process's own: a forked process must not use its parent's connections."""
        if self._made is None or self._made[0] != os.getpid():
            self._made = (os.getpid(), self._make_client())
        return self._made[1]

    def _make_client(self) -> Any:
        expect_plain_s3()
        import boto3
        from botocore.config import Config

        keys: dict[str, str] = {}
        where: dict[str, str | None] = {"endpoint_url": os.environ.get("S3_ENDPOINT_URL")}
        if self.scheme == "gs":
            keys = {
                "aws_access_key_id": os.environ["GCS_KEY"],
                "aws_secret_access_key": os.environ["GCS_SECRET"],
            }
            where = {"region_name": "auto", "endpoint_url": "https://storage.googleapis.com"}
        return boto3.Session().client(
            "s3", config=Config(read_timeout=READ_TIMEOUT), **where, **keys
        )

    def _in_its_words(self, error: Any, name: str) -> Exception:
        """The store's own word for a refusal: a HEAD request, with which downloads begin, is answered without one."""
        from botocore.exceptions import ClientError

        if not str(error.response.get("Error", {}).get("Code")).isdecimal():
            return error
        try:
            self._client.get_object(Bucket=self.bucket, Key=self.prefix + name, Range="bytes=0-0")
        except ClientError as better:
            return better
        except Exception:
            return error
        return error


class Streamed:
    """Every other store, by Streaming's downloaders and uploaders."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder: str | None = None
        self._uploader: Any = None

    @property
    def can_list(self) -> bool:
        """Whether Streaming can list this kind of store; Azure it can't."""
        from streaming.base.storage import CloudUploader

        return type(self._upload_client()).list_objects is not CloudUploader.list_objects

    @property
    def can_delete(self) -> bool:
        """Whether Streaming's client can delete; Google's can."""
        return getattr(self._upload_client(), "gcs_client", None) is not None

    def download(self, name: str, path: Path) -> None:
        """See :class:`Cloud`."""
        from streaming.base.storage import CloudDownloader
        from streaming.base.storage.download import DOWNLOADER_MAPPINGS

        scheme = urlparse(self.url).scheme
        if scheme not in DOWNLOADER_MAPPINGS:
            hint = nearest(scheme, filter(None, DOWNLOADER_MAPPINGS))
            raise ValueError(f"no storage is known as '{scheme}'; {hint}")
        CloudDownloader.direct_download(f"{self.url}/{name}", str(path), READ_TIMEOUT)

    def upload(self, path: Path, name: str) -> None:
        """See :class:`Cloud`."""
        client = self._upload_client()
        staged = Path(client.local, name)  # Streaming uploads what lies below a folder of its own
        staged.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.hardlink_to(path)
        except OSError:
            shutil.copyfile(path, staged)
        try:
            client.upload_file(name)
        finally:
            staged.unlink(missing_ok=True)

    def names(self) -> Iterator[str]:
        """See :class:`Cloud`."""
        prefix = urlparse(self.url).path.strip("/")
        for key in self._upload_client().list_objects() or ():
            yield key[len(prefix) :].lstrip("/")

    def size(self, name: str) -> int | None:
        """See :class:`Cloud`; Streaming doesn't ask."""
        return None

    def delete(self, name: str) -> None:
        """See :class:`Cloud`."""
        parts = urlparse(f"{self.url}/{name}")
        blob = self._upload_client().gcs_client.bucket(parts.netloc).blob(parts.path.lstrip("/"))
        if blob.exists():
            blob.delete()

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_folder": None, "_uploader": None}

    def __del__(self) -> None:
        if getattr(self, "_folder", None):
            shutil.rmtree(str(self._folder), ignore_errors=True)

    def _upload_client(self) -> Any:
        if self._uploader is None:
            expect_plain_s3()
            from streaming.base.storage import CloudUploader
            from streaming.base.storage.upload import UPLOADERS

            scheme = urlparse(self.url).scheme
            if scheme not in UPLOADERS:
                schemes = ", ".join(f"{name}://" for name in UPLOADERS if name and ":" not in name)
                raise UserError(
                    f"cannot write to '{self.url}': Streaming knows {schemes} and local folders"
                )
            self._folder = tempfile.mkdtemp(prefix="alignclip-upload-")
            self._uploader = CloudUploader.get(
                (self._folder, self.url), keep_local=True, retry=1
            )  # we wait longer
        return self._uploader
