"""Evaluation during training: each evaluator at its own interval, to every logger."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from composer.algorithms import EMA
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch.distributed.fsdp import register_fsdp_forward_method

from alignclip.config.metrics import arrow, metric_named
from alignclip.config.schema import RunConfig
from alignclip.device import autocast_dtype
from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder, Interrupted
from alignclip.evaluation.evaluator import Evaluator, MetricFigures
from alignclip.evaluation.history import EvaluationRecords
from alignclip.evaluation.sets import OpenSets
from alignclip.model.encoders import CLIP
from alignclip.ranks import errors_on_all_ranks, rank
from alignclip.training.best import BestCheckpoint
from alignclip.training.callbacks import StopOnSignal, settle_callbacks
from alignclip.training.display import print_once
from alignclip.training.save_folder import SaveFolder
from alignclip.training.spent import Stopwatch
from alignclip.training.trainer_arguments import show_progress

log = logging.getLogger(__name__)

EVENTS = (Event.BATCH_END, Event.EPOCH_END)


class EvaluationCallback(Callback):
    """Runs evaluators at their intervals and at the end of training; logs ``metrics/NAME/METRIC``.

    It draws nothing from the global random generators and leaves the model in training mode: the
    losses of a run are those that it would have without. An evaluation that fails is reported, and
    the training goes on.

    Args:
        config: of the run.
        encoders: the model's, as they were before DDP or FSDP wrapped them.
        folder: the run's, for the record of its evaluations and the best checkpoint.

    Attributes:
        history: what the evaluators have found.
        watch: the seconds of evaluating, and of keeping the best checkpoint.

    Raises:
        UserError: a set is missing, or lacks what its task needs.
    """

    def __init__(self, config: RunConfig, encoders: CLIP, folder: SaveFolder | None) -> None:
        self._config, self._encoders = config, encoders
        self._best = (
            BestCheckpoint(config.keep_best, folder) if config.keep_best and folder else None
        )
        self.history = EvaluationRecords(folder.files if folder is not None else None)
        opened = OpenSets()
        self._evaluators: list[tuple[Evaluator, Callable[[State, Event], bool]]] = []
        for name, one in config.evaluators.items():
            with errors_on_all_ranks():  # a file may be missing on one machine
                evaluator = Evaluator(name, one, opened)
            if evaluator.note:
                print_once(f"evaluators.{name}: {evaluator.note}")
            is_due = create_interval_scheduler(
                one.interval, checkpoint_events=False, final_events=set(EVENTS)
            )
            self._evaluators.append((evaluator, is_due))
        self._last: dict[str, int] = {}  # batch of each one's last evaluation
        self.watch = Stopwatch("evaluation")
        self._watches = {name: Stopwatch(f"evaluation of {name}") for name in config.evaluators}

    def fit_start(self, state: State, logger: Logger) -> None:
        """Make FSDP gather the parameters for encoding alone, as for ``forward``."""
        for method in ("encode_image", "encode_text"):
            register_fsdp_forward_method(self._encoders, method)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Evaluate what is due."""
        super().run_event(event, state, logger)
        if event not in EVENTS:
            return
        batch = state.timestamp.batch.value
        # the last batch of a run is also the end of its last epoch
        due = [
            evaluator
            for evaluator, is_due in self._evaluators
            if is_due(state, event) and self._last.get(evaluator.name) != batch
        ]
        if not due:
            return
        settle_callbacks(state, logger)
        encoder = self._encoder(state)
        found: MetricFigures = {}
        with self.watch, _as_saved(state, logger):
            try:
                for evaluator in due:
                    if encoder.interrupted is not None and encoder.interrupted():
                        return  # the Trainer saves where it stands, and ends
                    self._last[evaluator.name] = batch
                    with self._watches[evaluator.name]:
                        found |= self._evaluate(evaluator, encoder, batch, logger)
                if rank() == 0:
                    self.history.write()
                if self._best is not None:
                    self._best.offer(found, state)
            except Interrupted:
                return

    def seconds_of_evaluators(self) -> dict[str, float]:
        """Return the seconds of each evaluator in this start."""
        return {name: watch.seconds for name, watch in self._watches.items()}

    def _encoder(self, state: State) -> Encoder:
        device = next(self._encoders.parameters()).device
        dtype, progress = autocast_dtype(self._config.precision), show_progress(self._config)
        encoder = Encoder(self._encoders, device, dtype, progress=progress)
        stop = next((one for one in state.callbacks if isinstance(one, StopOnSignal)), None)
        if stop is not None:  # the launcher gives 30 s, and they are for the checkpoint
            encoder.interrupted = lambda: stop.requested(state)
        return encoder

    def _evaluate(
        self, evaluator: Evaluator, encoder: Encoder, batch: int, logger: Logger
    ) -> MetricFigures:
        try:
            result = evaluator(encoder)
        except UserError as error:  # on every rank alike
            log.warning(f"evaluator '{evaluator.name}' at batch {batch}: {error}")
            return {}
        named = {f"{evaluator.name}/{key}": value for key, value in result.metrics.items()}
        logger.log_metrics({f"metrics/{key}": value for key, value in named.items()})
        record = self.history.add(batch, evaluator.name, result.metrics, result.chance)
        print_once(f"batch {batch}, {evaluator.name}: {_watched(result.metrics)}")
        if record["verdict"]:
            print_once(f"  {evaluator.name}: {record['verdict']}")
        return named

    def state_dict(self) -> dict[str, Any]:
        """Return the best value so far, which a resumed run has to beat, and the evaluations."""
        best = self._best.state_dict() if self._best else None
        return {"best": best, "history": [dict(record) for record in self.history.records]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        if self._best is not None and state.get("best") is not None:
            self._best.load_state_dict(state["best"])
        self.history.records = list(state.get("history", []))  # earlier versions kept none

    def post_close(self) -> None:
        """Wait until the best checkpoint and the record are where they belong."""
        self.history.finish()
        if self._best is not None:
            self._best.finish()


def _watched(metrics: MetricFigures) -> str:
    """Return the figures to watch, with which way is better; loggers and record have all."""
    return ", ".join(
        f"{key} {arrow(key)} {value:.4f}"
        for key, value in metrics.items()
        if metric_named(key).watch
    )


@contextmanager
def _as_saved(state: State, logger: Logger) -> Iterator[None]:
    """Use the weights that a checkpoint gets: under Composer's EMA, the averages."""
    averages = [a for a in state.algorithms if isinstance(a, EMA) and a.ema_started]
    for algorithm in averages:
        algorithm.apply(Event.EVAL_START, state, logger)
    try:
        yield
    finally:
        for algorithm in averages:
            algorithm.apply(Event.EVAL_END, state, logger)
