"""Conversion on a Dask cluster: a scheduler and workers as processes of this machine."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from conversions import COMMAND, TIMEOUT, Command, Undisturbed, download, said
from processes import WITH_US, python
from s3 import _free_port
from tarballs import three_tars

from alignclip.conversion import workers

pytestmark = pytest.mark.slow
WORKERS = 3
# before Python 3.12 the profiler can stop a worker: github.com/dask/distributed/issues/8616
NO_PROFILER = {"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "false"}


class Cluster:
    """A scheduler and workers of one thread, on 127.0.0.1.

    Nothing of it is left after the ``with`` block.

    Attributes:
        address: of the scheduler.
        scheduler, workers: processes.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        about = folder / "scheduler.json"
        shared = ["--host", "127.0.0.1", "--scheduler-file", str(about), "--no-dashboard"]
        self.workers: list[psutil.Popen] = []
        self.scheduler = self._start("dask_scheduler", "--port", "0", *shared)
        try:
            self._wait_for(about.exists)
            self.address = json.loads(about.read_text())["address"]
            own = ["--nthreads", "1", "--no-nanny", "--local-directory", str(folder)]
            self._worker = ("dask_worker", *shared, *own)
            self.mend()
        except BaseException:
            self.__exit__()
            raise

    def mend(self) -> None:
        """Start the workers that are missing."""
        alive, known = [one for one in self.workers if one.poll() is None], self._registered()
        missing = WORKERS - len(alive)
        self.workers = alive + [self._start(*self._worker) for _ in range(missing)]
        self._wait_for(lambda: self._registered() == known + missing)

    def _registered(self) -> int:
        """How many workers the scheduler has ever known."""
        return self.log().count("Register worker")

    def _start(self, what: str, *arguments: str) -> psutil.Popen:
        with (self.folder / "log.txt").open("ab") as log:
            return psutil.Popen(
                [*WITH_US, sys.executable, "-m", f"distributed.cli.{what}", *arguments],
                env={**os.environ, **NO_PROFILER, "TMPDIR": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert all(process.poll() is None for process in (self.scheduler, *self.workers)), (
                self.log()
            )
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for process in (*self.workers, self.scheduler):
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()


@pytest.fixture(scope="module")
def lasting_cluster(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("dask") / "cluster"
    with Cluster(folder) as cluster:  # its workers write to the server of ``s3``
        yield cluster


@pytest.fixture
def cluster(lasting_cluster: Cluster) -> Cluster:
    """A cluster of all its workers, whichever of them a test before has killed.

    Its scheduler is killed by the last test that asks for it.
    """
    lasting_cluster.mend()
    return lasting_cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), tars=32, samples=12)


def test_a_worker_that_is_killed_is_made_up_for(
    s3: Any, tmp_path: Path, cluster: Cluster, undisturbed: Undisturbed
) -> None:
    out = f"{s3.bucket()}/pairs"
    with Command(tmp_path / "run", undisturbed.tars, out, scheduler=cluster.address) as command:
        command.wait_for_changes(lambda: set(s3.keys(out)), 30)
        random.Random(3).choice(cluster.workers).kill()
        assert "pairs/index.json" not in s3.keys(out)
        assert said(command.finish()) == [f"{WORKERS} Dask workers at {cluster.address}"]
        assert command.workers() == []
    undisturbed.assert_same(download(s3, out, tmp_path / "got"))


def test_a_bad_input_is_one_line(s3: Any, tmp_path: Path, cluster: Cluster) -> None:
    """It is found by a worker: the command looks no further than whether it is there."""
    url = f"http://127.0.0.1:{s3.port}/secret/00000.tar"
    with Command(tmp_path / "run", url, tmp_path / "out", scheduler=cluster.address) as command:
        connected, line = said(command.finish(2))
    assert connected == f"{WORKERS} Dask workers at {cluster.address}"
    assert line == f"error: cannot fetch {url}: access denied; check the credentials"


def test_a_scheduler_that_is_killed_is_one_line(
    s3: Any, tmp_path: Path, cluster: Cluster, undisturbed: Undisturbed
) -> None:
    out = f"{s3.bucket()}/pairs"
    with Command(tmp_path / "run", undisturbed.tars, out, scheduler=cluster.address) as command:
        command.wait_for_changes(lambda: set(s3.keys(out)), 30)
        cluster.scheduler.kill()
        start = time.monotonic()
        errors = said(command.finish(2))
        assert time.monotonic() - start < 60
    gone = f"error: the Dask scheduler at {cluster.address} is gone; start it and run again"
    assert errors[-1] == gone
    with Command(tmp_path / "again", undisturbed.tars, out, processes=1) as command:
        command.finish()
    undisturbed.assert_same(download(s3, out, tmp_path / "got"))


def test_no_scheduler_is_one_line(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{_free_port()}"
    words = ["--inputs", str(three_tars(tmp_path / "in")), "--out", str(tmp_path / "out")]
    code = f"""
    import runpy, sys
    from alignclip.conversion import workers
    workers.CONNECT_TIMEOUT = 2
    sys.argv = ["cc12m.py", *{words}, "--no-semantic", "--scheduler", "{address}"]
    runpy.run_path({str(COMMAND)!r}, run_name="__main__")
    """
    start = time.monotonic()
    done = python("-c", textwrap.dedent(code))
    (line,) = said(done.stderr)
    assert line.startswith(f"error: --scheduler {address}: ")
    assert done.returncode == 2
    assert time.monotonic() - start < 90
    assert workers.CONNECT_TIMEOUT <= 60
