"""The memory of a run's processes over days: whether it grows without end."""

from __future__ import annotations

import multiprocessing
import os
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

LOOK_EVERY = 100  # batches between two looks
FIRST_LOOKS = 12  # looks, after which the growth is judged; then after twice as many, and so on
LEAST = 256e6  # bytes that are a growth,
GROWN_SHARE = 0.05  # and this share of what there was
PARTS_OF_GROWTH = 4  # of the looks behind the warm-up
GB = 1e9
MAIN, WORKERS = "the main process", "the data workers"
ADVICE = {
    MAIN: "look at callbacks, loggers and metrics of your own; a new start begins small",
    WORKERS: "data.persistent_workers=false starts them anew each epoch",
}


class MemoryWatch:
    """Looks at this rank's memory every :data:`LOOK_EVERY` batches, and says once that it grows."""

    def __init__(self) -> None:
        self._levels: dict[str, list[int]] = {MAIN: [], WORKERS: []}
        self._batches: list[int] = []
        self._judged_at = FIRST_LOOKS

    def look(self, batch: int) -> str | None:
        """Note the memory after a batch.

        Returns:
            a line where the memory has grown steadily; None where it has not, or that was said.
        """
        if not self._judged_at:
            return None
        self._batches.append(batch)
        workers = [process.pid for process in multiprocessing.active_children()]
        self._levels[MAIN].append(own_bytes(os.getpid()))
        self._levels[WORKERS].append(sum(own_bytes(pid) for pid in workers if pid))
        if len(self._batches) < self._judged_at:
            return None
        self._judged_at *= 2
        for whose, levels in self._levels.items():
            if line := self._describe(whose, levels):
                self._judged_at = 0
                return line
        return None

    def _describe(self, whose: str, levels: Sequence[int]) -> str | None:
        before, now = steady_growth(levels)
        if now - before < max(LEAST, GROWN_SHARE * before):
            return None
        looks = len(self._batches)
        batches = self._batches[-1] - self._batches[looks // 3]
        return (
            f"memory: {whose} of rank 0 grew steadily over {batches:,} batches, from "
            f"{before / GB:.2f} to {now / GB:.2f} GB; {ADVICE[whose]}"
        )


def steady_growth(levels: Sequence[float]) -> tuple[float, float]:
    """Return the levels between which a memory has grown steadily; 0, 0 where it has not.

    The first third is the warm-up. Behind it, each of :data:`PARTS_OF_GROWTH` parts must lie above
    the one before, by two thirds of its share of the growth at least: a memory that jumps, or comes
    to rest, does not.
    """
    rest = levels[len(levels) // 3 :]
    size = len(rest) // PARTS_OF_GROWTH
    medians = [statistics.median(rest[i * size : (i + 1) * size]) for i in range(PARTS_OF_GROWTH)]
    growth = medians[-1] - medians[0]
    least = min(after - before for before, after in pairwise(medians))
    is_steady = growth > 0 and least >= growth / (PARTS_OF_GROWTH - 1) * 2 / 3
    return (medians[0], medians[-1]) if is_steady else (0.0, 0.0)


def own_bytes(pid: int) -> int:
    """Return the bytes of a process that are no file's and not shared memory; 0 where unknown.

    A forked process shares pages with its parent. They count for both, and stay the same when one
    of the two writes to them.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
