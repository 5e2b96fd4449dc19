"""Check an MDS set: files against the index, hashes, every sample, and the converter's counts.

Exit status: 0 sound, 1 problems (a line each), 2 nothing could be checked (no such set, no access,
wrong options).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignclip.config.command_line import read_options
from alignclip.config.setting import check_settings, setting
from alignclip.data.image_files import EVALUATION_FORMATS, TRAINING_FORMATS
from alignclip.data.mds_index import DATASET, dimension_of
from alignclip.errors import one_line_errors
from alignclip.runtime import console
from alignclip.storage import open_store
from alignclip.verification import contact_sheet
from alignclip.verification.findings import SetSummary, folder_of
from alignclip.verification.index import summarize

if TYPE_CHECKING:
    from alignclip.verification.shards import ShardReport

SHEET_SHARDS = 8  # fetched for a sheet, if their samples are enough
T = TypeVar("T")

VERIFY_EXAMPLES = """examples:
  # everything: sizes, hashes, keys, captions, embeddings, counts; one image in a hundred is decoded
  python convert/verify.py s3://bucket/cc12m --processes 8

  # every image of a local set
  python convert/verify.py /data/eval/coco --decode 1

  # only whether all files are there, and 64 samples to look at
  python convert/verify.py s3://bucket/cc12m --fast --sample 64 --to cc12m.png

Exit status: 0 sound, 1 problems found, 2 nothing could be checked.
"""


@dataclass
class VerifyOptions:
    """Choices of what to check, and how thoroughly.

    Attributes:
        set: path or URL.
        split: a sub-folder with an index of its own.
        fast: don't open shards.
        decode: the fraction of images that are decoded, chosen by key and ``seed``.
        sample: that many samples are drawn on the picture ``to``.
        processes: shards that are read at a time.
    """

    set: str = setting(
        flags=("set",),
        place=True,
        metavar="SET",
        help="local folder, or s3://, gs://, oci://, azure:// …",
    )
    split: str | None = setting(
        None, metavar="NAME", help="check this sub-folder, which has an index.json of its own"
    )
    fast: bool = setting(
        False, help="don't open shards: only the index, the files it names, and the counts"
    )
    decode: float = setting(
        0.01,
        at_least=0,
        at_most=1,
        metavar="X",
        help="fraction of images to decode (default: %(default)s)",
    )
    seed: int = setting(
        0, metavar="N", help="another one, other images are decoded (default: %(default)s)"
    )
    sample: int | None = setting(
        None,
        at_least=1,
        metavar="N",
        help="also draw N samples with their captions on a contact sheet",
    )
    to: str = setting(
        "sample.png", place=True, metavar="FILE", help="the contact sheet (default: %(default)s)"
    )
    processes: int = setting(
        1,
        unless_typed=os.cpu_count() or 1,
        at_least=1,
        metavar="N",
        help="shards at a time (default: %(default)s)",
    )
    progress: bool = True


def verify(options: VerifyOptions) -> tuple[str, bool]:
    """Check a set, and draw its contact sheet if asked for.

    Returns:
        what to print, and whether the set is sound.

    Raises:
        UserError: wrong options, no such set, or it can't be reached.
    """
    _refuse_wrong(options)
    place = options.set if "://" in options.set else str(Path(options.set).expanduser().resolve())
    store = open_store("/".join([place.rstrip("/"), *([options.split] if options.split else [])]))
    found = summarize(store)
    reports = [] if options.fast else _check_shards(found, options)
    rows = [("set", store.place), *_index_rows(found)]
    rows += [] if options.fast else _sample_rows(found, reports)
    rows += _count_rows(found)
    if options.sample:
        rows.append(("contact sheet", _draw_sheet(found, options)))
    paragraphs = ["\n".join(f"{name:<22}{value}" for name, value in rows)]
    if found.notes:
        paragraphs.append("\n".join(f"note: {note}" for note in found.notes))
    if number := found.problems.numbers.total():
        paragraphs.append(f"{_counted(number, 'problem')}:\n{found.problems.text()}")
        paragraphs += _mending(found)
    elif options.fast:
        paragraphs.append("no problems; shards were not opened (--fast)")
    elif "image" in found.columns and not any(report.decoded for report in reports):
        paragraphs.append(f"no problems; no image was decoded (--decode {options.decode:g})")
    else:
        paragraphs.append("sound")
    return "\n\n".join(paragraphs), not number


def _mending(found: SetSummary) -> list[str]:
    """Say what to do about the problems, where converting again helps."""
    if not found.problems.parts:
        return []
    # the converter makes the held-out part of an input together with the rest, in the folder above
    out = folder_of(found.store.place) if found.is_held_out else found.store.place
    if parts := sorted(found.problems.parts - {""}):
        others = ", ".join([*parts[1:4], *(["…"] if parts[4:] else [])])
        delete = f"{out}/{parts[0]}" + (f" (and likewise {others})" if others else "")
        why = "it makes what is gone anew and leaves the rest"
    elif found.indexed.keys() <= {""}:
        delete, why = out, "it leaves a set that is there as it is"
    else:
        delete, why = "", "it writes index.json and dataset.json anew"
    first = f"delete {delete}, then " if delete else ""
    return [f"to mend it: {first}run the convert command again; {why}"]


def _refuse_wrong(options: VerifyOptions) -> None:
    """Refuse wrong options before the set is read."""
    check_settings(options)
    if options.sample:
        contact_sheet.check_path(options.to)


def _formats(found: SetSummary) -> tuple[str, ...]:
    """Return what PIL may read: evaluation also takes formats that training doesn't."""
    is_evaluation_set = "label" in found.columns or "split" in found.dataset
    return EVALUATION_FORMATS if is_evaluation_set else TRAINING_FORMATS


