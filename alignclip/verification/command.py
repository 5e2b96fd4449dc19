"""Check an MDS set: files against the index, hashes, every sample, and the counts that the converter has kept.

Exit status: 0 sound, 1 problems (a line each), 2 nothing could be checked (no such set, no access, wrong options).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alignclip.data.image_files import EVALUATION_FORMATS, TRAINING_FORMATS
from alignclip.errors import UserError, check_place, one_line_errors
from alignclip.paths import option
from alignclip.runtime import console
from alignclip.storage.staging import OutputFolder
from alignclip.verification import contact_sheet
from alignclip.verification.findings import Overview
from alignclip.verification.index import look

if TYPE_CHECKING:
    from alignclip.verification.shards import Read

SHEET_SHARDS = 8  # fetched for a sheet, if their samples are enough

EXAMPLES = """examples:
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
    """What is checked, and how thoroughly.

    ``split``: a sub-folder with an index of its own. ``fast``: shards are not opened. ``decode``: the fraction of
    images that are decoded, chosen by key and ``seed``. ``sample``: that many are drawn on the picture ``to``.
    """

    set: str
    split: str | None = None
    fast: bool = False
    decode: float = 0.01
    seed: int = 0
    sample: int | None = None
    to: str = "sample.png"
    processes: int = 1
    progress: bool = True


def verify(options: VerifyOptions) -> tuple[str, bool]:
    """Check a set, draw its contact sheet if asked for, and return what to print and whether the set is sound.

    Raises:
        UserError: wrong options, no such set, or it can't be reached.
    """
    _check(options)
    store = OutputFolder(options.set.rstrip("/") + (f"/{options.split}" if options.split else ""))
    found = look(store)
    read: Read | None = None
    if not options.fast:
        read = _read(store, found, options)
    rows = _table(found, read)
    if options.sample:
        rows.append(("contact sheet", _draw(store, found, options)))
    text = "\n".join(f"{name:<22}{value}" for name, value in [("set", store.out), *rows])
    if found.notes:
        text += "\n\n" + "\n".join(f"note: {note}" for note in found.notes)
    problems = found.problems
    if not problems.number:
        return (
            f"{text}\n\n{'no problems; shards were not opened (--fast)' if options.fast else 'sound'}",
            True,
        )
    text += f"\n\n{_number(problems.number, 'problem')}:\n{problems.text()}"
    return text + _mending(store, found), False


def _mending(store: OutputFolder, found: Overview) -> str:
    """What to do about the problems, where converting again helps."""
    parts = sorted(found.problems.parts - {""})
    # the held-out part of an input is made together with the rest, by whose folder the converter goes
    out = store.out.rpartition("/")[0] if found.is_held_out else store.out
    if parts:
        more = (
            f" (and likewise {', '.join(parts[1:4])}{', …' if len(parts) > 4 else ''})"
            if parts[1:]
            else ""
        )
        delete = f"delete {out}/{parts[0]}{more}, then "
        why = "it makes what is gone anew and leaves the rest"
    elif not found.problems.parts:
        return ""
    elif found.indexed.keys() <= {""}:
        delete, why = f"delete {out}, then ", "it leaves a set that is there as it is"
    else:
        delete, why = "", "it writes index.json and dataset.json anew"
    return f"\n\nto mend it: {delete}run the convert command again; {why}"


def _check(options: VerifyOptions) -> None:
    """Refuse what can be seen to be wrong before the set is read."""
    check_place("set", options.set)
    if options.processes < 1:
        raise UserError(f"--processes must be at least 1, not {options.processes}")
    if not 0 <= options.decode <= 1:
        raise UserError(f"--decode is a fraction between 0 and 1, not {options.decode}")
    if options.sample is None:
        return
    if options.sample < 1:
        raise UserError(f"--sample must be at least 1, not {options.sample}")
    contact_sheet.check_path(options.to)


def _formats(found: Overview) -> tuple[str, ...]:
    """What PIL may read: evaluation also takes formats that training doesn't."""
    is_evaluation_set = "label" in found.columns or "split" in found.dataset
    return EVALUATION_FORMATS if is_evaluation_set else TRAINING_FORMATS


def _read(store: OutputFolder, found: Overview, options: VerifyOptions) -> Read:
    """Open all shards; their problems are added to those found before."""
    from alignclip.verification.shards import Read, Rules, read_shards
    from alignclip.verification.whole import add_duplicates, add_outliers

    # ndarray:float16:384; without a last part any shape may come
    encoding = found.columns.get("semantic", "").split(":")
    stored = int(encoding[2].split(",")[-1]) if len(encoding) > 2 else None
    said = found.dataset.get("dimension")
    if stored and said and stored != said:
        text = f"says embeddings have {said} dimensions, the column has {stored}"
        found.problems.add("dimensions differ", "dataset.json", text)
    classes = None if found.classes is None else len(found.classes)
    rules = Rules(store.out, options.decode, options.seed, _formats(found), classes, stored or said)
    reads = read_shards(found.entries, rules, options.processes, options.progress)
    total = Read()
    for one in reads:
        total.add(one)
    found.problems.merge(total.problems)
    add_outliers(reads, found.entries, found)
    add_duplicates(reads, found.entries, store.out, found)
    return total


