"""What an error of storage means: passing or for good, absent or refused, and which right is missing.

Every cloud's library has exceptions of its own, and which libraries are installed differs. So classes
are told by their names, and answers by their HTTP status and the store's own code.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from typing import Any, Literal
from urllib.error import URLError

from alignclip.errors import UserError

Right = Literal["list", "read", "write", "delete"]

PASSING_STATUSES = {408, 425, 429, 500, 502, 503, 504, 509}
# A store's own words outrank its status: some stores answer 400 or 403 to what will pass, …
PASSING_CODES = {
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "TooManyRequests",
    "TooManyRequestsException",
    "ServerBusy",
    "OperationTimedOut",
    "InternalError",
    "InternalServerError",
    "ServiceUnavailable",
    "OperationAborted",  # 409: another request was changing the same object
    "ConditionalRequestConflict",
    "rateLimitExceeded",
    "userRateLimitExceeded",
    "backendError",
}
# … and some answer 403 or 503 to a quota, which doesn't grow while one waits.
FULL_CODES = {
    "QuotaExceeded",
    "quotaExceeded",
    "StorageQuotaExceeded",
    "InsufficientStorage",
    "InsufficientCapacity",
    "EntityTooLarge",
    "InsufficientAccountResources",
    "XMinioStorageFull",
    "XMinioAdminBucketQuotaExceeded",
    "LimitExceeded",
}
EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
SKEWED_CODES = {"RequestTimeTooSkewed", "RequestInTheFuture"}
WRONG_KEY_CODES = {"InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException"}
WRONG_SECRET_CODES = {"SignatureDoesNotMatch", "InvalidSignature"}
WRONG_TOKEN_CODES = {"InvalidToken"}
DENIED_CODES = {
    "AccessDenied",
    "AccessDeniedException",
    "Forbidden",
    "AllAccessDisabled",
    "AuthorizationFailure",
    "AuthorizationPermissionMismatch",
    "InsufficientAccountPermissions",
    "NotAuthorized",
    "NotAuthorizedOrNotFound",
}
NO_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound", "FilesystemNotFound", "BucketNotFound"}
ABSENT_CODES = {"NoSuchKey", "BlobNotFound", "PathNotFound", "ResourceNotFound", "ObjectNotFound"}

# Exceptions that bring no answer, by their names
PASSING_CLASSES = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectTimeout",
    "ReadTimeoutError",
    "ReadTimeout",
    "ConnectionClosedError",
    "ConnectionError",
    "ProxyConnectionError",
    "HTTPClientError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "ChunkedEncodingError",
    "ProtocolError",
    "FlexibleChecksumError",  # botocore's, of a body that isn't what was sent
    "DataCorruption",
    "ServiceUnavailable",
    "TransportError",
    "ServiceRequestError",
    "ServiceRequestTimeoutError",
    "ServiceResponseError",
    "ServiceResponseTimeoutError",
    "RequestException",
    "RetriesExceededError",  # boto3's, of a body that breaks again and again
    "RetryError",
    "SSLError",
    "ObjectStoreTransientError",  # Composer's
}
NO_CREDENTIALS_CLASSES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "DefaultCredentialsError",
    "CredentialUnavailableError",
    "ConfigFileNotFound",
    "InvalidConfig",
    "ProfileNotFound",
    "NoAuthTokenError",
}
EXPIRED_CLASSES = {"TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
FOR_GOOD_CLASSES = NO_CREDENTIALS_CLASSES | EXPIRED_CLASSES | {"OfflineModeIsEnabled"}
ABSENT_CLASSES = {"FileNotFoundError", "ResourceNotFoundError", "NotFound", "EntryNotFoundError"}

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
AWS_TEXT = re.compile(r"An error occurred \((\w+)\) when calling the (\w+) operation")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, as Python links them, and as boto3 and urllib keep them."""
    seen: list[BaseException] = []
    ahead: list[Any] = [error]
    while ahead:
        one = ahead.pop(0)
        if isinstance(one, BaseException) and one not in seen:
            yield one
            seen.append(one)
            ahead += [getattr(one, "last_exception", None), getattr(one, "reason", None)]
            ahead.append(one.__cause__ or one.__context__)


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later, though nobody does anything.

    What passes: no connection, a server in trouble, too many requests, a body that broke on its way.
    What doesn't: anything that a person has to change, such as a name, a key, a right or a quota. An
    answer of the store outranks the exceptions that were raised around the answer.
    """
    if not isinstance(error, Exception):  # Ctrl-C; what it came in the middle of is linked to it
        return False
    errors = list(chain(error))
    if any(_is_for_good(one) for one in errors):
        return False
    for one in errors:
        code, status = code_of(one), status_of(one)
        if code in FULL_CODES:
            return False
        if code in PASSING_CODES:
            return True
        if status is not None:
            return (
                status in PASSING_STATUSES
            )  # not 501, a store without the feature, nor 507, a full one
    if any(code_of(one) for one in errors):
        return False
    return any(_is_no_answer(one) for one in errors)


def is_absent(error: BaseException) -> bool:
    """Whether the store says that there is no such object. A missing bucket is no absent object."""
    for one in chain(error):
        code = code_of(one)
        if code in NO_BUCKET_CODES or code in DENIED_CODES:
            return False
        if code in ABSENT_CODES:
            return True
        if (status := status_of(one)) is not None:
            return status == 404
    return bool(class_names(error) & ABSENT_CLASSES)


def is_denied(error: BaseException) -> bool:
    """Whether the store knows the key, and refuses. It refuses an absent object, too, to a key that can't list."""
    for one in chain(error):
        code = code_of(one)
        if code in DENIED_CODES:
            return True
        if code and not code.isdecimal():
            return False
        if (status := status_of(one)) is not None:
            return status == 403
    return False


