"""Output that nobody reads any more: a pipe whose reader has ended, a terminal that was closed."""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from pathlib import Path
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.ECONNRESET)  # of a pipe, of a socket


def survive() -> None:
    """Let a command go on when its output's reader has ended: it keeps its exit status.

    The file descriptor itself is pointed at the null device, so that loggers and bars that hold the
    stream, child processes and the flush at the interpreter's exit meet an output that takes
    everything.
    """
    sys.stdout = _surviving(sys.stdout, 1)
    sys.stderr = _surviving(sys.stderr, 2)


class _Output(io.FileIO):
    """A standard output, up to the first writing that nobody can read."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not _is_gone(error, self.fileno()):
                raise
            _point_at_nothing(self.fileno())
            return super().write(data)


def _surviving(stream: TextIO | None, descriptor: int) -> TextIO:
    """Replace the stream of a file descriptor; keep any other stream (a notebook's, a test's)."""
    if stream is None:  # the command was started with it closed
        if not _is_open(descriptor):  # or the next file that is opened would be the standard output
            _point_at_nothing(descriptor)
        return Path(os.devnull).open("w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO or raw.fileno() != descriptor:
        return stream
    output = _Output(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        output if stream.buffer is raw else io.BufferedWriter(output),  # python -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _is_gone(error: OSError, descriptor: int) -> bool:
    """Say whether nobody reads; a full disk, or a failing one, is something else."""
    # a terminal that was closed says EIO, and so does a failing disk
    return error.errno in _GONE or (
        error.errno == errno.EIO and stat.S_ISCHR(os.fstat(descriptor).st_mode)
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _point_at_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    if nothing == descriptor:
        os.set_inheritable(nothing, True)
    else:
        os.dup2(nothing, descriptor)
        os.close(nothing)
