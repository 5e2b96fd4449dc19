from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path
from typing import Any

import processes
import pytest
import streaming.base.shared.memory
from composer.utils import get_device
from processes import Forked, python
from runs import wait_until, write_config, write_set
from streaming.base.shared import SharedMemory
from streaming.base.shared.prefix import _pack_locals as pack_locals

from alignclip.config.reading import load
from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data import shared_memory, streaming_memory
from alignclip.data.dataset import ImageTextDataset
from alignclip.data.shared_memory import OWNER_NOTE, SHM
from alignclip.errors import UserError
from alignclip.training.build import build_data

pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="shared memory is not a folder here")

HOLDER = """
import sys, time
from pathlib import Path
from alignclip.data import shared_memory
from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset
config = DataConfig(streams={"a": StreamConfig(local=sys.argv[1])}, num_canonical_nodes=1)
shared_memory.remove_stale()
dataset = ImageTextDataset(config, batch_size=4, image_size=32, context_length=20, semantic=False)
with dataset._cache_filelock:  # Streaming leaves its file
    pass
print(dataset._shm_prefix_int, flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.05)
"""


def hold(folder: Path) -> tuple[Forked, int]:
    """A process that has opened a set, until ``go-on`` is beside that.

    And the prefix of its memory.
    """
    output = folder.with_name(f"{uuid.uuid4()}.txt")
    words = (sys.executable, "-c", HOLDER, folder, folder.with_name("go-on"))
    process = Forked(*words, output=output)
    while not (text := output.read_text()).endswith("\n"):
        assert process.poll() is None, text
        time.sleep(0.05)
    return process, int(text)


def segments(prefix: int) -> list[str]:
    return sorted(path.name for path in SHM.glob(f"{prefix:06}_*"))


def locks_of(prefix: int) -> list[Path]:
    return [*Path(tempfile.gettempdir()).glob(f"{prefix:06}_*filelock")]


