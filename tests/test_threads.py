"""Threads on shared CPUs: waiting threads sleep, a rank takes its share, a user's settings stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignclip.runtime import threads

CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not imported torch, and whose user has set nothing."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the function sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "CGROUP", Path("/nowhere"))
    return monkeypatch


@pytest.mark.parametrize(
    ("ranks", "expected"), [(None, CORES), ("1", CORES), ("64", 1), ("x", CORES)]
)
def test_a_rank_takes_its_share(
    ranks: str | None, expected: int, fresh: pytest.MonkeyPatch
) -> None:
    if ranks:
        fresh.setenv("LOCAL_WORLD_SIZE", ranks)
    threads.set_thread_defaults()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == str(expected)


def test_a_users_settings_stay(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("OMP_WAIT_POLICY", "ACTIVE")
    fresh.setenv("OMP_NUM_THREADS", "7")
    threads.set_thread_defaults()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("ACTIVE", "7")


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "?\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_container_may_use_fewer_cores_than_it_sees(
    files: dict[str, str], quota: int | None, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    fresh.setattr(threads, "CGROUP", tmp_path)
    fresh.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert threads.available_cores() == (quota or 16)


def test_commands_set_them_before_torch_is_imported() -> None:
    code = "import sys; from alignclip.runtime.arguments import read_arguments\n"
    code += "read_arguments(['a.yaml'], 'x', '', '')\n"
    code += "import os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    bare = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["PASSIVE", "False"]
