"""Classify errors of storage: passing, absent, refused or full; and find the missing right.

Each cloud's library has exceptions of its own, and which libraries are installed differs. So
classes are known by their names, and answers by their HTTP status and the store's own code.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Literal
from urllib.error import URLError

from alignclip.errors import UserError

Right = Literal["list", "read", "write", "delete"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504, 509}
# The stores' own codes, and names of exceptions. A code outranks the status: some stores answer 400
# or 403 to what will pass, and 403 or 503 to a quota, which doesn't grow while one waits. A 409 is
# another request that was changing the same object.
BUSY = _words("""
    RequestTimeout IncompleteBody BadDigest SlowDown Throttling ThrottlingException
    ThrottledException RequestThrottled RequestThrottledException RequestLimitExceeded
    BandwidthLimitExceeded TooManyRequests TooManyRequestsException ServerBusy OperationTimedOut
    InternalError InternalServerError ServiceUnavailable OperationAborted
    ConditionalRequestConflict rateLimitExceeded userRateLimitExceeded backendError""")
NO_ANSWER = _words("""
    EndpointConnectionError ConnectTimeoutError ConnectTimeout ReadTimeoutError ReadTimeout
    ConnectionClosedError ConnectionError ProxyConnectionError HTTPClientError
    ResponseStreamingError IncompleteReadError ChunkedEncodingError ProtocolError
    FlexibleChecksumError DataCorruption ServiceUnavailable TransportError ServiceRequestError
    ServiceRequestTimeoutError ServiceResponseError ServiceResponseTimeoutError RequestException
    RetriesExceededError RetryError SSLError ObjectStoreTransientError""")
FULL = _words("""
    QuotaExceeded quotaExceeded StorageQuotaExceeded InsufficientStorage InsufficientCapacity
    EntityTooLarge InsufficientAccountResources XMinioStorageFull XMinioAdminBucketQuotaExceeded
    LimitExceeded""")
NO_CREDENTIALS = _words("""
    NoCredentialsError PartialCredentialsError DefaultCredentialsError CredentialUnavailableError
    ConfigFileNotFound InvalidConfig ProfileNotFound NoAuthTokenError""")
EXPIRED = _words("""
    ExpiredToken ExpiredTokenException TokenRefreshRequired RequestExpired TokenRetrievalError
    UnauthorizedSSOTokenError SSOTokenLoadError""")
SKEWED_CLOCK = _words("RequestTimeTooSkewed RequestInTheFuture")
WRONG_KEY = _words("InvalidAccessKeyId InvalidClientTokenId UnrecognizedClientException")
WRONG_SECRET = _words("SignatureDoesNotMatch InvalidSignature")
WRONG_TOKEN = _words("InvalidToken")
DENIED = _words("""
    AccessDenied AccessDeniedException Forbidden AllAccessDisabled AuthorizationFailure
    AuthorizationPermissionMismatch InsufficientAccountPermissions NotAuthorized
    NotAuthorizedOrNotFound""")
NO_BUCKET = _words("NoSuchBucket ContainerNotFound FilesystemNotFound BucketNotFound")
ABSENT = _words("""
    NoSuchKey BlobNotFound PathNotFound ResourceNotFound ObjectNotFound FileNotFoundError
    NotADirectoryError ResourceNotFoundError NotFound EntryNotFoundError""")

WRONG_NAME = _words("""
    ParamValidationError InvalidBucketName InvalidURI InvalidURL KeyTooLongError
    XMinioInvalidObjectName XMinioInvalidResourceName""")
WRONG_NAME_STATUSES = {(410,), (414,), (451,)}  # gone, too long, withheld by law

# Of a file system, local or mounted
FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
PASSING_ERRORS = {
    errno.ESTALE,  # NFS: the path, opened again, is the file
    errno.EHOSTUNREACH,
    errno.EHOSTDOWN,
    errno.ENETUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
}
LOCAL_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
)
# Where exceptions of botocore, Azure, OCI and Google keep the store's own word for what is wrong
CODES = ("response.Error.Code", "error_code", "code", "errors.reason")
# Where these, and those of requests and urllib, keep the HTTP status
STATUSES = (
    "response.ResponseMetadata.HTTPStatusCode",
    "code",
    "status_code",
    "status",
    "response.code",
    "response.status_code",
    "response.status",
)
# PyTorch, safetensors and PIL have words of their own for a full disk
FULL_WORDS = re.compile(
    r"file write failed|unexpected pos|No space left|os error (28|122|27)|Disk quota exceeded"
)
AWS_TEXT = re.compile(r"An error occurred \((\w+)\) when calling the (\w+) operation")
NO_CODES = ("None", "Unknown")  # botocore's words where an answer has no code
# Google names the right instead of the request
GOOGLE_TEXT = re.compile(r"storage\.(?:objects|buckets|multipartUploads)\.(\w+)")
# How the names of requests begin that need a right, in small letters without underscores
REQUESTS: dict[Right, tuple[str, ...]] = {
    "list": ("list", "headbucket"),
    "read": ("get", "headobject"),
    "write": ("put", "create", "upload", "complete", "abort", "update"),
    "delete": ("delete",),
}


def chain(error: BaseException) -> Iterator[BaseException]:
    """Give the error and its causes, as Python links them, and as boto3 and urllib keep them."""
    seen: list[BaseException] = []
    ahead: list[Any] = [error]
    while ahead:
        one = ahead.pop(0)
        if isinstance(one, BaseException) and one not in seen:
            yield one
            seen.append(one)
            ahead += [getattr(one, "last_exception", None), getattr(one, "reason", None)]
            ahead.append(one.__cause__ or one.__context__)


@dataclass(frozen=True)
class Answer:
    """A store's answer, found in an error and its causes.

    Attributes:
        codes: the store's own words for what is wrong.
        statuses: of HTTP, the outermost error's first.
        names: of the errors' classes, base classes included.
    """

    codes: frozenset[str]
    statuses: tuple[int, ...]
    names: frozenset[str]


def answer_in(error: BaseException) -> Answer:
    """Find the store's answer in an error and its causes."""
    errors = list(chain(error))
    return Answer(
        frozenset(code for one in errors if (code := code_of(one))),
        tuple(status for one in errors if (status := status_of(one)) is not None),
        frozenset(kind.__name__ for one in errors for kind in type(one).__mro__),
    )


