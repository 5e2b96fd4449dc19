"""A process that has imported the stack, and forks the commands of the tests: ``python
tests/warm_server.py SOCKET``.

Importing the stack takes ten seconds, a fork a few milliseconds. Each command runs as the
interpreter would run it: in a session, a folder and an environment of its own, with ``__main__``,
``sys.argv`` and an exit status. The ranks of ``composer`` are forked by the launcher, and what a
command starts by multiprocessing's "spawn" is forked from a copy of the command that was made
before the command began. Nothing of alignclip is imported before the fork.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import uuid
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn

import spawned
from s3 import share_descriptions

STACK = (
    "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torchvision", "composer",
    "composer.cli.launcher", "streaming", "open_clip", "timm", "boto3", "pyarrow.parquet",
    "scipy.stats", "sklearn.linear_model", "matplotlib.pyplot", "sentence_transformers",
)  # fmt: skip
OUTLIVES = "ALIGNCLIP_TEST_OUTLIVES"  # set: ranks outlive their launcher, as real ones do
PR_SET_PDEATHSIG, MADV_COLLAPSE = 1, 25
HUGE = 2**21  # bytes of a page


@dataclass(frozen=True)
class Request:
    """What a client wants to run.

    Attributes:
        command: ``python script.py …``, ``python -m module …``, ``python -c code …`` or ``composer
            …``, as words.
        cwd, environment, path: of the process; ``path`` is its ``sys.path``.
        stdout, stderr: files that its output is appended to.
        spawns: whether it may start processes by multiprocessing's "spawn".
    """

    command: list[str]
    cwd: str
    environment: dict[str, str]
    path: list[str]
    stdout: str
    stderr: str
    spawns: bool = True


def serve(address: str) -> None:
    """Fork a process for each connection's request.

    Answer with its number, and its exit status once it has ended.
    """
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the test session's
    for name in STACK:
        importlib.import_module(name)
    share_descriptions()
    os.fsync = lambda _: None  # no test takes the power from the disk
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of what they share
    use_huge_pages()
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    running: dict[int, Connection] = {}

    def end_all(*_: object) -> None:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os._exit(0)

    signal.signal(signal.SIGTERM, end_all)
    with Listener(address, "AF_UNIX", backlog=64) as listener:
        door = listener._listener._socket  # type: ignore[attr-defined]
        while True:
            ready = wait([door, woken, *running.values()])
            if woken in ready:
                os.read(woken, 4096)
                reap(running)
            for pid, connection in running.items():
                if connection in ready:  # the client is gone, and nothing may outlive it
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
            if door in ready:
                connection = listener.accept()
                request = connection.recv()
                pid = os.fork()
                if not pid:
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)
                    os.setsid()
                    for number in (door.fileno(), woken, wakes, connection.fileno()):
                        os.close(number)
                    for other in running.values():
                        os.close(other.fileno())
                    become(request)
                with contextlib.suppress(OSError):
                    connection.send(pid)
                running[pid] = connection


def use_huge_pages() -> None:
    """Have Linux keep this process's memory in pages of 2 MB, as far as Linux can.

    A fork copies the table of the pages, and its end removes the table: 40 ms for the 4 kB pages
    of the stack, 15 ms for larger ones. Elsewhere, or before Linux 6.1, nothing changes.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, rights, *_, inode, name = f"{line} -".split()[:6]
        if rights != "rw-p" or inode != "0" or name not in ("-", "[heap]"):
            continue
        start, end = (int(number, 16) for number in place.split("-"))
        start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if start < end:
            madvise(start, end - start, MADV_COLLAPSE)


def reap(running: dict[int, Connection]) -> None:
    """Tell each client of a process that has ended how it ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with contextlib.closing(running.pop(pid)) as connection, contextlib.suppress(OSError):
            connection.send(os.waitstatus_to_exitcode(status))


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have this process get a signal as soon as its parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def become(request: Request) -> NoReturn:
    """Run the request in this process, which was forked for it."""
    die_with_parent()
    for name, descriptor in (("/dev/null", 0), (request.stdout, 1), (request.stderr, 2)):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[:] = request.path
    if Path(request.command[0]).name == "composer":
        sys.argv = request.command
        end(launch)
    run_python(request.command[1:], request.spawns)


def run_python(arguments: list[str], spawns: bool = True) -> NoReturn:
    """Run ``python ARGUMENTS`` in this process, which was forked for it."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    output: Any = sys.stdout
    output.reconfigure(line_buffering=unbuffered, write_through=unbuffered)
    tempfile.tempdir = None
    import numpy as np
    import torch

    np.random.seed()
    torch.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    if spawns:
        fork_spawned_processes()
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    what, *rest = arguments
    if what == "-m":
        sys.argv = rest
        end(lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True))
    if what == "-c":
        sys.argv, text = ["-c", *rest[1:]], rest[0]
        sys.path.insert(0, "")
    else:
        sys.argv, text = arguments, Path(what).read_text(encoding="utf-8")
        sys.path.insert(0, str(Path(what).resolve().parent))
        main.__file__ = str(Path(what).absolute())
    end(lambda: exec(compile(text, what, "exec"), main.__dict__))


def end(program: Any) -> NoReturn:
    """Call, and end this process as the interpreter ends: threads, exit functions, the exit
    status.
    """
    status = 1
    try:
        try:
            program()
            status = 0
        finally:
            threading._shutdown()  # type: ignore[attr-defined]
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        else:
            status = error.code or 0
    except BaseException as error:
        traceback.print_exc()
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if status == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def fork_spawned_processes() -> None:
    """Have a copy of this process, made now, fork what multiprocessing would spawn."""
    name = f"alignclip-tests-{uuid.uuid4().hex}"
    with spawned.listen(name) as listener:
        alive = spawned.use(name)
        if not os.fork():
            os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
            spawned.serve(listener, alive)
            os._exit(0)
    os.close(alive)


class Rank:
    """A rank that the launcher forks: what it needs of ``subprocess.Popen``."""

    def __init__(
        self, args: list[str], stdout: Any = None, stderr: Any = None, text: bool = True
    ) -> None:
        self.args, self.stdout, self.stderr = args, stdout, stderr
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            if OUTLIVES not in os.environ:
                die_with_parent()
            for stream, descriptor in ((stdout, 1), (stderr, 2)):
                if stream is not None:
                    os.dup2(1 if stream == subprocess.STDOUT else stream.fileno(), descriptor)
            show_siblings()
            run_python(args[1:])

    def poll(self) -> int | None:
        """The exit status, once there is one."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def show_siblings() -> None:
    """Ranks look for one another in /proc, which shows the environment that a forked process began
    with.
    """
    from alignclip.runtime import launcher

    launcher.siblings = lambda environ, patience=0.0: int(environ["LOCAL_WORLD_SIZE"])


def launch() -> None:
    """Run Composer's launcher, which forks its ranks."""
    from composer.cli import launcher

    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.set_wakeup_fd(-1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    launcher.subprocess = types.SimpleNamespace(
        Popen=Rank, STDOUT=subprocess.STDOUT, CalledProcessError=subprocess.CalledProcessError
    )
    sys.exit(launcher.main())


if __name__ == "__main__":
    # under its own name, so that requests unpickle
    from warm_server import serve as main

    main(sys.argv[1])
