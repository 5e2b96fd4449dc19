"""The card of a run, ``run.json`` and ``run.md`` beside its checkpoints: what was trained, and how.

A start that ends well, done or stopped by a signal, writes the card anew. The card gathers what is
kept elsewhere: the configuration, the record of starts, the curves, the evaluations.
"""

from __future__ import annotations

import json
import logging
import platform
import statistics
from dataclasses import dataclass

from composer.core import State

from alignclip.config.reading import plain_values
from alignclip.config.schema import (
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SchedulerConfig,
)
from alignclip.data.dataset import ImageTextDataset
from alignclip.data.streams import place_of
from alignclip.device import processor_name
from alignclip.evaluation.history import EVALUATIONS, records_in
from alignclip.evaluation.json_lines import lines_in
from alignclip.ranks import local_world_size, world_size
from alignclip.runtime.environment import Start
from alignclip.runtime.threads import available_cores
from alignclip.storage import describe_storage_error
from alignclip.training.history import HISTORY, KEPT, History
from alignclip.training.pace import Pace, one_of
from alignclip.training.run_record import starts_of
from alignclip.training.save_folder import SaveFolder

log = logging.getLogger(__name__)

JSON, PAGE = "run.json", "run.md"
FINISHED, STOPPED_EARLY = "finished", "stopped by a signal"


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
        sets: name → path or URL.
        samples: of all sets.
        epochs: begun so far, the last one as a share.
        global_train_batch_size: samples of all ranks in a batch.
    """

    sets: dict[str, str]
    samples: int
    epochs: float
    global_train_batch_size: int


@dataclass(frozen=True)
class Recipe:
    """The sections of the configuration that make a model what it is, and the model's size."""

    parameters: int
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    scheduler: SchedulerConfig
    max_duration: str
    precision: str
    seed: int


@dataclass(frozen=True)
class Hardware:
    """The machines of the last start.

    Attributes:
        device: of rank 0.
        ranks: processes on all machines.
        machines: with as many ranks as rank 0's.
        cores: that the processes of rank 0's machine may use.
        cpu: of rank 0's machine.
    """

    device: str
    ranks: int
    machines: int
    cores: int
    cpu: str


@dataclass(frozen=True)
class Hours:
    """Hours of rank 0 in all starts; what a kill has undone isn't counted.

    Attributes:
        total: from the first batch of each start to its end.
        training: of these, data_wait among them.
        data_wait: of these, waiting for data.
        evaluation: of these.
        checkpoints: of these; an upload beside the training takes none.
    """

    total: float
    training: float
    data_wait: float
    evaluation: float
    checkpoints: float


@dataclass(frozen=True)
class Speed:
    """The speed of a run while it trained.

    Attributes:
        samples_seen: in all starts.
        samples_per_second: of all ranks; the median of windows of a hundred batches, or the mean of
            a shorter run.
        mfu: model FLOPs utilization, the same median; None where it isn't known.
    """

    samples_seen: int
    samples_per_second: float
    mfu: float | None


@dataclass(frozen=True)
class Evaluation:
    """The last figures of an evaluator; a metric that is not finite is None."""

    batch: int
    metrics: dict[str, float | None]


@dataclass(frozen=True)
class RunCard:
    """The card of a run; the fields are those of ``run.json``.

    Attributes:
        run_name: of the run.
        status: :data:`FINISHED` or :data:`STOPPED_EARLY`.
        batch: how many are trained.
        of_batches: of how many.
        losses: the last ones that were kept, with the learning rate and the scale.
        evaluations: by evaluator.
        curves: whether ``curves.png`` and ``curves.html`` show them.
        starts: of the run, with command, commit, versions and machine.
    """

    run_name: str
    status: str
    batch: int
    of_batches: int
    data: Data
    recipe: Recipe
    hardware: Hardware
    hours: Hours
    speed: Speed
    losses: dict[str, float | None]
    evaluations: dict[str, Evaluation]
    curves: bool
    starts: list[Start]