def is_passing(error: BaseException) -> bool:
    """Tell whether the same request may succeed later, though nobody does anything.

    No connection passes, a server in trouble, too many requests, a body that broke on its way. What
    a person has to change doesn't pass: a name, a key, a right, a quota. An answer of the store
    outranks the exceptions that were raised around the answer.
    """
    if not isinstance(error, Exception):  # Ctrl-C, which Python links to what it interrupted
        return False
    errors, said = list(chain(error)), answer_in(error)
    if said.codes & FULL or any(map(_is_for_good, errors)):
        return False
    if said.codes & BUSY:
        return True
    if said.statuses:
        # not 501, a store without the feature, nor 507, a full one
        return said.statuses[0] in PASSING_STATUSES
    return not said.codes and any(map(_is_no_answer, errors))


def is_absent(error: BaseException) -> bool:
    """Tell whether the store says that there is no such object; a missing bucket is none."""
    said = answer_in(error)
    if said.codes & (NO_BUCKET | DENIED):
        return False
    if said.codes & ABSENT:
        return True
    return said.statuses[0] == 404 if said.statuses else bool(said.names & ABSENT)


def is_denied(error: BaseException) -> bool:
    """Tell whether the store knows the key, and refuses.

    A store refuses an absent object, too, to a key that can't list.
    """
    said = answer_in(error)
    words = {code for code in said.codes if not code.isdecimal()}
    return bool(words & DENIED) or (not words and said.statuses[:1] == (403,))


def is_about_name(error: BaseException) -> bool:
    """Tell whether one name is refused, absent or impossible, and another one may be read."""
    said = answer_in(error)
    is_wrong = bool((said.codes | said.names) & (NO_BUCKET | WRONG_NAME))
    is_refused = said.statuses[:1] in WRONG_NAME_STATUSES
    return is_wrong or is_refused or is_absent(error) or is_denied(error)


def is_full(error: BaseException) -> bool:
    """Tell whether there is no room: in a bucket's quota, on a disk, in a file system's quota."""
    said = answer_in(error)
    no_room = any(getattr(one, "errno", None) in FULL_ERRORS for one in chain(error))
    return no_room or bool(said.codes & FULL) or 507 in said.statuses


def is_disk_full(error: BaseException) -> bool:
    """Tell whether a library that was writing a local file had no room, in whatever words."""
    return any(
        one.errno in FULL_ERRORS if isinstance(one, OSError) else FULL_WORDS.search(str(one))
        for one in chain(error)
    )


def code_of(error: BaseException) -> str:
    """Give the store's own word for what is wrong, or nothing."""
    for value in _values(error, CODES):
        if isinstance(value, str):
            return str(getattr(value, "value", value))  # Azure's is an enumeration of strings
    if isinstance(error, UserError):  # our own words about the error that caused it
        return ""
    found = AWS_TEXT.search(str(error))  # boto3 keeps no more than the text where it wraps an error
    return found[1] if found and found[1] not in NO_CODES else ""


def status_of(error: BaseException) -> int | None:
    """Find the HTTP status of a store's answer."""
    if isinstance(error, UserError):  # its status is a command's
        return None
    for value in _values(error, STATUSES):
        if isinstance(value, int) and not isinstance(value, bool):
            return int(value)
    found = AWS_TEXT.search(str(error))
    return int(found[1]) if found and found[1].isdecimal() else None


def _values(error: BaseException, paths: tuple[str, ...]) -> Iterator[Any]:
    """Yield what an error holds at these paths, through attributes, mappings and first elements."""
    for path in paths:
        value: Any = error
        for step in path.split("."):
            if isinstance(value, list | tuple) and value:
                value = value[0]
            value = value.get(step) if isinstance(value, Mapping) else getattr(value, step, None)
        yield value


def right_of(error: BaseException) -> Right | None:
    """Find the right that a refused request needed, where the error tells which request it was."""
    for one in chain(error):
        found, google = AWS_TEXT.search(str(one)), GOOGLE_TEXT.search(str(one))
        name = google[1] if google else getattr(one, "operation_name", None)
        request = str(name or (found[2] if found else "")).lower().replace("_", "")
        for right, begins in REQUESTS.items():
            if request.startswith(begins):
                return right
    return None


def _is_for_good(error: BaseException) -> bool:
    """Tell whether waiting is vain: a wrong certificate, no credentials, this machine's files."""
    if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return True  # botocore's has the text only
    if isinstance(error, LOCAL_ERRORS) and status_of(error) is None:
        return True
    if isinstance(error, OSError) and error.errno in FULL_ERRORS:
        return True
    return type(error).__name__ in NO_CREDENTIALS | EXPIRED | {"OfflineModeIsEnabled"}


def _is_no_answer(error: BaseException) -> bool:
    """Tell whether no answer came, or a broken one."""
    if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
        return True
    if getattr(error, "retryable", False) is True:  # google.auth says it itself
        return True
    kinds = (ConnectionError, TimeoutError, URLError, HTTPException, ssl.SSLError, socket.gaierror)
    return isinstance(error, kinds) or type(error).__name__ in NO_ANSWER
