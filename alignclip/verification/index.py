"""Compare what an MDS set says about itself with what is there: index, files, counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

from alignclip.checked_json import has_type, parse_json
from alignclip.conversion.formats import INPUT_FORMATS
from alignclip.data.mds_index import (
    BROKEN_INPUT,
    CLASSES,
    DATASET,
    INDEX,
    IndexedFile,
    ShardEntry,
    columns_of,
    listed_shards,
    stored_file,
    why_unusable,
)
from alignclip.errors import UserError, one_line
from alignclip.near import did_you_mean
from alignclip.storage import StorageError, Store, is_absent, patiently
from alignclip.storage.staging import COUNTS, VAL, shown
from alignclip.verification.findings import Problems, SetSummary, folder_of

CONVERTER = "convert.json"
SAYING = (DATASET, CLASSES, CONVERTER)  # what the set says of itself
OURS = {INDEX, COUNTS, CONVERTER, DATASET, CLASSES, "report.md"}  # beside shards
READERS = 16  # small files at a time


def summarize(store: Store) -> SetSummary:
    """Read the index and compare it with a listing, local files' sizes, and the converter's counts.

    Raises:
        UserError: there is no set, or it can't be reached or read.
    """
    found = SetSummary(store)
    usable = _usable(_read_entries(store), found.problems)
    named = {file for entry in usable for file in _file_names(entry)}
    if is_listed := _list(found):
        said = _read_objects(store, found.names.intersection(SAYING), found.problems)
    else:  # take for there what the set names
        said = _read_objects(store, SAYING)
        parts = filter(None, map(folder_of, named)) if "options" in said.get(DATASET, {}) else ()
        found.names = {INDEX, *named, *said, *(f"{part}/{COUNTS}" for part in parts)}
    _take_entries(usable, found)
    if others := _other_sets(found.names):
        found.notes.append(f"below are other sets, to be checked with --split: {', '.join(others)}")
        below = tuple(f"{folder}/" for folder in others)
        found.names = {name for name in found.names if not name.startswith(below)}
    planned = _take_dataset(said, found)
    # an input without samples has no shard, so only a listing shows that it is there
    _check_parts(planned if is_listed else {}, found)
    _check_held_out(found)
    _note_orphans(named, found)
    return found


def _list(found: SetSummary) -> bool:
    """List a set's files that aren't hidden; note where that can't be done, and return False."""
    store, unknown = found.store, "which files are there is not known"
    try:
        found.names = shown(store.names())
    except StorageError as error:
        found.notes.append(f"cannot reach {store.place}: {error.why}: {unknown}")
        return False
    if INDEX not in found.names:  # Azure's can't be listed
        found.notes.append(f"this storage can't be listed: {unknown}")
        return False
    return True


def _read_entries(store: Store) -> list[Any]:
    """Read the ``shards`` of the index, which may be anything."""
    try:
        index = parse_json(patiently(lambda: store.read_bytes(INDEX), store.place))
        return listed_shards(index)
    except StorageError as error:
        why = f"cannot read {store.at(INDEX)}: {error.why}"
        if not store.is_remote and is_absent(error):
            why = f"no {INDEX} there"
        raise UserError(f"no MDS set at {store.place} ({why}){_instead(store)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{store.at(INDEX)} is not JSON: {one_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{store.at(INDEX)} {one_line(error)}") from None


def _instead(store: Store) -> str:
    """Say what is there where there is no set: the end of a sentence."""
    if not store.is_remote and not Path(store.place).exists():
        return did_you_mean(store.place, lambda path: (path / INDEX).is_file())
    try:
        names = shown(store.names())
    except StorageError:
        return ""
    if CONVERTER in names:
        return "; its conversion was not finished: run the convert command again"
    below = sorted(folder_of(name) for name in names if name.endswith(f"/{INDEX}"))
    below = [name for name in below if not name.startswith(tuple(f"{one}/" for one in below))]
    if below:
        return f"; there is one in {', '.join(below[:3])}: --split {below[0]}"
    for one in INPUT_FORMATS:
        if inputs := one.among(name for name in names if "/" not in name):
            more = ", …" if inputs[1:] else ""
            return f"; it holds inputs ({inputs[0]}{more}), which convert/cc12m.py makes a set of"
    return ""


