from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_set

from alignclip import shared_memory
from alignclip.shared_memory import NOTE, SHM

pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="shared memory is not a folder here")

HOLDER = """
import sys, time
from alignclip import shared_memory
from alignclip.config import DataConfig, StreamConfig
from alignclip.data import ImageTextDataset
config = DataConfig(streams={"a": StreamConfig(local=sys.argv[1])}, num_canonical_nodes=1)
shared_memory.remove_stale()
dataset = ImageTextDataset(config, batch_size=4, image_size=32, context_length=20, semantic=False)
shared_memory.claim(dataset._shm_prefix_int)
print(dataset._shm_prefix_int, flush=True)
sys.stdin.readline()
"""


def hold(folder: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def segments(prefix: int) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"{prefix:06}_*"))


def test_the_dead_are_buried_and_the_living_left_alone(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"), 8)
    dead, dead_prefix = hold(tmp_path / "set")
    alive, alive_prefix = hold(tmp_path / "set")
    try:
        assert dead_prefix != alive_prefix
        dead.kill()
        dead.wait()
        left, used = segments(dead_prefix), segments(alive_prefix)
        assert len(left) > 4, "a killed process leaves its segments"
        assert dead_prefix in shared_memory.remove_stale()
        assert segments(dead_prefix) == []
        assert segments(alive_prefix) == used
        alive.communicate("end\n", timeout=60)
        assert alive.returncode == 0
        assert segments(alive_prefix) == [], "one that ends leaves nothing, not even its note"
    finally:
        for process in (dead, alive):
            process.kill()


def test_processes_of_another_container_are_not_judged() -> None:
    note = SHM / f"999999_{NOTE}"
    note.write_text(json.dumps({"pid": 2**22 + 1, "started": 1, "namespace": "pid:[1]"}))
    try:
        assert 999999 not in shared_memory.remove_stale()
        assert note.exists()
    finally:
        note.unlink()


def test_a_process_number_that_was_given_again_is_another_process() -> None:
    identity = shared_memory._identity(os.getpid())
    assert identity is not None
    note = SHM / f"999998_{NOTE}"
    note.write_text(json.dumps(identity | {"started": 0}))
    assert 999998 in shared_memory.remove_stale()
