"""The plan of a set: the options that a whole set shares, and its inputs; and what is complete.

See :mod:`alignclip.conversion.dataset` for the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from alignclip.config.differences import differences
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import InputRecord, Plan
from alignclip.conversion.wording import are_them, first_few, listing
from alignclip.data.mds_index import usable_shards
from alignclip.errors import UserError
from alignclip.storage.staging import COUNTS, INDEX, VAL, OutputFolder, shown

PLAN = "convert.json"  # at the root, written first: what a later run must agree with


def check_free(store: OutputFolder, there: set[str], names: Iterable[str]) -> None:
    """Refuse an output that holds other files: a set would lie among them, and could replace some.

    Args:
        store: the output.
        there: the files in the output.
        names: sub-folders that are to be written.

    Raises:
        UserError: no conversion has begun there, and there are files that are not hidden.
    """
    sets = tuple(name.removesuffix(PLAN) for name in there if name.endswith(f"/{PLAN}"))
    others = sorted(name for name in shown(there) if not name.startswith(sets))
    if PLAN in there or not others:  # a set of ours below is a split
        return
    for name in ("", *names):
        if f"{name}/{INDEX}".lstrip("/") in there:
            place = f"{store.out}/{name}".rstrip("/")
            raise UserError(
                f"{place} already holds a data set that is not this converter's; choose another "
                "--out"
            )
    more = ", …" if others[3:] else ""
    raise UserError(
        f"{store.out} holds other files ({listing(others[:3])}{more}); give --out a new or empty "
        "folder"
    )


def begin(
    store: OutputFolder,
    there: set[str],
    options: ConvertOptions,
    names: dict[str, str],
    columns: dict[str, str],
) -> tuple[dict[str, InputRecord], dict[str, str]]:
    """Write the plan into ``out``, or compare it with the plan there; return what is complete.

    While nothing has been written, for instance because of a wrong caption key, other options take
    the place of those there. More inputs are added to those there; but none may be left out as long
    as it is not converted: the set would be published without it.

    Args:
        store: the output.
        there: the files in the output.
        options: of this run.
        names: sub-folder name -> input of this run.
        columns: of the MDS shards that this run writes.

    Returns:
        sub-folder name -> record, of the complete sub-folders; and sub-folder name -> input, of
        earlier runs.

    Raises:
        UserError: other options, other inputs, or a set that is not this converter's.
    """
    check_free(store, there, names)
    plan = Plan(options.fixed(), columns, names)
    before, complete = _read_plan(store, there) if PLAN in there else (None, {})
    written = any(record.counts.written for record in complete.values())
    different = before and differences(before.settings, plan.settings, same=_same)
    if before is None or (different and not written):
        _write_plan(store, plan)
        return {}, {}
    if different:
        first = min(different, key=lambda key: key == "quality")  # of images, after their size
        was, is_now = (_as_flag(first, value) for value in different[first])
        raise UserError(
            f"{store.out} was begun with {was}, this run has {is_now}: finish it with the same "
            f"options, choose another --out or delete {store.out} to start again"
        )
    if written and before.columns not in (None, columns):
        raise UserError(
            f"{store.out} was begun with the columns {before.columns}, this run would write "
            f"{columns}; choose another --out"
        )
    _check_inputs(store, complete, before.inputs, names)
    if names.items() - before.inputs.items():
        _write_plan(store, Plan(plan.settings, columns, before.inputs | names))
    return complete, before.inputs


def index_over(store: OutputFolder, split: str, names: Sequence[str]) -> str:
    """Return the index over these sub-folders of a split.

    Streaming's merge_index opens a connection for each of them and takes every .json for an index.

    Raises:
        UserError: the index of a sub-folder is none, or can't be read safely.
    """
    shards = []
    paths = [f"{split}/{name}/{INDEX}".lstrip("/") for name in names]
    for name, path, index in zip(names, paths, store.read_json(paths), strict=True):
        try:
            entries = usable_shards(index)
        except ValueError as error:
            folder = store.files.at(path).removesuffix(f"/{INDEX}")
            way = f"delete {folder} to convert its input again"
            raise UserError(f"{store.files.at(path)} {error}; {way}") from None
        for shard in entries:
            if not shard["samples"]:  # MDSWriter's first, where the first sample exceeds the limit
                continue
            for file in filter(None, (shard["raw_data"], shard["zip_data"])):
                file["basename"] = f"{name}/{file['basename']}"
            shards.append(shard)
    return json.dumps({"version": 2, "shards": shards})


def _read_plan(store: OutputFolder, there: set[str]) -> tuple[Plan, dict[str, InputRecord]]:
    """Read the plan and the records of complete sub-folders; a damaged record is none."""
    names = sorted(
        folder
        for folder, _, file in (name.rpartition("/") for name in there)
        if file == INDEX and folder and "/" not in folder and f"{folder}/{COUNTS}" in there
    )
    files = [PLAN, *(f"{name}/{COUNTS}" for name in names)]
    plan, *contents = store.read_json(files)
    if (before := Plan.parse(plan)) is None:
        raise UserError(f"{store.out}/{PLAN} is broken; delete {store.out} to start again")
    complete = {}
    for name, record in zip(names, map(InputRecord.parse, contents), strict=True):
        held_out = {f"{VAL}/{name}/{file}" for file in (INDEX, COUNTS)}
        if record and (not record.counts.held_out or held_out <= there):
            complete[name] = record
    return before, complete


def _check_inputs(
    store: OutputFolder,
    complete: Mapping[str, InputRecord],
    planned: Mapping[str, str],
    names: Mapping[str, str],
) -> None:
    """Refuse an input in another one's place, and a run without inputs that are left to convert.

    Raises:
        UserError: names the first.
    """
    for name, source in names.items():
        record = complete.get(name)
        if record and record.counts.written and record.source != source:
            raise UserError(
                f"{store.out}/{name} was made from {record.source}, not from {source}; choose "
                "another --out"
            )
    left = [
        source
        for name, source in planned.items()
        if name not in complete and names.get(name) != source
    ]
    if left:
        are, them = are_them(len(left))
        raise UserError(
            f"{store.out} was begun with other --inputs, and {len(left):,} of its inputs {are} not "
            f"converted yet ({first_few(left, 1)}): name {them} as well, choose another --out or "
            f"delete {store.out} to start again"
        )


def _write_plan(store: OutputFolder, plan: Plan) -> None:
    with store.staged() as folder:
        (folder / PLAN).write_text(plan.text())


def _same(key: str, before: Any, now: Any) -> bool:
    """Say whether two values of an option are the same: 32mb are 33554432 bytes."""
    if key == "size_limit" and isinstance(before, (int, str)):
        from alignclip.conversion.mds_writer import bytes_of

        with suppress(ValueError):  # a plan that is damaged
            return bytes_of(before) == bytes_of(now)
    return bool(before == now)


def _as_flag(key: str, value: Any) -> str:
    """Return an option as it is given on the command line."""
    if key == "encoder" and value is None:
        return "--no-semantic"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    flag = f"--{key.replace('_', '-')}"
    if value is True:
        return flag
    return f"no {flag}" if value is None else f"{flag} {value}"
