"""A whole conversion: what is there already, what is left to do, and the index over all of it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignclip.conversion import inputs, mds
from alignclip.conversion.captions import find_encoder, load_encoder
from alignclip.conversion.images import CHECKS
from alignclip.conversion.mds import COLUMNS as PAIRS
from alignclip.conversion.options import ConvertOptions, Counts
from alignclip.conversion.plan import (
    PLAN,
    begin,
    check_free,
    holds_samples,
    planned_inputs,
    written_in,
)
from alignclip.conversion.report import (
    REPORT,
    first_example,
    inputs_in_words,
    ways_out,
    why_nothing,
    write_report,
)
from alignclip.conversion.samples import BROKEN_INPUT
from alignclip.conversion.shards import counts_of, is_current, mds_writer
from alignclip.conversion.workers import convert_all
from alignclip.errors import UserError, check_place, nearest
from alignclip.storage import leaving_nothing
from alignclip.storage.copies import remove_stale_copies
from alignclip.storage.staging import INDEX, VAL, OutputFolder, shown

ENOUGH = 1000  # samples: before, a share of bad ones says little
DATASET = "dataset.json"  # at the root, written last but for the index: what the set is


class NothingWritten(UserError):
    """A conversion that has read its inputs and written no sample."""


def convert(options: ConvertOptions, executor: Executor | None = None) -> Counts:
    """Convert the inputs to MDS; return the counts of the whole set in ``options.out``, earlier runs' parts included.

    A run that is refused before it has written a sample leaves a new local folder as it was.

    Args:
        options: what to convert, and how.
        executor: what converts the input shards, a task each, any of ``concurrent.futures``; None: ``processes`` of
            this machine, or ``scheduler``'s cluster. It is not shut down.

    Raises:
        UserError: an input, the encoder or the output is not there; ``out`` was begun with other options or from other
            files of the same names; no sample was written, or more than ``max_bad`` of them are bad.
    """
    for what, places in (("--out", [options.out]), ("--inputs", options.inputs)):
        for place in places:
            check_place(what, place)
    _check_numbers(options)
    names = _unique_names(
        inputs.expand(options.inputs, options.caption_key, options.reading), options
    )
    store = OutputFolder(options.out)
    # whether it can be reached, and is free; what is there counts once nobody else can change it
    check_free(store, store.listing(), names)
    store.check_writable()
    _check(options)
    columns = _columns(options, names.values())
    with leaving_nothing(store.out), store.locked():
        is_new = not shown(store.listing())
        try:
            return _convert(options, store, names, columns, executor)
        except OSError as error:
            raise UserError(f"{store.out}: {error}") from error
        except UserError as error:
            elsewhere = (
                executor is not None or options.scheduler
            )  # where somebody may still be writing
            if is_new and not (store.is_remote or elsewhere or holds_samples(store)):
                store.clear(names, PLAN, REPORT)
            elif isinstance(error, NothingWritten) and REPORT in store.listing():
                raise UserError(f"{error}; {store.out}/{REPORT} says more") from None
            raise


def _convert(
    options: ConvertOptions,
    store: OutputFolder,
    names: dict[str, str],
    columns: dict[str, str],
    executor: Executor | None,
) -> Counts:
    """Convert what is left to do, and write the index over all there is."""
    listing = store.listing()
    planned = planned_inputs(store, listing)
    complete = begin(store, listing, options, names, columns)
    remove_stale_copies()
    store.remove_partial()
    again = {
        name
        for name, source in names.items()
        if name in complete and not is_current(source, complete[name])
    }
    done = {name: counts_of(kept) for name, kept in complete.items() if name not in again}
    todo = {name: source for name, source in names.items() if name not in done}
    options = replace(options, inputs=_sources(store, listing, options))
    if options.progress:
        _say_what_is_there(store, done, todo, planned)
    if INDEX in listing and any(_is_named(name, listing, complete) for name in todo):
        # Their shards will be replaced, under the same names. Were this run killed, the set is smaller but consistent.
        _publish(store, done, columns, options)
    sources = {name: kept["source"] for name, kept in complete.items()} | names
    start = time.monotonic()
    try:
        convert_all(
            todo,
            done,
            columns,
            options,
            lambda counts: _check_bad(counts, options, ENOUGH),
            executor,
        )
    except KeyboardInterrupt:
        store.remove_partial()
        raise
    except UserError:
        with suppress(UserError, OSError):  # the first error is the one that counts
            if any(counts.examples for counts in done.values()):
                _write_report(store, done, sources)
        raise
    seconds = time.monotonic() - start
    if done:
        _write_report(store, done, sources)
    _check_bad(done, options, 0)
    _publish(store, done, columns, options)
    return replace(
        _total(done), inputs=len(names), converted=len(todo), broken=_broken(done), seconds=seconds
    )


def _say_what_is_there(
    store: OutputFolder, done: dict[str, Counts], todo: dict[str, str], planned: set[str]
) -> None:
    """Say what a set holds before more is added to it, and what that is."""
    there = _total(done)
    if not there.written or not todo:
        return
    new = [source for source in todo.values() if source not in planned]
    holds = f"{store.out} holds {there.written:,} samples from {inputs_in_words(len(done))}"
    more = (
        [f"{inputs_in_words(len(new))} added ({new[0]}{', …' if new[1:] else ''})"] if new else []
    )
    more += (
        [f"{inputs_in_words(len(todo) - len(new))} of its own left to convert"]
        if len(todo) > len(new)
        else []
    )
    print(f"{holds}; {', '.join(more)}", file=sys.stderr)


def _is_named(name: str, listing: set[str], complete: dict[str, dict[str, Any]]) -> bool:
    """Whether the root's index may name shards of this sub-folder."""
    return f"{name}/{INDEX}" in listing and not (
        name in complete and not written_in(complete[name])
    )


