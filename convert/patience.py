"""Waiting for storage that is away for the moment: with growing pauses, said once by all processes together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPException
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar
from urllib.error import URLError

from tqdm import tqdm

from alignclip.errors import one_line

T = TypeVar("T")
PATIENCE = 600.0  # seconds in all
LONGEST_PAUSE = 20.0  # seconds
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
}


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
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

    waiting = Retrying(
        retry=retry_if_exception(is_passing),
        wait=wait_exponential_jitter(initial=1, max=LONGEST_PAUSE),
        stop=stop_after_delay(PATIENCE),
        reraise=True,
    )
    result = waiting(work)
    _say(f"{place} is back", 0)
    return result


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: no connection, a server in trouble, too many requests."""
    if not isinstance(error, Exception):  # Ctrl-C; what it came in the middle of is linked to it
        return False
    for one in _chain(error):
        status = _status(one)
        if status is not None:
            return (status >= 500 and status != 501) or status in (408, 425, 429)  # 501: a store without that feature
    return any(
        isinstance(one, (ConnectionError, TimeoutError, URLError, HTTPException)) or type(one).__name__ in PASSING
        for one in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        yield one
        seen.append(one)
        one = one.__cause__ or one.__context__


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
