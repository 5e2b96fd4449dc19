"""Processes of the tests, forked from one that has imported the stack: commands, and functions on
ranks.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from multiprocessing import context
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import psutil
import spawned
from warm_server import Request

from alignclip.data import shared_memory

ADDRESS = (
    "ALIGNCLIP_TESTS_WARM_SERVER"  # the socket of the session's server, for all pytest workers
)
START_TIMEOUT = 120.0  # seconds, of the server
# so that a process ends with a test session that is killed
WITH_US = [found, "--pdeathsig", "KILL"] if (found := shutil.which("setpriv")) else []
WORK = "from processes import _work; _work()"


@cache
def warm_server() -> str:
    """Start the server that forks this session's processes, unless there is one; return its socket.

    The server ends with the process that started it, and ends whatever it has forked.
    """
    if ADDRESS not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="alignclip-tests-")
        os.environ[ADDRESS] = f"{folder.name}/socket"
        server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("warm_server.py"), os.environ[ADDRESS]],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        atexit.register(folder.cleanup)
        atexit.register(server.terminate)
    return os.environ[ADDRESS]


def _connect() -> Connection:
    deadline = time.monotonic() + START_TIMEOUT
    address = warm_server()
    while True:
        with suppress(FileNotFoundError, ConnectionRefusedError):
            return Client(address, "AF_UNIX")
        if time.monotonic() > deadline:
            raise TimeoutError("the server of warm processes does not start")
        time.sleep(0.05)


class Started:
    """A command in a session of its own; the names are those of ``subprocess.Popen``.

    Attributes:
        args: its words.
        pid: its number, and its group's.
        returncode: its exit status, once somebody has asked for it after its end.
    """

    args: list[str]
    pid: int
    returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        raise NotImplementedError

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process alone, at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the process alone to end."""
        self.send_signal(signal.SIGTERM)

    def signal_group(self, number: int) -> None:
        """Send a signal to the process and to all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def end(self) -> None:
        """End the process and all that it has started, at once."""
        self.signal_group(signal.SIGKILL)
        self.wait(30)


class Forked(Started):
    """A command that the session's server has forked.

    Args:
        command: ``python …`` or ``composer …``, as words; the server runs it as they would.
        output: a file that standard output and standard error are appended to.
        errors: another one for standard error.
        cwd, env: of the process; this one's by default.
        spawns: whether it may start processes by multiprocessing's "spawn".
    """

    def __init__(
        self,
        *command: str | Path,
        output: Path,
        errors: Path | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        spawns: bool = True,
    ) -> None:
        self.args = [str(word) for word in command]
        self._connection = _connect()
        environment = dict(os.environ) if env is None else env
        files = str(output.absolute()), str((errors or output).absolute())
        output.touch()
        self._connection.send(
            Request(self.args, str(cwd or Path.cwd()), environment, list(sys.path), *files, spawns)
        )
        self.pid = self._connection.recv()

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._connection.poll(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._connection.recv()
            self._connection.close()
        return self.returncode


class Real(Started):
    """A command as a shell starts it: for tests that are about the interpreter or the launcher.
    Arguments as above.
    """

    def __init__(
        self,
        *command: str | Path,
        output: Path,
        errors: Path | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.args = [str(word) for word in command]
        with output.open("ab") as out, (errors or output).open("ab") as err:
            self._process = subprocess.Popen(
                [*WITH_US, *self.args],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        self.returncode = self._process.wait(timeout)
        return self.returncode


def command(
    *words: str | Path,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 240.0,
) -> subprocess.CompletedProcess[str]:
    """Run ``python …`` or ``composer …`` to its end; return its status and what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = Forked(*words, output=output, errors=errors, cwd=cwd, env=env)
        try:
            status = process.wait(timeout)
        finally:
            process.end()
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in (output, errors)]
        return subprocess.CompletedProcess(process.args, status, *texts)


