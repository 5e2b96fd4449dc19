"""What a person reads when storage refuses: one line that says what is wrong and what to do."""

from __future__ import annotations

import os
from urllib.error import HTTPError

from alignclip.errors import UserError, one_line
from alignclip.storage import trouble
from alignclip.storage.trouble import Right

CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"
# What the clouds call a right
NAMES: dict[Right, str] = {
    "list": "s3:ListBucket",
    "read": "s3:GetObject",
    "write": "s3:PutObject",
    "delete": "s3:DeleteObject",
}


class StorageError(UserError):
    """A place that can't be read, written, listed or deleted from, and why, in one line."""

    def __init__(self, right: Right, place: str, why: str) -> None:
        super().__init__(
            right, place, why
        )  # an exception is sent to another process as its arguments
        self.right, self.place, self.why = right, place, why

    def __str__(self) -> str:
        return f"can't {self.right} {self.place}: {self.why}"


def describe_storage_error(error: BaseException, right: Right | None = None) -> str:
    """Say in one line why storage refused, which right is missing, and what to do where that is clear.

    Args:
        error: of any cloud's library, or of a file system.
        right: what was tried. Most errors tell it themselves.
    """
    if isinstance(error, StorageError):
        return error.why
    if isinstance(error, HTTPError):  # a web server's, which knows neither keys nor rights
        return "access denied; check the credentials" if error.code == 403 else one_line(error)
    errors = list(trouble.chain(error))
    names = trouble.class_names(error)
    codes = {trouble.code_of(one) for one in errors} - {""}
    statuses = {trouble.status_of(one) for one in errors}
    text = " ".join(one_line(one) for one in errors)
    right = trouble.right_of(error) or right
    if names & trouble.NO_CREDENTIALS_CLASSES or "GCS_SECRET" in text:
        return "no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or your cloud's equivalent)"
    if said := _about_key(codes, names, statuses):
        return said
    if codes & trouble.NO_BUCKET_CODES or "NoSuchBucket" in text:
        return "no such bucket"
    if trouble.is_full(error):
        return _full(error)
    busy = codes & trouble.PASSING_CODES or {
        str(one) for one in statuses if one in trouble.PASSING_STATUSES
    }
    if busy:
        return f"the store is busy or in trouble ({min(busy)}); try again later"
    if _is_about_checksums(codes, statuses, text):
        return (
            f"the store doesn't know the checksums that boto3 sends ({one_line(errors[-1])}); "
            f"set {CHECKSUMS}=when_required"
        )
    if trouble.is_denied(error) or "Forbidden" in text:
        return _denied(right)
    if names & {"EndpointConnectionError", "ConnectTimeoutError"}:
        return f"can't connect: {one_line(error)} (S3_ENDPOINT_URL?)"
    if isinstance(error, OSError) and error.strerror and trouble.status_of(error) is None:
        return error.strerror
    if trouble.is_absent(error):
        return "not found; check the bucket and the path"
    return one_line(error)


def _about_key(codes: set[str], names: set[str], statuses: set[int | None]) -> str | None:
    """What is wrong with the key itself or the clock that signs requests, if anything is."""
    if codes & trouble.EXPIRED_CODES or names & trouble.EXPIRED_CLASSES:
        return "the key has expired; get a new one (a session token lasts for hours)"
    if codes & trouble.SKEWED_CODES:
        return "this machine's clock and the store's differ too much; set the clock (NTP)"
    if codes & trouble.WRONG_KEY_CODES:
        return "access denied: the store doesn't know this key; check AWS_ACCESS_KEY_ID"
    if codes & trouble.WRONG_SECRET_CODES:
        return (
            "access denied: the secret is not the one of this key; check the credentials "
            f"(AWS_SECRET_ACCESS_KEY; with Google's S3 interface also {CHECKSUMS}=when_required)"
        )
    if codes & trouble.WRONG_TOKEN_CODES:
        return "access denied: the session token is not one of this store; check AWS_SESSION_TOKEN"
    if 401 in statuses:
        return "access denied: the store doesn't accept these credentials; check the credentials"
    return None


def _denied(right: Right | None) -> str:
    """Name the right that is missing."""
    if right == "read":
        return (
            f"access denied: the key may not read it ({NAMES['read']}), or it isn't there and the key may not "
            f"list ({NAMES['list']}); check the credentials and the path"
        )
    if right is not None:
        return f"access denied: the key may not {right} ({NAMES[right]}); check the credentials"
    return "access denied; check the credentials"


def _is_about_checksums(codes: set[str], statuses: set[int | None], text: str) -> bool:
    """Whether a store stumbles over the checksums and chunked bodies of newer boto3."""
    if os.environ.get(CHECKSUMS, "").lower() == "when_required":
        return False
    said = text.lower()
    return (
        501 in statuses
        or bool(
            codes & {"501", "NotImplemented", "XAmzContentSHA256Mismatch", "MissingContentLength"}
        )
        or any(
            word in said
            for word in ("x-amz-sdk-checksum", "x-amz-checksum", "aws-chunked", "x-amz-trailer")
        )
    )


def _full(error: BaseException) -> str:
    """A full disk, a file system's quota or a bucket's quota."""
    for one in trouble.chain(error):
        if isinstance(one, OSError) and one.errno in trouble.FULL_ERRORS:
            return str(one.strerror)
    code = next((code for one in trouble.chain(error) if (code := trouble.code_of(one))), "507")
    return f"the bucket's quota is used up ({code}); make room, or ask for more"
