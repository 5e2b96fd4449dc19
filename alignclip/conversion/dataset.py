"""A whole conversion: what is there already, what is left to do, and the index over all of it.

The protocol
------------
A set is complete or absent, and so is each of its sub-folders. The same command goes on where a run
was stopped, by Ctrl-C, a kill or a power cut.

1. ``convert.json``, the plan, is written first: the options that the whole set shares, and the
   input of each sub-folder. A later run has to agree with the plan
   (:mod:`alignclip.conversion.plan`).
2. An input shard becomes a sub-folder of the shard's name (:mod:`alignclip.conversion.shards`). The
   files are written elsewhere and appear together; ``index.json`` follows the shards that it names,
   and ``counts.json`` goes last. A sub-folder that holds both is complete. Held-out samples are in
   ``val/NAME``, which is there before ``NAME`` (:mod:`alignclip.storage.staging`).
3. A sub-folder is converted again where its source has changed since. Before shards are replaced
   that the set's index names, the index is written without them: after a kill the set is smaller,
   and whole.
4. ``report.md`` follows the last sub-folder, then ``dataset.json``, and at last the ``index.json``
   over all sub-folders. A set without ``index.json`` isn't finished.
5. Whatever a killed process leaves in the making has names of its own. The next run removes it.
6. One run at a time: a local output is locked. Another run into a bucket can't be seen. A task on
   a cluster writes nothing once another run has marked the output.

Runs of earlier versions are taken up: their records may lack entries that came later.
"""

from __future__ import annotations

import fnmatch
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from alignclip.checked_json import has_type
from alignclip.config.setting import check_settings
from alignclip.conversion import inputs
from alignclip.conversion.captions import find_encoder, load_encoder
from alignclip.conversion.formats.declaration import CAPTION_LISTS, PAIR_COLUMNS
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.plan import PLAN, begin, check_free, index_over
from alignclip.conversion.records import (
    CARD_FILE,
    Counts,
    package_versions,
    to_json,
    total_of,
)
from alignclip.conversion.report import (
    REPORT,
    first_example,
    ways_out,
    why_nothing,
    write_report,
)
from alignclip.conversion.shards import is_current
from alignclip.conversion.wording import are_them, counted, first_few, inputs_in_words
from alignclip.conversion.workers import convert_all
from alignclip.errors import UserError, without_secrets
from alignclip.storage import leaving_nothing
from alignclip.storage.staging import INDEX, VAL, OutputFolder, shown
from alignclip.storage.temporary import temporary_folder

ENOUGH_SAMPLES = 1000  # with fewer, a share of bad ones says little


class NothingWritten(UserError):
    """A conversion that has read its inputs and written no sample."""


def convert_pairs(options: ConvertOptions, executor: Executor | None = None) -> Counts:
    """Convert the inputs to MDS; return the counts of the whole set, earlier runs' parts included.

    A run that is refused before it has written a sample leaves a new local folder as it was.

    Args:
        options: what to convert, and how.
        executor: what converts the input shards, a task each, any of ``concurrent.futures``; None:
            ``processes`` of this machine, or ``scheduler``'s cluster. It is not shut down.

    Raises:
        UserError: an input, the encoder or the output is not there; ``out`` was begun with other
            options or from other files of the same names; no sample was written, or more than
            ``max_bad`` of them are bad.
    """
    check_settings(options)
    names = inputs.unique_names(
        inputs.expand_inputs(options.inputs, options.reading), [VAL] if options.held_out else []
    )
    store = OutputFolder(options.out)
    # whether it can be reached, and is free; what is there counts once nobody else can change it
    check_free(store, store.listing(), names)
    store.check_writable()
    _try_options(options)
    columns = _output_columns(options, names.values())
    elsewhere = executor is not None or bool(options.scheduler)  # somebody may still be writing
    with leaving_nothing(store.out), store.locked(), _left_as_it_was(store, names, elsewhere):
        return _convert_rest(options, store, names, columns, executor)


@contextmanager
def _left_as_it_was(store: OutputFolder, names: Iterable[str], elsewhere: bool) -> Iterator[None]:
    """Remove what a refused run has written into a new local folder; else point to the report."""
    is_new = not shown(store.listing())
    try:
        yield
    except OSError as error:
        raise UserError(f"{store.out}: {error}") from error
    except UserError as error:
        if is_new and not (
            store.is_remote or elsewhere or fnmatch.filter(store.listing(), "*.mds*")
        ):
            store.clear(names, PLAN, REPORT)
        elif isinstance(error, NothingWritten) and REPORT in store.listing():
            raise UserError(f"{error}; {store.out}/{REPORT} says more") from None
        raise


