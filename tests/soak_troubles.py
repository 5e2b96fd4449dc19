"""The troubles of a round of the soak: what is killed, stopped, frozen or cut off."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from botocore.exceptions import BotoCoreError, ClientError
from processes import Started
from s3 import S3Server

LONGEST_OUTAGE = 4.0  # seconds
BOUND = 150.0  # seconds in which what is left of a killed command has to end


@dataclass
class Round:
    """A round: its folder, its random numbers, and what has happened.

    Attributes:
        folder: of all that it writes on this machine.
        rng: from which everything is drawn.
        server: of its buckets.
        shared: what rounds have in common, by name: sets, and runs that nothing disturbed.
        what: what was drawn, in words.
        starts: of the command.
        struck: the troubles, in turn.
        buckets: that it has made.
        is_kept: the folder stays, and the buckets do to the end of the soak.
    """

    folder: Path
    rng: random.Random
    server: S3Server
    shared: dict[str, Any]
    what: str = ""
    starts: int = 0
    struck: list[str] = field(default_factory=list)
    buckets: list[str] = field(default_factory=list)
    is_kept: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)

    def bucket(self) -> str:
        """Create a bucket of this round, and return its address."""
        self.buckets.append(self.server.bucket())
        return self.buckets[-1]

    def mend(self) -> None:
        """Have the server run again, whatever has become of it."""
        process = self.server._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
        if not self.server._answers():
            self.server.stop()
            self.server.start()

    def remove(self) -> None:
        """Remove the folder, and empty the buckets: hours of rounds would fill the disk."""
        if self.is_kept:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            for bucket in self.buckets:
                self.server.empty(bucket)
        except (BotoCoreError, ClientError) as error:  # costs room, and not the rounds to come
            print(f"a bucket isn't emptied: {error}", flush=True)


def kill_all(process: Started, here: Round) -> None:
    """SIGKILL to the command and all that it has started."""
    process.signal_group(signal.SIGKILL)


def kill_child(process: Started, here: Round) -> None:
    """SIGKILL to a rank, or to a process of a conversion's pool."""
    _kill_one(_children(process.pid), here)


def kill_grandchild(process: Started, here: Round) -> None:
    """SIGKILL to a data worker; to a rank where there is none."""
    ranks = _children(process.pid)
    workers = [worker for rank in ranks for worker in _children(rank.pid)]
    _kill_one(workers or ranks, here)


def terminate_child(process: Started, here: Round) -> None:
    """SIGTERM to a rank."""
    if ranks := _children(process.pid):
        with suppress(psutil.NoSuchProcess):
            here.rng.choice(ranks).terminate()


def terminate(process: Started, here: Round) -> None:
    """SIGTERM to the launcher, or to the converter."""
    process.terminate()


def interrupt(process: Started, here: Round) -> None:
    """Ctrl-C: SIGINT to all."""
    process.signal_group(signal.SIGINT)


def stop_store(process: Started, here: Round) -> None:
    """End the server of the bucket, and start it again after seconds."""
    here.server.stop()
    time.sleep(here.rng.uniform(0.2, LONGEST_OUTAGE))
    here.server.start()


def freeze_store(process: Started, here: Round) -> None:
    """Freeze the server of the bucket for seconds."""
    server = here.server._process
    assert server is not None
    os.killpg(server.pid, signal.SIGSTOP)
    time.sleep(here.rng.uniform(0.2, LONGEST_OUTAGE))
    os.killpg(server.pid, signal.SIGCONT)


Trouble = Callable[[Started, Round], None]
PASSING = (stop_store, freeze_store)  # which no command may end of


def strike(process: Started, here: Round, troubles: list[Trouble], after: float) -> int | None:
    """Give a command a trouble at some moment, and wait for what becomes of it.

    Args:
        process: the command.
        here: the round.
        troubles: to choose from.
        after: the latest moment, in seconds.

    Returns:
        the exit status; None where the trouble is one that passes and the command still runs.
    """
    with suppress(subprocess.TimeoutExpired):
        return process.wait(here.rng.uniform(0, after))
    trouble = here.rng.choice(troubles)
    here.struck.append(trouble.__name__)
    trouble(process, here)
    if trouble in PASSING:
        return process.poll()
    try:
        return process.wait(BOUND)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still there {BOUND:.0f} s after {trouble.__name__}") from None


def _children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children()
    return []


def _kill_one(some: list[psutil.Process], here: Round) -> None:
    if some:
        with suppress(psutil.NoSuchProcess):
            here.rng.choice(sorted(some, key=lambda one: one.pid)).kill()
