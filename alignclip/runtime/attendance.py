"""Say which ranks are there, what each one does, and why one has ended.

Where a rank dies or hangs, the others wait in a collective operation, whose error names neither the
rank nor the cause. So a thread of each rank gives a sign of life to the store at which the ranks
have met, beside gloo and NCCL.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from alignclip.errors import RANK_LOST, RankLostError, few, one_line
from alignclip.ranks import rank, world_size

BEAT = 2.0  # seconds between two signs of life
MISSED_AFTER = 4 * BEAT  # seconds without a sign, after which a rank is missed
TOLD_AFTER = 60.0  # seconds without a step, after which rank 0 says who is late
GRACE = 30.0  # seconds within which a rank ends by itself once another one has failed
STORE_TIMEOUT = 10.0
FAILED = "failed"
# what an error of gloo or NCCL names, where another rank is gone or late
LOST = re.compile(r"\bgloo/|NCCL")
REPEAT = "repeat the command"


@dataclass
class Sign:
    """A rank's sign of life: its number, place, and what it has done for how many seconds."""

    rank: int
    host: str
    process: int
    beats: int
    doing: str
    seconds: float
    late: str  # where others may wait for this: what it waits for

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class Attendance:
    """This rank's part of the roll call.

    One thread talks to the store, and may wait there for ever. Another one looks at the clock.

    Args:
        timeout: seconds after which the others no longer wait for a rank.

    Raises:
        OSError, RuntimeError: the store doesn't answer.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout, self._rank, self._world = timeout, rank(), world_size()
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store
        self._prefix = f"alignclip/{start}/"
        self._store: Any = _connect()
        self._sign = Sign(self._rank, socket.gethostname(), os.getpid(), 0, "starts", 0.0, "")
        self._since = self._told = time.monotonic()
        self._heard: dict[int, tuple[Sign, float]] = {}  # the last new sign of each, and when
        self._answered = time.monotonic()  # the store
        self._failure, self._failed_at = "", 0.0  # of the first rank that failed
        self._asks, self._knows = threading.Event(), threading.Event()  # this rank's main thread
        self._ends = threading.Event()  # likewise, well or not
        self._beat()
        for task in (self._talk, self._watch):
            threading.Thread(target=task, name="attendance", daemon=True).start()

    def note(self, doing: str, late: str) -> None:
        """See :func:`note`."""
        self._sign.doing, self._sign.late = doing, late
        self._since = time.monotonic()

    def end(self) -> None:
        """Give no more signs, and leave the process alone."""
        self._ends.set()

    def why_lost(self, error: Exception) -> str | None:
        """Say which other rank an error comes from; where it is this rank's own, tell the others.

        Returns:
            one line; None where the error is this rank's own.
        """
        if not _is_of_the_connection(error):
            self._fails(f"{self._sign} has failed: {one_line(error)}")
            return None
        self._asks.set()
        self._knows.wait(MISSED_AFTER + BEAT)
        why = self._failure
        if not why and time.monotonic() - self._answered > MISSED_AFTER / 2:
            why = f"rank 0 doesn't answer at {_store_place()}: it has ended or stands still"
        why = why or self._missing()
        self._fails(why)
        return f"{self._sign.doing}: {why}; {REPEAT} ({one_line(error)})"

    def _fails(self, why: str) -> None:
        """Tell the others, if nobody has told them anything before."""

        def tell() -> None:
            with suppress(RuntimeError, AttributeError):  # no connection
                self._store.compare_set(self._prefix + FAILED, "", why)

        if time.monotonic() - self._answered < MISSED_AFTER:
            teller = threading.Thread(target=tell, daemon=True)
            teller.start()
            teller.join(STORE_TIMEOUT)

    def _talk(self) -> None:
        """Give signs; hear of failures; on rank 0, say who is late."""
        while not self._ends.wait(BEAT):
            try:
                if self._store is None:
                    self._store = _connect()
                self._beat()
                if not self._failure:
                    self._hear_of_a_failure()
                self._answered = time.monotonic()
                if self._asks.is_set():
                    self._listen()
                elif self._rank == 0:
                    self._say_who_is_late()
            except (RuntimeError, OSError):  # the connection is lost, or can't be made yet
                self._store = None

    def _watch(self) -> None:
        """End a process that the others have left, and whose main thread doesn't hear of that.

        What must be finished first is waited for as long as the ranks wait for one another.
        """
        before = time.monotonic()
        while not self._ends.wait(BEAT):
            now, why = time.monotonic(), self._failure
            if now - before > MISSED_AFTER:  # this process stood still, as by SIGSTOP or a debugger
                self._answered = self._failed_at = now
            before = now
            if not why and now - self._answered > self._timeout + GRACE:
                why = f"rank 0 has not answered at {_store_place()} for {self._timeout:.0f} s"
            elif not why or now - self._failed_at < GRACE + self._timeout * bool(_unfinished):
                continue
            print(f"error: {self._sign.doing}: {why}; {REPEAT}", file=sys.stderr, flush=True)
            os._exit(RANK_LOST)

    def _beat(self) -> None:
        self._sign.beats += 1
        self._sign.seconds = time.monotonic() - self._since
        self._store.set(self._key(self._rank), json.dumps(asdict(self._sign)))

    def _hear_of_a_failure(self) -> None:
        key = self._prefix + FAILED
        if self._store.check([key]):
            self._failure, self._failed_at = self._store.get(key).decode(), time.monotonic()
            self._knows.set()

    def _say_who_is_late(self) -> None:
        """Name the ranks that the others wait for, once a step."""
        patience = min(TOLD_AFTER, self._timeout / 4)
        if time.monotonic() - self._since < patience - MISSED_AFTER:
            return
        self._listen()
        if self._sign.seconds < patience or self._told == self._since:
            return
        if late := self._late(patience / 2):
            self._told = self._since
            print(
                f"{self._sign.doing}: the ranks have waited {self._sign.seconds:.0f} s for {late}; "
                f"they end after {self._timeout:.0f} s (dist_timeout)",
                file=sys.stderr,
                flush=True,
            )

    def _listen(self) -> None:
        """Read the signs of all ranks that have given one."""
        now = time.monotonic()
        keys = [self._key(number) for number in range(self._world)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        for text in self._store.multi_get(keys):
            sign = Sign(**json.loads(text))
            before = self._heard.get(sign.rank)
            if before is None or before[0].beats != sign.beats:
                self._heard[sign.rank] = sign, now

    def _late(self, seconds: float) -> str:
        """Describe the ranks that give no sign; else those that others have waited for."""
        now = time.monotonic()
        silent = [
            f"{sign}, which has died or stands still: its last sign of life ('{sign.doing}') is "
            f"{now - heard:.0f} s old; look at that machine"
            for sign, heard in self._heard.values()
            if now - heard >= MISSED_AFTER - BEAT and sign.rank != self._rank
        ]
        late = [
            f"{sign}, which {sign.doing} since {sign.seconds:.0f} s: look at {sign.late}"
            for sign, _ in self._heard.values()
            if sign.late and sign.seconds >= seconds
        ]
        return few(silent or late)

    def _missing(self) -> str:
        """Say who is missing, after an error that doesn't."""
        if late := self._late(BEAT):
            return f"the ranks have lost {late}"
        return (
            f"{len(self._heard)} of {self._world} ranks give signs of life, and can't reach one "
            "another: look at their network"
        )

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number}"