def write_run_card(folder: SaveFolder, state: State, of_batches: int, status: str) -> None:
    """Write the card of a run whose training has ended; for rank 0. Trouble is a warning."""
    from alignclip.training.run_card_page import card_text

    try:
        card = make_card(folder, state, of_batches, status)
        folder.files.write_text(JSON, json.dumps(plain_values(card), indent=2) + "\n")
        folder.files.write_text(PAGE, card_text(card))
    except Exception as error:  # of the file system, or any cloud's, or of files that others wrote
        why = describe_storage_error(error)
        log.warning(f"could not write the run's card in {folder.uri}: {why}")


def make_card(folder: SaveFolder, state: State, of_batches: int, status: str) -> RunCard:
    """Gather the card of a run.

    Raises:
        UserError: the save folder can't be read.
    """
    config, starts = folder.config, starts_of(folder)
    history, pace = one_of(state, History), one_of(state, Pace)
    assert pace is not None
    return RunCard(
        run_name=config.run_name,
        status=status,
        batch=state.timestamp.batch.value,
        of_batches=of_batches,
        data=_data(config, state),
        recipe=_recipe(config, state),
        hardware=Hardware(
            device=starts[-1].device,
            ranks=world_size(),
            machines=world_size() // local_world_size(),
            cores=available_cores(),
            cpu=processor_name() or platform.machine(),
        ),
        hours=_hours(pace),
        speed=_speed(pace, config, state),
        losses=_last_losses(folder),
        evaluations=_evaluations(folder),
        curves=history is not None and history.is_drawn,
        starts=starts,
    )


def _data(config: RunConfig, state: State) -> Data:
    loader = state.train_dataloader
    dataset = loader.dataset  # type: ignore[union-attr]
    assert isinstance(dataset, ImageTextDataset)
    time, an_epoch = state.timestamp, len(loader)  # type: ignore[arg-type]
    return Data(
        sets={name: place_of(one, "") for name, one in config.data.streams.items()},
        samples=dataset.size,
        epochs=time.epoch.value + time.batch_in_epoch.value / an_epoch,
        global_train_batch_size=config.global_train_batch_size,
    )


def _recipe(config: RunConfig, state: State) -> Recipe:
    return Recipe(
        parameters=sum(p.numel() for p in state.model.parameters()),
        model=config.model,
        loss=config.loss,
        optimizer=config.optimizer,
        scheduler=config.scheduler,
        max_duration=config.max_duration,
        precision=config.precision,
        seed=config.seed,
    )


def _hours(pace: Pace) -> Hours:
    spent = pace.spent()
    seconds = (
        spent.seconds,
        spent.training,
        spent.waiting,
        spent.evaluation,
        spent.checkpoints,
    )
    return Hours(*(one / 3600 for one in seconds))


def _speed(pace: Pace, config: RunConfig, state: State) -> Speed:
    spent, seen = pace.spent(), state.timestamp.sample.value
    # of the measured batches: an earlier version's starts left no clocks
    whole = spent.batches * config.global_train_batch_size / spent.training
    rate = statistics.median(pace.rates) if pace.rates else whole
    return Speed(seen, rate, statistics.median(pace.mfus) if pace.mfus else None)


def _last_losses(folder: SaveFolder) -> dict[str, float | None]:
    lines = lines_in(folder.files.read_text_optional(HISTORY) or "")
    losses = [line for line in lines if "losses" in line]
    last = losses[-1] if losses else {"losses": {}}
    kept = {name: last[name] for name in KEPT if name in last}
    return {**last["losses"], **kept}


def _evaluations(folder: SaveFolder) -> dict[str, Evaluation]:
    records = records_in(folder.files.read_text_optional(EVALUATIONS) or "")
    return {one["evaluator"]: Evaluation(one["batch"], one["metrics"]) for one in records}
