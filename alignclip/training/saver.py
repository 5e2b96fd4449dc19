"""Composer's CheckpointSaver for a run's folder: whole files, not too many, errors in one line."""

from __future__ import annotations

import logging
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from pathlib import Path
from typing import Any

import torch
from composer import callbacks
from composer.core import State
from composer.loggers import Logger
from composer.utils import reproducibility
from composer.utils.checkpoint import glob_filter

from alignclip.errors import UserError, one_line
from alignclip.ranks import errors_on_all_ranks, rank, true_on_any_rank
from alignclip.runtime import attendance
from alignclip.storage import (
    StorageError,
    describe_storage_error,
    patiently,
    why_not_written,
)
from alignclip.training.callbacks import settle_callbacks
from alignclip.training.delivery import Delivery
from alignclip.training.run_record import StartedAgainError, check_last_start
from alignclip.training.save_folder import SaveFolder
from alignclip.training.spent import Stopwatch
from alignclip.weights.checkpoint_file import GOES_ON, NotSavedError

log = logging.getLogger(__name__)
ASKED_EVERY = 2.0  # seconds between two questions whether the uploads have arrived


class CheckpointSaver(callbacks.CheckpointSaver):
    """Saves a run as its configuration says, and deletes the checkpoints that are too many.

    It is one of Composer's, because EMA asks Composer's savers when they save. Composer's own
    uploads by processes that each import Composer, writes no whole files, and deletes none in a
    bucket nor of earlier starts.

    Args:
        save_folder: of the run.

    Attributes:
        keep: checkpoints to keep; below 1 all of them.
        watch: the seconds of saving; of uploads those that the training waited for.
    """

    def __init__(self, save_folder: SaveFolder) -> None:
        config = save_folder.config
        self.save_folder = save_folder
        self.keep = config.save_num_checkpoints_to_keep
        self.watch = Stopwatch("checkpoint")
        self._delivery = Delivery(save_folder, overwrite=config.save_overwrite)
        self._on_their_way: list[Future[None]] = []
        self._run_has_ended = False  # by an upload that failed for good
        self._closed = False
        super().__init__(
            folder=self._delivery.place,
            filename=config.save_filename,
            remote_file_name=None,
            latest_filename=None,
            latest_remote_file_name=None,
            save_interval=config.save_interval,
            overwrite=config.save_overwrite,
            weights_only=config.save_weights_only,
        )

    def save_now(self, state: State, logger: Logger) -> None:
        """Save, whatever the interval is, and wait until the checkpoint has arrived."""
        self._save_checkpoint(state, logger)
        self.fit_end(state, logger)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        """Save, and end the run on all ranks where rank 0 can't.

        Raises:
            NotFiniteError: the last batch is not to be saved; on every rank.
            UserError: on every rank.
        """
        settle_callbacks(state, logger)
        self.last_checkpoint_batch = state.timestamp.batch
        attendance.note("saves a checkpoint", "the save folder" if rank() == 0 else "")
        with self.watch:
            # the ranks' messages about a large model need room of their own
            torch.cuda.empty_cache()
            content = self._content(state)  # on every rank: each may have a part of the model
            name = Path(self.filename.format(state)).relative_to(self.folder)
            with errors_on_all_ranks():
                if rank() == 0:
                    self._save(content, str(name), logger)

    def _content(self, state: State) -> dict[str, Any]:
        content: dict[str, Any] = {}
        if self.weights_only:  # the whole state would gather the optimizer's as well
            content["state"] = {
                "model": state.get_model_state_dict(),
                "integrations": state._get_integrations_state_dict(),
                "metadata": state._get_state_metadata(),
            }
        else:
            content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        if ignored := self.save_folder.config.save_ignore_keys:
            glob_filter(ignored)(content)
            content.setdefault("state", {})
        return content

    def _save(self, content: dict[str, Any], name: str, logger: Logger) -> None:
        try:
            arrives = self._delivery.save(content, name, lambda: self._arrived(name, logger))
        except (OSError, StorageError) as error:  # of the small files beside the checkpoint
            path = self._delivery.place / name
            why = why_not_written(error, path)
            raise NotSavedError(f"can't save {path}: {why}. {GOES_ON}") from error
        self._on_their_way.append(arrives)

    def _arrived(self, name: str, logger: Logger) -> None:
        folder = self.save_folder
        check_last_start(folder)
        if not folder.remote:  # WandBLogger's log_artifacts and Composer's uploader keep copies
            path = str(self._delivery.place / name)
            logger.upload_file(path.lstrip("/"), path, overwrite=self.overwrite)
        patiently(lambda: folder.point_latest(name), folder.uri)
        self._delivery.then(self._rotate)

    def _rotate(self) -> None:
        """Delete old checkpoints; those that stay cost money, not the run."""
        if self.keep < 1:
            return
        try:
            self.save_folder.rotate(self.keep)
        except Exception as error:  # of the file system, or any cloud's
            why = describe_storage_error(error)
            log.warning(f"could not remove old checkpoints of {self.save_folder.uri}: {why}")

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Hear of uploads. The Trainer raises on all ranks what this raises on rank 0.

        Raises:
            NotSavedError: one has failed for good.
        """
        arrived = [one for one in self._on_their_way if one.done()]
        self._on_their_way = [one for one in self._on_their_way if one not in arrived]
        for one in arrived:
            if isinstance(error := one.exception(), UserError):
                self._run_has_ended = True
                if isinstance(error, StartedAgainError):
                    raise error
                raise NotSavedError(f"{error}. {GOES_ON}") from None
            one.result()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the uploads, on every rank.

        Raises:
            NotSavedError: one has failed for good; on every rank.
        """
        goes_on = True
        with self.watch:
            while goes_on:  # an upload may take longer than the ranks wait for one another
                arrived, others = wait(self._on_their_way, ASKED_EVERY, FIRST_EXCEPTION)
                has_failed = any(one.exception() for one in arrived)
                (goes_on,) = true_on_any_rank(torch.tensor([bool(others) and not has_failed]))
        with errors_on_all_ranks():
            self.before_dataloader(state, logger)

    def post_close(self) -> None:
        """Wait for uploads that an error has overtaken. Composer calls this twice."""
        if self._closed or rank() != 0:
            return
        self._closed = True
        self._delivery.then(self._rotate)
        self._delivery.finish(at_once=self._run_has_ended)
        for one in [] if self._run_has_ended else self._on_their_way:
            if error := one.exception():
                folder = self.save_folder.uri
                log.warning(f"not all checkpoints have arrived in {folder}: {one_line(error)}")