def _draw(store: OutputFolder, found: Overview, options: VerifyOptions) -> str:
    """Draw samples at even distances, of a few shards at even distances; return where."""
    from alignclip.conversion.evaluation_sets import spread
    from alignclip.verification.shards import samples_at

    assert options.sample
    number, positions = SHEET_SHARDS, list[tuple[int, int]]()
    while len(positions) < options.sample and number < 2 * len(found.entries) + SHEET_SHARDS:
        shards = spread(list(range(len(found.entries))), number)
        positions = [(shard, i) for shard in shards for i in range(found.entries[shard]["samples"])]
        number *= 2
    cells = []
    for _, sample in samples_at(spread(positions, options.sample), found.entries, store.out):
        image = sample.get("image")
        cell = contact_sheet.Cell(
            str(sample.get("key", "")),
            image if isinstance(image, bytes) else b"",
            _text(sample, found.classes or []),
        )
        cells.append(cell)
    if not cells:
        return "no sample can be read"
    title = f"{store.out}: {len(cells):,} of {found.samples:,} samples"
    path = contact_sheet.check_path(options.to)
    contact_sheet.save(contact_sheet.draw(cells, title, _formats(found)), path)
    return f"{path} ({_number(len(cells), 'sample')})"


def _text(sample: dict[str, Any], names: Sequence[str]) -> str:
    """What stands below a sample's image."""
    if "label" in sample:
        label = sample["label"]
        is_class = isinstance(label, int) and 0 <= label < len(names)
        return f"{label}: {names[label]}" if is_class else str(label)
    caption = sample.get("caption", "")
    if isinstance(caption, list):
        return (
            f"{caption[0]}" + (f" (+{len(caption) - 1})" if len(caption) > 1 else "")
            if caption
            else ""
        )
    return str(caption)


def _table(found: Overview, read: Read | None) -> list[tuple[str, str]]:
    rows = [
        ("shards", f"{found.shards:,}"),
        ("samples", f"{found.samples:,}"),
        ("size", _size(found.bytes)),
    ]
    rows.append(
        ("columns", ", ".join(f"{name} {encoding}" for name, encoding in found.columns.items()))
    )
    if read:
        if read.samples != found.samples:
            rows.append(("samples read", f"{read.samples:,}"))
        if "image" in found.columns:
            rows.append(("images decoded", f"{read.decoded:,}"))
        if read.norms:
            norms = f"{read.least:.4f} / {read.sum / read.norms:.4f} / {read.most:.4f}"
            rows.append(("embeddings", f"{read.norms:,} of {read.dimension} dimensions"))
            rows.append(("  norm", f"{norms} (min / mean / max)"))
    if found.written is not None:
        skipped = sum(found.skipped.values())
        rows.append(("read from source", f"{found.written + found.held_out + skipped:,}"))
        rows += [("  written", f"{found.written:,}")]
        rows += [("  held out", f"{found.held_out:,}")] if found.held_out else []
        rows += [("  skipped", f"{skipped:,}")]
        rows += [
            (f"    {reason}", f"{number:,}")
            for reason, number in sorted(found.skipped.items())
            if number
        ]
    return rows


def _number(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:,.1f} MiB"


def parse(arguments: Sequence[str] | None = None) -> VerifyOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="convert/verify.py",
        description="Check an MDS set: files, hashes, samples, counts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("set", type=option, metavar="SET", help="local folder, or s3://, gs://, oci://, azure:// …")
    add("--split", metavar="NAME", help="check this sub-folder, which has an index.json of its own")
    add(
        "--fast",
        action="store_true",
        help="don't open shards: only the index, the files it names, and the counts",
    )
    add(
        "--decode",
        type=float,
        default=0.01,
        metavar="X",
        help="fraction of images to decode (default: %(default)s)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="another one, other images are decoded (default: %(default)s)",
    )
    add(
        "--sample",
        type=int,
        metavar="N",
        help="also draw N samples with their captions on a contact sheet",
    )
    add(
        "--to",
        type=option,
        default="sample.png",
        metavar="FILE",
        help="the contact sheet (default: %(default)s)",
    )
    add(
        "--processes",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="shards at a time (default: %(default)s)",
    )
    return VerifyOptions(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, print what was found, and exit with status 1 where there are problems."""
    console.prepare()
    options = parse(arguments)
    try:
        with one_line_errors():
            text, sound = verify(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    print(text)
    if not sound:
        raise SystemExit(1)
