"""What an output was begun with: the options that a whole set shares, and its inputs; and what is complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from alignclip.conversion.csv_tables import listing as listed
from alignclip.conversion.options import ConvertOptions
from alignclip.errors import UserError
from alignclip.storage.staging import COUNTS, INDEX, VAL, OutputFolder, shown

PLAN = "convert.json"  # at the root, written first: what a later run must agree with
KEPT = {
    "source",
    "written",
    "held_out",
    "skipped",
    "noted",
    "bytes",
    "examples",
}  # in a sub-folder's counts.json


def check_free(store: OutputFolder, listing: set[str], names: Iterable[str]) -> None:
    """Refuse an output that holds somebody else's files: a set would lie among them, and could replace some.

    Args:
        store: the output.
        listing: what it holds.
        names: of the sub-folders that are to be written.

    Raises:
        UserError: no conversion has begun there, and there are files that are not hidden.
    """
    sets = tuple(
        name.removesuffix(PLAN) for name in listing if name.endswith(f"/{PLAN}")
    )  # of ours, as a split
    there = sorted(name for name in shown(listing) if not name.startswith(sets))
    if PLAN in listing or not there:
        return
    foreign = [name for name in ("", *names) if f"{name}/{INDEX}".lstrip("/") in listing]
    if foreign:
        place = f"{store.out}/{foreign[0]}".rstrip("/")
        raise UserError(
            f"{place} already holds a data set that is not this converter's; choose another --out"
        )
    more = ", …" if there[3:] else ""
    raise UserError(
        f"{store.out} holds other files ({listed(there[:3])}{more}); give --out a new or empty folder"
    )


def begin(
    store: OutputFolder,
    listing: set[str],
    options: ConvertOptions,
    names: dict[str, str],
    columns: dict[str, str],
) -> dict[str, dict[str, Any]]:
    """Write the options and inputs into ``out``, or compare them with those there; return what is complete.

    While nothing has been written, for instance because of a wrong caption key, other options take their place. More
    inputs are added to those there; but none may be left out as long as it is not converted: the set would be published
    without it.

    Args:
        store: the output.
        listing: what it holds.
        options: of this run.
        names: sub-folder name -> input of this run.
        columns: of the MDS shards that it writes.

    Returns:
        sub-folder name -> contents of its ``counts.json``, of those that are complete.

    Raises:
        UserError: other options, other inputs, or a set that is not this converter's.
    """
    check_free(store, listing, names)
    if PLAN not in listing:
        _write(store, options, names, columns)
        return {}
    before, complete = _read(store, listing)
    written = any(written_in(kept) for kept in complete.values())
    different = [
        key
        for key, value in options.fixed().items()
        if _plain(key, before.get(key)) != _plain(key, value)
    ]
    if different and written:
        key = min(different, key=lambda name: (name == "quality", different.index(name)))
        raise UserError(
            f"{store.out} was begun with {_flag(key, before.get(key))}, this run has "
            f"{_flag(key, options.fixed()[key])}: finish it with the same options, choose another --out or delete "
            f"{store.out} to start again"
        )
    if different:
        _write(store, options, names, columns)
        return {}
    there = before.get("columns", columns)
    if written and there != columns:
        raise UserError(
            f"{store.out} was begun with the columns {there}, this run would write {columns}; choose another --out"
        )
    planned: dict[str, str] = before.get("inputs") or {}
    _check_inputs(store, complete, planned, names)
    if names.items() - planned.items():
        _write(store, options, planned | names, columns)
    return complete


def holds_samples(store: OutputFolder) -> bool:
    """Whether a sub-folder is complete and has samples."""
    listing = store.listing()
    return PLAN in listing and any(map(written_in, _read(store, listing)[1].values()))


def planned_inputs(store: OutputFolder, listing: set[str]) -> set[str]:
    """The inputs that a set was begun with, of all runs so far."""
    before = store.read_json([PLAN], broken=True)[0] if PLAN in listing else None
    inputs = before.get("inputs") if isinstance(before, dict) else None
    return set(inputs.values()) if isinstance(inputs, dict) else set()


def _read(
    store: OutputFolder, listing: set[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plan, and the counts of the complete sub-folders; one without counts that can be read is as good as none."""
    parts = sorted(
        file.split("/")[0]
        for file in listing
        if file.endswith(f"/{INDEX}") and file.count("/") == 1
    )
    parts = [name for name in parts if f"{name}/{COUNTS}" in listing]
    before, *kept = store.read_json([PLAN, *(f"{name}/{COUNTS}" for name in parts)], broken=True)
    if not isinstance(before, dict):
        raise UserError(f"{store.out}/{PLAN} is broken; delete {store.out} to start again")
    complete = {}
    for name, counts in zip(parts, kept, strict=True):
        if not isinstance(counts, dict) or KEPT - counts.keys():
            continue
        held_out = (
            {f"{VAL}/{name}/{file}" for file in (INDEX, COUNTS)} if counts["held_out"] else set()
        )
        if held_out <= listing:
            complete[name] = counts
    return before, complete


def _check_inputs(
    store: OutputFolder,
    complete: Mapping[str, dict[str, Any]],
    planned: Mapping[str, str],
    names: Mapping[str, str],
) -> None:
    """No input may take another one's place, and none that is not converted yet may be missing from this run.

    Raises:
        UserError: names the first.
    """
    for name, source in names.items():
        if name in complete and written_in(complete[name]) and complete[name]["source"] != source:
            raise UserError(
                f"{store.out}/{name} was made from {complete[name]['source']}, not from {source}; choose another --out"
            )
    left = [
        source
        for name, source in planned.items()
        if name not in complete and names.get(name) != source
    ]
    if left:
        are, them = (
            ("1 of its inputs is", "it")
            if len(left) == 1
            else (f"{len(left):,} of its inputs are", "them")
        )
        raise UserError(
            f"{store.out} was begun with other --inputs, and {are} not converted yet ({left[0]}"
            f"{', …' if left[1:] else ''}): name {them} as well, choose another --out or delete {store.out} to start "
            "again"
        )


def _write(
    store: OutputFolder,
    options: ConvertOptions,
    names: Mapping[str, str],
    columns: Mapping[str, str],
) -> None:
    plan = {**options.fixed(), "columns": dict(columns), "inputs": dict(names)}
    with store.staged() as folder:
        (folder / PLAN).write_text(json.dumps(plan, indent=2))


def written_in(kept: Mapping[str, Any]) -> int:
    """The samples of a complete sub-folder, held-out ones included."""
    return int(kept["written"] + kept["held_out"])


def _plain(key: str, value: Any) -> Any:
    """What equal options have in common: 32mb are 33554432 bytes."""
    from streaming.base.util import bytes_to_int

    return bytes_to_int(value) if key == "size_limit" and isinstance(value, str) else value


def _flag(key: str, value: Any) -> str:
    """A fixed option as it is given on the command line."""
    if key == "encoder" and value is None:
        return "--no-semantic"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    flag = f"--{key.replace('_', '-')}"
    if value is True:
        return flag
    return f"no {flag}" if value is None else f"{flag} {value}"
