"""The report that a person reads: pairs left out or mended, other files, examples, ways out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts, total_of
from alignclip.conversion.samples import (
    BROKEN_INPUT,
    DUPLICATE_KEY,
    FIRST_DOT,
    IMAGE_EXTENSIONS,
    LIE_APART,
    MISSING_CAPTION,
    MISSING_IMAGE,
)
from alignclip.conversion.wording import counted, did_you_mean_one, inputs_in_words, listing

REPORT = "report.md"  # beside the index
SHOWN_EXAMPLES = 20  # of each reason
WAYS_OUT = {
    LIE_APART: "Image and caption lie apart: sort the tar (tar --sort=name packs a folder so), or "
    "give --unsorted",
    FIRST_DOT: "A key ends at the first dot of the file name, as in webdataset, which makes these "
    "pairs one: give "
    "--last-dot, or rename the files",
    DUPLICATE_KEY: "Of equal keys in one input the first is kept: give each pair a key of its own "
    "(several captions of "
    "an image: convert/retrieval.py)",
}


def ways_out(skipped: Mapping[str, int]) -> list[str]:
    """Return what a person can do about pairs left out for such reasons, a sentence each."""
    return [way for reason, way in WAYS_OUT.items() if reason in skipped]


def first_example(done: Mapping[str, Counts]) -> str:
    """Return what is known of the first pair that was left out; "" for nothing."""
    told = {*WAYS_OUT, MISSING_CAPTION, BROKEN_INPUT}  # of these the message says enough
    for _, counts in sorted(done.items()):
        for reason, _ in counts.skipped.most_common():
            if reason in told or (reason == MISSING_IMAGE and counts.endings):
                continue
            for key, detail in counts.examples.get(reason, ()):
                if detail:
                    return _in_backticks(detail if reason == MISSING_IMAGE else f"{key}: {detail}")
    return ""


def why_nothing(total: Counts, number: int, options: ConvertOptions, first: str = "") -> str:
    """Return the message of a run without a sample: what was skipped, what captions may be called.

    Args:
        total: what was counted.
        number: of inputs.
        options: of the run.
        first: what is told of the first pair, as :func:`first_example` has it.
    """
    skipped = counted(total.skipped) or "nothing"
    message = f"no sample was written from {inputs_in_words(number)}; skipped: {skipped}"
    if total.ignored:
        message += f"; no part of a pair: {counted(total.ignored)}"
    if first:
        message += f". The first: {first}"
        if MISSING_IMAGE in total.skipped and not total.endings:
            message += " (a table's relative paths begin at its own folder)"
    names = _other_names(total, options.reading.caption_key)
    return ". ".join([message, *ways_out(total.skipped), *filter(None, [names])])


def _other_names(total: Counts, key: str | None) -> str:
    """Say what images and captions may be called instead; "" where nothing tells."""
    texts, they_have = sorted(total.texts), f"they have: {', '.join(sorted(total.texts))}"
    the_files = f"The files end in {listing(sorted(total.endings))}:"
    if MISSING_CAPTION not in total.skipped:
        if MISSING_IMAGE not in total.skipped or not total.endings:
            return ""
        return f"{the_files} name those of images and captions with --image-key, --caption-key"
    if texts and key is not None:
        hint = did_you_mean_one(key, texts)
        return f"--caption-key '{key}' is no text in the json members; {they_have}{hint}"
    if texts:
        none = "There are no txt members, and no 'caption' in json members"
        return f"{none}; {they_have} (--caption-key)"
    if {ending.lower() for ending in total.endings} - {*IMAGE_EXTENSIONS, "json"}:
        return f"{the_files} --caption-key names the ending of captions"
    if not total.endings:  # of a table
        return ""
    return "There are no texts in json members" + ("" if key else ", and there are no txt members")


def write_report(done: Mapping[str, Counts], sources: Mapping[str, str]) -> str:
    """Markdown: a table of the reasons, and examples of each.

    Args:
        done: sub-folder name -> what was counted there.
        sources: sub-folder name -> the input that it was made from.
    """
    total = total_of(done.values())
    read = total.written + total.bad
    lines = ["# Conversion report", ""]
    lines += [
        f"{read:,} samples read from {inputs_in_words(len(done))}, {total.written:,} written, "
        f"{total.bad:,} skipped."
    ]
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
        lines += [
            f"| {reason} | {numbers[reason]:,} | {numbers[reason] / whole:.2%} |"
            for reason in ordered
        ]
        lines += [line for way in ways_out(numbers) for line in ("", f"{way}.")]
        for reason in ordered:
            lines += ["", f"### {reason}", "", *_examples(reason, done, sources)]
            if numbers[reason] > SHOWN_EXAMPLES:
                lines += [f"- … {numbers[reason]:,} in all"]
    return "\n".join(lines) + "\n"


def _examples(reason: str, done: Mapping[str, Counts], sources: Mapping[str, str]) -> Iterator[str]:
    """Yield a few examples of each input, so that they are not all of the first."""
    left = SHOWN_EXAMPLES
    having = [name for name in sorted(done) if reason in done[name].examples]
    each = max(1, SHOWN_EXAMPLES // max(len(having), 1))
    for name in having:
        for key, detail in done[name].examples[reason][:each]:
            if not left:
                return
            left -= 1
            yield f"- `{_in_backticks(key) or '?'}` in `{_in_backticks(sources[name])}`" + (
                f": `{_in_backticks(detail)}`" if detail else ""
            )


def _in_backticks(text: str) -> str:
    """Return text that may stand between backticks in a line of Markdown."""
    return "".join(
        character if character.isprintable() and character != "`" else "·" for character in text
    )
