"""Whether a run says that its memory grows without end, and only then."""

from __future__ import annotations

import itertools
import mmap
import random
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from runs import write_set
from small_runs import SmallRuns

from alignclip.data.dataset import ImageTextDataset
from alignclip.training import memory

MB = 1_000_000
LEAK = 5 * MB  # bytes a batch
BATCHES = 24
held: list[mmap.mmap] = []


def leak() -> None:
    """Keep some memory, and take it from the system: a heap may have room that tests have left."""
    kept = mmap.mmap(-1, LEAK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    kept.write(LEAK * b"x")
    held.append(kept)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRuns:
    """Runs that look at each batch, and count little as a growth."""
    monkeypatch.setattr(memory, "LOOK_EVERY", 1)
    monkeypatch.setattr(memory, "LEAST", 20 * MB)
    monkeypatch.setattr(memory, "GROWN_SHARE", 0.0)
    write_set(str(tmp_path / "set"), 64)
    return SmallRuns(tmp_path, tmp_path / "set", None, f"max_duration={BATCHES}ba")


class Leaking(Callback):
    """A callback that keeps something of each batch."""

    def batch_end(self, state: State, logger: Logger) -> None:
        leak()


def test_an_ordinary_run_says_nothing(runs: SmallRuns, capfd: pytest.CaptureFixture[str]) -> None:
    runs.train("data.num_workers=1")
    assert "memory: " not in "".join(capfd.readouterr())


def test_a_callback_that_leaks_is_said_once(
    runs: SmallRuns, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        runs.train(callbacks=[Leaking()])
    finally:
        held.clear()
    (line,) = [line for line in "".join(capfd.readouterr()).splitlines() if "memory: " in line]
    assert "memory: the main process of rank 0 grew steadily over" in line
    assert "look at callbacks" in line


def test_a_data_worker_that_leaks_is_said(
    runs: SmallRuns, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ImageTextDataset.batch_of

    def leaking(self: ImageTextDataset, ids: Any) -> Any:
        leak()
        return read(self, ids)

    monkeypatch.setattr(ImageTextDataset, "batch_of", leaking)
    # a worker that reads more batches ahead, or fewer, than at the look before has grown unsteadily
    runs.train("data.num_workers=1", "data.prefetch_factor=1")
    said = "".join(capfd.readouterr())
    assert "memory: the data workers of rank 0 grew steadily over" in said
    assert "data.persistent_workers=false starts them anew" in said


@pytest.mark.parametrize(
    ("levels", "grows"),
    [
        ([1000 + 10 * i for i in range(24)], True),  # a leak
        ([1000 + 10 * i + 40 * (i % 2) for i in range(24)], True),  # beneath something that varies
        ([1000] * 24, False),
        ([1000 - 900 / (1 + i) for i in range(24)], False),  # comes to rest
        ([1000] * 16 + [2000] * 8, False),  # jumps, as at a first evaluation
        ([10 * i for i in range(8)] + [100] * 16, False),  # warms up
        ([1000 - 10 * i for i in range(24)], False),
    ],
)
def test_what_is_a_steady_growth(levels: list[float], grows: bool) -> None:
    before, now = memory.steady_growth(levels)
    assert (now > before) is grows


def test_noise_is_no_growth() -> None:
    rng = random.Random(3)
    grown = [
        now - before
        for _ in range(200)
        for before, now in [memory.steady_growth([rng.gauss(1000, 10) for _ in range(96)])]
    ]
    assert max(grown) < 20  # far below a share of 5 %


def test_it_is_judged_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    def steady_growth(levels: list[float]) -> tuple[float, float]:
        judged.append(len(levels))
        return 0.0, 0.0

    monkeypatch.setattr(memory, "steady_growth", steady_growth)
    watch = memory.MemoryWatch()
    for batch in itertools.islice(itertools.count(1), 100):
        assert watch.look(batch) is None
    assert judged == [12, 12, 24, 24, 48, 48, 96, 96]  # of two kinds of processes