def _convert_rest(
    options: ConvertOptions,
    store: OutputFolder,
    names: dict[str, str],
    columns: dict[str, str],
    executor: Executor | None,
) -> Counts:
    """Convert what is left to do, and write the index over all there is."""
    there = store.listing()
    # what is written down and said: a URL may be signed, each day anew
    said = {name: without_secrets(source) for name, source in names.items()}
    complete, planned = begin(store, there, options, said, columns)
    store.remove_partial()
    done = {
        name: record.counts
        for name, record in complete.items()
        if name not in names or is_current(record, names[name])
    }
    todo = {name: source for name, source in names.items() if name not in done}
    sources = {name: record.source for name, record in complete.items()} | said
    whole = _WholeSet(options, store, _all_patterns(store, there, options), sources, done)
    resumed = total_of(done.values()).written
    if options.progress and resumed and todo:
        added = _what_is_added({name: said[name] for name in todo}, planned)
        holds = f"{store.out} holds {resumed:,} samples from {inputs_in_words(len(done))}"
        print(f"{holds}; {added}", file=sys.stderr)
    # where shards are replaced that the index may name, the index is written without them first
    replaced = {
        f"{name}/{INDEX}" for name in todo if name not in complete or complete[name].counts.written
    }
    if INDEX in there and replaced & there:
        whole.publish()
    start = time.monotonic()
    try:
        check = partial(whole.check_bad, ENOUGH_SAMPLES)
        with store.marked() as mark:
            convert_all(todo, done, columns, options, mark, check, executor)
    except KeyboardInterrupt:
        store.remove_partial()
        raise
    except UserError:
        with suppress(UserError, OSError):  # the first error is the one that counts
            if any(counts.examples for counts in done.values()):
                whole.write_report()
        raise
    seconds = time.monotonic() - start
    if done:  # inputs may have no parts
        whole.write_report()
    whole.check_bad()
    whole.publish()
    return replace(
        total_of(done.values()),
        resumed=resumed,
        inputs=len(names),
        converted=len(todo),
        broken=whole.broken,
        seconds=seconds,
    )


def _what_is_added(todo: dict[str, str], planned: dict[str, str]) -> str:
    """Say which of the inputs that are left to convert are new to the set."""
    new = [source for name, source in todo.items() if planned.get(name) != source]
    more = [f"{inputs_in_words(len(new))} added ({first_few(new, 1)})"] if new else []
    if own := len(todo) - len(new):
        more.append(f"{inputs_in_words(own)} of its own left to convert")
    return ", ".join(more)


def _all_patterns(store: OutputFolder, there: set[str], options: ConvertOptions) -> list[str]:
    """Return what was named as inputs, of this run and of finished runs before."""
    before = store.read_json([CARD_FILE])[0] if CARD_FILE in there else None
    earlier: Any = before.get("source") if isinstance(before, dict) else None
    known = earlier if has_type(earlier, list[str]) else []
    return list(dict.fromkeys(map(without_secrets, [*known, *options.inputs])))


