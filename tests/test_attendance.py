"""Signs of life that are no reason to end a run which is well."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch.distributed as dist

from alignclip.ranks import rank
from alignclip.runtime import attendance, distributed
from alignclip.training.delivery import Delivery
from alignclip.training.saver import CheckpointSaver
from alignclip.training.spent import Stopwatch

TIMEOUT = 2.0


class Roll:
    """An attendance of one rank, whose seconds are short, and the end of whose process is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ended = threading.Event()
        self.slept = 0.0
        self.serve(0)
        clock = SimpleNamespace(monotonic=lambda: time.monotonic() + self.slept)
        short = {"BEAT": 0.05, "MISSED_AFTER": 0.5, "GRACE": 0.5, "time": clock}
        for name, value in short.items():
            monkeypatch.setattr(attendance, name, value)
        monkeypatch.setattr(attendance.os, "_exit", self._exit)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(self.store.port))
        self.here = attendance.Attendance(TIMEOUT)

    def serve(self, port: int) -> None:
        self.store: Any = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

    def fail(self) -> None:
        """As another rank does."""
        self.store.set(self.here._prefix + attendance.FAILED, "rank 1 has failed")

    def _exit(self, status: int) -> None:
        self.ended.set()
        self.here.end()


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Iterator[Roll]:
    roll = Roll(monkeypatch)
    yield roll
    roll.here.end()
    time.sleep(0.2)  # before BEAT is long again


def test_a_process_ends_where_another_has_failed(roll: Roll) -> None:
    roll.fail()
    assert roll.ended.wait(10)


def test_a_save_and_its_upload_end_before_the_process(
    roll: Roll, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    going_on, arrived = threading.Event(), threading.Event()
    folder = SimpleNamespace(uri=str(tmp_path), remote="s3://b", bring=lambda *_: going_on.wait(20))
    monkeypatch.setattr("alignclip.training.delivery.write_checkpoint", lambda *_: roll.fail())
    Delivery(folder).save({}, "x.pt", arrived.set)  # type: ignore[arg-type]
    assert not roll.ended.wait(2 * attendance.GRACE)
    going_on.set()
    assert roll.ended.wait(10)
    assert arrived.is_set()


def test_a_save_that_hangs_is_waited_for_as_long_as_ranks_are(roll: Roll) -> None:
    with attendance.unhurried():
        roll.fail()
        assert roll.ended.wait(10)


def test_a_process_that_was_stopped_goes_on(roll: Roll, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = threading.Event()
    monkeypatch.setattr(roll.here, "_beat", talk.wait)  # the store answers a moment later
    time.sleep(0.2)
    roll.slept = 10 * TIMEOUT
    assert not roll.ended.wait(0.3)
    talk.set()
    assert not roll.ended.wait(0.3)


def test_a_connection_that_breaks_is_made_anew(roll: Roll) -> None:
    port = roll.store.port
    del roll.store
    time.sleep(0.3)
    roll.serve(port)
    assert not roll.ended.wait(TIMEOUT + 2 * attendance.GRACE)
    roll.fail()
    assert roll.ended.wait(10)


def wait_for_an_upload(seconds: float, longest_wait: float) -> float:
    """Wait as at a run's end, with ranks that wait less long for one another."""
    dist.destroy_process_group()
    distributed.join_ranks("gloo", longest_wait)
    saver = object.__new__(CheckpointSaver)
    saver.watch, saver._on_their_way = Stopwatch("checkpoint"), []
    if rank() == 0:
        upload: Future[None] = Future()
        saver._on_their_way.append(upload)
        threading.Timer(seconds, upload.set_result, [None]).start()
    began = time.monotonic()
    saver.fit_end(None, None)  # type: ignore[arg-type]
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_an_upload_at_the_end_may_take_longer_than_ranks_are_waited_for() -> None:
    assert min(processes.run(2, wait_for_an_upload, 6.0, 4.0)) > 5


def open_files_after(action: Callable[[], None], soft: int) -> tuple[int, int]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    action()
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_a_process_may_open_a_connection_to_each_of_many_ranks() -> None:
    soft, hard = processes.call(open_files_after, distributed.allow_many_connections, 256)
    assert soft == min(hard, distributed.OPEN_FILES)
