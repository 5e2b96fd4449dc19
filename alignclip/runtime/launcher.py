"""The variables by which launchers tell each process of a run its number.

Composer's launcher sets all of :data:`RANK_NUMBERS` and :data:`MEETING`. torchrun, srun and mpirun
set other variables, and this module derives ours from them. Variables that an earlier job or
launcher has left in a shell would make a single process wait for others that never come: a person
is told which variables.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Mapping, MutableMapping
from typing import Any

from alignclip.errors import UserError

RANK_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
MEETING = ("MASTER_ADDR", "MASTER_PORT")  # where rank 0 waits for the others
END_TIMEOUT = 5.0  # seconds within which ranks end once one has failed
SIBLINGS_START = 10.0  # seconds within which a launcher has started all processes of a machine
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_LAUNCHERS = re.compile(r"(^|/)(composer|torchrun)$|^(composer\.cli|torch\.distributed\.run)")
# our names -> the launchers' own: Open MPI's; MPICH's and Intel MPI's
_MPI = (
    {
        "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
        "RANK": "OMPI_COMM_WORLD_RANK",
        "LOCAL_WORLD_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
        "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    {
        "WORLD_SIZE": "PMI_SIZE",
        "RANK": "PMI_RANK",
        "LOCAL_WORLD_SIZE": "MPI_LOCALNRANKS",
        "LOCAL_RANK": "MPI_LOCALRANKID",
    },
)


def settle(
    environ: MutableMapping[str, str] = os.environ, patience: float = SIBLINGS_START
) -> None:
    """Make the variables whole, or refuse them.

    Args:
        environ: of this process; what can be derived is set.
        patience: seconds to wait for the other processes of this machine to be started.

    Raises:
        UserError: variables that contradict one another, too few of them, or no other process on
            this machine.
    """
    for name in (*RANK_NUMBERS, *MEETING):
        if environ.get(name) == "":
            del environ[name]
    _from_mpi(environ)
    _from_slurm(environ)
    if "GROUP_RANK" in environ and "TORCHELASTIC_RUN_ID" in environ:  # torchrun's name of it
        environ.setdefault("NODE_RANK", environ["GROUP_RANK"])
    numbers = {name: _whole_number(environ, name) for name in RANK_NUMBERS if name in environ}
    world = numbers.get("WORLD_SIZE", 1)
    rank, local_rank = numbers.get("RANK", 0), numbers.get("LOCAL_RANK", 0)
    local_world = numbers.get("LOCAL_WORLD_SIZE", local_rank + 1 if world > 1 else 1)
    if not (
        rank < max(world, 1) and local_rank < max(local_world, 1) and 1 <= local_world <= world
    ):
        raise UserError(f"{_in_words(environ)} contradict one another; {_way_out(environ, world)}")
    if world == 1:
        return
    if {"LOCAL_WORLD_SIZE", "RANK"} <= numbers.keys() and "NODE_RANK" not in numbers:
        environ["NODE_RANK"] = str(rank // local_world)
    if missing := [name for name in (*RANK_NUMBERS, *MEETING) if name not in environ]:
        raise UserError(
            f"{_in_words(environ)}: that is one of {world} processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set; {_way_out(environ, world)}"
        )
    _whole_number(environ, "MASTER_PORT")
    if local_world > 1 and siblings(environ, patience) == 1:
        raise UserError(
            f"{_in_words(environ)}: that is one of {local_world} processes of this machine, "
            f"and no other one runs; {_way_out(environ, world)}"
        )


def siblings(environ: Mapping[str, str], patience: float = 0.0) -> int | None:
    """Count the processes of this machine that wait at the same place, this one among them.

    None where the system doesn't show them.
    """
    deadline = time.monotonic() + patience
    expected = int(environ["LOCAL_WORLD_SIZE"])
    while True:
        others = _local_processes(environ)
        found = None if others is None else len({environ["LOCAL_RANK"], *others.values()})
        if found is None or found >= expected or time.monotonic() >= deadline:
            return found
        time.sleep(0.2)


def wait_until_others_end(environ: Mapping[str, str] = os.environ) -> None:
    """Wait until the other ranks of this machine have ended, :data:`END_TIMEOUT` seconds at most.

    A launcher ends all ranks when one fails: a rank that fails lets the others finish before.
    """
    import psutil

    if {*MEETING, "WORLD_SIZE", "LOCAL_RANK"} <= environ.keys():
        psutil.wait_procs([*(_local_processes(environ) or {})], timeout=END_TIMEOUT)


def end_with_launcher() -> None:
    """Have this process get SIGTERM when the launcher that has started it dies, however that dies.

    Ranks without a launcher would train on, beside those of the next start. A process that a shell
    has started may outlive the shell.
    """
    import psutil

    try:
        words = psutil.Process(os.getppid()).cmdline()
    except psutil.Error:
        return
    if any(_LAUNCHERS.search(word) for word in words):
        signal_with_parents_death(signal.SIGTERM)


def signal_with_parents_death(number: int) -> None:
    """Have Linux send this process a signal when the process that has started it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def is_ended_by_launcher() -> bool:
    """Wait for SIGTERM, by which a launcher ends all ranks when one fails, and say whether it came.

    The wait lasts :data:`END_TIMEOUT` seconds at most.
    """
    if not hasattr(signal, "sigtimedwait"):  # macOS
        return False
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    return signal.sigtimedwait({signal.SIGTERM}, END_TIMEOUT) is not None


def _local_processes(environ: Mapping[str, str]) -> dict[Any, str] | None:
    """Find the other ranks' processes on this machine, with their LOCAL_RANK; None where hidden."""
    import psutil

    mine = {name: environ[name] for name in (*MEETING, "WORLD_SIZE")}
    found = {}
    try:
        for process in psutil.process_iter():
            try:
                theirs = process.environ()
            except psutil.Error:
                continue  # another user's, or ended
            number = theirs.get("LOCAL_RANK", environ["LOCAL_RANK"])
            if number != environ["LOCAL_RANK"] and mine.items() <= theirs.items():
                found[process] = number
    except (OSError, SystemError):
        return None
    return found


def _from_mpi(environ: MutableMapping[str, str]) -> None:
    """Derive the variables of a process that mpirun has started."""
    for names in _MPI:
        found = {ours: environ[theirs] for ours, theirs in names.items() if theirs in environ}
        if "RANK" in environ or len(found) < len(names) or found["WORLD_SIZE"] == "1":
            continue
        if found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"]:
            job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid")
            port = _port(job or str(os.getppid()))
            found |= {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        _derive(environ, found)


def _from_slurm(environ: MutableMapping[str, str]) -> None:
    """Derive the variables of a process of srun: one of a step with several tasks."""
    step = [
        environ.get(f"SLURM_{name}") for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID", "NODEID")
    ]
    if "RANK" in environ or None in step or step[0] == "1":
        return
    tasks, rank, local_rank, node = (str(value) for value in step)
    derived = {"WORLD_SIZE": tasks, "RANK": rank, "LOCAL_RANK": local_rank, "NODE_RANK": node}
    per_node = _slurm_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if int(node) < len(per_node):
        derived["LOCAL_WORLD_SIZE"] = str(per_node[int(node)])
    if first := re.match(
        r"([\w.-]+?)(?:\[(\d+)[^\]]*\])?(?:,|$)", environ.get("SLURM_STEP_NODELIST", "")
    ):
        derived["MASTER_ADDR"] = first[1] + (first[2] or "")
    job = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    _derive(environ, derived | {"MASTER_PORT": _port(job)})


def _slurm_counts(text: str) -> list[int]:
    """Return the tasks of each node: ``2(x3),1`` → [2, 2, 2, 1]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _derive(environ: MutableMapping[str, str], derived: Mapping[str, str]) -> None:
    for name, value in derived.items():
        environ.setdefault(name, value)


def _port(job: str) -> str:
    """Return a port that all processes of a job find alike."""
    return str(20000 + zlib.crc32(job.encode()) % 10000)


def _whole_number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"the environment variable {name}={text} is no whole number; unset {name}")
    return int(text)


def _in_words(environ: Mapping[str, str]) -> str:
    return " ".join(
        f"{name}={environ[name]}" for name in (*RANK_NUMBERS, *MEETING) if name in environ
    )


def _way_out(environ: Mapping[str, str], world: Any) -> str:
    names = " ".join(name for name in (*RANK_NUMBERS, *MEETING) if name in environ)
    several = f"; for several: composer -n {max(int(world), 2)} …" if int(world) < 1000 else ""
    return (
        f"if an earlier job or launcher has left them: unset {names}, for a single process{several}"
    )
