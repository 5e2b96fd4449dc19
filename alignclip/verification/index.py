"""What an MDS set says about itself, held against what is there: the index, the files, the converter's counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from alignclip.conversion.samples import BROKEN_INPUT
from alignclip.data.mds_index import INDEX, ShardEntry, listed_shards, stored_file, why_unusable
from alignclip.errors import UserError, one_line
from alignclip.near import did_you_mean
from alignclip.storage.staging import COUNTS, VAL, OutputFolder
from alignclip.verification.findings import Overview, Problems, folder_of

CONVERTER, DATASET, CLASSES = "convert.json", "dataset.json", "classes.json"
OURS = {INDEX, COUNTS, CONVERTER, DATASET, CLASSES, "report.md"}  # beside shards


def look(store: OutputFolder) -> Overview:
    """Read the index and hold it against a listing, the sizes of local files, and the converter's counts.

    Raises:
        UserError: there is no set, or it can't be reached or read.
    """
    listed = _read_listed(store)
    found = Overview()
    listing: set[str] | None = None
    try:
        listing = list_files(store)
    except UserError as error:
        found.notes.append(f"{error}: which files are there is not known")
    if listing is not None and INDEX not in listing:  # Azure's can't be listed
        listing = None
        found.notes.append("this storage can't be listed: which files are there is not known")
    everything = listing
    if listing is not None and (others := _other_sets(listing)):
        found.notes.append(f"below are other sets, to be checked with --split: {', '.join(others)}")
        below = tuple(f"{folder}/" for folder in others)
        listing = {name for name in listing if not name.startswith(below)}
    usable: list[ShardEntry] = []
    if not listed:
        found.problems.add("no shards", INDEX, "names no shards")
    for number, entry in enumerate(listed):
        if why := why_unusable(entry):
            found.problems.add("entries that can't be read", INDEX, f"shard {number} {why}")
        else:
            usable.append(entry)
            _count(entry, found)
            if _is_there(entry, store, everything, found.problems) and entry["samples"]:
                found.entries.append(entry)
    _compare(usable, found)
    _check_counts(store, listing, found)
    _check_held_out(store, everything, found)
    if listing is not None:
        _find_orphans(store, listing, found, {file for entry in usable for file in _files(entry)})
    return found


def list_files(store: OutputFolder) -> set[str]:
    """The names of all files of the set, relative to it.

    Raises:
        UserError: it can't be reached, or must not be listed.
    """
    if store.is_remote:
        return store.listing()
    root = Path(store.out)
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {
        file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)
    }


def _files(entry: ShardEntry) -> list[str]:
    """Of a compressed shard the raw file as well: reading a local set leaves it beside the other."""
    return [file["basename"] for file in (entry["raw_data"], entry["zip_data"]) if file]


def _read_listed(store: OutputFolder) -> list[Any]:
    """Read the ``shards`` of the index, which may be anything."""
    try:
        index = store.read_json([INDEX])[0]
    except (OSError, UserError) as error:
        why = f"no {INDEX} there" if isinstance(error, FileNotFoundError) else one_line(error)
        raise UserError(f"no MDS set at {store.out} ({why}){_instead(store)}") from None
    except ValueError as error:
        raise UserError(f"{store.out}/{INDEX} is not JSON: {one_line(error)}") from None
    try:
        return listed_shards(index)
    except ValueError as error:
        raise UserError(f"{store.out}/{INDEX} {error}") from None


def _instead(store: OutputFolder) -> str:
    """The end of the sentence that there is no set: what there is."""
    from alignclip.conversion.formats import (
        among,
    )  # and all formats, of which a set that is there has none

    if not store.is_remote and not Path(store.out).exists():
        return did_you_mean(store.out, lambda path: (path / INDEX).is_file())
    try:
        listing = list_files(store)
    except UserError:
        return ""
    if CONVERTER in listing:
        return "; its conversion was not finished: run the convert command again"
    below = sorted(folder_of(name) for name in listing if name.endswith(f"/{INDEX}"))
    below = [name for name in below if not any(name.startswith(f"{other}/") for other in below)]
    if below:
        return f"; there is one in {', '.join(below[:3])}: --split {below[0]}"
    if files := among(name for name in listing if "/" not in name):
        return f"; it holds inputs ({files[0]}{', …' if files[1:] else ''}), which convert/cc12m.py makes a set of"
    return ""


def _count(entry: ShardEntry, found: Overview) -> None:
    """Add a usable entry's numbers."""
    found.shards += 1
    found.samples += entry["samples"]
    found.bytes += stored_file(entry)["bytes"]
    found.indexed[folder_of(stored_file(entry)["basename"])] += entry["samples"]