@pytest.mark.alone
def test_the_dead_are_buried_and_the_living_left_alone(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"), 8)
    dead, dead_prefix = hold(tmp_path / "set")
    alive, alive_prefix = hold(tmp_path / "set")
    try:
        assert dead_prefix != alive_prefix
        with shared_memory.lock():  # other tests beside this one clean up, too
            dead.end()  # with Python's own cleaner of shared memory
            left, used = segments(dead_prefix), segments(alive_prefix)
            assert locks_of(alive_prefix)
        assert len(left) > 4, "a killed process leaves its segments"
        shared_memory.remove_stale()
        assert segments(dead_prefix) == []
        assert segments(alive_prefix) == used
        (tmp_path / "go-on").touch()
        assert alive.wait(60) == 0
        assert not locks_of(alive_prefix)
        assert segments(alive_prefix) == [], "one that ends leaves nothing, not even its note"
    finally:
        for process in (dead, alive):
            process.end()


KILLED_EARLY = """
import os, signal, sys
from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data import streaming_memory
from alignclip.data.dataset import ImageTextDataset
register = streaming_memory.take_prefix
def killed(*arguments, **more):
    print(register(*arguments, **more)[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
streaming_memory.take_prefix = killed
stream = StreamConfig(remote=sys.argv[1], local=sys.argv[2])
config = DataConfig(streams={"a": stream}, num_canonical_nodes=1)
ImageTextDataset(config, batch_size=4, image_size=32, context_length=20, semantic=False)
"""


def open_set(remote: Path | None, local: Path) -> ImageTextDataset:
    stream = StreamConfig(remote=None if remote is None else str(remote), local=str(local))
    config = DataConfig(streams={"a": stream}, num_canonical_nodes=1)
    return ImageTextDataset(config, batch_size=4, image_size=32, context_length=20, semantic=False)


def test_a_run_that_is_killed_while_it_opens_its_set_blocks_no_other(tmp_path: Path) -> None:
    """Between the first segment and the last: Streaming looks at every shard, and waits for all
    other machines.
    """
    write_set(str(tmp_path / "set"), 8)
    killed = python("-c", KILLED_EARLY, tmp_path / "set", tmp_path / "cache")
    assert killed.returncode == -9
    prefix = int(killed.stdout)
    # Python's cleaner of shared memory outlives a process that is killed alone; kill -9 of a group
    # takes it along
    if not (SHM / f"{prefix:06}_locals").exists():
        (SHM / f"{prefix:06}_locals").write_bytes(pack_locals([str(tmp_path / "cache")], prefix))
    shared_memory.remove_stale()
    assert segments(prefix) == []
    assert open_set(tmp_path / "set", tmp_path / "cache").size == 8


def test_another_containers_memory_is_passed_over(tmp_path: Path) -> None:
    """A container that was killed and comes again has the same cache, and can't see that the old
    one is dead.
    """
    write_set(str(tmp_path / "set"), 8)
    first = open_set(tmp_path / "set", tmp_path / "cache")
    note = SHM / f"{first._shm_prefix_int}_{OWNER_NOTE}"
    owner = json.loads(note.read_text())
    note.write_text(json.dumps(owner | {"namespace": "pid:[1]"}), encoding="utf-8")
    try:
        assert open_set(tmp_path / "set", tmp_path / "cache").size == first.size
    finally:
        note.write_text(json.dumps(owner), encoding="utf-8")


SURVIVED = """
import os, signal, sys, time
from pathlib import Path
from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset
stream, folder = StreamConfig(local=sys.argv[1]), Path(sys.argv[2])
config = DataConfig(streams={"a": stream}, num_canonical_nodes=1)
dataset = ImageTextDataset(config, batch_size=4, image_size=32, context_length=20, semantic=False)
print(dataset._shm_prefix_int, flush=True)
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
def wait(said, until):
    (folder / said).touch()
    while not (folder / until).exists():
        time.sleep(0.05)
wait("survives", until="go-on")
dataset.load_state_dict(dataset.state_dict(4, False) | {"epoch": 0})
wait("loaded", until="end")
"""


def test_what_outlives_a_killed_run_leaves_the_next_one_alone(tmp_path: Path) -> None:
    """A rank that still starts while the first one is dead goes on in the middle of its epoch.

    When the last process ends, Python's cleaner removes what they have made, by name.
    """
    write_set(str(tmp_path / "set"), 8)
    words = (sys.executable, "-c", SURVIVED, tmp_path / "set", tmp_path)
    killed = Forked(*words, output=tmp_path / "output.txt")
    try:
        assert killed.wait(60) == -9
        wait_until((tmp_path / "survives").exists)
        shared_memory.remove_stale()
        dataset = open_set(tmp_path / "set", tmp_path / "cache")
        (tmp_path / "go-on").touch()
        wait_until((tmp_path / "loaded").exists)
        assert sorted(dataset) == list(range(8)), "the next run begins its epoch in the middle"
        owned = segments(dataset._shm_prefix_int)
        (tmp_path / "end").touch()
        prefix = int((tmp_path / "output.txt").read_text())
        wait_until(lambda: not segments(prefix))
        assert segments(dataset._shm_prefix_int) == owned
    finally:
        killed.end()


def test_two_runs_with_one_cache(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"), 16)
    config = load(write_config(tmp_path, str(tmp_path / "set")), ["data.num_workers=0"])
    (stream,) = config.data.streams.values()
    stream.remote, stream.local = str(tmp_path / "set"), str(tmp_path / "cache")
    first = build_data(config, get_device("cpu")).dataset
    says_so = SHM / f"{first._shm_prefix_int}_locals"
    says = rf"^data: another dataset is read through {tmp_path / 'cache'}/? \({says_so} says so; "
    with pytest.raises(UserError, match=says):
        build_data(config, get_device("cpu"))
    assert open_set(tmp_path / "set", tmp_path / "other").size == first.size
    # a set without a remote may be read by anybody
    assert len([open_set(None, tmp_path / "set") for _ in range(2)]) == 2


IDENTITY = shared_memory._identity(os.getpid()) or {}
NOT_OURS = {"pid": 2**22 + 1, "started": 1, "namespace": "pid:[1]"}


@pytest.fixture
def note() -> Iterator[Path]:
    """Where a prefix's owner is noted: one between Streaming's, which begin with 0, and ours."""
    found = SHM / f"999997_{OWNER_NOTE}"
    yield found
    for path in SHM.glob("999997_*"):
        path.unlink()


def test_a_cleaner_that_comes_late_leaves_the_next_owner_alone(note: Path) -> None:
    """Between two cleaners a new run may take the prefix that both have found dead."""
    segment = SHM / "999997_locals"
    removed: list[int] = []
    cleaner = threading.Thread(target=lambda: removed.extend(shared_memory.remove_stale()))
    with shared_memory.lock():
        note.write_text(json.dumps(IDENTITY | {"started": 0}), encoding="utf-8")
        cleaner.start()
        time.sleep(0.5)
        note.write_text(json.dumps(IDENTITY), encoding="utf-8")
        segment.write_bytes(b"taken")
    cleaner.join(60)
    assert 999997 not in removed
    assert note.exists()
    assert segment.exists()


@pytest.mark.parametrize(
    ("owner", "stays"),
    [
        (NOT_OURS, True),  # a process of another container is not judged
        (IDENTITY | {"started": 0}, False),  # a number that was given again is another process
    ],
)
def test_whose_notes_stay(note: Path, owner: dict[str, object], stays: bool) -> None:
    note.write_text(json.dumps(owner), encoding="utf-8")
    assert (999997 in shared_memory.remove_stale()) != stays
    assert note.exists() == stays


def test_a_note_of_the_next_owner_outlives_the_last_one(note: Path) -> None:
    note.write_text(json.dumps(IDENTITY | {"pid": 1, "started": 1}), encoding="utf-8")
    shared_memory._disclaim(note)
    assert note.exists()


def test_a_note_goes_though_a_lock_file_can_not(
    note: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "999997_cache_filelock").mkdir()
    note.write_text(json.dumps(IDENTITY), encoding="utf-8")
    shared_memory._disclaim(note)
    assert not note.exists()


def test_threads_that_open_memory_leave_the_resource_tracker_as_it_was(
    note: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming swaps a function of the tracker while it opens memory, in each thread."""
    streaming_memory.install_patches()
    (SHM / "999997_a").write_bytes(b"memory")
    register = resource_tracker.register
    monkeypatch.setattr(resource_tracker, "register", register)  # puts it back after a failure
    seconds = [0.4, 0.8]  # the second to begin ends last

    def slowly(*arguments: Any) -> BuiltinSharedMemory:
        time.sleep(seconds.pop(0))
        return BuiltinSharedMemory(*arguments)

    monkeypatch.setattr(streaming.base.shared.memory, "BuiltinSharedMemory", slowly)
    threads = [threading.Thread(target=SharedMemory, args=("999997_a", False)) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    multiprocessing.get_context("spawn").Lock()  # registers a semaphore meanwhile
    for thread in threads:
        thread.join(60)
    assert resource_tracker.register is register
    assert not seconds


def test_two_runs_that_start_together_take_two_prefixes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_set(str(tmp_path / name), 8)
    barrier = threading.Barrier(3)
    found: list[ImageTextDataset] = []

    def start(folder: Path) -> None:
        barrier.wait(30)
        found.append(open_set(folder, tmp_path / f"cache-{folder.name}"))

    threads = [threading.Thread(target=start, args=(tmp_path / name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len({dataset._shm_prefix_int for dataset in found}) == 3


MANY = """
import resource, sys
from alignclip.config.schema import SetConfig
from alignclip.evaluation.sets import OpenSets
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (500, most))
opened = OpenSets()
print(len([opened.open(SetConfig(local=folder)) for folder in sys.argv[1:]]))
"""


def test_many_sets_fit_into_few_open_files(tmp_path: Path) -> None:
    """Each opens the memory of all before it to find a prefix of its own.

    Kept open, 20 sets took over 2,000 files.
    """
    for i in range(20):
        write_set(str(tmp_path / f"set{i}"), 2)
    done = python("-c", MANY, *tmp_path.iterdir())
    assert (done.returncode, done.stdout) == (0, "20\n"), done.stderr


def build_on_a_rank(folder: str) -> int:
    config = load(
        write_config(Path(folder) / f"rank{os.environ['RANK']}", f"{folder}/set"),
        ["data.num_workers=0"],
    )
    return build_data(config, get_device("cpu")).dataset._shm_prefix_int


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_the_ranks_of_a_machine_have_one_prefix(tmp_path: Path) -> None:
    write_set(str(tmp_path / "set"), 32)
    first, second = processes.run(2, build_on_a_rank, str(tmp_path))
    assert first == second
