"""What of Composer is replaced while a run saves and loads: function by function, with the reason for each.

Measured with mosaicml 0.32.1; ``tests/test_composer_patches.py`` says what is expected of Composer. The
functions keep the signatures of Composer's own.
"""

from __future__ import annotations

import ast
import atexit
from pathlib import Path
from typing import Any

import composer.algorithms
from composer import Trainer
from composer.core.engine import Engine
from composer.utils import checkpoint, dist

from alignclip.errors import UserError
from alignclip.ranks import raise_on_all_ranks
from alignclip.weights.checkpoint_file import save
from alignclip.weights.safe_read import read_pickled

WAY_OUT = "a run's own checkpoints hold plain data alone; go on from another one"

places: dict[str, str] = {}  # path of a file on this machine → what a person calls the file

_composers_save, _composers_load = checkpoint.save_checkpoint, checkpoint.safe_torch_load
_failures: list[UserError] = []  # of the checkpoint that is being saved
_contents: dict[
    str, dict[str, Any]
] = {}  # what was read and not yet taken, by the path of its file


def install() -> None:
    """Have Composer save and load by the functions of this module."""
    checkpoint.save_checkpoint = save_checkpoint
    checkpoint._write_checkpoint_file = write_checkpoint_file
    checkpoint.download_checkpoint = download_checkpoint
    checkpoint.safe_torch_load = load_checkpoint_file
    checkpoint._torch_load_with_validation = _take_content


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
    try:
        path = _composers_save(*args, **options)
    except AssertionError:  # Composer looks for the file
        if not _failures:
            raise
    raise_on_all_ranks(_failures[0] if _failures else None)
    return path


def write_checkpoint_file(state_dict: dict[str, Any], filename: str) -> None:
    """Write a checkpoint that is there as a whole, with its checksum, or not at all.

    Composer writes under the checkpoint's name from the first byte on: a full disk leaves a part of a
    file there. What goes wrong is kept for :func:`save_checkpoint`, in which all ranks meet.
    """
    try:
        save(state_dict, Path(filename))
    except UserError as error:
        _failures.append(error)


def download_checkpoint(
    path: str, node_checkpoint_folder: str, object_store: object, progress_bar: bool
) -> tuple[str, None, bool]:
    """Give Composer the file that :mod:`alignclip.training.resume` has put on this machine.

    Composer makes a symbolic link to the file in a temporary folder, and not every file system has links.
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
    failure: UserError | None = None
    if dist.get_global_rank() == 0 or not load_monolith_rank0_only:
        try:
            _contents[path] = read_checkpoint(Path(path), places.get(path, path))
        except UserError as error:
            failure = error
    raise_on_all_ranks(failure)
    return _composers_load(composer_states_filepath, map_location, load_monolith_rank0_only)


def read_checkpoint(path: Path, place: str) -> dict[str, Any]:
    """Return what a run's checkpoint holds.

    Composer evaluates the text by which a checkpoint names an algorithm that has changed the model. So this
    text may be a plain call of one of Composer's classes only.

    Args:
        path: of the file.
        place: what a person calls the file.

    Raises:
        UserError: the file holds something else than plain data, or isn't a run's checkpoint.
    """
    content = read_pickled(path, what=place, way_out=WAY_OUT)
    if not isinstance(content, dict) or not isinstance(content.get("state"), dict):
        raise UserError(f"{place} is no checkpoint of a run: it has no state")
    algorithms = content["state"].get("algorithms", ())
    pairs = algorithms.items() if isinstance(algorithms, dict) else algorithms
    for name, saved in pairs:
        text = saved.get("repr", "") if isinstance(saved, dict) else ""
        cls = getattr(composer.algorithms, str(name), None)
        if cls is not None and cls.required_on_load() and not _is_plain_call(str(text), str(name)):
            raise UserError(
                f"{place} is refused: its algorithm {name} is '{text}', which could run code; {WAY_OUT}"
            )
    return content


def _take_content(checkpoint_filepath: str | Path, map_location: str) -> dict[str, Any]:
    """Give Composer what was read."""
    return _contents.pop(str(checkpoint_filepath))


def close(trainer: Trainer) -> None:
    """Close what a run has opened, once, while threads and processes can still be started.

    Composer closes a second time as Python ends, and only then where an error has ended the run. Then no
    thread can be started any more, and what comes of it hides the error.
    """
    trainer.engine.close()
    atexit.unregister(Engine._close)


def _is_plain_call(text: str, name: str) -> bool:
    """Whether a text is a call of the class ``name`` with constants, or members of Composer's Event, alone."""
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if (
        not isinstance(call, ast.Call)
        or not isinstance(call.func, ast.Name)
        or call.func.id != name
    ):
        return False
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return all(_is_constant(value) for value in values)


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "Event"
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
    return True
