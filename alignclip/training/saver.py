"""Composer's CheckpointSaver for a run's folder: whole files, errors in one line.

The private names of Composer that this subclass overrides or reads are Composer's of mosaicml
0.32.1; ``tests/test_contracts.py`` fails where an upgrade has changed them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from composer import callbacks
from composer.core import State
from composer.loggers import Logger

from alignclip.errors import UserError, one_line
from alignclip.ranks import errors_on_all_ranks, rank
from alignclip.storage import why_not_written
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.checkpoint_file import GOES_ON, NotSavedError

log = logging.getLogger(__name__)


class CheckpointSaver(callbacks.CheckpointSaver):
    """Saves a run as its configuration says.

    It has the name of Composer's own, by which a checkpoint keeps its state.

    Args:
        save_folder: of the run.
    """

    def __init__(self, save_folder: SaveFolder) -> None:
        config, remote = save_folder.config, save_folder.remote
        self.save_folder = save_folder
        self._moves_latest = not remote and config.save_latest_filename is not None
        self._upload_error: UserError | None = None  # of the checkpoint that is being saved
        self._run_has_ended = False  # by an upload that failed for good
        self._closed = False
        prefix = Path(urlparse(save_folder.uri).path.strip("/") if remote else save_folder.uri)
        latest = config.save_latest_filename
        super().__init__(
            folder=save_folder.uri,
            filename=config.save_filename,
            remote_file_name=str(prefix / config.save_filename),
            # in a folder SaveFolder moves `latest`: not every file system has links
            latest_filename=latest if remote else None,
            latest_remote_file_name=str(prefix / latest) if remote and latest else None,
            save_interval=config.save_interval,
            overwrite=config.save_overwrite,
            # 0 deletes the local file of an upload; in a local folder Rotation deletes
            num_checkpoints_to_keep=0 if remote else -1,
            weights_only=config.save_weights_only,
            ignore_keys=config.save_ignore_keys,
        )
        # how soon `latest` follows an upload; Composer's 30 s are 30 s of training to lose
        self._symlink_upload_wait_before_next_try_in_seconds = 1.0

    def init(self, state: State, logger: Logger) -> None:
        """Connect to the bucket."""
        self._opened = state, logger
        super().init(state, logger)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        """Save, and end the run on all ranks where rank 0 can't.

        Raises:
            UserError: on every rank.
        """
        self._upload_error = None
        pointers = list(self.symlink_upload_tasks)
        try:
            with errors_on_all_ranks():
                self._save_or_say_why(state, logger)
        except Exception:
            self.symlink_upload_tasks = pointers  # `latest` follows what was saved before
            raise

    def _save_or_say_why(self, state: State, logger: Logger) -> None:
        try:
            super()._save_checkpoint(state, logger)
            if rank() == 0 and self._moves_latest:
                self.save_folder.point_latest(Path(self.saved_checkpoints[-1]).name)
        except OSError as error:  # of the small files beside the checkpoint
            raise self._not_saved(error) from error
        if self._upload_error is not None:
            raise self._upload_error

    def _upload_checkpoint(
        self,
        remote_file_name: str,
        local_file_name: str,
        local_remote_file_names: list[str],
        logger: Logger,
    ) -> None:
        """Copy a checkpoint to where an uploader takes it. An error waits for the other ranks."""
        upload = super()._upload_checkpoint
        arguments = (remote_file_name, local_file_name, local_remote_file_names, logger)
        uploader = self.remote_uploader
        if uploader is None:
            upload(*arguments)
            return
        waiting = Path(uploader._upload_staging_folder)
        before = set(waiting.glob("*"))
        size = Path(local_file_name).stat().st_size
        self.save_folder.expect(Path(remote_file_name).name, size)
        try:
            upload(*arguments)
        except OSError as error:
            for part in set(waiting.glob("*")) - before:
                part.unlink(missing_ok=True)
            path = waiting / Path(local_file_name).name
            self._upload_error = self._not_saved(error, path, size)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Hear of uploads, and move ``latest`` in the bucket."""
        with self._uploading():
            super().batch_end(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Wait for the uploads, and move ``latest`` in the bucket."""
        with self._uploading():
            super().fit_end(state, logger)
        self.symlink_upload_tasks = []

    def post_close(self) -> None:
        """Wait for uploads that an error has overtaken. Composer calls this twice."""
        uploader = self.remote_uploader
        if uploader is None or self._closed:
            return
        self._closed = True
        try:
            if self.symlink_upload_tasks and not self._run_has_ended:
                self.fit_end(*self._opened)
            uploader.wait_and_close()
        except Exception as error:  # of any cloud's library
            if not self._run_has_ended:
                folder = self.save_folder.uri
                log.warning(f"not all checkpoints have arrived in {folder}: {one_line(error)}")
            for executor in (uploader.upload_executor, uploader.check_remote_files_exist_executor):
                executor.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _uploading(self) -> Iterator[None]:
        """Turn an upload that has failed for good into the run's last line."""
        try:
            yield
        except UserError as error:
            self._run_has_ended = True
            raise NotSavedError(f"{error}. {GOES_ON}") from None

    def _not_saved(
        self, error: OSError, path: Path | None = None, needed: int | None = None
    ) -> NotSavedError:
        path = path or Path(error.filename or self.save_folder.uri)
        why = why_not_written(error, path, needed)
        return NotSavedError(f"can't save {path}: {why}. {GOES_ON}")
