"""Threads of PyTorch's operators on CPUs that a process doesn't have for itself.

A thread of libgomp that waits for the others keeps its core busy. Where the cores are shared — with
other jobs, with the run's own data workers, or because a container may use fewer than it sees — the
threads that have work wait for those cores, and a step takes several times as long. See
docs/performance.md.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def set_thread_defaults() -> None:
    """Have waiting threads sleep, and give a rank its share of cores; a user's settings stay.

    PyTorch reads the variables when it is imported. Child processes inherit them.
    """
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "OMP_NUM_THREADS" not in os.environ:
        ranks = _integer(os.environ.get("LOCAL_WORLD_SIZE", "1")) or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, available_cores() // ranks))


def available_cores() -> int:
    """Count the cores that this process may use: its affinity, bounded by its container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _quota() -> float | None:
    """Read how many cores' time the container may use; None where there is no limit.

    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html (``cpu.max``), and version 1's
    ``cpu.cfs_quota_us``.
    """
    try:
        if (file := CGROUP / "cpu.max").is_file():
            used, period = file.read_text(encoding="utf-8").split()
        else:
            folder = CGROUP / "cpu"
            used = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    quota, whole = _integer(used), _integer(period)
    return quota / whole if quota and whole and quota > 0 else None


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:  # "max", or what somebody has typed
        return None
