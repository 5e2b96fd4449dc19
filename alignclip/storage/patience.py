"""Wait for storage that is away for the moment, with growing pauses; all processes say so once."""

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

Result = TypeVar("Result")
# Seconds since storage was last known to answer: of a conversion, and of a checkpoint's upload
PATIENCE = 600.0
TRAINING_PATIENCE = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0  # seconds, between which the pauses double
ANSWERS = 5  # times that a try of more than LONGEST_PAUSE counts as an answer


class _Outage:
    """Hold 1 while an outage is said, in one process. The workers of a pool share a number."""

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


def patiently(work: Callable[[], Result], place: str, patience: float | None = None) -> Result:
    """Call ``work`` until it succeeds, fails for good, or storage is away for ``patience`` seconds.

    Args:
        work: may be called again after it has failed half-way.
        place: what ``work`` is done to, for the message.
        patience: seconds; :data:`PATIENCE` where it isn't given.

    Raises:
        Exception: the last one of ``work``.
    """
    from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter

    limit = PATIENCE if patience is None else patience
    since: float | None = None
    began, answers = 0.0, 0

    def begin_try(_: RetryCallState) -> None:
        nonlocal began
        began = time.monotonic()

    def is_away_too_long(_: RetryCallState) -> bool:
        nonlocal since, answers
        now = time.monotonic()
        if since is None:
            since = now
        # A long try has transferred something, so that another outage begins. A server that never
        # answers looks the same, and must not be waited for without end.
        elif now - began > LONGEST_PAUSE and answers < ANSWERS:
            since, answers = now, answers + 1
        return now - since > limit

    def say_why(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        why = describe_storage_error(error)
        _say(f"{place} can't be reached ({why}); waiting, up to {limit / 60:.0f} minutes", 1)

    result = Retrying(
        retry=retry_if_exception(is_passing),
        wait=wait_exponential_jitter(initial=FIRST_PAUSE, max=LONGEST_PAUSE),
        before=begin_try,
        stop=is_away_too_long,
        before_sleep=say_why,
        sleep=lambda seconds: time.sleep(seconds),  # found when it is called: tests replace it
        reraise=True,
    )(work)
    if since is not None:
        _say(f"{place} is back", 0)
    return result


def _say(message: str, outage: int) -> None:
    with _outage.get_lock():
        if _outage.value == outage:
            return
        _outage.value = outage
    tqdm.write(message, file=sys.stderr)
