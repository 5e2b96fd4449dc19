"""Wait for storage that is away for the moment, with growing pauses; all processes say so once."""

from __future__ import annotations

import math
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from alignclip.storage.trouble import chain, is_passing
from alignclip.storage.words import describe_storage_error

if TYPE_CHECKING:
    from tenacity import RetryCallState

Result = TypeVar("Result")
PATIENCE = 600.0  # seconds since a store was last known to answer
# Seconds for a host whose name is unknown, and that has not answered this process yet: a typo
UNKNOWN_HOST_PATIENCE = 30.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds, between which the pauses double
SILENCE = 300.0  # seconds after which every client gives a server up that says nothing
ANSWERS = 5  # times that a try of more than SILENCE counts as an answer
SLOW = 60.0  # seconds of a read, after which it is said that the read still goes on
OUTAGE, SLOWNESS = 1, 2  # bits of what is said


class _Outage:
    """Hold the bits of what is said, in one process. The workers of a pool share a number."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def get_lock(self) -> Any:
        return self._lock


class _Silences:
    """Count how long each store has not answered, for all threads of a process that wait for it.

    Without this, a queue of uploads would wait for the whole patience one after the other.
    """

    def __init__(self) -> None:
        self._times: dict[str, tuple[float, float]] = {}  # first and last failure of an outage
        self._known: set[str] = set()

    def fails(self, store: str, began: float, now: float) -> float:
        """Note a try that has failed; return when the outage began."""
        first, last = self._times.get(store, (0.0, -math.inf))
        if began - last > 2 * LONGEST_PAUSE:  # nobody has asked for a while: another outage
            first = now if now - began > SILENCE else began  # a try of so long has transferred
        self._times[store] = first, now
        return first

    def answers(self, store: str) -> None:
        """Note an answer."""
        self._times.pop(store, None)
        self._known.add(store)

    def is_known(self, store: str) -> bool:
        """Say whether a store has answered this process."""
        return store in self._known


_outage: _Outage | Synchronized[int] = _Outage()
_silences = _Silences()


def share(outage: Synchronized[int]) -> None:
    """Say an outage once together with the processes that share this number."""
    global _outage
    _outage = outage


def patiently(work: Callable[[], Result], place: str) -> Result:
    """Call ``work`` until it succeeds, fails for good, or storage is away for :data:`PATIENCE`.

    Args:
        work: may be called again after it has failed half-way.
        place: what ``work`` is done to, for the message.

    Raises:
        Exception: the last one of ``work``.
    """
    from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

    limit = PATIENCE
    store = _store_of(place)
    since: float | None = None
    began, answers = 0.0, 0

    def begin_try(_: RetryCallState) -> None:
        nonlocal began
        began = time.monotonic()

    def is_away_too_long(state: RetryCallState) -> bool:
        nonlocal limit, since, answers
        now = time.monotonic()
        others = _silences.fails(store, began, now)
        if since is None:
            since = others
        # Another outage begins. A server that always breaks a transfer must not be waited for
        # without end.
        elif now - began > SILENCE and answers < ANSWERS:
            since, answers = now, answers + 1
        if _is_unknown_host(_error_of(state)) and not _silences.is_known(store):
            limit = min(limit, UNKNOWN_HOST_PATIENCE)
        return now - since > limit

    def say_why(state: RetryCallState) -> None:
        why = describe_storage_error(_error_of(state))
        _say(f"{place} can't be reached ({why}); waiting, up to {_duration(limit)}", OUTAGE)

    result = Retrying(
        retry=retry_if_exception(is_passing),
        wait=wait_exponential_jitter(initial=FIRST_PAUSE, max=LONGEST_PAUSE),
        before=begin_try,
        stop=is_away_too_long,
        before_sleep=say_why,
        sleep=lambda seconds: time.sleep(seconds),  # found when it is called: tests replace it
        reraise=True,
    )(work)
    _silences.answers(store)
    if since is not None:
        _say(f"{place} is back", OUTAGE, False)
    return result


@contextmanager
def slowness_said(place: str) -> Iterator[None]:
    """Say once that the block, a read of a place, takes long; a slow store ends nothing."""
    message = f"{place} is slow, or silent: a read takes more than {SLOW:.0f} seconds"
    timer = threading.Timer(SLOW, lambda: _say(message, SLOWNESS))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def answered(place: str) -> None:
    """Note that a store has answered this process: an outage that follows is no typo."""
    _silences.answers(_store_of(place))


def _store_of(place: str) -> str:
    return "/".join(place.split("/")[:3])


def _error_of(state: RetryCallState) -> BaseException:
    """Return what a try has failed of."""
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def _is_unknown_host(error: BaseException) -> bool:
    return any(isinstance(one, socket.gaierror) for one in chain(error))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 60 else f"{seconds:.0f} seconds"


def _say(message: str, what: int, is_so: bool = True) -> None:
    with _outage.get_lock():
        if bool(_outage.value & what) == is_so:
            return
        _outage.value ^= what
    tqdm.write(message, file=sys.stderr)
