"""A rank or a data worker that dies or hangs: the others end in time and say why, nothing of the
run is left, and the same command goes on.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from evaluations import encoder_of, small_model
from recorded_runs import RecordedRun
from runs import write_set
from torch.utils.data import DataLoader, Dataset, TensorDataset

from alignclip.data import workers
from alignclip.errors import RANK_LOST, UserError, WorkerDiedError

BOUND = 60.0  # seconds within which all ends; the launcher alone waits for 30
DIST_TIMEOUT = 8.0
SLOWLY = {"ALIGNCLIP_TEST_STEP_SECONDS": "0.2"}
WHO = r"rank {} \(process {} on \S+\)"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "set"
    write_set(str(folder))
    return folder


def workers_of(rank: psutil.Process) -> list[psutil.Process]:
    return [child for child in rank.children() if child.name() == "pt_data_worker"]


def stop_workers(rank: psutil.Process) -> None:
    for worker in workers_of(rank):
        worker.suspend()


def kill_beside_a_worker_that_hangs(rank: psutil.Process) -> None:
    workers_of(rank)[0].suspend()
    rank.kill()


def kill_worker(rank: psutil.Process) -> None:
    workers_of(rank)[0].kill()


DIED = r"trains batch \d+: the ranks have lost {who}, which has died or stands still: its last sign"
NO_ANSWER = r"trains batch \d+: rank 0 doesn't answer at 127\.0\.0\.1:\d+: it has ended or stands"
WAITS = r"the ranks have lost {who}, which waits for the data of batch \d+ since \d+ s: look at its"
OF_WORKER = r"error: .*data worker \d+ of rank {} on \S+ was killed; .*data.num_workers"
MORE = pytest.mark.full


@pytest.mark.slow
@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("strike", "number", "hangs", "says"),
    [
        (kill_beside_a_worker_that_hangs, 1, False, DIED),
        (kill_worker, 1, False, OF_WORKER.format(1)),
        pytest.param(psutil.Process.kill, 0, False, NO_ANSWER, marks=MORE),
        pytest.param(kill_worker, 0, False, OF_WORKER.format(0), marks=MORE),
        pytest.param(psutil.Process.suspend, 1, True, DIED, marks=MORE),
        pytest.param(psutil.Process.suspend, 0, True, NO_ANSWER, marks=MORE),
        pytest.param(stop_workers, 1, True, WAITS, marks=MORE),
        pytest.param(stop_workers, 0, True, WAITS, marks=MORE),
    ],
    ids=["killed-1", "worker-killed-1", "killed-0", "worker-killed-0", "stopped-1", "stopped-0",
        "workers-stopped-1", "workers-stopped-0"],
)  # fmt: skip
def test_the_others_end_and_say_why(
    dataset: Path,
    tmp_path: Path,
    strike: Callable[[psutil.Process], None],
    number: int,
    hangs: bool,
    says: str,
) -> None:
    settings = {"processes": 2, "env": SLOWLY}
    run = RecordedRun(
        tmp_path, str(dataset), str(tmp_path / "saved"), f"dist_timeout={DIST_TIMEOUT}", **settings
    )
    process = run.launch()
    try:
        run.wait_for(lambda: len(run.numbers()) >= 7, process)
        everyone = psutil.Process(process.pid).children(recursive=True)
        struck = sorted(psutil.Process(process.pid).children(), key=lambda one: one.pid)[number]
        strike(struck)
        began = time.monotonic()
        status = process.wait(BOUND + DIST_TIMEOUT * hangs)
        assert time.monotonic() - began > DIST_TIMEOUT * hangs
        # Composer's launcher ends as rank 0 does
        killed = number == 0 and strike in (psutil.Process.kill, psutil.Process.suspend)
        assert (status == RANK_LOST) is not killed, run.output()
        assert not psutil.wait_procs([one for one in everyone if is_ours(one)], timeout=10)[1]
    finally:
        process.end()
    who = WHO.format(number, struck.pid)
    assert re.search(says.format(who=who), run.output()), run.output()
    assert "Traceback" not in run.output()
    goes_on = run.run("max_duration=12ba")
    assert "goes on after batch 5, from the latest checkpoint" in goes_on
    assert run.numbers()[-1] == 11


def is_ours(process: psutil.Process) -> bool:
    """Not one that the tests' server has made beside a rank, which strikes stop, too."""
    try:
        return process.status() != psutil.STATUS_STOPPED or process.name() == "pt_data_worker"
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.world_size(2)
def test_ranks_whose_launcher_is_killed_save_and_end(dataset: Path, tmp_path: Path) -> None:
    settings = {"processes": 2, "env": SLOWLY}
    run = RecordedRun(
        tmp_path, str(dataset), str(tmp_path / "saved"), "save_interval=1000ba", **settings
    )
    process = run.launch(really=True)
    try:
        run.wait_for(lambda: len(run.numbers()) >= 3, process)
        everyone = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        assert not psutil.wait_procs(everyone, timeout=BOUND)[1], run.output()
    finally:
        process.signal_group(signal.SIGKILL)
    assert "stopped by a signal after batch" in run.output()
    assert len(run.checkpoints()) == 1


