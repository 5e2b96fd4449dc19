"""A callback that counts the bytes which the ranks of this machine send one another in a step."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from alignclip.ranks import rank, wait_for_all_ranks, world_size
from alignclip.training.network import step_bytes
from alignclip.training.speed import model_of

NOT_COUNTED = 3  # steps: DDP makes its buckets anew
COUNTERS = Path("/proc/net/dev")


class LoopbackBytes(Callback):
    """Writes what a rank gets in a step, and what the formula says, to a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self._path, self._counts = Path(path), list[int]()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Read the counter of the loopback once all ranks have come here."""
        wait_for_all_ranks()
        self._counts.append(loopback_bytes())
        wait_for_all_ranks()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Write the median of the steps."""
        counts = self._counts[NOT_COUNTED:]
        steps = [after - before for before, after in itertools.pairwise(counts)]
        model = model_of(state)
        semantic = state.batch.get("semantic")
        formula = step_bytes(
            sum(one.numel() for one in model.parameters() if one.requires_grad),
            ranks=world_size(),
            pairs=len(state.batch["text"]),
            width=model.encoders.text_projection.shape[1],
            semantic=0 if semantic is None else semantic.shape[1],
            fsdp=state.fsdp_enabled,
        )
        if rank() == 0:
            counted = statistics.median(steps) / world_size()
            self._path.write_text(f"{counted} {formula.all}\n", encoding="utf-8")


def loopback_bytes() -> int:
    """Return the bytes that this machine's loopback has carried."""
    lines = COUNTERS.read_text(encoding="utf-8").splitlines()
    line = next(one for one in lines if one.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])
