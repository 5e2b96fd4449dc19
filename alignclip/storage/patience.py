"""Wait for storage that is away for the moment: with growing pauses, said once by all processes together."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from tqdm import tqdm

from alignclip.storage.trouble import is_passing
from alignclip.storage.words import describe_storage_error

T = TypeVar("T")
# Seconds since storage was last known to answer: of a conversion, and of a checkpoint's upload in training
PATIENCE = 600.0
TRAINING_PATIENCE = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds, between which the pauses double
ANSWERS = 5  # times that a try of more than LONGEST_PAUSE counts as an answer


class _Outage:
    """Whether an outage has been said; in one process. The workers of a pool share a number instead."""

    def __init__(self) -> None:
        self.value = 0
        self._lock = threading.Lock()

    def get_lock(self) -> Any:
        return self._lock


_outage: _Outage | Synchronized[int] = _Outage()


def share(outage: Synchronized[int]) -> None:
    """Say an outage once together with the processes that share this number."""
    global _outage
    _outage = outage


def patiently(work: Callable[[], T], place: str, patience: float | None = None) -> T:
    """Call ``work`` until it succeeds, fails for good, or storage has been away for ``patience`` seconds.

    Args:
        work: may be called again after it has failed half-way.
        place: what it is done to, for the message.
        patience: seconds; :data:`PATIENCE` where it isn't given.

    Raises:
        Exception: the last one of ``work``.
    """
    limit = PATIENCE if patience is None else patience
    try:
        return work()
    except Exception as error:
        if not is_passing(error):
            raise
        why = describe_storage_error(error)
        _say(f"{place} can't be reached ({why}); waiting, up to {limit / 60:.0f} minutes", 1)
    from tenacity import Retrying, retry_if_exception, wait_exponential_jitter

    away = _Away(limit)
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

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._since = self._began = time.monotonic()
        self._answers = 0

    def begins(self, _: Any) -> None:
        """Note when a try begins."""
        self._began = time.monotonic()

    def is_too_long(self, _: Any) -> bool:
        """Decide after a try that has failed."""
        now = time.monotonic()
        # a server that never answers looks the same, and must not be waited for without end
        if now - self._began > LONGEST_PAUSE and self._answers < ANSWERS:
            self._since, self._answers = now, self._answers + 1
        return now - self._since > self._limit


def _say(message: str, outage: int) -> None:
    with _outage.get_lock():
        if _outage.value == outage:
            return
        _outage.value = outage
    tqdm.write(message, file=sys.stderr)
