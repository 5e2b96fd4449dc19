"""The checkpoint that a run starts from: its newest whole one, ``load_path``, or none.

Rank 0 looks at the checkpoints and decides. Each machine then has the file before the Trainer is
built, so that Composer neither searches for a checkpoint nor downloads one.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import composer.algorithms
from composer import Trainer

from alignclip.checked_json import has_type
from alignclip.config.schema import RunConfig
from alignclip.errors import UserError, few
from alignclip.ranks import (
    errors_on_all_ranks,
    rank,
    run_on_rank_zero,
    run_once_per_machine,
    wait_for_all_ranks,
)
from alignclip.storage.temporary import temporary_folder
from alignclip.training import composer_patches
from alignclip.training.display import print_once
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file
from alignclip.weights.checkpoint_file import CANT_BE_READ, GONE
from alignclip.weights.fetch import fetch
from alignclip.weights.finite import check_finite
from alignclip.weights.safe_read import read_pickled

PLAIN_DATA_HINT = "a run's own checkpoints hold plain data alone; go on from another one"


class _Model(TypedDict):
    model: dict[str, Any]


class _State(_Model, total=False):
    """The state of a run, as far as Composer relies on its types."""

    optimizers: dict[str, Any]
    algorithms: list[tuple[str, Any]] | dict[str, Any]
    rank_zero_seed: int
    dataset_state: dict[str, Any] | None


class _Content(TypedDict, total=False):
    rng: list[Any]


class _Checkpoint(_Content):
    state: _State


@dataclass
class StartingPoint:
    """The checkpoint that a run starts from.

    Attributes:
        path: a whole checkpoint on this machine; None where the run starts without one.
        place: what a person calls the checkpoint.
        goes_on: the checkpoint is the run's own.
    """

    path: Path | None = None
    place: str = ""
    goes_on: bool = False

    def trainer_arguments(self) -> dict[str, Any]:
        """Return the Trainer's arguments about loading.

        A run that goes on loads all of its checkpoint: the YAML's exclusions are for ``load_path``.
        """
        arguments: dict[str, Any] = {"autoresume": False, "load_path": None}
        if self.path is not None:
            arguments["load_path"] = str(self.path.absolute())
        if self.goes_on:
            arguments |= {
                "load_weights_only": False,
                "load_ignore_keys": None,
                "load_exclude_algorithms": None,
            }
        return arguments


@contextmanager
def starting_point(config: RunConfig, folder: SaveFolder | None) -> Iterator[StartingPoint]:
    """Put the checkpoint that a run starts from on every machine until the block ends.

    Call this on every rank.

    Raises:
        UserError: no checkpoint is whole, or it can't be read; on every rank.
    """
    with temporary_folder() as downloads:
        download, start = downloads / "checkpoint.pt", None
        if folder is not None and config.autoresume:
            start = _own_checkpoint(folder, download)
        if start is None and (place := config.load_path):
            path = run_once_per_machine(lambda: _given_checkpoint(place, Path(downloads)))
            start = StartingPoint(path, place)
        start = start or StartingPoint()
        if start.path is not None:
            with errors_on_all_ranks():
                composer_patches.given[:] = [read_checkpoint(start.path, start.place)]
        try:
            yield start
        except RuntimeError as error:
            what, *mismatches = str(error).splitlines()
            if start.path is None or "loading state_dict" not in what:
                raise
            told = few(map(str.strip, mismatches))
            raise UserError(f"{start.place} is no checkpoint of this model: {told}") from None
        wait_for_all_ranks()  # the other ranks of a machine read its first rank's download


def choose_checkpoint(folder: SaveFolder, download: Path) -> str | None:
    """Find the newest whole checkpoint of a save folder, and mend ``latest``; on rank 0.

    The checkpoint that ``latest`` names goes first: a person may have turned it back. A run that
    was killed while it saved its first checkpoint has none. Prints which checkpoints are passed
    over.

    Args:
        folder: of the run.
        download: where a bucket's checkpoint shall lie afterwards.

    Returns:
        the checkpoint's name in the folder; None where the run has completed none so far.

    Raises:
        UserError: the run has completed checkpoints, and none is whole any more; or the only ones
            left can't be read.
    """
    target, batches = folder.latest_target(), folder.checkpoints()
    names = sorted(batches, key=lambda name: (batches[name], name), reverse=True)
    candidates = [target, *(name for name in names if name != target)] if target else names
    reasons: dict[str, str] = {}
    for name in candidates:
        why = folder.damage(name, download)
        if why is None:
            if reasons or not target:
                folder.point_latest(name)
                passed = few(f"{name} ({why})" for name, why in reasons.items())
                what = f"passed over {passed}" if reasons else f"there was no {folder.latest}"
                print(f"{folder.uri}: {what}; the newest whole checkpoint is {name}", flush=True)
            return name
        reasons[name] = why
    passed = few(f"{name} ({why})" for name, why in reasons.items())
    # a key that may not list a bucket knows no other checkpoint than the one that `latest` names
    was_completed = bool(target) and (bool(names) or reasons[target] != GONE)
    if was_completed or any(why.startswith(CANT_BE_READ) for why in reasons.values()):
        raise UserError(
            f"no checkpoint in {folder.uri} is whole: {passed}; put a whole one there, "
            "or move these away to start anew"
        )
    if reasons:
        what = f"nothing whole yet: {passed}"
        if target:
            what = f"{folder.latest} points at {target}, which is gone"
        print(f"{folder.uri}: {what}; the run starts anew", flush=True)
    return None


def _own_checkpoint(folder: SaveFolder, download: Path) -> StartingPoint | None:
    """Find the run's own checkpoint: rank 0 chooses, and the other machines get the same."""
    name = run_on_rank_zero(lambda: choose_checkpoint(folder, download))
    if name is None:
        return None

    def get() -> Path:
        if rank() != 0 and (why := folder.damage(name, download)):
            raise UserError(
                f"{folder.uri}/{name} is whole on the first machine, but not on this one: {why}"
            )
        return download if folder.remote else Path(folder.uri, name)

    return StartingPoint(run_once_per_machine(get), f"{folder.uri}/{name}", goes_on=True)


