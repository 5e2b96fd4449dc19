"""The report that a person reads: the pairs left out or mended, other files, examples of each, and ways out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from convert.options import Counts
from convert.samples import DUPLICATE_KEY, FIRST_DOT, LIE_APART

REPORT = "report.md"  # beside the index
EXAMPLES = 20  # of each reason
WAYS_OUT = {
    LIE_APART: "Image and caption lie apart: sort the tar (tar --sort=name packs a folder so), or give --unsorted",
    FIRST_DOT: "A key ends at the first dot of the file name, as in webdataset, which makes these pairs one: give "
    "--last-dot, or rename the files",
    DUPLICATE_KEY: "Of equal keys in one input the first is kept: give each pair a key of its own (several captions of "
    "an image: convert/retrieval.py)",
}


def ways_out(skipped: Mapping[str, int]) -> list[str]:
    """What a person can do about pairs that were left out for such reasons, a sentence each."""
    return [way for reason, way in WAYS_OUT.items() if reason in skipped]


def write_report(done: Mapping[str, Counts], sources: Mapping[str, str]) -> str:
    """Markdown: a table of the reasons, and examples of each.

    Args:
        done: sub-folder name -> what was counted there.
        sources: sub-folder name -> the input that it was made from.
    """
    total = Counts()
    for counts in done.values():
        total.add(counts)
    read = total.written + total.bad
    lines = ["# Conversion report", ""]
    inputs = "1 input" if len(done) == 1 else f"{len(done):,} inputs"
    lines += [f"{read:,} samples read from {inputs}, {total.written:,} written, {total.bad:,} skipped."]
    for title, numbers, of in (
        ("Skipped", total.skipped, "samples"),
        ("Written, but mended or unusual", total.noted, "samples"),
        ("No part of a pair", total.ignored, "files"),
    ):
        if not numbers:
            continue
        ordered = sorted(numbers, key=lambda reason: (-numbers[reason], reason))
        lines += ["", f"## {title}", "", f"| what | {of} | share |", "|---|---:|---:|"]
        whole = read if of == "samples" else sum(numbers.values())
        lines += [f"| {reason} | {numbers[reason]:,} | {numbers[reason] / whole:.2%} |" for reason in ordered]
        lines += [line for way in ways_out(numbers) for line in ("", f"{way}.")]
        for reason in ordered:
            lines += ["", f"### {reason}", "", *_examples(reason, done, sources)]
            if numbers[reason] > EXAMPLES:
                lines += [f"- … {numbers[reason]:,} in all"]
    return "\n".join(lines) + "\n"


def _examples(reason: str, done: Mapping[str, Counts], sources: Mapping[str, str]) -> Iterator[str]:
    """A few of each input, so that they are not all of the first."""
    left = EXAMPLES
    having = [name for name in sorted(done) if reason in done[name].examples]
    each = max(1, EXAMPLES // max(len(having), 1))
    for name in having:
        for key, detail in done[name].examples[reason][:each]:
            if not left:
                return
            left -= 1
            yield f"- `{_plain(key) or '?'}` in `{_plain(sources[name])}`" + (f": `{_plain(detail)}`" if detail else "")


def _plain(text: str) -> str:
    """What may stand between backticks in a line of Markdown."""
    return "".join(character if character.isprintable() and character != "`" else "·" for character in text)