def is_full(error: BaseException) -> bool:
    """Whether there is no room: a quota of a bucket, a disk, or a file system's quota."""
    return any(
        code_of(one) in FULL_CODES
        or status_of(one) == 507
        or (isinstance(one, OSError) and one.errno in FULL_ERRORS)
        for one in chain(error)
    )


def code_of(error: BaseException) -> str:
    """The store's own word for what is wrong, or nothing."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        return str(response.get("Error", {}).get("Code") or "")
    for name in ("error_code", "code"):  # Azure's is an enumeration of strings; OCI
        value = getattr(error, name, None)
        if isinstance(value, str):
            return str(getattr(value, "value", value))
    details = getattr(error, "errors", None)
    if isinstance(details, (list, tuple)) and details and isinstance(details[0], Mapping):  # Google
        return str(details[0].get("reason") or "")
    if isinstance(error, UserError):  # our own words about the error that caused it
        return ""
    found = AWS_TEXT.search(str(error))  # boto3 keeps no more than the text where it wraps an error
    return found[1] if found and found[1] != "None" else ""


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an exception of botocore, Google, Azure, OCI, requests or urllib."""
    if isinstance(error, UserError):  # its status is a command's
        return None
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for holder in (error, response):
        for name in ("code", "status_code", "status"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return int(value)
    found = AWS_TEXT.search(str(error))
    return int(found[1]) if found and found[1].isdecimal() else None


def right_of(error: BaseException) -> Right | None:
    """The right that a refused request needed, where the error tells which request that was."""
    for one in chain(error):
        found = AWS_TEXT.search(str(one))
        operation = str(getattr(one, "operation_name", None) or (found[2] if found else ""))
        if access := re.search(
            r"storage\.(?:objects|buckets|multipartUploads)\.(\w+)", str(one)
        ):  # Google
            operation = access[1]
        name = operation.lower()
        if name.startswith(("list", "headbucket", "head_bucket")):
            return "list"
        if name.startswith(("get", "headobject", "head_object")):
            return "read"
        if name.startswith(("put", "create", "upload", "complete", "abort", "update")):
            return "write"
        if name.startswith("delete"):
            return "delete"
    return None


def class_names(error: BaseException) -> set[str]:
    """The names of the classes of an error and of what caused it."""
    return {kind.__name__ for one in chain(error) for kind in type(one).__mro__}


def _is_for_good(error: BaseException) -> bool:
    """Whether waiting helps nobody: a wrong certificate, no credentials, this machine's own files."""
    if isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return True  # botocore's has the text only
    if isinstance(error, LOCAL_ERRORS) and status_of(error) is None:
        return True
    if isinstance(error, OSError) and error.errno in FULL_ERRORS:
        return True
    return type(error).__name__ in FOR_GOOD_CLASSES


def _is_no_answer(error: BaseException) -> bool:
    """Whether no answer came, or a broken one."""
    if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
        return True
    if getattr(error, "retryable", False) is True:  # google.auth says it itself
        return True
    kinds = (ConnectionError, TimeoutError, URLError, HTTPException, ssl.SSLError, socket.gaierror)
    return isinstance(error, kinds) or type(error).__name__ in PASSING_CLASSES
