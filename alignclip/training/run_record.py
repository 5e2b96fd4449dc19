"""The record beside a run's checkpoints: whose run it is, and each of its starts.

``config.yaml`` is the resolved configuration. ``starts.json`` has an entry for each start of the
run (:class:`alignclip.runtime.environment.Start`). The functions are for rank 0.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from alignclip.checked_json import has_type, parse_json
from alignclip.config.reading import to_yaml
from alignclip.errors import UserError, one_line
from alignclip.runtime.environment import Git, Start
from alignclip.storage import StorageError
from alignclip.training.run_identity import changes, identity_changes, nested, with_defaults
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.checkpoint_file import NotSavedError
from alignclip.weights.locate import CARD

CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.json"
ENTRIES_OF_MACHINE = ("world_size", "device")  # entries of a start
# What a record of an earlier version may lack: the defaults are those of this process.
NOT_RECORDED: dict[str, Any] = {"time": "", "command": "", "versions": {}, "process": ""}


class StartedAgainError(NotSavedError):
    """The run has a later start than this process."""


def check_config(folder: SaveFolder) -> None:
    """Refuse to go on with another run's checkpoints.

    Raises:
        UserError: the folder holds a run that was configured differently (with the differences),
            or a run at all when ``autoresume`` is off.
    """
    config = folder.config
    if not folder.has_checkpoint():
        return
    if not config.autoresume:
        raise UserError(
            f"{folder.uri} holds checkpoints of run '{config.run_name}' already; "
            "set autoresume=true to go on with it, or choose another run_name"
        )
    if (old := _last_config(folder)) is None:
        return
    now = nested(to_yaml(config))
    if old.get("run_name") != now["run_name"]:
        raise UserError(
            f"{folder.uri} is the folder of run '{old.get('run_name')}', not of "
            f"'{now['run_name']}'; choose another save_folder, e.g. one with {{run_name}} in it"
        )
    if changed := identity_changes(old, now):
        raise UserError(
            f"run '{config.run_name}' in {folder.uri} was started with other settings: "
            f"{'; '.join(changed)}. Put them back, or choose another run_name"
        )
    duration = old.get("max_duration")
    if duration != now["max_duration"]:
        print(f"max_duration: {duration} → {now['max_duration']}; the learning rate follows it")


def check_sets(folder: SaveFolder, sets: dict[str, str]) -> None:
    """Refuse to go on with other samples: a set that was converted anew at the same place.

    Args:
        folder: of the run.
        sets: the fingerprint of each stream's set as it is now.

    Raises:
        UserError: a set is another one than the run's last start has read.
    """
    if not folder.has_checkpoint() or not (starts := _entries_of_starts(folder)):
        return
    before, streams = starts[-1].get("sets", {}), folder.config.data.streams
    for name in sets.keys() & before.keys():
        if sets[name] != before[name]:
            place = streams[name].remote or streams[name].local
            raise UserError(
                f"run '{folder.config.run_name}' in {folder.uri} was started with another set: "
                f"data.streams.{name} ({place}) has other samples now. Put the old set back, or "
                "choose another run_name"
            )


def record_config(folder: SaveFolder) -> None:
    """Leave this run's configuration beside its checkpoints, to be compared or run again.

    Raises:
        UserError: the folder can't be written.
    """
    _write(folder, CONFIG_FILE, to_yaml(folder.config))


def record_card(folder: SaveFolder, card: str) -> None:
    """Leave a model card beside the checkpoints, which carries the licence of their origin.

    Raises:
        UserError: the folder can't be written.
    """
    _write(folder, CARD, card)


def add_start(folder: SaveFolder, start: Start) -> None:
    """Add an entry to the record of the run's starts, with the changes since the last start.

    Call this before :func:`record_config`: the folder still has the settings of the last start.

    Raises:
        UserError: the record is not as this has written it, or can't be written.
    """
    now = dataclasses.asdict(start)
    new_versions: list[str] = []
    starts = _entries_of_starts(folder)
    if starts:
        last = starts[-1]
        new_versions = changes(last.get("versions", now["versions"]), now["versions"])
        machines = ({key: one[key] for key in ENTRIES_OF_MACHINE} for one in (last, now))
        now["changed"] = [*_changed_settings(folder), *changes(*machines), *new_versions]
    if new_versions and start.batch:
        listed = "; ".join(new_versions)
        print(f"since the last start other versions were installed: {listed}", flush=True)
    _write(folder, STARTS_FILE, json.dumps([*starts, now], indent=2) + "\n")
    folder.start = start


def check_last_start(folder: SaveFolder) -> None:
    """Refuse to save where the run was started once more, and so has another process at work.

    Raises:
        StartedAgainError: it was, after the :func:`add_start` of this process.
    """
    if (own := folder.start) is None:
        return
    try:
        last = starts_of(folder)[-1:]
    except (UserError, OSError, StorageError):  # a person moved it, or the bucket is away
        return
    if last and (last[0].time, last[0].process) != (own.time, own.process):
        raise StartedAgainError(
            f"the run in {folder.uri} was started again at {last[0].time}, as process "
            f"{last[0].process}: this one ends and leaves the folder to it"
        )


def starts_of(folder: SaveFolder) -> list[Start]:
    """Read the record of the run's starts, the first one first.

    Raises:
        UserError: the record is not as :func:`add_start` has written it.
    """
    starts = _entries_of_starts(folder)
    return [
        Start(**NOT_RECORDED | _known(Start, one) | {"git": git})
        for one in starts
        for git in [Git(**_known(Git, one["git"])) if one.get("git") else None]
    ]


def _known(kind: type[Start] | type[Git], entries: dict[str, Any]) -> dict[str, Any]:
    """Leave out what a later version has recorded."""
    names = {one.name for one in dataclasses.fields(kind)}
    return {name: value for name, value in entries.items() if name in names}


def _entries_of_starts(folder: SaveFolder) -> list[dict[str, Any]]:
    """Read the entries of all starts."""
    place = folder.files.at(STARTS_FILE)
    try:
        starts = parse_json(folder.files.read_text_optional(STARTS_FILE) or "[]")
    except ValueError:
        starts = None
    if not has_type(starts, list[Start]):
        raise UserError(f"{place} is no list of this run's starts; move it away")
    entries: list[dict[str, Any]] = starts
    return entries


def _last_config(folder: SaveFolder) -> dict[str, Any] | None:
    """Read the configuration of the last start; None where there is none.

    Raises:
        UserError: it is not as :func:`record_config` has written it.
    """
    if (text := folder.files.read_text_optional(CONFIG_FILE)) is None:
        return None
    try:
        return nested(text)
    except ValueError as error:
        place = folder.files.at(CONFIG_FILE)
        raise UserError(
            f"{place} is not what a run has written: {one_line(error)}; put the run's own back, or "
            "move it away"
        ) from None


def _changed_settings(folder: SaveFolder) -> list[str]:
    before = _last_config(folder)
    if before is None:
        return []
    return changes(with_defaults(before), with_defaults(nested(to_yaml(folder.config))))


def _write(folder: SaveFolder, name: str, text: str) -> None:
    try:
        folder.files.write_text(name, text)
    except StorageError as error:
        raise UserError(f"save_folder={folder.uri} can't be written: {error.why}") from None
