"""Storage: what passes and what doesn't, in words; one store for folders and URLs.

Whole files only.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import socket
import ssl
import time
import urllib.error
from collections.abc import Callable
from functools import lru_cache
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path
from typing import Any

import azure.core.exceptions as azure
import botocore.exceptions as boto
import google.api_core.exceptions as google
import oci.exceptions as oci
import pytest
import requests
import torch
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore.exceptions import ClientError
from composer.utils import ObjectStoreTransientError
from google.auth.exceptions import DefaultCredentialsError, TransportError
from refusing import RefusingS3
from streaming.base.storage import CloudUploader, LocalUploader

from alignclip.errors import UserError
from alignclip.storage import (
    StorageError,
    describe_storage_error,
    expect_plain_s3,
    is_about_name,
    is_denied,
    is_passing,
    open_store,
    patiently,
    write_text_whole,
    write_whole,
)
from alignclip.storage.clouds import S3

OPERATIONS = {
    "list": "ListObjectsV2",
    "read": "GetObject",
    "write": "PutObject",
    "delete": "DeleteObject",
}
CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"
PUT_FAILED = "An error occurred ({}) when calling the PutObject operation"


def answer(text: str, right: str = "write") -> ClientError:
    """Make S3's answer, as botocore raises it, of a status and a code."""
    status, _, code = text.partition(" ")
    response: Any = {
        "Error": {"Code": code or status},
        "ResponseMetadata": {"HTTPStatusCode": int(status)},
    }
    return ClientError(response, OPERATIONS[right])