def _given_checkpoint(place: str, downloads: Path) -> Path:
    """Get the checkpoint of ``load_path`` onto this machine.

    Raises:
        UserError: there is none, it can't be reached, or is not whole.
    """
    try:
        path = fetch(place.removesuffix(".symlink"), downloads)
    except UserError as error:
        raise UserError(f"load_path={place}: {error}") from None
    if why := checkpoint_file.damage(path):
        raise UserError(f"load_path={place} is no whole checkpoint: {why}")
    return path


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
    if not has_type(content, _Checkpoint):
        raise UserError(f"{place} is no checkpoint of a run: it has no state of one")
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


def check_loaded(trainer: Trainer, start: StartingPoint) -> None:
    """Refuse a checkpoint with numbers that are not finite; each rank may have a part of them.

    Raises:
        UserError: names them, and what to do; on every rank.
    """
    state = trainer.state
    what, way_out = f"load_path={start.place}", ""
    if start.goes_on:
        what = f"the latest checkpoint ({start.place})"
        way_out = "Move it away: the next start goes on from the newest one that is left"
    moments = {
        f"{name} ({i})": value
        for optimizer in state.optimizers
        for i, values in enumerate(optimizer.state.values())
        for name, value in values.items()
    }
    with errors_on_all_ranks():
        check_finite(dict(state.model.named_parameters()), what, way_out)
        check_finite(moments, f"the optimizer's state in {what}", way_out)


def say_jump(trainer: Trainer, before: float, now: float) -> None:
    """Say that the learning rate is another than the checkpoint's own schedule goes on with."""
    if not math.isclose(before, now, rel_tol=1e-6):
        batch = trainer.state.timestamp.batch.value
        print_once(
            f"learning rate of the next step (batch {batch + 1}): {before:.6g} → {now:.6g}, "
            "by this run's schedule"
        )
