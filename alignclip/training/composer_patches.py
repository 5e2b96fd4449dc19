"""Patches of Composer and torch: functions that are replaced, and private names that are used.

Each says why. Measured with mosaicml 0.32.1 and torch 2.7.0; ``tests/test_contracts.py`` fails
where an upgrade has moved or changed one of the names. A function that takes the place of one of
Composer's keeps its signature. :mod:`alignclip.training.saver` patches Composer's CheckpointSaver;
all other modules use public names only.
"""

from __future__ import annotations

import ast
import atexit
from pathlib import Path
from typing import Any

import composer.algorithms
import torch
import torch.distributed as dist
from composer import Trainer, loggers
from composer.core import Callback, State
from composer.core.engine import Engine
from composer.loggers import Logger
from composer.utils import checkpoint, remote_uploader, reproducibility
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from alignclip.errors import UserError
from alignclip.ranks import errors_on_all_ranks, rank, world_size
from alignclip.storage import (
    TRAINING_PATIENCE,
    StorageError,
    describe_storage_error,
    expect_plain_s3,
    patiently,
)
from alignclip.weights.checkpoint_file import write_checkpoint
from alignclip.weights.safe_read import read_pickled

PLAIN_DATA_HINT = "a run's own checkpoints hold plain data alone; go on from another one"

places: dict[str, str] = {}  # path of a file on this machine → what a person calls the file

_composers_save, _composers_load = checkpoint.save_checkpoint, checkpoint.safe_torch_load
_composers_upload = remote_uploader._upload_file_to_object_store
_failures: list[UserError] = []  # of the checkpoint that is being saved
_contents: dict[str, dict[str, Any]] = {}  # path of a file → its content, until Composer takes it


def install() -> None:
    """Have Composer save, load and upload by the functions of this module."""
    checkpoint.save_checkpoint = save_checkpoint
    checkpoint._write_checkpoint_file = write_checkpoint_file
    checkpoint.download_checkpoint = download_checkpoint
    checkpoint.safe_torch_load = load_checkpoint_file
    checkpoint._torch_load_with_validation = _take_content
    expect_plain_s3()
    remote_uploader._upload_file_to_object_store = upload_patiently  # type: ignore[assignment]
    remote_uploader.validate_credentials = validate_credentials


# --- saving ---------------------------------------------------------------------------------------


def save_checkpoint(*args: Any, **options: Any) -> str | None:
    """Save a checkpoint, on every rank; rank 0 writes the file.

    Where rank 0 can't write, Composer's other ranks wait for rank 0 until they time out.

    Returns:
        the path of the file on rank 0, None on the others.

    Raises:
        UserError: the file can't be written; on every rank.
    """
    _failures.clear()
    path = None
    with errors_on_all_ranks():
        try:
            path = _composers_save(*args, **options)
        except AssertionError:  # Composer looks for the file
            if not _failures:
                raise
        if _failures:
            raise _failures[0]
    return path


def write_checkpoint_file(state_dict: dict[str, Any], filename: str) -> None:
    """Write a whole checkpoint with its checksum, or no file at all.

    Composer writes under the checkpoint's name from the first byte on: a full disk leaves a part of
    a file there. An error waits for :func:`save_checkpoint`, in which all ranks meet.
    """
    try:
        write_checkpoint(state_dict, Path(filename))
    except UserError as error:
        _failures.append(error)


# --- loading --------------------------------------------------------------------------------------


def download_checkpoint(
    path: str, node_checkpoint_folder: str, object_store: object, progress_bar: bool
) -> tuple[str, None, bool]:
    """Give Composer the file that :mod:`alignclip.training.resume` has put on this machine.

    Composer makes a symbolic link to the file in a temporary folder, and not every file system has
    links.
    """
    return path, None, False


def load_checkpoint_file(
    composer_states_filepath: str | Path,
    map_location: str = "cpu",
    load_monolith_rank0_only: bool = False,
) -> dict[str, Any]:
    """Read a checkpoint on every rank, or under FSDP on rank 0, without executing anything of it.

    Composer unpickles whatever the file holds.

    Raises:
        UserError: see :func:`read_checkpoint`; on every rank.
    """
    path = str(composer_states_filepath)
    with errors_on_all_ranks():
        if rank() == 0 or not load_monolith_rank0_only:
            _contents[path] = read_checkpoint(Path(path), places.get(path, path))
    return _composers_load(composer_states_filepath, map_location, load_monolith_rank0_only)


def _take_content(checkpoint_filepath: str | Path, map_location: str) -> dict[str, Any]:
    """Give Composer what :func:`load_checkpoint_file` has read."""
    return _contents.pop(str(checkpoint_filepath))


