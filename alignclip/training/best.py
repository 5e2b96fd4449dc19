"""The best checkpoint of a run by one metric, kept beside the latest ones."""

from __future__ import annotations

import logging
import math
from concurrent.futures import Future
from typing import Any

from composer.core import State
from composer.utils import reproducibility

from alignclip.config.metrics import KEEP_BEST_MODES, better
from alignclip.config.schema import KeepBestConfig
from alignclip.errors import UserError, nearest
from alignclip.evaluation.evaluator import MetricFigures
from alignclip.ranks import rank, run_on_rank_zero
from alignclip.storage import describe_storage_error
from alignclip.training.delivery import Delivery
from alignclip.training.display import print_once, say
from alignclip.training.save_folder import SaveFolder

log = logging.getLogger(__name__)

BEST = "best-rank0.pt"


class BestCheckpoint:
    """Keeps the checkpoint with the best value of a metric as ``best-rank0.pt``, always complete.

    ``value`` belongs to the checkpoint that is kept: a value whose checkpoint could not be written
    need not be beaten. Into a bucket the checkpoint is uploaded while the training goes on. Rank 0
    decides.
    """

    def __init__(self, config: KeepBestConfig, folder: SaveFolder) -> None:
        self.config, self.folder = config, folder
        metric = config.metric.partition("/")[2]
        better_mode = KEEP_BEST_MODES[better(metric)]
        self.mode = config.mode or better_mode or "max"
        if better_mode not in (None, self.mode):
            print_once(
                f"keep_best: {metric} is better {better(metric)}, and keep_best.mode={self.mode} "
                f"keeps the worst; keep_best.mode={better_mode}?"
            )
        self.value: float | None = None
        self._pending: list[tuple[float, Future[None]]] = []
        self._delivery = Delivery(folder)

    def offer(self, metrics: MetricFigures, state: State) -> None:
        """Save ``state`` if its metrics are the best so far; on every rank.

        Raises:
            UserError: the evaluator has other metrics than the one that is asked for.
        """
        name = self.config.metric
        mine = [key for key in metrics if key.partition("/")[0] == name.partition("/")[0]]
        if not mine:
            return
        if name not in metrics:
            hint = nearest(name, mine)
            raise UserError(f"keep_best.metric={name} is no metric of that evaluator; {hint}")
        if not run_on_rank_zero(lambda: self._is_better(metrics[name])):
            return
        # on all ranks, where the model is spread over ranks; writing the file is rank 0's trouble
        # alone
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        if rank() == 0:
            value = metrics[name]
            try:
                arrives = self._delivery.save(content, BEST, lambda: self._say(value))
            except Exception as error:
                self._complain(error)
            else:
                self._pending.append((value, arrives))

    def finish(self) -> None:
        """Wait until what was found best is where it belongs; may be called again."""
        self._delivery.finish()
        self._settle()

    def state_dict(self) -> dict[str, Any]:
        """Return the value that a resumed run has to beat, and the metric."""
        self._settle()
        return {"metric": self.config.metric, "mode": self.mode, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`; a value of another metric says nothing about this one."""
        if (state["metric"], state["mode"]) == (self.config.metric, self.mode):
            value = state["value"]
            self.value = value if value is not None and math.isfinite(value) else None
        else:
            print_once(
                f"keep_best: the best {state['metric']} ({state['mode']}) so far doesn't count "
                f"for {self.config.metric} ({self.mode})"
            )

    def _is_better(self, value: float) -> bool:
        """Compare with what is kept, and with what is on its way."""
        self._settle()
        known = [self.value, *(pending for pending, _ in self._pending)]
        sign = 1 if self.mode == "max" else -1
        return math.isfinite(value) and all(
            other is None or sign * value > sign * other for other in known
        )

    def _settle(self) -> None:
        """Take over the values whose checkpoints have arrived."""
        pending = []
        for value, arrives in self._pending:
            if not arrives.done():
                pending.append((value, arrives))
            elif error := arrives.exception():
                self._complain(error)
            else:
                self.value = value
        self._pending = pending

    def _say(self, value: float) -> None:
        say(f"best {self.config.metric} so far: {value:.4f}; kept as {self.folder.uri}/{BEST}")

    def _complain(self, error: BaseException) -> None:
        """Warn and go on: a full disk, or a bucket that refuses, is no reason to end a run."""
        why = str(error) if isinstance(error, UserError) else describe_storage_error(error)
        log.warning(f"could not keep the best checkpoint in {self.folder.uri}: {why}")
