"""Alarms about numbers that are finite and yet wrong: a loss that jumps, features all equal."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 100  # batches that a loss is compared with
ENOUGH = 50  # batches that say what is usual
# A loss has jumped where it is half as large again as the median of the window, and so many times
# as far from the median as the losses of the window typically are.
HALF, FAR = 0.5, 10.0
# Features of unit length are equal below this variance. Images have 9e-3 by the random weights of a
# ViT-B-16, and at least 3e-2 in the quickstart, an AlignCLIP run whose plateau of the beginning is
# no such collapse. With 50 times its learning rate it collapses to 3e-5.
EQUAL = 3e-4
# Images that look all alike may begin below that: faint ones with 1.6e-4. Theirs are equal below
# this part of what the start began with.
FALLEN = 0.5
LASTING = 50  # batches after which equal features are said


class Alarms:
    """Says once when the loss jumps, and once when a modality's features are all equal.

    A jump is said again when the loss has come back to what is usual. A loss that stays becomes
    usual. A start knows nothing of the batches of earlier starts, and says
    nothing of features that were equal from its first batch on.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._is_high = False
        self._equal: dict[str, int] = {}  # batches in a row
        self._bounds: dict[str, float] = {}  # below which a modality's features are equal

    def look(self, batch: int, loss: float, spreads: dict[str, float | None]) -> list[str]:
        """Look at a batch that is finite.

        Args:
            batch: its number in the run.
            loss: its total.
            spreads: the variance of each modality's features, None where that is unknown.

        Returns:
            the lines to say.
        """
        lines = [*self._jump(loss), *self._collapse(spreads)]
        return [f"batch {batch}: {line}" for line in lines]

    def _collapse(self, spreads: dict[str, float | None]) -> list[str]:
        for kind, spread in spreads.items():
            if spread is not None and kind not in self._bounds:
                self._bounds[kind] = min(EQUAL, FALLEN * spread)
            is_equal = spread is not None and spread < self._bounds[kind]
            self._equal[kind] = self._equal.get(kind, 0) + 1 if is_equal else 0
        kinds = [kind for kind, batches in self._equal.items() if batches == LASTING]
        if not kinds:
            return []
        return [
            f"COLLAPSED: for {LASTING} batches the {' and '.join(kinds)} features of all samples "
            "have been equal. A lower optimizer.lr, a longer warm-up or a lower loss.beta, in a "
            "run of another name, may help"
        ]

    def _jump(self, loss: float) -> list[str]:
        usual, was_high = list(self._losses), self._is_high
        self._losses.append(loss)
        if len(usual) < ENOUGH:
            return []
        median = statistics.median(usual)
        deviation = statistics.median(abs(one - median) for one in usual)
        self._is_high = loss - median > max(FAR * deviation, HALF * abs(median))
        if was_high or not self._is_high:
            return []
        return [
            f"the loss has jumped to {loss:.4g}; the median of the {len(usual)} batches before is "
            f"{median:.4g}"
        ]