def _check_shards(found: SetSummary, options: VerifyOptions) -> list[ShardReport]:
    """Open all shards, and add their problems to those found before."""
    from alignclip.verification.shards import (
        SampleRules,
        add_duplicates,
        add_outliers,
        check_shards,
    )

    stored, said = dimension_of(found.columns), found.dataset.get("dimension")
    if stored and said and stored != said:
        text = f"says embeddings have {said} dimensions, the column has {stored}"
        found.problems.add("dimensions differ", DATASET, text)
    rules = SampleRules(
        found.store.place,
        options.decode,
        options.seed,
        _formats(found),
        None if found.classes is None else len(found.classes),
        stored or said,
    )
    reports = check_shards(found.entries, rules, options.processes, options.progress)
    for report in reports:
        found.problems.merge(report.problems)
    add_outliers(reports, found)
    add_duplicates(reports, found)
    return reports


def _draw_sheet(found: SetSummary, options: VerifyOptions) -> str:
    """Draw samples at even distances, of few shards where these have enough; return where."""
    from alignclip.verification.shards import samples_at

    assert options.sample
    counts = [entry["samples"] for entry in found.entries]
    shards = _spread(range(len(counts)), SHEET_SHARDS)
    if sum(counts[shard] for shard in shards) < options.sample:
        shards = [*range(len(counts))]
    positions = [(shard, i) for shard in shards for i in range(counts[shard])]
    cells = []
    for _, sample in samples_at(_spread(positions, options.sample), found):
        image, key = sample.get("image"), str(sample.get("key", ""))
        content = image if isinstance(image, bytes) else b""
        cells.append(contact_sheet.Cell(key, content, _text(sample, found.classes or [])))
    if not cells:
        return "no sample can be read"
    title = f"{found.store.place}: {len(cells):,} of {found.samples:,} samples"
    path = contact_sheet.check_path(options.to)
    contact_sheet.save_sheet(contact_sheet.draw_sheet(cells, title, _formats(found)), path)
    return f"{path} ({_counted(len(cells), 'sample')})"


def _spread(items: Sequence[T], number: int) -> list[T]:
    """Return at most ``number`` of the items, at even distances."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]


def _text(sample: dict[str, Any], names: Sequence[str]) -> str:
    """Return what stands below a sample's image."""
    if "label" in sample:
        label = sample["label"]
        is_class = isinstance(label, int) and 0 <= label < len(names)
        return f"{label}: {names[label]}" if is_class else str(label)
    caption = sample.get("caption", "")
    if isinstance(caption, list):
        more = f" (+{len(caption) - 1})" if len(caption) > 1 else ""
        return f"{caption[0]}{more}" if caption else ""
    return str(caption)


def _index_rows(found: SetSummary) -> list[tuple[str, str]]:
    gib, mib = found.bytes / 2**30, found.bytes / 2**20
    return [
        ("shards", f"{found.shards:,}"),
        ("samples", f"{found.samples:,}"),
        ("size", f"{gib:,.1f} GiB" if gib >= 10 else f"{mib:,.1f} MiB"),
        ("columns", ", ".join(f"{name} {encoding}" for name, encoding in found.columns.items())),
    ]


def _sample_rows(found: SetSummary, reports: Sequence[ShardReport]) -> list[tuple[str, str]]:
    from alignclip.verification.shards import sound_norms

    rows = []
    if (read := sum(report.samples for report in reports)) != found.samples:
        rows.append(("samples read", f"{read:,}"))
    if "image" in found.columns:
        decoded = sum(report.decoded for report in reports)
        rows.append(("images decoded", f"{decoded:,} of {read:,}"))
    if len(norms := sound_norms(reports)):
        dimension = next(report.dimension for report in reports if report.dimension)
        shown = f"{norms.min():.4f} / {norms.mean(dtype=float):.4f} / {norms.max():.4f}"
        rows.append(("embeddings", f"{len(norms):,} of {dimension} dimensions"))
        rows.append(("  norm", f"{shown} (min / mean / max)"))
    return rows


def _count_rows(found: SetSummary) -> list[tuple[str, str]]:
    if found.written is None:
        return []
    skipped = found.skipped.total()
    numbers = [
        ("read from source", found.written + found.held_out + skipped),
        ("  written", found.written),
        *([("  held out", found.held_out)] if found.held_out else []),
        ("  skipped", skipped),
        *((f"    {reason}", number) for reason, number in sorted(found.skipped.items()) if number),
    ]
    return [(name, f"{number:,}") for name, number in numbers]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def parse(arguments: Sequence[str] | None = None) -> VerifyOptions:
    """Read the command line."""
    return read_options(
        VerifyOptions,
        arguments,
        "convert/verify.py",
        "Check an MDS set: files, hashes, samples, counts.",
        VERIFY_EXAMPLES,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, print what was found, and exit with status 1 where there are problems."""
    console.prepare_output()
    options = parse(arguments)
    with one_line_errors(interrupted="interrupted"):
        text, sound = verify(options)
    print(text)
    if not sound:
        raise SystemExit(1)