KILLED = "DataLoader worker (pid 7) is killed by signal: {}. "


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (RuntimeError(KILLED.format("Bus error")), UserError, "ran out of shared memory; /dev/shm"),
        (
            RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)"),
            UserError,
            "ran out of shared memory; /dev/shm has",
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>"),
            UserError,
            "ran out of shared memory; /dev/shm has",
        ),
        (RuntimeError(KILLED.format("Killed")), WorkerDiedError, "data worker 7 of rank 0 on "),
        (
            RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
            WorkerDiedError,
            "data worker 7, 8 of rank 0 on ",
        ),
        (
            RuntimeError(KILLED.format("Segmentation fault")),
            WorkerDiedError,
            " died of a signal (Segmentation fault): data.num_workers=0 shows",
        ),
        (RuntimeError("CUDA out of memory"), RuntimeError, "CUDA"),
        (OSError(28, "No space left on device", "/runs/x.pt"), OSError, "/runs/x.pt"),
    ],
)
def test_the_death_of_a_data_worker_in_words(error: Exception, expected: Any, says: str) -> None:
    with pytest.raises(expected, match=re.escape(says)), workers.deaths_explained():
        raise error


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=type
)
def test_a_death_that_is_first_seen_as_a_broken_connection(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SEEN_WITHIN", 0.1)
    with pytest.raises(type(error)), workers.deaths_explained():
        raise error  # of something else: no worker is dead

    def fail() -> None:
        raise RuntimeError(KILLED.format("Killed"))

    monkeypatch.setattr(workers._utils.signal_handling, "_error_if_any_worker_fails", fail)
    with pytest.raises(WorkerDiedError, match="was killed; "), workers.deaths_explained():
        raise error


def test_a_container_that_was_out_of_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 2\noom_kill 1\n", "utf-8")
    monkeypatch.setattr(workers, "MEMORY_EVENTS", events)
    said = "this container has been out of memory"
    with pytest.raises(WorkerDiedError, match=said), workers.deaths_explained():
        raise RuntimeError(KILLED.format("Killed"))


class Deadly(Dataset):  # type: ignore[type-arg]
    """Samples whose worker is killed at the third one."""

    def __init__(self, size: int, number: int = signal.SIGKILL) -> None:
        self.size, self.signal = size, number

    def __len__(self) -> int:
        return 4

    def __getitem__(self, at: int) -> tuple[torch.Tensor, int]:
        if at == 2:
            time.sleep(0.3)  # the others have been sent
            os.kill(os.getpid(), self.signal)
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), at


def test_a_worker_that_is_killed_in_an_evaluation_is_named() -> None:
    encoder = encoder_of(small_model(), batch_size=1)
    with pytest.raises(UserError, match=r"data worker \d+ of rank 0 on \S+ was killed; "):
        encoder.images(Deadly(encoder.image_size), num_workers=1)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, "was killed; "),
        (signal.SIGSEGV, r"died of a signal \(Segmentation fault\): "),
    ],
    ids=["SIGKILL", "SIGSEGV"],
)
@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_death_that_goes_unheard_is_named(
    number: int, says: str, pins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = "_error_if_any_worker_fails"
    monkeypatch.setattr(workers._utils.signal_handling, silent, lambda: None)
    pin = "pin_memory"  # takes long enough for the worker to die before its next batch is fetched
    monkeypatch.setattr(workers._utils.pin_memory, pin, lambda data, _: time.sleep(1) or data)
    pinning = {"pin_memory": True, "pin_memory_device": "none"} if pins else {}
    batches: Any = iter(DataLoader(Deadly(8, number), num_workers=1, prefetch_factor=3, **pinning))
    (worker,) = batches._workers
    worker.join(20)
    if pins:
        batches._pin_memory_thread.join(20)
    monkeypatch.setattr(worker, "is_alive", lambda: True)  # as it was a moment before
    with (
        pytest.raises(WorkerDiedError, match=f"data worker {worker.pid} of rank 0 on .* {says}"),
        workers.deaths_explained(),
    ):
        list(batches)


def read(**settings: Any) -> Any:
    """The batches of a loader whose workers live on."""
    return iter(DataLoader(TensorDataset(torch.zeros(8)), persistent_workers=True, **settings))


@pytest.mark.parametrize("pins", [False, True])
def test_a_process_whose_command_has_failed_can_load_again(pins: bool) -> None:
    pinning = {"pin_memory": True, "pin_memory_device": "none"} if pins else {}
    batches = read(num_workers=2, **pinning)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(ValueError, match="of the run"), workers.killed_by_a_failure():
        raise ValueError("of the run")
    for worker in batches._workers:
        worker.join(20)
        assert worker.exitcode == -signal.SIGKILL
    if pins:
        batches._pin_memory_thread.join(20)
        assert not batches._pin_memory_thread.is_alive()
    handling = workers._utils.signal_handling
    handling._set_worker_pids(id(batches), ())  # refused where PyTorch still knows the iterator
    handling._remove_worker_pids(id(batches))
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert len(list(DataLoader(range(4), num_workers=1))) == 4  # type: ignore[arg-type]
    with pytest.raises(WorkerDiedError), workers.deaths_explained():
        list(DataLoader(Deadly(8), num_workers=1))


def test_a_worker_that_dies_while_all_are_killed_hides_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = read(num_workers=1), read(num_workers=1)
    objects = gc.get_objects

    def meanwhile() -> list[Any]:
        (worker,) = second._workers
        worker.kill()
        worker.join(20)
        return objects()

    monkeypatch.setattr(workers.gc, "get_objects", meanwhile)
    with pytest.raises(ValueError, match="of the run"), workers.killed_by_a_failure():
        raise ValueError("of the run")
    (worker,) = first._workers
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL
