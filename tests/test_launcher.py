"""Variables that launchers set, and those that they leave behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import PRETRAIN, TIMEOUT, write_config, write_set

from alignclip.errors import UserError
from alignclip.runtime import launcher


def variables(text: str) -> dict[str, str]:
    """``A=1 B=2`` → a dict."""
    return dict(pair.split("=") for pair in text.split())


WHOLE = variables(
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 NODE_RANK=0 MASTER_ADDR=127.0.0.1 "
    "MASTER_PORT=29499"
)


def clean(**more: str) -> dict[str, str]:
    """The environment without any launcher's variables, and with these."""
    names = (*launcher.RANK_NUMBERS, *launcher.MEETING)
    return {k: v for k, v in os.environ.items() if k not in names} | more


@pytest.mark.parametrize(
    "given",
    [
        "",
        "WORLD_SIZE=1",
        "RANK=0",
        "LOCAL_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=1",
        "WORLD_SIZE= RANK=",
        "WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 NODE_RANK=0",
        "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_NODEID=0",  # a batch script
        "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0 SLURM_NODEID=0",
        "OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0",
    ],
)
def test_what_says_a_single_process_is_one(given: str) -> None:
    environ = variables(given)
    launcher.settle(environ)
    assert environ.get("WORLD_SIZE", "1") == "1"
    assert "" not in environ.values()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (
            variables("WORLD_SIZE=2 RANK=0"),
            "LOCAL_RANK, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT are not set; "
            "if an earlier job or launcher has left them: unset RANK WORLD_SIZE, for a single "
            "process; for several: composer -n 2",
        ),
        (variables("WORLD_SIZE=8"), "WORLD_SIZE=8: that is one of 8 processes"),
        (variables("RANK=3"), "RANK=3 contradict"),
        (variables("LOCAL_RANK=1"), "unset LOCAL_RANK"),
        (variables("LOCAL_WORLD_SIZE=4"), "unset LOCAL_WORLD_SIZE"),
        (variables("WORLD_SIZE=0"), "contradict"),
        (variables("WORLD_SIZE=two"), "WORLD_SIZE=two is no whole number"),
        (variables("WORLD_SIZE=-1"), "unset WORLD_SIZE"),
        (WHOLE | {"RANK": "2"}, "contradict"),
        (WHOLE | {"LOCAL_RANK": "2"}, "contradict"),
        (WHOLE | {"MASTER_PORT": "x"}, "MASTER_PORT=x"),
        ({k: v for k, v in WHOLE.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
    ],
)
def test_variables_that_are_left_over_are_named_in_one_line(
    environ: dict[str, str], says: str
) -> None:
    with pytest.raises(UserError) as error:
        launcher.settle(dict(environ), patience=0)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_torchruns_variables_are_enough() -> None:
    environ = {k: v for k, v in WHOLE.items() if k != "NODE_RANK"} | {
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    launcher.settle(environ | {"TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "1"})
    launcher.settle(environ)
    assert environ["NODE_RANK"] == "1"


def test_mpiruns_variables_are_enough() -> None:
    open_mpi = [f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")]
    for names in (open_mpi, ["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"]):
        environ = dict(zip(names, ("4", "3", "1", "0"), strict=True))
        with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT are not set"):
            launcher.settle(environ)
        environ |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
        launcher.settle(environ)
        assert [environ[name] for name in launcher.RANK_NUMBERS] == ["3", "4", "0", "1", "3"]
        alone = dict(zip(names, ("2", "1", "2", "1"), strict=True))
        with pytest.raises(UserError, match="no other one runs"):
            launcher.settle(alone, patience=0)
        assert alone["MASTER_ADDR"] == "127.0.0.1"


def test_sruns_variables_are_enough() -> None:
    step = variables(
        "SLURM_STEP_NUM_TASKS=3 SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_NODEID=2 SLURM_JOB_ID=77 "
        "SLURM_STEP_TASKS_PER_NODE=1(x3) SLURM_STEP_NODELIST=gpu-a[007-009],gpu-b1"
    )
    environ = dict(step)
    launcher.settle(environ)
    assert [environ[name] for name in launcher.RANK_NUMBERS] == ["2", "3", "0", "1", "2"]
    assert environ["MASTER_ADDR"] == "gpu-a007"
    other = step | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    launcher.settle(other)
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]
    under_composer = WHOLE | step | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "NODE_RANK": "1"}
    launcher.settle(under_composer)
    assert under_composer["RANK"] == "1"
    assert [launcher._slurm_counts(t) for t in ("2(x3),1", "4", "")] == [[2, 2, 2, 1], [4], []]


def test_processes_of_one_launcher_see_one_another() -> None:
    environ = dict(WHOLE, MASTER_PORT=str(free_port()))
    with pytest.raises(
        UserError, match=r"one of 2 processes of this machine, and no other one runs; if an earlier"
    ):
        launcher.settle(dict(environ), patience=0)
    with sleeper(dict(environ, LOCAL_RANK="0", RANK="0")):
        launcher.settle(environ, patience=60)
        assert launcher.siblings(environ) == 2


class sleeper:
    """A process that only waits, with a launcher's variables."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ

    def __enter__(self) -> None:
        code = "import time; time.sleep(600)"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", code], env=os.environ | self.environ
        )

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_set(str(tmp_path / "set"), count=48)
    return write_config(tmp_path, str(tmp_path / "set"), "runs/{run_name}")


@pytest.mark.slow
def test_torchrun_trains_on_two_processes(tiny: Path) -> None:
    torchrun = f"-m torch.distributed.run --nproc_per_node 2 --master_port {free_port()}"
    settings = "run_name=elastic max_duration=2ba scheduler.t_warmup=1ba data.num_workers=0"
    done = subprocess.run(
        [sys.executable, *torchrun.split(), str(PRETRAIN), str(tiny), *settings.split()],
        cwd=tiny.parent,
        env=clean(OMP_NUM_THREADS="1"),
        capture_output=True,
        encoding="utf-8",
        timeout=2 * TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 × cpu" in done.stdout


WAITING = """
import sys
from alignclip.runtime import distributed
distributed.SECONDS_UNTIL_TOLD = 0.5
distributed.join_ranks("gloo", float(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_says_for_whom_and_ends_on_a_signal(number: signal.Signals) -> None:
    port = str(free_port())
    environ = clean(**dict(WHOLE, MASTER_PORT=port, RANK="0", LOCAL_RANK="0"))
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "600"],
        env=environ,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    try:
        assert process.stderr is not None
        line = until(process.stderr.readline, lambda text: "waits for the others" in text)
        assert (
            f"process 0 of 2 (numbers begin at 0) waits for the others at 127.0.0.1:{port}" in line
        )
        assert "of 2 on this machine 1 run" in line
        process.send_signal(number)
        assert process.wait(60) == -number
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_others_that_do_not_come_end_the_wait_with_one_line() -> None:
    body = "\n".join(f"    {line}" for line in WAITING.splitlines())
    code = f"from alignclip.errors import one_line_errors\nwith one_line_errors():\n{body}"
    environ = clean(**dict(WHOLE, MASTER_PORT=str(free_port()), RANK="0", LOCAL_RANK="0"))
    done = subprocess.run(
        [sys.executable, "-c", code, "2"],
        env=environ,
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "error: the processes of this run can't meet at 127.0.0.1:"
    )


def until(read: Callable[[], str], condition: Callable[[str], bool]) -> str:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        line = read()
        assert line, "ended without saying it"
        if condition(line):
            return line
    raise AssertionError("waited too long")
