"""The parts of a run's time: training and waiting for data, evaluation, checkpoints."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from types import TracebackType

from torch.profiler import record_function


class Stopwatch:
    """Adds up the seconds of ``with`` blocks, and names the blocks in a profiler's trace.

    Attributes:
        seconds: of all blocks so far.
    """

    def __init__(self, name: str) -> None:
        self.seconds = 0.0
        self._name = name

    def __enter__(self) -> None:
        self._range = record_function(self._name)
        self._range.__enter__()
        self._since = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds += time.perf_counter() - self._since
        self._range.__exit__(kind, error, trace)


@dataclass(frozen=True)
class Spent:
    """The work of a rank so far, and the seconds that it took.

    Attributes:
        batches: trained.
        seconds: of all.
        waiting: seconds of these, for data.
        evaluation: seconds of these.
        checkpoints: seconds of these; an upload beside the training takes none.
        flops: operations of the steps.
    """

    batches: float = 0.0
    seconds: float = 0.0
    waiting: float = 0.0
    evaluation: float = 0.0
    checkpoints: float = 0.0
    flops: float = 0.0

    @property
    def training(self) -> float:
        """Return the seconds of training, waiting for data among them."""
        return self.seconds - self.evaluation - self.checkpoints

    def __sub__(self, earlier: Spent) -> Spent:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(earlier), strict=True)
        return Spent(*(a - b for a, b in pairs))

    def __add__(self, other: Spent) -> Spent:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Spent(*(a + b for a, b in pairs))
