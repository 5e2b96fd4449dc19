"""Every point at which a command can end: at each operation on files and networks it dies, or the
operation fails.

Python's audit events name the operations, whatever code calls them. A command that is interrupted
at the first, the second, … the last of them is exhaustive where random kills are not, and costs a
fork.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from s3 import share_descriptions

from alignclip.errors import UserError
from alignclip.storage import patience

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
# exit statuses of a command that is interrupted
OVER, BROKEN, REFUSED, DIED, NOT_REACHED = 0, 1, 2, 70, 71


def prepare_for_forks(with_bucket: bool) -> None:
    """Do once what each forked process would do, and have no process wait for disk or server."""
    os.fsync = lambda _: None  # a process that dies takes nothing from the disk
    resource_tracker.ensure_running()
    if with_bucket:
        os.environ["AWS_MAX_ATTEMPTS"] = "1"
        patience.FIRST_PAUSE = 0.01
        share_descriptions()


class Interruption:
    """The death of this process, or the failure of an operation, at a change of files or a request
    to a server.

    Attributes:
        has_come: whether there were so many operations.

    Args:
        at: the operation's number, from 1 on.
        kind: "dies" or "fails".
        below: the folder whose files count.
    """

    def __init__(self, at: int, kind: str, below: Path) -> None:
        self.at, self.kind, self.below = at, kind, str(below)
        self.count = 0
        sys.addaudithook(self._hear)

    @property
    def has_come(self) -> bool:
        return self.count >= self.at

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._counts(event, arguments):
            return
        self.count += 1
        if self.count == self.at:
            if self.kind == "dies":
                os._exit(DIED)
            error = ConnectionResetError if event == "http.client.send" else OSError
            raise error(errno.EIO, f"{event} fails, as the test wants it")

    def _counts(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "http.client.send":
            return True
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return False
        if event != "open" and event not in CHANGES:
            return False
        path = arguments[event == "os.symlink"]  # whose first argument is what the link names
        return isinstance(path, (str, bytes, os.PathLike)) and self.below in os.fsdecode(path)


def forked(act: Callable[[], object]) -> int:
    """Act in a forked process and return its exit status.

    This process must have no other thread.
    """
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = BROKEN
    try:
        act()
        status = OVER
    except UserError:
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)


def every_point(
    act: Callable[[int], object], kind: str, below: Path, prepare: Callable[[int], object]
) -> Iterator[int]:
    """Prepare, and act up to the first, the second, … operation, in a process of its own.

    Yield the number.

    Raises:
        AssertionError: the command ended by anything but a refusal in one line.
    """

    def until(at: int) -> None:
        prepare(at)
        interruption = Interruption(at, kind, below)
        act(at)
        if not interruption.has_come:
            os._exit(NOT_REACHED)

    allowed = {DIED} if kind == "dies" else {OVER, REFUSED}
    at = 1
    while (status := forked(lambda: until(at))) != NOT_REACHED:  # noqa: B023
        assert status in allowed, f"operation {at} {kind}: exit status {status}"
        yield at
        at += 1
