"""Evaluation during training: each evaluator at its own interval, on every rank, to every logger."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer.algorithms import EMA
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from composer.utils.checkpoint import save_checkpoint
from torch.distributed.fsdp import register_fsdp_forward_method

from alignclip.callbacks import StopOnSignal
from alignclip.checkpoints import SaveFolder
from alignclip.config import EvaluatorConfig, KeepBestConfig
from alignclip.encoders import CLIP
from alignclip.errors import UserError, describe_storage_error, nearest
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.sets import OpenSets
from alignclip.evaluation.tasks import Evaluator, Metrics

log = logging.getLogger(__name__)

BEST = "best-rank0.pt"
EVENTS = (Event.BATCH_END, Event.EPOCH_END)


class EvaluationCallback(Callback):
    """Runs evaluators at their intervals and at the end of training; logs ``metrics/NAME/METRIC``.

    It draws nothing from the global random generators and leaves the model in training mode: the losses of a run are
    those that it would have without. An evaluation that fails is reported, and the training goes on.

    Args:
        evaluators: by name.
        encoders: the model's, as they were before DDP or FSDP wrapped them.
        image_size: pixels a side.
        dtype: of autocast while encoding; None runs in the model's own.
        progress: show bars.
        best: what keeps the best checkpoint, if anything should.

    Raises:
        UserError: a set is missing, or lacks what its task needs.
    """

    def __init__(
        self,
        evaluators: dict[str, EvaluatorConfig],
        encoders: CLIP,
        image_size: int,
        dtype: torch.dtype | None,
        progress: bool,
        best: BestCheckpoint | None = None,
    ) -> None:
        self._encoders, self._dtype, self._progress = encoders, dtype, progress
        self._best = best
        opened = OpenSets()
        self._evaluators: list[tuple[Evaluator, Callable[[State, Event], bool]]] = [
            (
                Evaluator(name, config, image_size, opened),
                create_interval_scheduler(config.interval, checkpoint_events=False, final_events=set(EVENTS)),
            )
            for name, config in evaluators.items()
        ]
        self._last: dict[str, int] = {}  # batch of each one's last evaluation

    def fit_start(self, state: State, logger: Logger) -> None:
        """Under FSDP the parameters are to be gathered for encoding alone, as they are for ``forward``."""
        for method in ("encode_image", "encode_text"):
            register_fsdp_forward_method(self._encoders, method)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Evaluate what is due."""
        super().run_event(event, state, logger)
        if event not in EVENTS:
            return
        batch = state.timestamp.batch.value
        due = [e for e, is_due in self._evaluators if is_due(state, event) and self._last.get(e.name) != batch]
        if not due:
            return
        stop = next((c for c in state.callbacks if isinstance(c, StopOnSignal)), None)
        found: Metrics = {}
        with _as_saved(state, logger):
            for evaluator in due:
                if stop is not None and stop.requested(state):
                    break  # the launcher gives 30 s, and they are for the checkpoint
                # the last batch of a run is also the end of its last epoch
                self._last[evaluator.name] = batch
                found |= self._evaluate(evaluator, state, logger)
            if self._best is not None:
                self._best.offer(found, state)

    def _evaluate(self, evaluator: Evaluator, state: State, logger: Logger) -> Metrics:
        config = evaluator.config
        device = next(self._encoders.parameters()).device
        encoder = Encoder(self._encoders, device, self._dtype, config.batch_size, self._progress)
        try:
            metrics = evaluator(encoder).metrics
        except UserError as error:  # on every rank alike
            log.warning(f"evaluator '{evaluator.name}' at batch {state.timestamp.batch.value}: {error}")
            return {}
        named = {f"{evaluator.name}/{key}": value for key, value in metrics.items()}
        logger.log_metrics({f"metrics/{key}": value for key, value in named.items()})
        if dist.get_global_rank() == 0:
            shown = ", ".join(f"{key} {value:.4f}" for key, value in metrics.items())
            print(f"batch {state.timestamp.batch.value}, {evaluator.name}: {shown}", flush=True)
        return named

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, which a resumed run has to beat."""
        return {"best": self._best.value if self._best else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        if self._best is not None and state.get("best") is not None:
            self._best.value = state["best"]


@contextmanager
def _as_saved(state: State, logger: Logger) -> Iterator[None]:
    """With the weights that a checkpoint gets: under Composer's EMA, the averages."""
    averages = [a for a in state.algorithms if isinstance(a, EMA) and a.ema_started]
    for algorithm in averages:
        algorithm.apply(Event.EVAL_START, state, logger)
    try:
        yield
    finally:
        for algorithm in averages:
            algorithm.apply(Event.EVAL_END, state, logger)


class BestCheckpoint:
    """Keeps the checkpoint with the best value of one metric as ``best-rank0.pt``, complete at any time.

    ``value`` is that of the checkpoint that is kept: one that could not be written has to be beaten by nobody.
    """

    def __init__(self, config: KeepBestConfig, folder: SaveFolder) -> None:
        self.config, self.folder = config, folder
        self.value: float | None = None

    def offer(self, metrics: Metrics, state: State) -> None:
        """Save ``state`` if its metrics are the best so far; on every rank, and training waits for it.

        Raises:
            UserError: the evaluator has other metrics than the one that is asked for.
        """
        name = self.config.metric
        mine = [key for key in metrics if key.partition("/")[0] == name.partition("/")[0]]
        if not mine:
            return
        if name not in metrics:
            raise UserError(f"keep_best.metric={name} is no metric of that evaluator; {nearest(name, mine)}")
        value, sign = metrics[name], 1 if self.config.mode == "max" else -1
        if math.isnan(value) or (self.value is not None and sign * value <= sign * self.value):
            return
        with tempfile.TemporaryDirectory() as temporary:
            saved = save_checkpoint(state, f"{temporary}/{BEST}")
            kept = [dist.get_global_rank() == 0 and saved is not None and self._keep(Path(saved), value)]
        dist.broadcast_object_list(kept)
        if kept[0]:
            self.value = value

    def _keep(self, file: Path, value: float) -> bool:
        """Put a file where it belongs; whether that worked."""
        try:
            self.folder.keep_file(file, BEST)
        except Exception as error:  # of the file system, or any cloud's
            log.warning(f"could not keep the best checkpoint in {self.folder.uri}: {describe_storage_error(error)}")
            return False
        print(f"best {self.config.metric} so far: {value:.4f}; kept as {self.folder.uri}/{BEST}", flush=True)
        return True