_here: Attendance | None = None
_unfinished: set[object] = set()  # blocks of unhurried()


def take_part(timeout: float) -> None:
    """Give signs of life from now on, in a run of several ranks that have met at a store."""
    global _here
    if _here is None and world_size() > 1:
        with suppress(RuntimeError, OSError, KeyError):  # without it an error just says less
            _here = Attendance(timeout)


def note(doing: str, late: str = "") -> None:
    """Note what this rank does, such as ``trains batch 3``.

    Args:
        doing: in the third person.
        late: where the others wait for this rank meanwhile: what to look at if that takes long.
    """
    if _here is not None:
        _here.note(doing, late)


@contextmanager
def unhurried() -> Iterator[None]:
    """Let a block end, such as a save, before this process is ended because of another rank.

    The block may end in another thread.
    """
    this = object()
    _unfinished.add(this)
    try:
        yield
    finally:
        _unfinished.discard(this)


def end() -> None:
    """Give no more signs of life, at the end of a command."""
    global _here
    if _here is not None:
        _here.end()
        _here = None


@contextmanager
def failures_told() -> Iterator[None]:
    """Tell the other ranks why this one fails; and where another one has failed, say which and why.

    Raises:
        RankLostError: another rank has failed, died or doesn't answer.
    """
    try:
        yield
    except Exception as error:
        why = None if _here is None else _here.why_lost(error)
        end()
        if why is not None:
            raise RankLostError(why) from error
        raise


def _is_of_the_connection(error: BaseException) -> bool:
    """Say whether an error is what a lost connection to another rank looks like."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and LOST.search(str(error)) is not None


def _connect() -> Any:
    """Connect to the store at which the ranks have met.

    Raises:
        OSError: nobody is there.
        RuntimeError: no store answers.
    """
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torch tries for long where nobody is there, and prints stack traces
    socket.create_connection(place, timeout=STORE_TIMEOUT).close()
    timeout = timedelta(seconds=STORE_TIMEOUT)
    return dist.TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timeout)


def _store_place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