def python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` as :func:`command` does."""
    return command(sys.executable, *arguments, **options)


@cache
def _spawn_server() -> Forked:
    """Start the server that forks what this process would spawn."""
    name = f"alignclip-tests-{uuid.uuid4().hex}"
    output = Path(warm_server()).with_name(name)
    code = f"import spawned; spawned.serve_a_session({name!r})"
    server = Forked(sys.executable, "-c", code, output=output)
    while "ready" not in output.read_text():
        assert server.poll() is None, output.read_text()
        time.sleep(0.02)
    spawned.use(name)
    return server


def fork_what_this_process_would_spawn() -> None:
    """Have processes of multiprocessing's "spawn" forked, from the first one on."""

    def start(process: Any) -> spawned.Popen:
        _spawn_server()
        return spawned.Popen(process)

    context.SpawnProcess._Popen = staticmethod(start)  # type: ignore[attr-defined]


def remove_leftovers() -> None:
    """Remove from shared memory what dead processes have left there.

    Tests kill a process together with Python's own cleaner of shared memory, and fork processes
    that end without cleaning. Left are Streaming's segments and locks, and semaphores that
    processes were to share. joblib, once it is imported, puts the number of the process that made
    one into its name.
    """
    shared_memory.remove_stale()
    taken = {path.name.partition("_")[0] for path in shared_memory.SHM.glob("[0-9]*_*")}
    for path in Path(tempfile.gettempdir()).glob("[0-9]*_*filelock"):
        if path.name.partition("_")[0] not in taken:
            path.unlink(missing_ok=True)
    for path in shared_memory.SHM.glob("sem.*-*-*"):
        maker = path.name.split("-")[1]
        if maker.isdecimal() and not psutil.pid_exists(int(maker)):
            with suppress(OSError):  # another session's tests remove them, too
                path.unlink()


def run(n: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``fn(*args)`` on ``n`` fresh processes that form the default gloo group.

    Return their results by rank.

    ``fn`` must be a function at the top level of a module, and it, ``args`` and results must
    pickle. Each process has one thread, this process's environment, and the launcher's variables
    (RANK, WORLD_SIZE, LOCAL_RANK, ...).

    Raises:
        RuntimeError: a process raised, with its traceback, died, or didn't end within ``timeout``
            seconds. No process is left behind.
    """
    return _call(n, True, fn, args, timeout)


def call(fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Call ``fn(*args)`` in a fresh process of one thread; return its result.

    The rest is as in :func:`run`.
    """
    return _call(1, False, fn, args, timeout)[0]


def _call(
    n: int, in_group: bool, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float
) -> list[Any]:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((timeout, in_group, fn, args)))
        environment = dict(os.environ) | (_launcher_environment(n) if in_group else {})
        processes: list[Forked] = []
        try:
            for rank in range(n):
                mine = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if in_group else {}
                words = (sys.executable, "-c", WORK, folder)
                output = Path(folder, f"{rank}.output")
                processes.append(
                    Forked(*words, output=output, env=environment | mine, spawns=False)
                )
            _wait(processes, Path(folder), timeout)
            # results travel in files: tensors in a queue would live in the memory of a process that
            # has ended
            return [
                torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(n)
            ]
        finally:
            for rank, process in enumerate(processes):
                process.end()
                sys.stdout.write(Path(folder, f"{rank}.output").read_text(encoding="utf-8"))


def _wait(processes: list[Forked], folder: Path, timeout: float) -> None:
    """Until all have ended well; raise at the first that has not."""
    deadline = time.monotonic() + timeout
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                # the earliest report is the cause, the others' are of the lost connection
                for report in sorted(
                    folder.glob("*.error"), key=lambda one: one.stat().st_mtime_ns
                ):
                    of = f"rank {report.stem} of {len(processes)}"
                    raise RuntimeError(f"{of} failed:\n{report.read_text()}")
                raise RuntimeError(f"rank {rank} of {len(processes)} ended with exit status {code}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            alive = [rank for rank, code in enumerate(codes) if code is None]
            raise RuntimeError(f"ranks {alive} of {len(processes)} still ran after {timeout:.0f} s")
        time.sleep(0.02)


def _launcher_environment(n: int) -> dict[str, str]:
    """What a launcher sets alike on all ``n`` processes of a node."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    size = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "NODE_RANK": "0"}
    return size | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _work() -> None:
    """Call the function on this rank, and keep its result."""
    import torch
    import torch.distributed as dist

    folder, rank = sys.argv[1], os.environ.get("RANK", "0")
    torch.set_num_threads(1)
    try:
        timeout, in_group, fn, args = pickle.loads(Path(folder, "call").read_bytes())
        if in_group:
            # a file for the rendezvous: unlike a port, nobody else can take it meanwhile
            dist.init_process_group(
                "gloo",
                f"file://{folder}/rendezvous",
                timedelta(seconds=timeout),
                world_size=int(os.environ["WORLD_SIZE"]),
                rank=int(rank),
            )
        torch.save(fn(*args), Path(folder, f"{rank}.result"))
        if in_group:
            dist.barrier()
        sys.stdout.flush()
        # a gloo group that is destroyed can wait for a thread of its own that waits for Python's
        # lock
        os._exit(0)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        # no clean-up, which could wait for the others
        os._exit(1)