def _is_there(
    entry: ShardEntry, store: OutputFolder, listing: set[str] | None, problems: Problems
) -> bool:
    """Look for the file, without fetching it; a local one has to have its size."""
    name, size = stored_file(entry)["basename"], stored_file(entry)["bytes"]
    if store.is_remote:
        is_there = listing is None or name in listing
    else:
        path = Path(store.out, name)
        is_there = path.is_file()
        if is_there and path.stat().st_size != size:
            problems.add(
                "size differs", name, f"{path.stat().st_size:,} bytes, the index says {size:,}"
            )
            return False
    if not is_there:
        problems.add("missing", name)
    return is_there


def _compare(usable: Sequence[ShardEntry], found: Overview) -> None:
    """Hold the entries against one another."""
    columns = [
        tuple(zip(entry["column_names"], entry["column_encodings"], strict=True))
        for entry in usable
    ]
    most = Counter(columns).most_common(1)
    found.columns = dict(most[0][0]) if most else {}
    for entry, own in zip(usable, columns, strict=True):
        if dict(own) != found.columns:
            text = ", ".join(f"{name} {encoding}" for name, encoding in own)
            found.problems.add(
                "other columns", stored_file(entry)["basename"], f"its columns are others: {text}"
            )
    if empty := sum(not entry["samples"] for entry in usable):
        found.notes.append(f"shards without samples: {empty:,}")
    if unhashed := sum(not stored_file(entry)["hashes"] for entry in usable):
        found.notes.append(
            f"shards without hashes, where a flipped bit is found by chance only: {unhashed:,}"
        )
    for name, number in Counter(stored_file(entry)["basename"] for entry in usable).items():
        if number > 1:
            found.problems.add("named more than once", name, f"the index names it {number} times")


def _read_objects(
    store: OutputFolder, names: Sequence[str], problems: Problems
) -> dict[str, dict[str, Any]]:
    """The contents of JSON files with an object in them, side by side; those that can't be read are problems."""
    contents: dict[str, Any] = {}
    try:
        contents = dict(zip(names, store.read_json(names), strict=True))
    except (OSError, ValueError, UserError):  # one of them; which is not said
        for name in names:
            try:
                contents[name] = store.read_json([name])[0]
            except (OSError, ValueError, UserError) as error:
                why = (
                    "is missing"
                    if isinstance(error, FileNotFoundError)
                    else f"can't be read: {one_line(error)}"
                )
                problems.add("counts that can't be read", name, why)
    for name in [name for name, content in contents.items() if not isinstance(content, dict)]:
        problems.add("counts that can't be read", name, "is no object")
        del contents[name]
    return contents


def _check_counts(store: OutputFolder, listing: set[str] | None, found: Overview) -> None:
    """Hold ``dataset.json`` and every sub-folder's ``counts.json`` against the index."""
    problems = found.problems
    if listing is None:
        root = _read_objects(store, [DATASET], Problems())  # whether there is one can't be known
    else:
        root = _read_objects(
            store, [name for name in (DATASET, CLASSES, CONVERTER) if name in listing], problems
        )
    found.dataset = root.get(DATASET, {})
    if isinstance(names := root.get(CLASSES, {}).get("classnames"), list):
        found.classes = [str(name) for name in names]
    samples = found.dataset.get("samples", found.samples)
    if samples != found.samples:
        problems.add(
            "counts differ", DATASET, f"says {samples} samples, the index has {found.samples}"
        )
    planned: Any = {}
    if listing is None:
        parts, counted = set(found.indexed), "options" in found.dataset
    else:
        ours = {name for name in listing if PurePosixPath(name).name in (INDEX, COUNTS)}
        parts = set(found.indexed) | {folder_of(name) for name in ours}
        counted = CONVERTER in listing or any(f"{part}/{COUNTS}" in listing for part in parts)
        found.is_held_out = counted and not listing & {CONVERTER, DATASET}
        planned = root.get(CONVERTER, {}).get("inputs") or {}
    parts.discard("")
    if not counted or not parts:
        if isinstance(samples, int) and _are_counts(
            found.dataset.get("skipped")
        ):  # an evaluation set's
            found.written = samples
            found.skipped.update(found.dataset["skipped"])
        return
    names = [f"{part}/{COUNTS}" for part in sorted(parts)]
    for name in names:
        if listing is not None and name not in listing:
            problems.add(
                "counts missing", name, "is missing: the conversion of this part was not finished"
            )
    if isinstance(planned, dict):
        for name in sorted(planned.keys() - parts):
            problems.add(
                "inputs that were not converted", CONVERTER, f"{planned[name]} was not converted"
            )
    _add_up(
        store,
        _read_objects(
            store, [name for name in names if listing is None or name in listing], problems
        ),
        found,
    )


