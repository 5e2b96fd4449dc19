"""An S3 server in memory that refuses what a test tells it to refuse: a right, a quota, an expired
key.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from s3 import client_environment, point_at

Refusal = tuple[int, str] | None


class Request(BaseHTTPRequestHandler):
    """One request.

    Attributes:
        right: "list", "read", "write" or "delete": what the request needs.
        key: the object's.
        found: whether there is such an object.
        content: what is sent to the store.
    """

    protocol_version = "HTTP/1.1"
    server: RefusingS3

    def log_message(self, *_: Any) -> None:
        pass

    def handle_any(self) -> None:
        url = urlparse(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        self.bucket, _, self.key = unquote(url.path).lstrip("/").partition("/")
        self.content = self._read()
        self.found = (self.bucket, self.key) in self.server.objects
        rights = {"PUT": "write", "POST": "write", "DELETE": "delete"}
        self.right = rights.get(self.command, "read" if self.key else "list")
        self.server.requests.append((self.command, self.key))
        if refusal := self.server.refuse(self):
            self._error(*refusal)
        elif self.command == "POST" or "uploadId" in query:
            self._multipart(query)
        elif self.command == "PUT":
            self.server.objects[self.bucket, self.key] = self.content
            self._answer(200, headers={"ETag": '"x"'})
        elif self.command == "DELETE":
            self.server.objects.pop((self.bucket, self.key), None)
            self._answer(204)
        elif not self.key:
            self._list(query.get("prefix", [""])[0])
        elif self.found:
            self._give(self.server.objects[self.bucket, self.key])
        else:
            self._error(404, "NoSuchKey")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _read(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in (self.headers.get("Content-Encoding") or ""):
            return data
        plain = b""
        while data:
            size, _, data = data.partition(b"\r\n")
            if not (count := int(size.split(b";")[0], 16)):
                break
            plain, data = plain + data[:count], data[count + 2 :]
        return plain

    def _answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(
            status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        )

    def _give(self, data: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.md5(data).hexdigest()}"',
            "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
        }
        if self.command == "HEAD":
            self._answer(200, headers={**headers, "Content-Length": str(len(data))})
        elif span := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], headers)
        else:
            self._answer(200, data, headers)

    def _list(self, prefix: str) -> None:
        there = list(self.server.objects)  # other threads add to them
        every = sorted(key for bucket, key in there if bucket == self.bucket)
        keys = [key for key in every if key.startswith(prefix)]
        rows = "".join(f"<Contents><Key>{key}</Key><Size>1</Size></Contents>" for key in keys)
        count = f"<IsTruncated>false</IsTruncated><KeyCount>{len(keys)}</KeyCount>"
        self._answer(200, f"<ListBucketResult>{count}{rows}</ListBucketResult>".encode())

    def _multipart(self, query: dict[str, list[str]]) -> None:
        parts = self.server.parts
        if "uploads" in query:
            upload = uuid.uuid4().hex
            parts[upload] = {}
            kind = "InitiateMultipartUploadResult"
            self._answer(200, f"<{kind}><UploadId>{upload}</UploadId></{kind}>".encode())
        elif self.command == "PUT":
            parts[query["uploadId"][0]][int(query["partNumber"][0])] = self.content
            self._answer(200, headers={"ETag": '"x"'})
        elif self.command == "DELETE":  # the client gives up
            parts.pop(query["uploadId"][0])
            self._answer(204)
        else:
            done = parts.pop(query["uploadId"][0])
            self.server.objects[self.bucket, self.key] = b"".join(done[n] for n in sorted(done))
            body = "<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
            self._answer(200, body.encode())


class RefusingS3(ThreadingHTTPServer):
    """The server.

    Attributes:
        objects: (bucket, key) → content.
        requests: (method, key), in the order of their arrival.
        refuse: gives the status and the code of a refusal, or None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.objects: dict[tuple[str, str], bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: Callable[[Request], Refusal] = lambda request: None

    def handle_error(self, *_: Any) -> None:
        """A client that leaves early is no trouble."""

    def keys(self, prefix: str = "") -> list[str]:
        return sorted(key for _, key in list(self.objects) if key.startswith(prefix))

    def without_right(self, *rights: str) -> None:
        """Have the key lack these rights.

        Without the right to list, what isn't there is refused, too.
        """

        def refuse(request: Request) -> Refusal:
            absent = "list" in rights and request.right == "read" and not request.found
            return (403, "AccessDenied") if request.right in rights or absent else None

        self.refuse = refuse

    def answer(self, status: int, code: str, *rights: str) -> None:
        """Answer every request for these rights like this, or every request at all."""
        self.refuse = lambda request: (
            (status, code) if not rights or request.right in rights else None
        )

    def answer_in_turn(
        self, answers: Iterable[Refusal], applies: Callable[[Request], bool] = lambda _: True
    ) -> None:
        """Give one answer after the other to the requests that it applies to, and then serve."""
        left = iter(answers)
        self.refuse = lambda request: next(left, None) if applies(request) else None

    def refuse_checksums(self) -> None:
        """Answer as a store that doesn't know the checksums of newer boto3."""

        def refuse(request: Request) -> Refusal:
            sent = any(name.lower().startswith("x-amz-checksum-") for name in request.headers)
            return (501, "NotImplemented") if sent else None

        self.refuse = refuse

    @property
    def env(self) -> dict[str, str]:
        return {**client_environment(self.server_address[1]), "AWS_MAX_ATTEMPTS": "1"}


@contextmanager
def refusing_s3() -> Iterator[RefusingS3]:
    """A running server that the environment points at."""
    with RefusingS3() as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for name in ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"):
            patch.setenv(name, "")  # so that what a test's code sets is taken back
            patch.delenv(name)
        point_at(server, patch)
        yield server
        server.shutdown()
