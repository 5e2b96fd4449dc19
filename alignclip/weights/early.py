"""A first look at the places that a command names: a wrong one is told within seconds.

Everything imported here is light. What needs PyTorch or Composer is looked at in
:mod:`alignclip.training.preflight`.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from alignclip.checked_json import parse_json
from alignclip.config.metrics import column_of, sets_of
from alignclip.config.schema import EvaluateConfig, EvaluatorConfig, RunConfig, SetConfig
from alignclip.data.mds_index import CLASSES, INDEX, columns_of, listed_shards
from alignclip.data.streams import (
    check_embeddings,
    check_task_columns,
    local_folder,
    no_set_at,
    place_of,
    read_index,
)
from alignclip.errors import UserError
from alignclip.near import did_you_mean
from alignclip.storage import (
    StorageError,
    Store,
    check_folder_writable,
    is_absent,
    open_file,
    open_store,
    read_text,
)
from alignclip.weights.locate import (
    LATEST,
    WEIGHT_FILES,
    find_on_disk,
    folder_meant,
    is_on_hub,
    looks_like_id,
    why_no_weights,
)


def check_run(config: RunConfig) -> None:
    """Look at a run's sets, its evaluators' sets, what it starts from, and its folder.

    Raises:
        UserError: what is wrong, all of it in one line.
    """
    if not _speaks():
        return
    wrong = []
    for name, stream in config.data.streams.items():
        where = f"data.streams.{name}"
        hint = f"; set {where}.remote or .local, or take it out with {where}=null"
        wrong += _wrong(check_set, where, stream, hint)
        if config.loss.needs_semantic:
            wrong += _wrong(check_embeddings, where, _set_columns(stream))
    for name, evaluator in config.evaluators.items():
        wrong += _wrong(check_evaluator, name, evaluator)
    if config.load_path and "://" not in config.load_path:
        wrong += _wrong(check_local_checkpoint, config.load_path)
    folder = save_folder(config)
    if config.pretrained and not (folder and _goes_on(config, folder)):
        wrong += _wrong(check_weights, "pretrained", config.pretrained)
    if folder and "://" not in folder:
        wrong += _wrong(check_writable, "save_folder", folder)
    _tell(wrong)


def check_evaluation(config: EvaluateConfig) -> dict[str, str]:
    """Look at what ``evaluate.py`` reads and writes; tell which evaluators' sets are not there.

    Returns:
        why evaluators can't be run, by their names; the others can. On the first process of a
        machine alone.

    Raises:
        UserError: a checkpoint that is not there, ``out`` that can't be written, or not one
            evaluator that can be run.
    """
    if not _speaks():
        return {}
    wrong = []
    places = {"checkpoint": config.checkpoint} if config.checkpoint else {}
    places |= {f"checkpoints.{name}": place for name, place in config.checkpoints.items()}
    for key, place in places.items():
        wrong += _wrong(check_weights, key, str(place))
    wrong += _wrong(check_writable, "out", config.out)
    _tell(wrong)
    failed = {}
    for name, evaluator in config.evaluators.items():
        if why := _wrong(check_evaluator, name, evaluator):
            failed[name] = why[0]
    if len(failed) == len(config.evaluators):
        raise UserError(f"nothing can be evaluated: {'; '.join(failed.values())}")
    for name, why_not in failed.items():
        print(f"error: {why_not}; without it: evaluators.{name}=null", file=sys.stderr, flush=True)
    return failed


def check_evaluator(name: str, evaluator: EvaluatorConfig, contents: bool = False) -> None:
    """Look for an evaluator's sets, and with ``contents`` (which needs Streaming) into them.

    Raises:
        UserError: the first that isn't.
    """
    column = column_of(evaluator.task)
    if column is None:
        _check_file(f"evaluators.{name}", str(evaluator.remote or evaluator.local))
        return
    for key, stream in sets_of(evaluator).items():
        where = f"evaluators.{name}.{key}".rstrip(".")
        if contents:
            shards = read_index(where, stream, local_folder("evaluation", stream))
            check_task_columns(where, map(columns_of, shards), column)
        else:
            check_set(where, stream)
            check_task_columns(where, _set_columns(stream), column)
        if column == "label":
            hint = "; convert/classification.py writes it"
            _check_file(where, place_of(stream, CLASSES), hint=hint, near=False)


def check_set(where: str, stream: SetConfig, hint: str = "") -> None:
    """There is an MDS set.

    Raises:
        UserError: there is none, or it can't be reached.
    """
    if stream.remote:
        _check_file(where, place_of(stream, INDEX), hint=hint)
    elif not (path := Path(place_of(stream, INDEX))).is_file():
        raise UserError(f"{where}: {no_set_at(path.parent, hint)}")


def _set_columns(stream: SetConfig) -> list[dict[str, str]]:
    """Return the columns in a set's index, shard by shard; none of one that can't be read yet."""
    try:
        text = read_text(place_of(stream, INDEX))
        found = [columns_of(entry) for entry in listed_shards(parse_json(text))]
    except (UserError, ValueError, KeyError, TypeError):
        return []
    texts = (text for one in found for pair in one.items() for text in pair)
    return found if all(isinstance(text, str) for text in texts) else []


def check_local_checkpoint(place: str) -> None:
    """There is such a checkpoint on this machine.

    Raises:
        UserError: there is none, or something else.
    """
    try:
        file = find_on_disk(place.removesuffix(".symlink"))
    except UserError as error:
        raise UserError(f"load_path={place}: {error}") from None
    if not zipfile.is_zipfile(file):
        hint = folder_meant(place) if why_no_weights(place) else ""
        raise UserError(f"load_path={place} is no checkpoint, or only a part of one{hint}")


def check_weights(key: str, place: str) -> None:
    """There are weights at a place that a setting names, as far as that is quickly known.

    Raises:
        UserError: there are none.
    """
    if why := why_no_weights(place):
        raise UserError(f"{key}: {why}")
    if is_on_hub(place):
        return  # its client has its own patience and cache
    if "://" in place:
        if Path(place).suffix in WEIGHT_FILES:
            _check_file(key, place, or_link=True)
        return
    if key == "pretrained" and looks_like_id(place):
        return  # perhaps MODEL/TAG of open_clip's list, which torch knows
    try:
        find_on_disk(place)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def check_writable(key: str, place: str) -> None:
    """See that the folder of a setting can be made and written to, and leave nothing of it.

    Raises:
        UserError: it can't.
    """
    try:
        check_folder_writable(Path(place))
    except StorageError as error:
        raise UserError(f"{key}={place}: {error.why}") from None


def save_folder(config: RunConfig) -> str | None:
    """Return the folder of a run's checkpoints; None where its name holds what nobody knows."""
    try:
        return config.save_folder.format(run_name=config.run_name) if config.save_folder else None
    except (KeyError, IndexError, ValueError):
        return None  # told by alignclip.training.save_folder


