"""The report that a person reads: what was left out, what was mended, and some of each to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from convert.options import Counts

REPORT = "report.md"  # beside the index
EXAMPLES = 20  # of each reason


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
    for title, numbers in (("Skipped", total.skipped), ("Written, but mended or unusual", total.noted)):
        if not numbers:
            continue
        ordered = sorted(numbers, key=lambda reason: (-numbers[reason], reason))
        lines += ["", f"## {title}", "", "| what | samples | share |", "|---|---:|---:|"]
        lines += [f"| {reason} | {numbers[reason]:,} | {numbers[reason] / read:.2%} |" for reason in ordered]
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