def _usable(entries: list[Any], problems: Problems) -> list[ShardEntry]:
    """Choose the entries that can be read; add the others to the problems."""
    if not entries:
        problems.add("no shards", INDEX, "names no shards")
    usable = []
    for number, entry in enumerate(entries):
        if why := why_unusable(entry):
            problems.add("entries that can't be read", INDEX, f"shard {number} {why}")
        else:
            usable.append(entry)
    return usable


def _file_names(entry: ShardEntry) -> list[str]:
    """Name a shard's files; reading a local compressed set leaves the raw file beside the other."""
    return [file["basename"] for file in (entry["raw_data"], entry["zip_data"]) if file]


def _take_entries(usable: list[ShardEntry], found: SetSummary) -> None:
    """Add the numbers of the entries up; compare the entries with the files and one another."""
    add, columns = found.problems.add, [*map(columns_of, usable)]
    most = Counter(tuple(one.items()) for one in columns).most_common(1)
    found.columns = dict(most[0][0]) if most else {}
    empty, unhashed, times = 0, 0, Counter[str]()
    for entry, own in zip(usable, columns, strict=True):
        file, samples = stored_file(entry), entry["samples"]
        name = file["basename"]
        times[name] += 1
        found.shards += 1
        found.samples += samples
        found.bytes += file["bytes"]
        found.indexed[folder_of(name)] += samples
        empty += not samples
        unhashed += not file["hashes"]
        if _is_whole(file, found) and samples:
            found.entries.append(entry)
        if own != found.columns:
            text = ", ".join(f"{column} {encoding}" for column, encoding in own.items())
            add("other columns", name, f"its columns are others: {text}")
    for name, number in times.items():
        if number > 1:
            add("named more than once", name, f"the index names it {number} times")
    if empty:
        found.notes.append(f"shards without samples: {empty:,}")
    if unhashed:
        what = "shards without hashes, where a flipped bit is found by chance only"
        found.notes.append(f"{what}: {unhashed:,}")


def _is_whole(file: IndexedFile, found: SetSummary) -> bool:
    """Return whether a shard's file is there, and, of a local one, has its size."""
    name, size, is_remote = file["basename"], file["bytes"], found.store.is_remote
    path = Path(found.store.place, name)
    if not (name in found.names if is_remote else path.is_file()):
        found.problems.add("missing", name)
    elif not is_remote and (has := path.stat().st_size) != size:
        found.problems.add("size differs", name, f"{has:,} bytes, the index says {size:,}")
    else:
        return True
    return False


def _read_objects(
    store: Store, names: Iterable[str], problems: Problems | None = None
) -> dict[str, dict[str, Any]]:
    """Read JSON objects, side by side; add the files that can't be read to ``problems``."""

    def read(name: str) -> Any:
        try:
            return parse_json(patiently(lambda: store.read_bytes(name), store.place))
        except (UserError, ValueError) as error:
            return error

    names = list(names)
    objects: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(READERS) as pool:
        for name, content in zip(names, pool.map(read, names), strict=True):
            why = "is no object"
            if isinstance(content, dict):
                objects[name] = content
                continue
            if isinstance(content, Exception):
                why = "is missing" if is_absent(content) else f"can't be read: {one_line(content)}"
            if problems is not None:
                problems.add("counts that can't be read", name, why)
    return objects


def _take_dataset(said: dict[str, dict[str, Any]], found: SetSummary) -> dict[str, Any]:
    """Take what the files beside the index say; return the inputs that were planned, by part."""
    found.dataset = said.get(DATASET, {})
    if isinstance(classes := said.get(CLASSES, {}).get("classnames"), list):
        found.classes = [str(name) for name in classes]
    if (samples := found.dataset.get("samples", found.samples)) != found.samples:
        text = f"says {samples} samples, the index has {found.samples}"
        found.problems.add("counts differ", DATASET, text)
    planned = said.get(CONVERTER, {}).get("inputs")
    return planned if isinstance(planned, dict) else {}


