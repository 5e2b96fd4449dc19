"""Checkpoints on their way into a run's save folder; into a bucket they go beside the training."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from alignclip.runtime import attendance
from alignclip.storage.temporary import make_temporary_folder
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.checkpoint_file import write_checkpoint


class Delivery:
    """Brings checkpoints into a save folder, in the order in which they were saved. For rank 0.

    A local folder has a checkpoint at once. For a bucket the checkpoint is written to this machine,
    and uploaded by a thread.

    Args:
        folder: of the run.
        overwrite: whether an upload may take the place of a checkpoint of the same name.

    Attributes:
        place: the local folder that checkpoints are written to.
    """

    def __init__(self, folder: SaveFolder, overwrite: bool = True) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.place = Path(folder.uri)
        if folder.remote:
            self._temporary = make_temporary_folder()
            self.place = Path(self._temporary.name)
        self._worker = ThreadPoolExecutor(1)

    def save(self, content: dict[str, Any], name: str, arrived: Callable[[], None]) -> Future[None]:
        """Write a checkpoint, and call ``arrived`` once the checkpoint is in the save folder.

        Returns:
            what raises the error of an upload or of ``arrived``.

        Raises:
            NotSavedError: the checkpoint can't be written to this machine.
        """
        done: Future[None] = Future()
        with ExitStack() as unhurried:
            unhurried.enter_context(attendance.unhurried())
            if self.folder.remote:
                # a folder for each: the checkpoint before may have this name, and be on its way
                made = Path(tempfile.mkdtemp(dir=self.place))
                write_checkpoint(content, made / name)
                done = self._worker.submit(self._upload, made, name, arrived)
                until_uploaded = unhurried.pop_all()
                done.add_done_callback(lambda _: until_uploaded.close())
            else:
                write_checkpoint(content, self.place / name)
                arrived()
                done.set_result(None)
        return done

    def then(self, action: Callable[[], None]) -> None:
        """Call ``action`` behind the uploads so far, beside the training; not after the end."""
        with suppress(RuntimeError):  # of a worker that takes nothing more, as when Python ends
            self._worker.submit(action)

    def finish(self, at_once: bool = False) -> None:
        """Wait for the uploads, or only for the one at work; may be called again."""
        self._worker.shutdown(cancel_futures=at_once)

    def _upload(self, made: Path, name: str, arrived: Callable[[], None]) -> None:
        try:
            self.folder.bring(made / name, name, self.overwrite)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        arrived()
