"""Composer's loggers for a run that is killed and goes on: one run in each tracker, each step once.

The classes have the names of Composer's own, by which the YAML calls them and a checkpoint keeps
their state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from composer import loggers
from composer.core import State
from composer.loggers import Logger

from alignclip.config.schema import RunConfig
from alignclip.errors import UserError, one_line
from alignclip.ranks import errors_on_all_ranks, rank, run_on_rank_zero
from alignclip.storage import write_whole
from alignclip.training.composer_patches import open_for_appending
from alignclip.training.save_folder import SaveFolder
from alignclip.training.wandb_files import BLOCK, NOTHING, LoggedStep, newest_step

WANDB_ID = "wandb-id.txt"  # in the save folder
OFFLINE = ("offline", "disabled", "dryrun")  # modes of W&B that need no login
METRIC_LINE = re.compile(r"\[metric\]\[batch=(\d+)\]: (\S+):")  # of Composer's FileLogger
# Metrics of a step that begins; the others are of the step that has ended
AT_START = re.compile(r"lr|time/(batch|sample|epoch|batch_in_epoch|sample_in_epoch)|loss/.*")


def check_login(config: RunConfig) -> None:
    """See that Weights & Biases lets this run in, before anything is built; on rank 0.

    Raises:
        UserError: nobody is logged in.
    """
    if "WandBLogger" not in config.loggers:
        return
    import wandb

    arguments = (config.loggers["WandBLogger"] or {}).get("init_kwargs") or {}
    mode = arguments.get("mode") or os.environ.get("WANDB_MODE", "online")
    if mode not in OFFLINE and not wandb.api.api_key:
        raise UserError(
            "loggers.WandBLogger: nobody is logged in to Weights & Biases; run `wandb login`, "
            "or set WANDB_API_KEY, or WANDB_MODE=offline and `wandb sync` later"
        )


def with_wandb_id(config: RunConfig, folder: SaveFolder | None) -> RunConfig:
    """Give all starts of a run the same W&B run, whose id lies in the save folder; on every rank.

    Without a save folder each start trains anew, and is another run. An id of the person's own is
    left alone. The id is no part of the configuration that is kept: another run may be started from
    that configuration.

    Raises:
        UserError: the save folder can't be read or written; on every rank.
    """
    if folder is None or "WandBLogger" not in config.loggers:
        return config
    wandb_id = run_on_rank_zero(lambda: _read_or_make_id(config, folder))
    arguments = dict(config.loggers["WandBLogger"] or {})
    init = dict(arguments.get("init_kwargs") or {})
    if "id" not in init and "WANDB_RUN_ID" not in os.environ:
        has_own_run = arguments.get("rank_zero_only") is False and rank() > 0
        init["id"] = f"{wandb_id}-rank{rank()}" if has_own_run else wandb_id
    init.setdefault("resume", "allow")
    arguments["init_kwargs"] = init
    return dataclasses.replace(config, loggers={**config.loggers, "WandBLogger": arguments})


def _read_or_make_id(config: RunConfig, folder: SaveFolder) -> str:
    if found := (folder.files.read_text_optional(WANDB_ID) or "").strip():
        if not re.fullmatch(r"[\w-]{1,64}", found, re.ASCII):  # it becomes a part of files' names
            place = folder.files.at(WANDB_ID)
            raise UserError(f"{place} holds no id of Weights & Biases; move it away")
        return found
    # the time: a run that is begun anew is another one
    text = f"{config.run_name} {folder.uri} {time.time_ns()}"
    made = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.files.write_text(WANDB_ID, made + "\n")
    return made


class RecentSteps:
    """The numbers of the newest steps: at least as many bytes as W&B may keep unwritten.

    Attributes:
        steps: number of the step, and its metrics.
    """

    MOST = 2 * BLOCK

    def __init__(self) -> None:
        self.steps: deque[tuple[int, dict[str, float]]] = deque()
        self._bytes = 0

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Add metrics of the newest step, and forget old steps."""
        numbers = numbers_of(metrics)
        if not self.steps or self.steps[-1][0] != step:
            self.steps.append((step, {}))
        newest = self.steps[-1][1]
        self._bytes += sum(len(name) for name in numbers.keys() - newest.keys())
        newest |= numbers
        while self._bytes - (oldest := sum(map(len, self.steps[0][1]))) > self.MOST:
            self._bytes -= oldest
            self.steps.popleft()


