"""Output that nobody reads any more ends no command, and changes no exit status."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from commands import COMMANDS
from processes import python
from runs import PRETRAIN, TIMEOUT, write_config, write_set

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SAYS = """
import io, subprocess, sys
from alignclip.runtime import console
console.prepare_output()
held = sys.stdout
for number in range(2000):
    print(number, "x" * 50)
print("flushed", flush=True)
print("held", file=held)
subprocess.run([sys.executable, "-c", "print('a child', flush=True)"], check=True)
print("said", file=sys.stderr)
sys.exit(3)
"""
MAIN = "import sys, importlib; sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[2:]))"


def unread(*command: str | Path, cwd: Path | None = None) -> tuple[int, str]:
    """Exit status and stderr of a command whose stdout has no reader."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, *command], stdout=write, stderr=subprocess.PIPE, text=True, cwd=cwd,
            env=ENVIRONMENT, timeout=TIMEOUT,
        )  # fmt: skip
    finally:
        os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_what_nobody_reads_goes_nowhere(unbuffered: list[str]) -> None:
    assert unread(*unbuffered, "-c", SAYS) == (3, "said\n")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>&- 2>&-"])
def test_a_command_that_is_started_without_an_output(closed: str, tmp_path: Path) -> None:
    """The first file that it opens doesn't become its standard output."""
    script = SAYS.replace(
        "sys.exit(3)",
        "open('file', 'w').close(); io.FileIO(1, 'w', False).write(b'!'); sys.exit(3)",
    )
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, script],
        capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, timeout=TIMEOUT,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "" if "2>" in closed else "said\n")
    assert done.stdout == "" if "1>" in closed else done.stdout.endswith("a child\n!")
    assert (tmp_path / "file").read_text() == ""


def test_a_terminal_that_was_closed() -> None:
    ours, theirs = pty.openpty()
    script = SAYS.replace("console.prepare_output()", "console.prepare_output(); sys.stdin.read()")
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=theirs,
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)
    _, error = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, error) == (3, "said\n")


def test_a_full_disk_is_no_reader_that_has_ended() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", SAYS], stdout=full, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_well_when_its_output_is_not_read(name: str) -> None:
    assert unread("-c", MAIN, name, "--help") == (0, "")


RUN_UNREAD = """
import os, runpy, sys
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_and_an_evaluation_that_nobody_reads_lose_nothing(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"))
    config = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    pretrain = ("-c", RUN_UNREAD, PRETRAIN, config, "run_name=a", "max_duration=6ba")
    done = python(*pretrain, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    latest = tmp_path / "runs" / "latest-rank0.pt"
    assert latest.resolve().name == "ep0-ba6-rank0.pt"
    sets = (
        "evaluators: {e: {task: gap, local: set, num_workers: 0}}\ndevice: cpu\nprecision: fp32\n"
    )
    (tmp_path / "evaluate.yaml").write_text(sets)
    for count, name in enumerate(
        ("one", "two")
    ):  # the second time, earlier results are moved aside first
        arguments = ("evaluate.yaml", f"checkpoints.{name}={latest}", "out=found")
        done = python("-c", RUN_UNREAD, ROOT / "evaluate.py", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert json.loads((tmp_path / "found" / "results.json").read_text())["complete"]
        assert len(list((tmp_path / "found").glob("earlier-*"))) == count
