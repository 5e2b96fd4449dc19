"""Composer's loggers for a run that is killed and goes on: one run in each tracker, each step once.

The classes have the names of Composer's own, by which the YAML calls them and a checkpoint keeps their state.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from composer import loggers
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from alignclip.config.schema import RunConfig
from alignclip.errors import UserError, one_line
from alignclip.ranks import raise_on_all_ranks, run_on_rank_zero
from alignclip.storage import write_whole
from alignclip.training.save_folder import SaveFolder

WANDB_ID = "wandb-id.txt"  # in the save folder
OFFLINE = ("offline", "disabled", "dryrun")  # modes of W&B that need no login
LINE = re.compile(r"\[metric\]\[batch=(\d+)\]: (\S+):")  # of Composer's FileLogger
# Metrics of a step that begins; the others are of the one that has ended
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
            "loggers.WandBLogger: nobody is logged in to Weights & Biases; run `wandb login`, or set WANDB_API_KEY, "
            "or WANDB_MODE=offline and `wandb sync` later"
        )


def with_wandb_id(config: RunConfig, folder: SaveFolder | None) -> RunConfig:
    """Give all starts of a run one and the same W&B run, whose id lies in the save folder; call it on every rank.

    Without a save folder each start trains anew, and is another run. An id of the person's own is left alone. The id is
    no part of the configuration that is kept: another run may be started from that.

    Raises:
        UserError: the save folder can't be read or written; on every rank.
    """
    if folder is None or "WandBLogger" not in config.loggers:
        return config
    own = folder
    found = run_on_rank_zero(lambda: _wandb_id(config, own))
    arguments = dict(config.loggers["WandBLogger"] or {})
    given = dict(arguments.get("init_kwargs") or {})
    if "id" not in given and "WANDB_RUN_ID" not in os.environ:
        every = arguments.get("rank_zero_only") is False and dist.get_global_rank() > 0
        given["id"] = f"{found}-rank{dist.get_global_rank()}" if every else found
    given.setdefault("resume", "allow")
    arguments["init_kwargs"] = given
    return dataclasses.replace(config, loggers={**config.loggers, "WandBLogger": arguments})


def _wandb_id(config: RunConfig, folder: SaveFolder) -> str:
    """The id that lies in the save folder, or a new one."""
    if found := (folder.files.read_text_optional(WANDB_ID) or "").strip():
        return found
    text = f"{config.run_name} {folder.uri} {time.time_ns()}"  # a run that is begun anew is another one
    made = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder.files.write_text(WANDB_ID, made + "\n")
    return made


class WandBLogger(loggers.WandBLogger):
    """Logs to W&B; what an earlier start has logged of a step is not logged again.

    W&B's history can only grow: the steps between a checkpoint and a kill are there already when they are trained
    again. Online the server says how far the history goes; offline a small file beside W&B's own says it.
    """

    _mark: Path | None = None
    _done = -1  # steps below are logged
    _done_names: frozenset[str] = frozenset()  # and these of the step itself
    _step = -1
    _names: frozenset[str] = frozenset()

    def init(self, state: State, logger: Logger) -> None:
        """Begin the W&B run, or go on with it; on every rank, of which often the first one alone logs.

        Raises:
            UserError: W&B can't be reached or refuses; on every rank.
        """
        import wandb

        failure: UserError | None = None
        try:
            super().init(state, logger)
        except (wandb.errors.Error, wandb.errors.UsageError) as error:
            way_out = "WANDB_MODE=offline keeps the logs here"
            failure = UserError(f"loggers.WandBLogger: {one_line(error)}; {way_out}")
        raise_on_all_ranks(failure)
        if self._enabled and wandb.run is not None and (place := getattr(wandb.run, "dir", None)):
            self._mark = Path(place).parents[1] / f"{wandb.run.id}.logged.json"
            try:
                mark = json.loads(self._mark.read_text(encoding="utf-8"))
                self._done, self._done_names = int(mark["step"]), frozenset(mark["names"])
            except (OSError, ValueError, KeyError, TypeError):
                pass  # the first start on this machine
            self._done = max(self._done, int(getattr(wandb.run, "starting_step", 0) or 0))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log what no earlier start has logged."""
        if step is not None and step <= self._done:
            metrics = {
                k: v for k, v in metrics.items() if step == self._done and k not in self._done_names
            }
        if not metrics:
            return
        if step is not None and step > self._step:
            self._step, self._names = step, frozenset()
            if step > self._done:
                self._remember()
        self._names |= metrics.keys()
        super().log_metrics(metrics, step)

    def post_close(self) -> None:
        """End the W&B run."""
        if self._step >= self._done:
            self._remember()
        super().post_close()

    def _remember(self) -> None:
        """Leave word of what is logged: of the step that has just begun nothing counts, W&B has not written it."""
        if self._mark is not None:
            try:
                self._mark.write_text(
                    json.dumps({"step": self._step, "names": sorted(self._names)}), encoding="utf-8"
                )
            except OSError:  # a disk that is full will end the run elsewhere
                return


