"""The best checkpoint of a run by one metric, kept beside the latest ones."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from composer.core import State
from composer.utils import dist, reproducibility

from alignclip.config.metrics import MODES, better
from alignclip.config.schema import KeepBestConfig
from alignclip.errors import UserError, nearest
from alignclip.evaluation.evaluator import Metrics
from alignclip.storage import describe_storage_error
from alignclip.training.display import say
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.checkpoint_file import save

log = logging.getLogger(__name__)

BEST = "best-rank0.pt"


class BestCheckpoint:
    """Keeps the checkpoint with the best value of one metric as ``best-rank0.pt``, complete at any time.

    ``value`` is that of the checkpoint that is kept: one that could not be written has to be beaten by nobody. Into a
    bucket it is uploaded while the training goes on. What is decided, rank 0 decides.
    """

    def __init__(self, config: KeepBestConfig, folder: SaveFolder) -> None:
        self.config, self.folder = config, folder
        metric = config.metric.partition("/")[2]
        better_mode = MODES[better(metric)]
        self.mode = config.mode or better_mode or "max"
        if better_mode not in (None, self.mode) and dist.get_global_rank() == 0:
            print(
                f"keep_best: {metric} is better {better(metric)}, and keep_best.mode={self.mode} keeps the worst; "
                f"keep_best.mode={better_mode}?",
                flush=True,
            )
        self.value: float | None = None
        self._pending: list[tuple[float, Future[bool]]] = []
        self._uploader = ThreadPoolExecutor(1)  # one at a time, so that the last one is the best

    def offer(self, metrics: Metrics, state: State) -> None:
        """Save ``state`` if its metrics are the best so far; on every rank.

        Raises:
            UserError: the evaluator has other metrics than the one that is asked for.
        """
        name = self.config.metric
        mine = [key for key in metrics if key.partition("/")[0] == name.partition("/")[0]]
        if not mine:
            return
        if name not in metrics:
            raise UserError(
                f"keep_best.metric={name} is no metric of that evaluator; {nearest(name, mine)}"
            )
        is_better = [dist.get_global_rank() == 0 and self._is_better(metrics[name])]
        dist.broadcast_object_list(is_better)
        if not is_better[0]:
            return
        # together, where the model is spread over ranks; the file is rank 0's business, and its trouble, alone
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        if dist.get_global_rank() == 0:
            self._keep(content, metrics[name])

    def finish(self) -> None:
        """Wait until what was found best is where it belongs; may be called again."""
        self._uploader.shutdown()
        self._settle()

    def state_dict(self) -> dict[str, Any]:
        """The value that a resumed run has to beat, and what it is of."""
        self._settle()
        return {"metric": self.config.metric, "mode": self.mode, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`; a value of another metric says nothing about this one."""
        if (state["metric"], state["mode"]) == (self.config.metric, self.mode):
            value = state["value"]
            self.value = value if value is not None and math.isfinite(value) else None
        elif dist.get_global_rank() == 0:
            print(
                f"keep_best: the best {state['metric']} ({state['mode']}) so far doesn't count for "
                f"{self.config.metric} ({self.mode})",
                flush=True,
            )

    def _is_better(self, value: float) -> bool:
        """Better than what is kept, and than what is on its way."""
        self._settle()
        sign = 1 if self.mode == "max" else -1
        others = [
            one
            for one in (self.value, *(pending for pending, _ in self._pending))
            if one is not None
        ]
        return math.isfinite(value) and all(sign * value > sign * other for other in others)

    def _settle(self) -> None:
        """What has arrived counts."""
        for value, future in [one for one in self._pending if one[1].done()]:
            if future.result():
                self.value = value
        self._pending = [one for one in self._pending if not one[1].done()]

    def _keep(self, content: dict[str, Any], value: float) -> None:
        """Write a checkpoint, and put it where it belongs."""
        if not self.folder.remote:
            if self._written(content, Path(self.folder.uri, BEST)):
                self.value = value
                self._say(value)
            return
        try:
            folder = Path(tempfile.mkdtemp(prefix="alignclip-best-"))
        except OSError as error:
            self._complain(error)
            return
        if self._written(content, folder / BEST):
            self._pending.append((value, self._uploader.submit(self._upload, folder, value)))
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def _written(self, content: dict[str, Any], path: Path) -> bool:
        """Whether a checkpoint could be written."""
        try:
            save(content, path)
        except UserError as error:
            self._complain(error)
            return False
        return True

    def _upload(self, folder: Path, value: float) -> bool:
        """Whether that worked."""
        try:
            self.folder.keep_file(folder / BEST, BEST)
        except Exception as error:  # of any cloud's library
            self._complain(error)
            return False
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._say(value)
        return True

    def _say(self, value: float) -> None:
        say(f"best {self.config.metric} so far: {value:.4f}; kept as {self.folder.uri}/{BEST}")

    def _complain(self, error: Exception) -> None:
        why = str(error) if isinstance(error, UserError) else describe_storage_error(error)
        log.warning(f"could not keep the best checkpoint in {self.folder.uri}: {why}")
