"""What a run starts from: its newest whole checkpoint, ``load_path``, or nothing; on every rank the same.

Rank 0 looks at the checkpoints and decides. Each machine then has the file before the Trainer is built,
so that Composer neither searches for a checkpoint nor downloads one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist

from alignclip.config.schema import RunConfig
from alignclip.errors import UserError, few
from alignclip.ranks import raise_on_all_ranks, run_on_rank_zero
from alignclip.training import composer_patches
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file
from alignclip.weights.checkpoint_file import GONE, UNREADABLE
from alignclip.weights.locate import fetch


@dataclass
class Origin:
    """What a run starts from.

    Attributes:
        path: a whole checkpoint on this machine; None where the run starts without one.
        place: what a person calls the checkpoint.
        goes_on: the checkpoint is the run's own.
    """

    path: Path | None = None
    place: str = ""
    goes_on: bool = False

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments about loading. What is left out of ``load_path`` is not left out of a resume."""
        arguments: dict[str, Any] = {"autoresume": False, "load_path": None}
        if self.path is not None:
            arguments["load_path"] = str(self.path.absolute())
            composer_patches.places[str(self.path.absolute())] = self.place
        if self.goes_on:
            arguments |= {
                "load_weights_only": False,
                "load_ignore_keys": None,
                "load_exclude_algorithms": None,
            }
        return arguments


@contextmanager
def origin_of(config: RunConfig, folder: SaveFolder | None) -> Iterator[Origin]:
    """Put the checkpoint that a run starts from on every machine, until the block ends; call it on every rank.

    Raises:
        UserError: no checkpoint is whole, or it can't be read; on every rank.
    """
    with tempfile.TemporaryDirectory(prefix="alignclip-") as downloads:
        own = _own(folder, Path(downloads)) if folder is not None and config.autoresume else None
        if own is None and config.load_path:
            own = Origin(
                _on_each_machine(lambda: _given(str(config.load_path), Path(downloads))),
                config.load_path,
            )
        yield own or Origin()
        dist.barrier()  # the first rank of a machine has the download, and the others read it


def choose(folder: SaveFolder, download: Path) -> str | None:
    """Find the newest whole checkpoint of a save folder, say what was passed over, and mend ``latest``; on rank 0.

    The checkpoint that ``latest`` names goes first: a person may have turned it back. A run that was killed
    while it saved its first checkpoint has none.

    Args:
        folder: of the run.
        download: where a bucket's checkpoint shall lie afterwards.

    Returns:
        the checkpoint's name in the folder; None where the run has completed none so far.

    Raises:
        UserError: the run has completed checkpoints, and none is whole any more; or the only ones left can't be read.
    """
    target, batches = folder.latest_target(), folder.checkpoints()
    names = sorted(batches, key=lambda name: (batches[name], name), reverse=True)
    candidates = [target, *(name for name in names if name != target)] if target else names
    passed: list[str] = []
    reasons: list[str] = []
    for name in candidates:
        if (why := folder.damage(name, download)) is None:
            if passed or not target:
                folder.point_latest(name)
                what = f"passed over {few(passed)}" if passed else f"there was no {folder.latest}"
                print(f"{folder.uri}: {what}; the newest whole checkpoint is {name}", flush=True)
            return name
        passed.append(f"{name} ({why})")
        reasons.append(why)
    # a key that may not list a bucket knows no other checkpoint than the one that `latest` names
    was_completed = bool(target) and (bool(names) or reasons[0] != GONE)
    if was_completed or any(why.startswith(UNREADABLE) for why in reasons):
        raise UserError(
            f"no checkpoint in {folder.uri} is whole: {few(passed)}; put a whole one there, or move these away to "
            "start anew"
        )
    if passed:
        what = (
            f"{folder.latest} points at {target}, which is gone"
            if target
            else f"nothing whole yet: {few(passed)}"
        )
        print(f"{folder.uri}: {what}; the run starts anew", flush=True)
    return None


def _own(folder: SaveFolder, downloads: Path) -> Origin | None:
    """The run's own checkpoint, if there is one; rank 0 chooses it, and the other machines get the same."""
    download = downloads / "checkpoint.pt"
    name = run_on_rank_zero(lambda: choose(folder, download))
    if name is None:
        return None

    def get() -> Path:
        if dist.get_global_rank() != 0 and (why := folder.damage(name, download)):
            raise UserError(
                f"{folder.uri}/{name} is whole on the first machine, but not on this one: {why}"
            )
        return download if folder.remote else Path(folder.uri, name)

    return Origin(_on_each_machine(get), f"{folder.uri}/{name}", goes_on=True)


def _given(place: str, downloads: Path) -> Path:
    """The checkpoint of ``load_path``, on this machine.

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


def _on_each_machine(get: Callable[[], Path]) -> Path:
    """Call ``get`` on the first rank of each machine; its path is the machine's.

    Raises:
        UserError: of any machine, on all ranks.
    """
    path: Path | None = None
    failure: UserError | None = None
    if dist.get_local_rank() == 0:
        try:
            path = get()
        except UserError as error:
            failure = error
    raise_on_all_ranks(failure)
    found = dist.all_gather_object(path)[dist.get_global_rank() - dist.get_local_rank()]
    assert found is not None
    return found