@dataclass(frozen=True)
class _WholeSet:
    """The whole set, as far as it is complete.

    Attributes:
        options: of this run.
        store: the output.
        patterns: what was named as inputs, in all runs.
        sources: sub-folder -> input, also of sub-folders that are left to convert.
        done: sub-folder -> counts, of the complete ones; it grows.
    """

    options: ConvertOptions
    store: OutputFolder
    patterns: list[str]
    sources: dict[str, str]
    done: dict[str, Counts]

    @property
    def broken(self) -> list[str]:
        """The sub-folders of truncated inputs."""
        return sorted(name for name, counts in self.done.items() if counts.is_broken)

    def write_report(self) -> None:
        """Write the report, also where nothing was left out: a reader looks for it."""
        with self.store.staged() as folder:
            text = write_report(self.done, self.sources)
            (folder / REPORT).write_text(text, encoding="utf-8")

    def check_bad(self, enough: int = 0) -> None:
        """Fail where more than ``max_bad`` of the samples were left out, and samples are many.

        At the end, when nothing is ``enough``, also where more than that of the inputs were
        truncated: of each, only one sample counts as bad, whatever has been lost with it.
        """
        done, most = self.done, self.options.max_bad
        total = total_of(done.values())
        read = total.written + total.bad
        if read < enough:
            return
        broken = self.broken
        if total.written and not enough and len(broken) > most * len(done):
            are, them = are_them(len(broken))
            raise UserError(
                f"{len(broken):,} of {inputs_in_words(len(done))} {are} truncated, more than "
                f"--max-bad {most:g} ({first_few(broken)}): fetch {them} again and repeat this "
                f"command, or take {them} as {'it is' if them == 'it' else 'they are'} with "
                "--max-bad 1"
            )
        if not total.written:
            raise NothingWritten(why_nothing(total, len(done), self.options, first_example(done)))
        if total.bad > most * read:
            ways = "".join(f"{way}; " for way in ways_out(total.skipped))
            raise UserError(
                f"{total.bad:,} of {read:,} samples are bad, more than --max-bad {most:g} "
                f"({counted(total.skipped)}); {ways}{REPORT} in {self.options.out} has examples"
            )

    def publish(self) -> None:
        """Write ``dataset.json`` and the indexes of the complete sub-folders and their split."""
        options, store = self.options, self.store
        # in the order of names: the same bytes, whatever was finished first
        names = sorted(self.done)
        total = total_of(self.done[name] for name in names)
        shared = options.fixed()
        encoding = ("sentence-transformers", "transformers", "torch")
        card = {
            "encoder": shared["encoder"],
            "dimension": load_encoder(options.encoder).dimension if options.semantic else None,
            "source": self.patterns,
            "inputs": len(names),
            "samples": total.written - total.held_out,  # outside of the held-out split
            "held_out": total.held_out,
            "skipped": total.skipped,
            "noted": total.noted,
            "ignored": total.ignored,
            "bytes": total.bytes,
            "options": shared,
            "versions": package_versions(*(encoding if options.semantic else ())),
        }
        if options.held_out:
            index = index_over(store, VAL, [name for name in names if self.done[name].held_out])
            with store.staged(VAL, replace=False) as folder:
                (folder / INDEX).write_text(index)
        with store.staged() as folder:
            (folder / CARD_FILE).write_text(to_json(card))
            (folder / INDEX).write_text(index_over(store, "", names))


def _try_options(options: ConvertOptions) -> None:
    """Try the options that would otherwise fail in the first worker."""
    if options.semantic:
        find_encoder(options.encoder)  # a wrong name is told before the seconds that imports take
    from alignclip.conversion import mds_writer

    mds_writer.check_compression(options.compression)
    mds_writer.check_hashes(options.hashes)
    with temporary_folder() as folder:
        try:
            mds_writer.JoinedShardWriter(
                PAIR_COLUMNS, folder / "empty", size_limit=options.size_limit
            ).finish()
        except ValueError as error:
            raise UserError(f"--size-limit {options.size_limit}: {error}") from None


def _output_columns(options: ConvertOptions, shards: Iterable[str]) -> dict[str, str]:
    """Return the MDS columns, and name the columns of MDS sets that are left out.

    Raises:
        UserError: some inputs have one caption an image and others lists of them.
    """
    columns, captions = dict(PAIR_COLUMNS), dict[str, str]()
    for place, there in inputs.input_columns(shards, options.reading).items():
        captions.setdefault(there["caption"], place)
        columns["caption"] = there["caption"]
        if options.progress and (rest := [name for name in there if name not in PAIR_COLUMNS]):
            made = " (made anew)" if options.semantic and "semantic" in rest else ""
            print(
                f"not taken from {without_secrets(place)}: {', '.join(rest)}{made}", file=sys.stderr
            )
    if len(captions) > 1:
        raise UserError(
            f"{captions[CAPTION_LISTS]} has lists of captions, other inputs have one an image; "
            "give it an --out of its own"
        )
    if options.semantic:
        encoder = load_encoder(options.encoder)
        if options.progress and encoder.length != encoder.stated:
            states = f"states {encoder.stated:,} tokens and takes" if encoder.stated else "takes"
            cut = f"{states} {encoder.length:,}; longer captions are cut"
            print(f"{options.encoder} {cut}", file=sys.stderr)
        shape = "" if CAPTION_LISTS in captions else f":{encoder.dimension}"
        columns["semantic"] = f"ndarray:float16{shape}"
    return columns