def _check_file(
    where: str, place: str, or_link: bool = False, hint: str = "", near: bool = True
) -> None:
    store, name = open_file(place)
    try:
        there = any_is_there(store, (name, f"{name}.symlink") if or_link else (name,))
    except StorageError as error:
        raise UserError(f"{where}: {error}") from None
    if not there:
        meant = did_you_mean(place) if near and "://" not in place else ""
        raise UserError(f"{where}: there is no {place}{meant or hint}")


def any_is_there(store: Store, names: Sequence[str]) -> bool:
    """Tell whether one of some files is there; True of a kind of store that doesn't tell.

    Raises:
        StorageError: none is, as far as the store says; the first refusal that says something else.
    """
    refusals = []
    for name in names:
        try:
            store.size(name)
        except StorageError as error:
            refusals += [] if is_absent(error) else [error]
        else:
            return True
    if refusals:
        raise refusals[0]
    return False


def _goes_on(config: RunConfig, folder: str) -> bool:
    """Tell whether a run has a checkpoint to go on from; True where that can't be known yet."""
    if not config.autoresume:
        return False
    latest = str(config.save_latest_filename or LATEST).format(run_name=config.run_name, rank=0)
    try:
        store = open_store(folder)
        if any_is_there(store, (latest, f"{latest}.symlink")):
            return True
        return any(
            name.endswith(".pt") for name in store.names()
        )  # an older checkpoint, without a latest
    except UserError as error:
        return not is_absent(error)


def _speaks() -> bool:
    """Tell whether this process looks, and speaks, for all: the others would say the same.

    With several machines nobody does: the processes of the others would wait for this one until
    they time out. Once all have met, :mod:`alignclip.training.preflight` and the evaluation look at
    the same places.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_WORLD_SIZE", world) == world


def _wrong(check: Callable[..., None], *arguments: object) -> list[str]:
    try:
        check(*arguments)
    except UserError as error:
        return [str(error)]
    return []


def _tell(wrong: list[str]) -> None:
    if wrong:
        raise UserError("; ".join(wrong))