def read_checkpoint(path: Path, place: str) -> dict[str, Any]:
    """Return the content of a run's checkpoint.

    Composer evaluates the text by which a checkpoint names an algorithm that has changed the model.
    So this text may be a plain call of one of Composer's classes only.

    Args:
        path: of the file.
        place: what a person calls the file.

    Raises:
        UserError: the file holds something else than plain data, or isn't a run's checkpoint.
    """
    content = read_pickled(path, what=place, way_out=PLAIN_DATA_HINT)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{place} is no checkpoint of a run: it has no state")
    algorithms = content["state"].get("algorithms", ())
    pairs = algorithms.items() if isinstance(algorithms, dict) else algorithms
    for name, saved in pairs:
        text = saved.get("repr", "") if isinstance(saved, dict) else ""
        cls = getattr(composer.algorithms, str(name), None)
        if cls is not None and cls.required_on_load() and not _is_plain_call(str(text), str(name)):
            raise UserError(
                f"{place} is refused: its algorithm {name} is '{text}', which could run code; "
                f"{PLAIN_DATA_HINT}"
            )
    return content


def _is_plain_call(text: str, name: str) -> bool:
    """Say whether a text only calls the class ``name`` with constants or members of ``Event``."""
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != name:
            return False
        for value in [*call.args, *(keyword.value for keyword in call.keywords)]:
            is_event = isinstance(value, ast.Attribute) and ast.unparse(value.value) == "Event"
            if not is_event:
                ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True


def restore_random_state(trainer: Trainer) -> None:
    """Restore the random generators of the loaded checkpoint: patch dropout draws from them.

    In the middle of an epoch Composer restores them only for loaders that can't resume.
    """
    if trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)


def close(trainer: Trainer) -> None:
    """Close what a run has opened, once, while threads and processes can still be started.

    Composer closes a second time as Python ends, and only then where an error has ended the run.
    Then no thread can be started any more, and the resulting error hides the first one.
    """
    trainer.engine.close()
    atexit.unregister(Engine._close)


# --- uploading, in processes of Composer's own ----------------------------------------------------


def upload_patiently(**arguments: Any) -> int:
    """Upload as Composer does, again and again where the storage may come back.

    Composer gives up after seconds, and ends the run.

    Raises:
        StorageError: asking again won't help, or the storage has been away for too long. It is one
            line: the cloud's own exception would reach the training process without its cause.
    """
    store, name = arguments["remote_backend_name"], arguments["remote_file_name"]
    options = arguments["backend_kwargs"]
    place = f"{store}://{options.get('bucket') or options.get('container', '')}/{name}"
    try:
        return patiently(lambda: _composers_upload(**arguments), place, TRAINING_PATIENCE)
    except Exception as error:  # every provider has its own
        raise StorageError("write", place, describe_storage_error(error, "write")) from None


def validate_credentials(remote_backend: object, remote_file_name_to_test: str) -> None:
    """Skip Composer's test of the credentials: the save folder itself has been tried by now.

    Composer writes to the bucket's root, where a key may have no right.
    """


# --- loggers --------------------------------------------------------------------------------------


def open_for_appending(logger: loggers.FileLogger, run_name: str) -> int:
    """Open a FileLogger's file behind its content; Composer's ``init`` empties the file.

    Returns:
        the size of the content in bytes.
    """
    logger._is_newline = True
    logger._run_name = run_name  # type: ignore[assignment]
    path = Path(logger.filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    logger.file = path.open("a+", buffering=logger.buffer_size, encoding="utf-8")
    logger._flush_queue()
    return size


# --- torch ----------------------------------------------------------------------------------------


class ReshardAfterBackward(Callback):
    """Keeps gathered parameters until the whole backward pass ends, under FSDP2 with chunked encoding.

    FSDP2 frees a block's parameters after a chunk's backward pass. The next chunk recomputes the
    same blocks within the backward pass, where FSDP2 gathers nothing, so its parameters must stay.
    """

    # Composer keeps a callback's state under this name: checkpoints of earlier versions have it
    __qualname__ = "WholeThroughBackward"

    def fit_start(self, state: State, logger: Logger) -> None:
        """Keep parameters during the backward pass."""
        for module in self._sharded(state):
            module.set_reshard_after_backward(False)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Free parameters before the optimizer's step: the next forward pass gathers them anew."""
        for module in self._sharded(state):
            module.reshard()

    @staticmethod
    def _sharded(state: State) -> list[FSDPModule]:
        return [module for module in state.model.modules() if isinstance(module, FSDPModule)]


def average_fsdp_gradients_on_gloo() -> bool:
    """Make FSDP2's gradients on CPU the average over ranks; call this on every rank.

    FSDP2 asks for reduce-scatter(AVG), and gloo of torch 2.7 sums: gradients come out world size
    times too large, which Adam hides. A probe decides, so that a mended gloo is left alone.

    Returns:
        whether anything had to be mended.
    """
    world = world_size()
    share = torch.empty(1)
    dist.reduce_scatter_tensor(share, torch.ones(world), op=dist.ReduceOp.AVG)
    if share.item() == 1:
        return False
    # the factors that FSDP2 divides by before and after a plain sum
    _fsdp_collectives._get_gradient_divide_factors = lambda *args, **kwargs: (1.0, float(world))
    return True


def compile_recomputed_chunks() -> None:
    """Keep torch.compile from splitting graphs for DDP: it fails where chunks are recomputed."""
    torch._dynamo.config.optimize_ddp = False
