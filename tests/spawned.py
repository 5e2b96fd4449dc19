"""Stand-ins for what multiprocessing spawns: processes that are forked from a server which has
imported the stack.

A spawned process imports everything anew, which takes ten seconds. Python's own "forkserver" is as
fresh, and cheap where the server is warm. These processes get besides what ``exec`` would hand on:
environment, output, blocked and ignored signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
from multiprocessing import context, forkserver, popen_forkserver, resource_tracker, spawn
from typing import Any

INTERRUPTS = {signal.SIGINT, signal.SIGTERM}


class Popen(popen_forkserver.Popen):
    """How a process is started that "spawn" would start."""

    def _launch(self, process_obj: Any) -> None:
        self._fds += [1, 2]  # the first of those that the process inherits
        super()._launch(process_obj)


def preparation_data(name: str, original: Any = spawn.get_preparation_data) -> dict[str, Any]:
    """What such a process is told first."""
    ignored = {number for number in INTERRUPTS if signal.getsignal(number) == signal.SIG_IGN}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    data = {**original(name), "inherited": (dict(os.environ), blocked, ignored)}
    if data.get("init_main_from_name", "").startswith("pytest"):
        del data["init_main_from_name"]
    return data


def prepare(data: dict[str, Any], original: Any = spawn.prepare) -> None:
    """Become the process that was asked for."""
    environment, blocked, ignored = data.pop("inherited")
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(forkserver.get_inherited_fds()[number - 1], number)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    tempfile.tempdir = None
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    original(data)


def listen(name: str) -> socket.socket:
    """A socket of that name, for :func:`serve`."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{name}")
    listener.listen()
    return listener


def serve(listener: socket.socket, alive: int) -> None:
    """Fork such processes, until the other end of the pipe is closed.

    Only the main thread may run.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)  # a group's are not for this one
    spawn.prepare = prepare
    with contextlib.suppress(SystemExit):
        forkserver.main(listener.detach(), alive, [])


def serve_a_session(name: str) -> None:
    """Serve a process that isn't this one's parent, until this one is killed."""
    listener = listen(name)
    print("ready", flush=True)
    serve(listener, use(name))


def use(name: str) -> int:
    """Have that server fork what this process, and what it forks, would spawn.

    Returns:
        the end of a pipe that is closed when all of them have ended.
    """
    server = forkserver._forkserver  # type: ignore[attr-defined]
    alive, server._forkserver_alive_fd = os.pipe()
    server._forkserver_address = f"\0{name}"
    server.ensure_running = resource_tracker.ensure_running
    spawn.get_preparation_data = preparation_data
    context.SpawnProcess._Popen = staticmethod(Popen)  # type: ignore[attr-defined]
    return alive