def _add_up(store: OutputFolder, contents: dict[str, dict[str, Any]], found: Overview) -> None:
    """Sum the counts of the sub-folders up, each held against the index; name the truncated inputs."""
    problems = found.problems
    found.written = 0
    for name, counts in contents.items():
        written, held_out, skipped = (
            counts.get(what, 0) for what in ("written", "held_out", "skipped")
        )
        indexed = found.indexed[folder_of(name)]
        if (
            not isinstance(written, int)
            or not isinstance(held_out, int)
            or not _are_counts(skipped)
        ):
            problems.add(
                "counts that can't be read", name, "has no numbers of samples written and skipped"
            )
            continue
        found.written += written
        found.held_out += held_out
        found.skipped.update(skipped)
        if BROKEN_INPUT in skipped:
            text = f"{counts.get('source')} was truncated: fetch it again and run the convert command again"
            problems.add("truncated inputs", name, text, mend=False)
        if written and folder_of(name) not in found.indexed:
            problems.add(
                "not in the index",
                name,
                f"says {written} written, and {store.out}/{INDEX} names none of them",
            )
        elif written != indexed:
            problems.add("counts differ", name, f"says {written} written, the index has {indexed}")


def _check_held_out(store: OutputFolder, listing: set[str] | None, found: Overview) -> None:
    """The split that was held out has to be there, with as many samples."""
    held_out = found.dataset.get("held_out") or found.held_out
    if not isinstance(held_out, int) or not held_out or found.is_held_out:
        return
    name = f"{VAL}/{INDEX}"
    there = _read_objects(store, [name], Problems()) if listing is None or name in listing else {}
    try:
        samples = sum(shard["samples"] for shard in there[name]["shards"])
    except (KeyError, TypeError):
        samples = 0
    if samples != held_out:
        what = f"{name} has {samples:,}" if there else f"and {name} is gone"
        text = f"says {held_out:,} samples are held out, {what}"
        found.problems.add("held-out split", DATASET, text)


def _are_counts(skipped: Any) -> bool:
    return isinstance(skipped, dict) and all(isinstance(number, int) for number in skipped.values())


def _other_sets(listing: set[str]) -> list[str]:
    """The folders of sets below this one: with a ``dataset.json``, or with an index over counted sub-folders."""
    counted = {folder_of(folder_of(name)) for name in listing if name.endswith(f"/{COUNTS}")}
    found = {folder_of(name) for name in listing if name.endswith(f"/{DATASET}")}
    found |= {folder for folder in counted if f"{folder}/{INDEX}" in listing}
    return sorted(found - {""})


def _find_orphans(store: OutputFolder, listing: set[str], found: Overview, named: set[str]) -> None:
    """Note the files that no index names; a sub-folder's own may name an empty shard that the root's leaves out."""
    orphans = {name for name in listing - named if PurePosixPath(name).name not in OURS}
    indexes = sorted(
        {f"{folder_of(name)}/{INDEX}" for name in orphans if folder_of(name)} & listing
    )
    for name, index in _read_objects(store, indexes, Problems()).items():
        for entry in index.get("shards", ()):
            if not why_unusable(entry):
                orphans -= {f"{folder_of(name)}/{file}" for file in _files(entry)}
    if orphans:
        some = ", ".join(sorted(orphans)[:3])
        found.notes.append(
            f"files that no index names: {len(orphans):,} ({some}{', …' if len(orphans) > 3 else ''})"
        )
