"""Say in one line what is wrong where storage refuses, and what a person can do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError

from alignclip.errors import UserError, one_line, printable
from alignclip.storage import trouble
from alignclip.storage.trouble import Right

CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"
# What the clouds call a right
RIGHT_NAMES: dict[Right, str] = {
    "list": "s3:ListBucket",
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "delete": "s3:DeleteObject",
}
# The first that fits, by the store's code or the name of the exception's class
SENTENCES = (
    (
        trouble.NO_CREDENTIALS | {"GCS_SECRET"},
        "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or your cloud's "
        "equivalent)",
    ),
    (trouble.EXPIRED, "the key has expired; get a new one (a session token lasts for hours)"),
    (
        trouble.SKEWED_CLOCK,
        "this machine's clock and the store's differ too much; set the clock (NTP)",
    ),
    (
        trouble.WRONG_KEY,
        "access denied: the store doesn't know this key; check AWS_ACCESS_KEY_ID",
    ),
    (
        trouble.WRONG_SECRET,
        "access denied: the secret is not the one of this key; check the credentials "
        f"(AWS_SECRET_ACCESS_KEY; with Google's S3 interface also {CHECKSUMS}=when_required)",
    ),
    (
        trouble.WRONG_TOKEN,
        "access denied: the session token is not one of this store; check AWS_SESSION_TOKEN",
    ),
    (
        {"401"},
        "access denied: the store doesn't accept these credentials; check the credentials",
    ),
    (trouble.NO_BUCKET, "no such bucket"),
)


class StorageError(UserError):
    """A place that can't be read, written, listed or deleted from, and why, in one line."""

    def __init__(self, right: Right, place: str, why: str) -> None:
        # an exception is sent to another process as its arguments
        super().__init__(right, place, why)
        self.right, self.place, self.why = right, place, why

    def __str__(self) -> str:
        return printable(f"can't {self.right} {self.place}: {self.why}")


@contextmanager
def cannot(what: str) -> Iterator[None]:
    """Turn an error of storage in the block into "cannot WHAT: why".

    Args:
        what: "write to s3://bucket", "reach s3://bucket".

    Raises:
        UserError: in one line. Its cause is the error that came.
    """
    try:
        yield
    except (StorageError, OSError) as error:
        raise UserError(f"cannot {what}: {describe_storage_error(error)}") from error


def describe_storage_error(error: BaseException, right: Right | None = None) -> str:
    """Say in one line why storage refused, which right is missing, and what to do if that is clear.

    Args:
        error: of any cloud's library, or of a file system.
        right: what was tried. Most errors tell it themselves.
    """
    if isinstance(error, StorageError):
        return error.why
    if isinstance(error, HTTPError):  # a web server's, which knows neither keys nor rights
        return "access denied; check the credentials" if error.code == 403 else one_line(error)
    errors, answer = list(trouble.chain(error)), trouble.answer_in(error)
    text = " ".join(map(one_line, errors))
    said = answer.codes | answer.names | {str(status) for status in answer.statuses}
    said |= {word for word in ("GCS_SECRET", "NoSuchBucket") if word in text}
    for words, sentence in SENTENCES:
        if words & said:
            return sentence
    if trouble.is_full(error):
        return _full(errors)
    passing = trouble.PASSING_STATUSES.intersection(answer.statuses)
    if busy := answer.codes & trouble.BUSY or {str(status) for status in passing}:
        return f"the store is busy or in trouble ({min(busy)}); try again later"
    if _is_about_checksums(said, text):
        return (
            f"the store doesn't know the checksums that boto3 sends ({one_line(errors[-1])}); "
            f"set {CHECKSUMS}=when_required"
        )
    if trouble.is_denied(error) or "Forbidden" in text:
        return _denied(trouble.right_of(error) or right)
    if answer.names & {"EndpointConnectionError", "ConnectTimeoutError"}:
        return f"can't connect: {one_line(error)} (S3_ENDPOINT_URL?)"
    if isinstance(error, OSError) and error.strerror and trouble.status_of(error) is None:
        return error.strerror
    if trouble.is_absent(error):
        return "not found; check the bucket and the path"
    return one_line(error)


def why_not_written(error: BaseException, path: Path, needed: int | None = None) -> str:
    """Say in one line why a local file couldn't be written, with the free bytes of a full disk.

    Args:
        error: of whatever library was writing.
        path: what was being written.
        needed: bytes of the file, or those that were written before it failed.
    """
    wants = f", {_bytes(needed)} needed" if needed else ""
    for one in trouble.chain(error):
        number = one.errno if isinstance(one, OSError) else None
        text = one_line(one)
        if number == errno.EDQUOT or "Disk quota" in text:
            return f"the quota of the file system of {path.parent} is used up{wants}"
        if number == errno.EFBIG or "File too large" in text:
            return (
                f"File too large: more than a limit of {path.parent} or of this process "
                f"(ulimit -f) allows{wants}"
            )
        if number == errno.ENOSPC or (number is None and trouble.FULL_WORDS.search(str(one))):
            return f"no space left in {path.parent}: {_bytes(_free_bytes(path))} free{wants}"
    return str(getattr(error, "strerror", None) or one_line(error))


def _free_bytes(path: Path) -> int:
    """Give the bytes that are free where a path lies or would lie."""
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def _denied(right: Right | None) -> str:
    """Name the right that is missing."""
    if right is None:
        return "access denied; check the credentials"
    name = RIGHT_NAMES[right]
    if right == "read":
        return (
            f"access denied: the key may not read it ({name}), or it isn't there and the key may "
            f"not list ({RIGHT_NAMES['list']}); check the credentials and the path"
        )
    return f"access denied: the key may not {right} ({name}); check the credentials"


def _is_about_checksums(said: frozenset[str], text: str) -> bool:
    """Tell whether a store stumbles over the checksums and chunked bodies of newer boto3."""
    if os.environ.get(CHECKSUMS, "").lower() == "when_required":
        return False
    headers = ("x-amz-sdk-checksum", "x-amz-checksum", "aws-chunked", "x-amz-trailer")
    codes = {"501", "NotImplemented", "XAmzContentSHA256Mismatch", "MissingContentLength"}
    return bool(codes & said) or any(header in text.lower() for header in headers)


def _full(errors: list[BaseException]) -> str:
    """Name a full disk, a file system's quota or a bucket's quota."""
    for one in errors:
        if isinstance(one, OSError) and one.errno in trouble.FULL_ERRORS:
            return str(one.strerror)
    code = next(filter(None, map(trouble.code_of, errors)), "507")
    return f"the bucket's quota is used up ({code}); make room, or ask for more"


def _bytes(count: int | None) -> str:
    """Write a number of bytes for people: the number itself below a megabyte."""
    value = float(count or 0)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