def _check_parts(planned: dict[str, Any], found: SetSummary) -> None:
    """Compare every sub-folder's ``counts.json`` with the index and with the converter's plan."""
    names = found.names
    counted = {name for name in names if name.endswith(f"/{COUNTS}")}
    is_converted = bool(counted) or CONVERTER in names
    found.is_held_out = is_converted and not {CONVERTER, DATASET} & names
    parts = {*found.indexed, *map(folder_of, counted)}
    parts |= {folder_of(name) for name in names if name.endswith(f"/{INDEX}")}
    parts.discard("")
    if not is_converted or not parts:
        samples, skipped = found.dataset.get("samples", found.samples), found.dataset.get("skipped")
        if isinstance(samples, int) and _are_counts(skipped):  # of an evaluation set
            found.written = samples
            found.skipped.update(skipped)
        return
    for name in sorted({f"{part}/{COUNTS}" for part in parts} - counted):
        text = "is missing: the conversion of this part was not finished"
        found.problems.add("counts missing", name, text)
    for part in sorted(planned.keys() - parts):
        text = f"{planned[part]} was not converted"
        found.problems.add("inputs that were not converted", CONVERTER, text)
    found.written = 0
    for name, counts in _read_objects(found.store, sorted(counted), found.problems).items():
        _add_counts(name, counts, found)


def _add_counts(name: str, counts: dict[str, Any], found: SetSummary) -> None:
    """Add a sub-folder's counts to the set's, and compare them with the index."""
    written, held_out = counts.get("written", 0), counts.get("held_out", 0)
    skipped, add = counts.get("skipped"), found.problems.add
    if not _are_counts({"written": written, "held_out": held_out}) or not _are_counts(skipped):
        add("counts that can't be read", name, "has no numbers of samples written and skipped")
        return
    found.written = (found.written or 0) + written
    found.held_out += held_out
    found.skipped.update(skipped)
    if BROKEN_INPUT in skipped:
        again = "fetch it again and run the convert command again"
        text = f"{counts.get('source')} was truncated: {again}"
        add("truncated inputs", name, text, mend=False)
    part = folder_of(name)
    if written and part not in found.indexed:
        text = f"says {written} written, and {found.store.at(INDEX)} names none of them"
        add("not in the index", name, text)
    elif written != found.indexed[part]:
        text = f"says {written} written, the index has {found.indexed[part]}"
        add("counts differ", name, text)


def _are_counts(numbers: Any) -> TypeGuard[dict[str, int]]:
    return has_type(numbers, dict[str, int])


def _check_held_out(found: SetSummary) -> None:
    """Check that the split that was held out is there, with as many samples."""
    held_out = found.dataset.get("held_out") or found.held_out
    if not isinstance(held_out, int) or not held_out or found.is_held_out:
        return
    name = f"{VAL}/{INDEX}"
    index = _read_objects(found.store, [name]).get(name)
    try:
        samples = sum(shard["samples"] for shard in (index or {})["shards"])
    except (KeyError, TypeError):
        samples = 0
    if samples != held_out:
        what = f"and {name} is gone" if index is None else f"{name} has {samples:,}"
        text = f"says {held_out:,} samples are held out, {what}"
        found.problems.add("held-out split", DATASET, text)


def _other_sets(names: set[str]) -> list[str]:
    """Name the folders of sets below this one: with a ``dataset.json``, or an index over parts."""
    over_parts = {folder_of(folder_of(name)) for name in names if name.endswith(f"/{COUNTS}")}
    found = {folder for folder in over_parts if f"{folder}/{INDEX}" in names}
    found |= {folder_of(name) for name in names if name.endswith(f"/{DATASET}")}
    return sorted(found - {""})


def _note_orphans(named: set[str], found: SetSummary) -> None:
    """Note the files that no index names; only a sub-folder's index names its empty shards."""
    orphans = {name for name in found.names - named if name.rpartition("/")[2] not in OURS}
    indexes = {f"{folder_of(name)}/{INDEX}" for name in orphans} & found.names
    for index, content in _read_objects(found.store, sorted(indexes)).items():
        shards = content.get("shards")
        for entry in shards if isinstance(shards, list) else ():
            if not why_unusable(entry):
                orphans -= {f"{folder_of(index)}/{file}" for file in _file_names(entry)}
    if orphans:
        some = ", ".join(sorted(orphans)[:3]) + (", …" if len(orphans) > 3 else "")
        found.notes.append(f"files that no index names: {len(orphans):,} ({some})")