def _sources(store: OutputFolder, listing: set[str], options: ConvertOptions) -> list[str]:
    """What the user named as inputs, of this run and those before it that were finished."""
    before = store.read_json([DATASET], broken=True)[0] if DATASET in listing else None
    there = before.get("source") if isinstance(before, dict) else None
    return list(dict.fromkeys([*(there if isinstance(there, list) else []), *options.inputs]))


def _broken(done: dict[str, Counts]) -> list[str]:
    """The sub-folders of truncated inputs."""
    return sorted(name for name, counts in done.items() if BROKEN_INPUT in counts.skipped)


def _write_report(store: OutputFolder, done: dict[str, Counts], sources: dict[str, str]) -> None:
    """Write the report, also where nothing was left out: a reader looks for it."""
    with store.staged() as folder:
        (folder / REPORT).write_text(write_report(done, sources), encoding="utf-8")


def _unique_names(shards: Sequence[str], options: ConvertOptions) -> dict[str, str]:
    """Sub-folder name -> input shard, of which there may be one each."""
    names: dict[str, str] = {}
    for shard in shards:
        name = inputs.name_of(shard)
        if not name:
            raise UserError(f"{shard} is a hidden file; rename it to convert it")
        if name in names:
            raise UserError(
                f"{names[name]} and {shard} would both become '{name}'; give each folder of inputs an --out of its own "
                "(training takes several streams)"
            )
        if name == VAL and options.held_out:
            raise UserError(
                f"{shard} would become '{VAL}', which is the held-out split's name; rename it"
            )
        names[name] = shard
    return names


def _check_numbers(options: ConvertOptions) -> None:
    images = options.images
    for flag, value, low, high in (
        ("--processes", options.processes, 1, None),
        ("--held-out", options.held_out, 0, 0.5),
        ("--max-bad", options.max_bad, 0, 1),
        ("--quality", images.quality, 1, 100),
        ("--min-side", images.min_side, 0, None),
        ("--resize", 1 if images.resize is None else images.resize, 1, None),
    ):
        if not value >= low or (high is not None and not value <= high):  # NaN is neither
            raise UserError(
                f"{flag} must be at least {low}{'' if high is None else f' and at most {high}'}, not {value}"
            )
    if images.check not in CHECKS:
        raise UserError(f"--check {images.check} does not exist; {nearest(images.check, CHECKS)}")


def _check(options: ConvertOptions) -> None:
    """Try the options that would otherwise fail in the first worker."""
    if options.semantic:
        find_encoder(options.encoder)  # a wrong name is told before the seconds that imports take
    _check_compression(options.compression)
    _check_hashes(options.hashes)
    with tempfile.TemporaryDirectory() as folder:
        try:
            mds_writer(PAIRS, Path(folder) / "empty", options).finish()
        except ValueError as error:
            raise UserError(f"--size-limit {options.size_limit}: {error}") from None


def _columns(options: ConvertOptions, shards: Iterable[str]) -> dict[str, str]:
    """The MDS columns; those of an MDS set that are left out are named.

    Raises:
        UserError: some inputs have one caption an image and others lists of them.
    """
    columns, captions = dict(PAIRS), dict[str, str]()
    for index in sorted(inputs.mds_sets(shards)):
        there = next(iter(mds.shards_of(index).values())).columns if index else PAIRS
        captions.setdefault(there["caption"], index)
        columns["caption"] = there["caption"]
        if options.progress and (rest := [name for name in there if name not in PAIRS]):
            made = " (made anew)" if options.semantic and "semantic" in rest else ""
            print(f"not taken from {index}: {', '.join(rest)}{made}", file=sys.stderr)
    if len(captions) > 1:
        raise UserError(
            f"{captions[mds.LIST]} has lists of captions, other inputs have one an image; give it an --out of its own"
        )
    if options.semantic:
        encoder = load_encoder(options.encoder)
        if options.progress and encoder.length != encoder.stated:
            states = f"states {encoder.stated:,} tokens and takes" if encoder.stated else "takes"
            print(
                f"{options.encoder} {states} {encoder.length:,}; longer captions are cut",
                file=sys.stderr,
            )
        shape = "" if mds.LIST in captions else f":{encoder.dimension}"
        columns["semantic"] = f"ndarray:float16{shape}"
    return columns


