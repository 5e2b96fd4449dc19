"""The command line as a person meets it: quick, one line, said once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import PRETRAIN

HERE = """
import sys
from alignclip.command import main
try:
    main(sys.argv[1:])
finally:
    print("composer" in sys.modules, "torch" in sys.modules)
"""


def call(*arguments: str | Path, rank: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HERE, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"LOCAL_RANK": str(rank)}, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lr=1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["--lr=1"], "write 'lr=1', without dashes"),
        (["-n", "2"], "override '-n'"),
    ],
)
def test_a_typo_is_one_line_before_anything_large_is_imported(arguments: list[str], says: str) -> None:
    done = call(PRETRAIN.parent / "yamls" / "alignclip.yaml", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "False False\n"


def test_help_shows_examples() -> None:
    done = call("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert done.stdout.endswith("False False\n")


def test_other_processes_of_the_machine_wait_for_the_first_to_speak() -> None:
    """The launcher ends them meanwhile; where the first one is well, they speak for themselves."""
    start = time.monotonic()
    done = call("nowhere.yaml", rank=1)
    assert time.monotonic() - start > 5
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