def numbers_of(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {name: float(one) for name, one in metrics.items() if isinstance(one, (int, float))}


class WandBLogger(loggers.WandBLogger):
    """Logs to W&B: metrics that an earlier start has logged are not logged again, and those that
    W&B has lost are.

    W&B's history can only grow: the steps between a checkpoint and a kill may be in it already when
    they are trained again. And W&B may have lost steps before the checkpoint, because W&B writes
    late. Online the server says how far the history goes, offline W&B's files say it. The newest
    steps are in the checkpoint.
    """

    _known: LoggedStep = NOTHING  # by earlier starts: all steps below, and these metrics of it
    _id = ""  # of the W&B run

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._recent = RecentSteps()
        self._loaded: dict[str, Any] = {}

    def init(self, state: State, logger: Logger) -> None:
        """Begin the W&B run, or go on with it; on every rank, of which often the first alone logs.

        Raises:
            UserError: W&B can't be reached or refuses; on every rank.
        """
        import wandb

        with errors_on_all_ranks():
            try:
                super().init(state, logger)
            except (wandb.errors.Error, wandb.errors.UsageError) as error:
                way_out = "WANDB_MODE=offline keeps the logs here"
                raise UserError(f"loggers.WandBLogger: {one_line(error)}; {way_out}") from error
        if wandb.run is None or not (place := getattr(wandb.run, "dir", None)):
            return
        self._id = wandb.run.id
        if wandb.run.offline:
            self._known = newest_step(Path(place).parents[1], self._id)
        else:
            self._known = (int(wandb.run.starting_step or 0), frozenset())

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log the metrics that no earlier start has logged."""
        if step is not None:
            self._recent.add(step, metrics)
            logged_step, logged_names = self._known
            if step < logged_step:
                return
            if step == logged_step:
                metrics = {k: v for k, v in metrics.items() if k not in logged_names}
        if metrics:
            super().log_metrics(metrics, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the steps that W&B may still lose."""
        return {"id": self._id, "steps": list(self._recent.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._loaded = state

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log what W&B has lost of the steps before the checkpoint."""
        if rank() == 0 and self._loaded.get("id") == self._id:
            for step, metrics in self._loaded["steps"]:
                self.log_metrics(metrics, step)


class TensorboardLogger(loggers.TensorboardLogger):
    """Logs to TensorBoard; a start that goes on replaces the steps behind its checkpoint."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._step = -1
        self._metrics_of_step: dict[str, float] = {}
        self._loaded: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log, and remember the newest step."""
        if step is not None:
            numbers = numbers_of(metrics)
            is_new = step != self._step
            self._metrics_of_step = numbers if is_new else self._metrics_of_step | numbers
            self._step = step
        super().log_metrics(metrics, step)

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics of the step that the checkpoint ends with."""
        return {"step": self._step, "metrics": dict(self._metrics_of_step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._loaded = state

    def fit_start(self, state: State, logger: Logger) -> None:
        """Have TensorBoard forget the steps behind the checkpoint, but not those logged with it."""
        if self.writer is None or (self.rank_zero_only and rank() != 0):
            return
        batch = state.timestamp.batch.value  # 0, too: a start may have died before it saved
        from torch.utils.tensorboard import SummaryWriter

        place = self.writer.log_dir
        self.writer.close()
        never = 365 * 24 * 3600  # as Composer's own, which flushes by its own interval
        self.writer = SummaryWriter(log_dir=place, flush_secs=never, purge_step=batch)
        if self._loaded.get("step") == batch:
            self.log_metrics(self._loaded["metrics"], batch)


class FileLogger(loggers.FileLogger):
    """Logs to one file for all starts of a run.

    A start that goes on drops the steps behind its checkpoint. Other lines of the file stay:
    output, errors. The file of a run that begins anew is moved aside.
    """

    def init(self, state: State, logger: Logger) -> None:
        """Open the file behind its content."""
        self._earlier = open_for_appending(self, state.run_name)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop the steps that are trained again."""
        batch = state.timestamp.batch.value
        if self.file is None or not self._earlier:
            return
        path = Path(self.filename)
        self.file.close()
        content = path.read_bytes()
        before, since = content[: self._earlier], content[self._earlier :]
        kept = ""
        if batch == 0:
            aside = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
            aside.write_bytes(before)
        else:
            kept = steps_before(before.decode(errors="replace"), batch)
        with write_whole(path) as partial:
            partial.write_bytes(kept.encode() + since)
        self.file = path.open("a+", buffering=self.buffer_size, encoding="utf-8")


def steps_before(text: str, batch: int) -> str:
    """Drop the metrics that a run which goes on after ``batch`` batches logs again."""
    kept, has_begun = [], False
    for line in text.splitlines(keepends=True):
        if found := METRIC_LINE.match(line):
            step, name = int(found[1]), found[2]
            if step > batch or (step == batch and AT_START.fullmatch(name)):
                has_begun = True
            if step > batch or (step == batch and has_begun):
                continue
        kept.append(line)
    return "".join(kept)


RESUMABLE_LOGGERS = {
    "WandBLogger": WandBLogger,
    "TensorboardLogger": TensorboardLogger,
    "FileLogger": FileLogger,
}