def _check_hashes(names: Sequence[str]) -> None:
    from streaming.base.hashing import get_hashes

    for name in names:
        if name not in get_hashes():
            raise UserError(
                f"--hashes {name} is not one of Streaming's; {nearest(name, get_hashes())}"
            )


def _check_compression(name: str | None) -> None:
    from streaming.base.compression import get_compressions

    if name is None or name in get_compressions():
        return
    levels: dict[str, list[int]] = {}
    for algorithm, _, level in (valid.partition(":") for valid in sorted(get_compressions())):
        levels.setdefault(algorithm, []).extend([int(level)] if level else [])
    valid = (
        f"{key}[:{min(found)}-{max(found)}]" if found else key for key, found in levels.items()
    )
    raise UserError(f"--compression {name} is not one of Streaming's; valid: {', '.join(valid)}")


def _total(done: dict[str, Counts]) -> Counts:
    total = Counts()
    for part in done.values():
        total.add(part)
    return total


def _check_bad(done: dict[str, Counts], options: ConvertOptions, enough: int) -> None:
    """Fail where more than ``max_bad`` of the samples, of which there are more than ``enough``, were left out.

    At the end, when nothing is ``enough``, also where more than that of the inputs were truncated: of each, only one
    sample counts as bad, whatever has been lost with it.
    """
    total = _total(done)
    read = total.written + total.bad
    if read < enough:
        return
    broken = _broken(done)
    if total.written and not enough and len(broken) > options.max_bad * len(done):
        are, them = ("is", "it") if len(broken) == 1 else ("are", "them")
        raise UserError(
            f"{len(broken):,} of {inputs_in_words(len(done))} {are} truncated, more than --max-bad {options.max_bad:g} "
            f"({', '.join(broken[:3])}{', …' if broken[3:] else ''}): fetch {them} again and repeat this command, or "
            f"take {them} as {'it is' if len(broken) == 1 else 'they are'} with --max-bad 1"
        )
    if not total.written:
        raise NothingWritten(why_nothing(total, len(done), options, first_example(done)))
    if total.bad > options.max_bad * read:
        why = ", ".join(f"{reason} {number:,}" for reason, number in sorted(total.skipped.items()))
        raise UserError(
            f"{total.bad:,} of {read:,} samples are bad, more than --max-bad {options.max_bad:g} ({why}); "
            + "".join(f"{way}; " for way in ways_out(total.skipped))
            + f"{REPORT} in {options.out} has examples"
        )


def _publish(
    store: OutputFolder, done: dict[str, Counts], columns: dict[str, str], options: ConvertOptions
) -> None:
    """Write ``dataset.json`` and the index of these sub-folders, and of those of the held-out split."""
    total = _total(done)
    packages = ["alignclip", "mosaicml-streaming", "pillow"]
    packages += ["sentence-transformers", "transformers", "torch"] if options.semantic else []
    dataset = {
        "encoder": options.encoder if options.semantic else None,
        "dimension": load_encoder(options.encoder).dimension if options.semantic else None,
        "source": list(options.inputs),
        "inputs": len(done),
        "samples": total.written - total.held_out,
        "held_out": total.held_out,
        "skipped": total.skipped,
        "noted": total.noted,
        "ignored": total.ignored,
        "bytes": total.bytes,
        "options": options.fixed(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    if options.held_out:
        _write_index(store, VAL, sorted(name for name in done if done[name].held_out))
    with store.staged() as folder:
        (folder / DATASET).write_text(json.dumps(dataset, indent=2))
        (folder / INDEX).write_text(_index(store, "", sorted(done)))


def _write_index(store: OutputFolder, split: str, names: Sequence[str]) -> None:
    index = _index(store, split, names)
    with store.staged(split, replace=False) as folder:
        (folder / INDEX).write_text(index)


def _index(store: OutputFolder, split: str, names: Sequence[str]) -> str:
    """The index over these sub-folders of a split.

    Streaming's merge_index opens a connection for each of them and takes every .json in them for an index.
    """
    shards = []
    paths = [f"{split}/{name}/{INDEX}".lstrip("/") for name in names]
    for name, index in zip(names, store.read_json(paths), strict=True):
        for shard in index["shards"]:
            if not shard[
                "samples"
            ]:  # MDSWriter begins with an empty one where the first sample exceeds the size limit
                continue
            for file in (shard["raw_data"], shard["zip_data"]):
                if file:
                    file["basename"] = f"{name}/{file['basename']}"
            shards.append(shard)
    return json.dumps({"version": 2, "shards": shards})