class TensorboardLogger(loggers.TensorboardLogger):
    """Logs to TensorBoard; a start that goes on replaces the steps behind its checkpoint."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._step = -1
        self._at_step: dict[str, float] = {}  # what is logged of the newest step
        self._kept: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Log, and remember the newest step."""
        if step is not None:
            numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
            self._at_step = self._at_step | numbers if step == self._step else numbers
            self._step = step
        super().log_metrics(metrics, step)

    def state_dict(self) -> dict[str, Any]:
        """What is logged of the step that the checkpoint ends with."""
        return {"step": self._step, "metrics": dict(self._at_step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._kept = state

    def fit_start(self, state: State, logger: Logger) -> None:
        """Tell TensorBoard to forget what comes behind the checkpoint, but for what was logged with it."""
        batch = state.timestamp.batch.value
        if (
            self.writer is None
            or batch == 0
            or (self.rank_zero_only and dist.get_global_rank() != 0)
        ):
            return
        from torch.utils.tensorboard import SummaryWriter

        place = self.writer.log_dir
        self.writer.close()
        self.writer = SummaryWriter(
            log_dir=place, flush_secs=365 * 24 * 3600, purge_step=batch
        )  # as Composer's own
        if self._kept.get("step") == batch:
            self.log_metrics(self._kept["metrics"], batch)


class FileLogger(loggers.FileLogger):
    """Logs to one file for all starts of a run; a start that goes on drops the steps behind its checkpoint.

    What else was written there stays: output, errors. The file of a run that begins anew is moved aside.
    """

    def init(self, state: State, logger: Logger) -> None:
        """Open the file behind what is in it."""
        self._is_newline = True
        self._run_name = state.run_name  # type: ignore[assignment]
        path = Path(self.filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._earlier = path.stat().st_size if path.exists() else 0
        self.file = path.open("a+", buffering=self.buffer_size, encoding="utf-8")
        self._flush_queue()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Drop what is trained again."""
        batch = state.timestamp.batch.value
        if self.file is None or not self._earlier:
            return
        path = Path(self.filename)
        self.file.close()
        content = path.read_bytes()
        before, since = content[: self._earlier], content[self._earlier :]
        if batch == 0:
            aside = path.with_name(f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
            aside.write_bytes(before)
            kept = ""
        else:
            kept = steps_before(before.decode(errors="replace"), batch)
        with write_whole(path) as partial:
            partial.write_bytes(kept.encode() + since)
        self.file = path.open("a+", buffering=self.buffer_size, encoding="utf-8")


def steps_before(text: str, batch: int) -> str:
    """The lines of a log file without metrics that a run which goes on after ``batch`` batches will log again."""
    kept, begun = [], False
    for line in text.splitlines(keepends=True):
        found = LINE.match(line)
        if found:
            step, name = int(found[1]), found[2]
            begun = (
                begun or step > batch or (step == batch and AT_START.fullmatch(name) is not None)
            )
            if step > batch or (step == batch and begun):
                continue
        kept.append(line)
    return "".join(kept)


OURS = {
    "WandBLogger": WandBLogger,
    "TensorboardLogger": TensorboardLogger,
    "FileLogger": FileLogger,
}