def test_a_refusal_without_a_code_is_one() -> None:
    response: Any = {"Error": {"Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    assert is_denied(ClientError(response, "GetObject"))


def raised_from(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def http_error(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://x/a", status, "no", {}, None)  # type: ignore[arg-type]


def google_error(kind: type[Exception], reason: str) -> Exception:
    return kind("no", errors=[{"reason": reason}])


def azure_error(status: int, code: str) -> Exception:
    error = azure.HttpResponseError("no")
    error.status_code, error.error_code = status, code  # type: ignore[attr-defined]
    return error


def system_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


# S3's answers by status and code, and the other libraries' exceptions
PASSING_ANSWERS = (
    "408", "425", "429", "500", "502", "503", "504", "509",
    "400 RequestTimeout", "400 IncompleteBody", "400 BadDigest", "400 ThrottlingException",
    "403 SlowDown", "403 RequestLimitExceeded", "403 BandwidthLimitExceeded",
    "503 SlowDown", "409 OperationAborted", "503 None",
)  # fmt: skip
PASSING = [
    *map(answer, PASSING_ANSWERS),
    raised_from(
        StorageError("write", "s3://b/a", PUT_FAILED.format("None") + ": None"),
        answer("503 None"),
    ),
    raised_from(S3UploadFailedError(PUT_FAILED.format("Odd")), answer("503 Odd")),
    raised_from(S3UploadFailedError("no"), answer("503 SlowDown")),
    RetriesExceededError(boto.ReadTimeoutError(endpoint_url="http://x")),
    boto.EndpointConnectionError(endpoint_url="http://x"),
    boto.ConnectTimeoutError(endpoint_url="http://x"),
    boto.ConnectionClosedError(endpoint_url="http://x"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    boto.ResponseStreamingError(error="broken"),
    boto.SSLError(endpoint_url="https://x", error="EOF occurred in violation of protocol"),
    *map(system_error, ("ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ESTALE")),
    BrokenPipeError(),
    TimeoutError(),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    urllib.error.URLError(ssl.SSLEOFError(8, "EOF occurred")),
    http_error(503),
    ssl.SSLError(1, "record layer failure"),
    IncompleteRead(b"half"),
    RemoteDisconnected("closed"),
    requests.exceptions.ConnectionError("no"),
    requests.exceptions.ChunkedEncodingError("broken"),
    google.ServiceUnavailable("no"),
    google.TooManyRequests("no"),
    google_error(google.Forbidden, "rateLimitExceeded"),
    TransportError("no"),
    azure_error(503, "ServerBusy"),
    azure.ServiceRequestError("no"),
    azure.IncompleteReadError("no"),
    oci.ServiceError(429, "TooManyRequests", {}, "no"),
    oci.RequestException("no"),
    ObjectStoreTransientError("no"),
]
FOR_GOOD_ANSWERS = (
    "400", "401", "403", "404", "405", "409", "411", "412", "416", "501", "505", "507",
    "400 InvalidArgument", "400 ExpiredToken", "400 InvalidToken", "400 EntityTooLarge",
    "400 XMinioAdminBucketQuotaExceeded", "403 AccessDenied", "403 RequestTimeTooSkewed",
    "403 ExpiredToken", "403 QuotaExceeded", "403 InvalidAccessKeyId", "403 SignatureDoesNotMatch",
    "403 AllAccessDisabled", "404 NoSuchKey", "404 NoSuchBucket", "412 PreconditionFailed",
    "503 XMinioStorageFull", "501 NotImplemented",
)  # fmt: skip
FOR_GOOD = [
    *map(answer, FOR_GOOD_ANSWERS),
    raised_from(ObjectStoreTransientError("no"), answer("501 NotImplemented")),
    raised_from(FileNotFoundError("Object s3://b/k not found"), answer("403 403")),
    S3UploadFailedError(PUT_FAILED.format("AccessDenied") + ": Access Denied"),
    RetriesExceededError(answer("403")),
    boto.NoCredentialsError(),
    raised_from(boto.NoCredentialsError(), ConnectionRefusedError()),
    boto.PartialCredentialsError(provider="env", cred_var="aws_secret_access_key"),
    boto.UnauthorizedSSOTokenError(),
    boto.ParamValidationError(report="no"),
    boto.SSLError(endpoint_url="https://x", error="[SSL: CERTIFICATE_VERIFY_FAILED] …"),
    urllib.error.URLError(ssl.SSLCertVerificationError(1, "certificate verify failed")),
    http_error(404),
    *map(system_error, ("ENOENT", "EACCES", "EEXIST", "ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO")),
    raised_from(requests.exceptions.ConnectionError("no"), system_error("ENOSPC")),
    google.Forbidden("no"),
    google.NotFound("no"),
    google_error(google.Forbidden, "quotaExceeded"),
    DefaultCredentialsError("no"),
    azure_error(403, "AuthorizationPermissionMismatch"),
    azure.ResourceNotFoundError("no"),
    azure.ClientAuthenticationError("no"),
    oci.ServiceError(404, "NotAuthorizedOrNotFound", {}, "no"),
    oci.ServiceError(400, "QuotaExceeded", {}, "no"),
    ValueError("no"),
    TypeError("no"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", [*PASSING, *FOR_GOOD], ids=repr)
def test_which_errors_pass(error: BaseException) -> None:
    assert is_passing(error) is (error in PASSING)


# S3's answers by status and code, each to a request that needs the last word's right -> what is
# said
SAID = {
    "403 AccessDenied list": "may not list (s3:ListBucket)",
    "403 AccessDenied write": "may not write (s3:PutObject)",
    "403 AccessDenied delete": "may not delete (s3:DeleteObject)",
    "403 AccessDenied read": "may not read it (s3:GetObject), or it isn't there",
    "403 403 read": "or it isn't there and the key may not list (s3:ListBucket)",
    "400 ExpiredToken write": "the key has expired",
    "403 RequestTimeTooSkewed write": "clock",
    "403 InvalidAccessKeyId write": "AWS_ACCESS_KEY_ID",
    "403 SignatureDoesNotMatch write": "AWS_SECRET_ACCESS_KEY",
    "400 InvalidToken write": "AWS_SESSION_TOKEN",
    "401 401 write": "doesn't accept these credentials",
    "404 NoSuchBucket write": "no such bucket",
    "404 NoSuchKey read": "not found",
    "403 QuotaExceeded write": "quota is used up (QuotaExceeded)",
    "507 InsufficientStorage write": "quota is used up",
    "501 NotImplemented write": f"set {CHECKSUMS}=when_required",
    "411 MissingContentLength write": f"set {CHECKSUMS}=when_required",
    "503 SlowDown write": "the store is busy or in trouble (SlowDown)",
}


@pytest.mark.parametrize("status", [403, 404, 410, 414, 451])
def test_an_answer_about_one_name_is_none_about_the_store(status: int) -> None:
    assert is_about_name(http_error(status))


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_an_answer_about_the_store(status: int) -> None:
    assert not is_about_name(http_error(status))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        *((answer(*text.rsplit(" ", 1)), words) for text, words in SAID.items()),
        (S3UploadFailedError(PUT_FAILED.format("AccessDenied")), "may not write"),
        (google.Forbidden("x does not have storage.objects.list access"), "may not list"),
        (azure_error(403, "AuthorizationPermissionMismatch"), "access denied"),
        (boto.NoCredentialsError(), "no credentials found"),
        (system_error("EACCES"), "Permission denied"),
    ],
    ids=repr,
)
def test_each_answer_in_words(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CHECKSUMS, raising=False)
    said = describe_storage_error(error)
    assert words in said
    assert "\n" not in said
    monkeypatch.setenv(CHECKSUMS, "when_required")  # a store is not blamed on them any more
    assert CHECKSUMS not in describe_storage_error(error) or "SECRET" in words


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, refusing: RefusingS3, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else "s3://b/some/store"


@pytest.mark.slow
def test_a_store(place: str, tmp_path: Path) -> None:
    store = open_store(place)
    assert store.names() == set()
    assert store.read_optional("a.txt") is None
    with pytest.raises(
        StorageError, match=rf"^can't read {place}/a\.txt: (not found|No such file)"
    ):
        store.read_bytes("a.txt")
    store.check_writable()
    assert store.names() == set()
    store.write_text("a.txt", "ä")
    source = tmp_path / "source"
    source.write_bytes(b"1" * 9_000_000)  # in several parts
    store.put(source, "sub/b.bin")
    assert store.read_text("a.txt") == store.read_text_optional("a.txt") == "ä"
    assert store.names() == {"a.txt", "sub/b.bin"}
    store.download("sub/b.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    store.put(_binary(tmp_path), "b2.bin")
    with pytest.raises(UserError, match=r"b2\.bin is no text file"):
        store.read_text("b2.bin")
    store.delete("a.txt")
    store.delete("a.txt")
    assert store.names() == {"sub/b.bin", "b2.bin"}
    assert store.read_text_optional("a.txt") is None
    again: StorageError = pickle.loads(pickle.dumps(StorageError("read", "a", "why")))
    assert str(again) == "can't read a: why"


@pytest.mark.slow
def test_stores_share_a_client_that_no_forked_process_inherits(
    refusing: RefusingS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (open_store(f"s3://{name}/runs") for name in ("a", "b"))
    assert isinstance(one, S3)
    assert isinstance(two, S3)
    one.write_text("x", "parent")
    client = one._client
    assert two._client is client

    def act() -> None:
        assert one._client is not client
        assert one._client is two._client
        for _ in range(20):
            assert one.read_text("x") == "parent"

    child = multiprocessing.get_context("fork").Process(target=act)
    child.start()
    for _ in range(20):
        assert one.read_text("x") == "parent"
    child.join(60)
    assert child.exitcode == 0
    assert one._client is client
    monkeypatch.setenv("WANDB_MODE", "offline")  # a variable that is no setting of a client
    assert one._client is client
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")  # a notebook's user mends the key
    assert one._client is not client


def _binary(folder: Path) -> Path:
    path = folder / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    return path


@pytest.mark.parametrize("right", OPERATIONS)
def test_each_missing_right_is_named(refusing: RefusingS3, right: str) -> None:
    store = open_store("s3://b/runs")
    store.write_text("here", "x")
    refusing.without_right(right)
    actions = {
        "list": store.names,
        "read": lambda: store.read_text("here"),
        "write": lambda: store.write_text("there", "x"),
        "delete": lambda: store.delete("here"),
    }
    name = OPERATIONS[right].removesuffix("ObjectsV2")
    with pytest.raises(StorageError, match=rf"^can't {right} s3://b/runs.*: access denied.*{name}"):
        actions.pop(right)()
    for other in actions.keys() - {"delete"}:
        actions[other]()
    if right == "list":
        assert store.read_optional("not there") is None
        with pytest.raises(StorageError, match=r"or it isn't there and the key may not list"):
            store.read_text("not there")
    if right in ("read", "write"):
        with pytest.raises(StorageError, match=rf"^can't {right} s3://b/runs.*may"):
            store.check_writable()
    else:
        store.check_writable()


@pytest.mark.slow
def test_only_a_passing_refusal_is_tried_again(
    refusing: RefusingS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignclip.storage.patience.FIRST_PAUSE", 0.01)
    store = open_store("s3://b/runs")
    refusing.answer(403, "QuotaExceeded")
    with pytest.raises(StorageError, match="quota"):
        patiently(lambda: store.write_text("a", "x"), store.place)
    assert refusing.requests.count(("PUT", "runs/a")) == 1
    refusing.answer_in_turn([(503, "SlowDown"), (500, "InternalError")])
    patiently(lambda: store.write_text("a", "x"), store.place)
    assert refusing.keys() == ["runs/a"]


def test_other_stores_get_no_checksums_unless_a_person_says_so(refusing: RefusingS3) -> None:
    refusing.refuse_checksums()
    open_store("s3://b/runs").write_text("a", "x")
    assert os.environ[CHECKSUMS] == "when_required"
    assert os.environ["AWS_RESPONSE_CHECKSUM_VALIDATION"] == "when_required"
    os.environ[CHECKSUMS] = "when_supported"
    with pytest.raises(StorageError, match=rf"set {CHECKSUMS}=when_required$"):
        open_store("s3://b/runs").write_text("a", "x")
    assert os.environ[CHECKSUMS] == "when_supported"


def test_keys_that_come_or_change_in_a_file_are_found(
    refusing: RefusingS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A login replaces the file while a conversion runs, or after a notebook has lacked keys."""
    keys = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    used: list[str] = []

    def note(request: Any) -> None:
        used.append(request.headers["Authorization"].partition("Credential=")[2].split("/")[0])

    refusing.refuse = note
    store = open_store("s3://b/runs")
    with pytest.raises(StorageError, match="no credentials found"):
        store.write_text("a", "x")
    for key in ("FIRST", "SECOND"):
        keys.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key=s\n")
        store.write_text("a", "x")
    assert used == ["FIRST", "SECOND"]


def test_an_endpoint_that_is_no_url_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://[::1")
    with pytest.raises(StorageError, match=r"^can't read s3://b/runs/a: Invalid IPv6 URL$"):
        open_store("s3://b/runs").read_text("a")


@pytest.mark.parametrize("endpoint", ["", "https://s3.eu-central-1.amazonaws.com"])
def test_amazon_itself_gets_what_boto3_sends(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", CHECKSUMS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("S3_ENDPOINT_URL", endpoint)
    expect_plain_s3()
    assert CHECKSUMS not in os.environ


def test_kinds_of_store_that_streaming_reaches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another store is read, written and listed by Streaming's clients, which are folders here."""

    class Uploader(LocalUploader):
        def __init__(self, out: tuple[str, str], *settings: Any) -> None:
            super().__init__((out[0], str(tmp_path / out[1].partition("://")[2])), *settings)

        def list_objects(self, prefix: str | None = None) -> list[str]:
            files = (path for path in Path(self.remote).rglob("*") if path.is_file())
            return [f"deep/{path.relative_to(self.remote)}" for path in files]

    class Downloader:
        def download(self, remote: str, local: str, timeout: float) -> None:
            shutil.copyfile(tmp_path / remote.partition("://")[2], local)

    monkeypatch.setattr("streaming.base.storage.upload.OCIUploader", Uploader)
    made = lru_cache(lambda place: Downloader())
    monkeypatch.setattr("alignclip.storage.clouds._downloader", made)
    store = open_store("oci://bucket/deep/")
    store.check_writable()
    store.write_text("a.txt", "x")
    assert {"a.txt"} <= store.names()
    assert store.can_list
    assert store.read_text("a.txt") == "x"
    assert store.read_optional("b.txt") is None
    assert store.size("a.txt") is None
    with pytest.raises(
        StorageError, match=r"^can't delete oci://bucket/deep/a\.txt: Streaming can't"
    ):
        store.delete("a.txt")
    monkeypatch.delattr(Uploader, "list_objects")
    monkeypatch.setattr(LocalUploader, "list_objects", CloudUploader.list_objects)
    assert not open_store("oci://bucket/deep").can_list
    with pytest.raises(StorageError, match=r"no storage is known as 'ftp'; did you mean 'sftp'\?"):
        open_store("ftp://host/x").read_text("a")


@pytest.mark.parametrize("durable", [True, False])
def test_bytes_are_on_the_disk_before_the_name_and_the_name_after(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves the old file or the new one."""
    path, seen = tmp_path / "file", []

    def fsync(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append((place == tmp_path, path.exists()))
        raise OSError(errno.EINVAL, "this file system has none")

    monkeypatch.setattr(os, "fsync", fsync)
    with write_whole(path, durable=durable) as partial:
        partial.write_text("new")
    assert seen == ([(False, False), (True, True)] if durable else [])
    assert path.read_text() == "new"


@pytest.mark.parametrize("writer", ["python", "torch"])
def test_a_disk_that_fills_in_the_middle(
    tmp_path: Path, small_files: Callable[[int], None], writer: str
) -> None:
    path = tmp_path / "run" / "latest.pt"
    write_text_whole(path, "whole")
    small_files(100_000)

    def write() -> None:
        with write_whole(path) as partial:
            if writer == "torch":
                torch.save({"a": torch.zeros(100_000)}, partial)
            else:
                partial.write_bytes(b"1" * 200_000)

    with pytest.raises(
        StorageError, match=rf"^can't write {path}: (no space left|File too large).*needed$"
    ):
        write()
    assert path.read_text() == "whole"
    assert [one.name for one in path.parent.iterdir()] == ["latest.pt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_room_in_bytes(tmp_path: Path, number: int) -> None:
    path = tmp_path / "a"
    with pytest.raises(StorageError) as raised, write_whole(path, 3_200_000_000):
        raise OSError(number, os.strerror(number))
    assert str(tmp_path) in raised.value.why
    assert "3.2 GB needed" in raised.value.why
    assert (" free" in raised.value.why) is (number == errno.ENOSPC)


def test_other_errors_of_the_block_stay(tmp_path: Path) -> None:
    def write() -> None:
        with write_whole(tmp_path / "a") as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    open_store(str(tmp_path / "new" / "run")).check_writable()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match=r"can't write .*run: .*is a file, not a folder"):
        open_store(str(tmp_path / "file" / "run")).check_writable()
    with pytest.raises(StorageError, match=r"^can't write /proc/run: "):
        open_store("/proc/run").check_writable()


def test_what_a_process_has_left_that_died_while_it_tried_a_folder(tmp_path: Path) -> None:
    for name in (dead := ".alignclip-probe-dead", live := ".alignclip-probe-live"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".file.partial").write_text("x")
    os.utime(tmp_path / dead, (time.time() - 7200,) * 2)
    open_store(str(tmp_path)).check_writable()
    assert [path.name for path in tmp_path.iterdir()] == [live]
