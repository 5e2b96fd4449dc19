"""The helper that runs tests on several processes: what it returns, and that failures surface."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import remove_leftovers, run


def rank_sum(value: torch.Tensor) -> tuple[torch.Tensor, str]:
    total = value * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total, f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']} {os.environ['PROCESSES_TEST']}"


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("the cause")
    dist.barrier()


def sleep_on_first_rank() -> None:
    if dist.get_rank() == 0:
        time.sleep(600)


@pytest.mark.world_size(2)
def test_results_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCESSES_TEST", "passed on")
    results = run(2, rank_sum, torch.tensor([1.0, 2.0]))
    assert [text for _, text in results] == ["0/2 passed on", "1/2 passed on"]
    for total, _ in results:
        assert total.tolist() == [3.0, 6.0]


@pytest.mark.world_size(2)
def test_a_failing_rank_is_an_error_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*the cause"):
        run(2, fail_on_last_rank)


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_rank_that_hangs_is_ended() -> None:
    with pytest.raises(RuntimeError, match=r"still ran after 4 s"):
        run(2, sleep_on_first_rank, timeout=4)


def test_semaphores_of_the_dead_go_and_those_of_the_living_stay() -> None:
    import joblib  # noqa: F401  # names semaphores

    spawn = multiprocessing.get_context("spawn")
    mine = spawn.Lock()
    if not (child := os.fork()):
        kept = spawn.Lock()
        os._exit(not kept)
    os.waitpid(child, 0)
    names = "sem.loky-{}-*"
    assert len([*Path("/dev/shm").glob(names.format(child))]) == 1
    remove_leftovers()
    assert not [*Path("/dev/shm").glob(names.format(child))]
    assert Path(f"/dev/shm/sem.{mine._semlock.name.strip('/')}").exists()
