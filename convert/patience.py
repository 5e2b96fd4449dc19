"""Waiting for storage that is away for the moment: with growing pauses, said once by all processes together."""

from __future__ import annotations

import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar
from urllib.error import URLError

from tqdm import tqdm

from alignclip.errors import one_line

T = TypeVar("T")
PATIENCE = 600.0  # seconds since storage was last known to answer
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds, between which they double
ANSWERS = 5  # times that a try of more than LONGEST_PAUSE counts as an answer
# Classes of the clouds' libraries, by name: which of them are installed differs
PASSING = {
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "ProxyConnectionError",
    "HTTPClientError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "ServiceUnavailable",
    "TransportError",
    "ServiceRequestError",
    "RequestException",
    "RetriesExceededError",  # boto3's, of a body that breaks again and again
    "SSLError",
}
PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest"}  # of S3's 400s: what came in was not what was sent


class _Outage:
    """Whether it has been said; in one process. The workers of a pool share a number instead."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def get_lock(self) -> Any:
        return self._lock


_outage: _Outage | Synchronized[int] = _Outage()


def share(outage: Synchronized[int]) -> None:
    """Say it once together with the processes that share this number."""
    global _outage
    _outage = outage


def patiently(work: Callable[[], T], place: str) -> T:
    """Call ``work`` until it succeeds, fails for good, or storage has been away for :data:`PATIENCE` seconds.

    Args:
        work: may be called again after it has failed half-way.
        place: what it is done to, for the message.

    Raises:
        Exception: the last one of ``work``.
    """
    try:
        return work()
    except Exception as error:
        if not is_passing(error):
            raise
        _say(f"{place} can't be reached ({one_line(error)}); waiting, up to {PATIENCE / 60:.0f} minutes", 1)
    from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

    away = _Away()
    time.sleep(FIRST_PAUSE)
    waiting = Retrying(
        retry=retry_if_exception(is_passing),
        wait=wait_exponential_jitter(initial=FIRST_PAUSE, max=LONGEST_PAUSE),
        before=away.begins,
        stop=away.is_too_long,
        sleep=lambda seconds: time.sleep(seconds),
        reraise=True,
    )
    result = waiting(work)
    _say(f"{place} is back", 0)
    return result


class _Away:
    """How long storage has been away, for tenacity: a try that has transferred something begins another outage."""

    def __init__(self) -> None:
        self._since = self._began = time.monotonic()
        self._answers = 0

    def begins(self, _: Any) -> None:
        """A try does."""
        self._began = time.monotonic()

    def is_too_long(self, _: Any) -> bool:
        """After a try that has failed."""
        now = time.monotonic()
        # a server that never answers looks the same, and must not be waited for without end
        if now - self._began > LONGEST_PAUSE and self._answers < ANSWERS:
            self._since, self._answers = now, self._answers + 1
        return now - self._since > PATIENCE


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: no connection, a server in trouble, too many requests."""
    if not isinstance(error, Exception):  # Ctrl-C; what it came in the middle of is linked to it
        return False
    chain = list(_chain(error))
    if any(_is_certificate(one) for one in chain):
        return False
    for one in chain:
        status = _status(one)
        if status is not None:
            passing = (status >= 500 and status != 501) or status in (
                408,
                425,
                429,
            )  # 501: a store without that feature
            return passing or (status == 400 and _code(one) in PASSING_CODES)
    return any(
        isinstance(one, (ConnectionError, TimeoutError, URLError, HTTPException, ssl.SSLError))
        or type(one).__name__ in PASSING
        for one in chain
    )


def _is_certificate(error: BaseException) -> bool:
    """Whether it is about a certificate, which will be as wrong in a minute; botocore's has the text only."""
    return isinstance(error, ssl.CertificateError) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
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


def _code(error: BaseException) -> str:
    """S3's own word for what is wrong."""
    return str(getattr(error, "response", {}).get("Error", {}).get("Code"))


def _status(error: BaseException) -> int | None:
    """The HTTP status in an exception of botocore, Google, Azure, OCI or urllib."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for name in ("code", "status_code", "status"):
        if isinstance(value := getattr(error, name, None), int):
            return value
    return None


def _say(message: str, outage: int) -> None:
    with _outage.get_lock():
        if _outage.value == outage:
            return
        _outage.value = outage
    tqdm.write(message, file=sys.stderr)
