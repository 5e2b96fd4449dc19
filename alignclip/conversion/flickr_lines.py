"""Lines of an image and a caption, as Flickr8k and Flickr30k are passed on."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from alignclip.errors import UserError

IMAGE = r"(?P<image>[^|,\t]+?\.jpg(?:\.\d)?)"  # one of Flickr8k's images ends in .jpg.1
# Layout -> a line of it. Only the header of ``numbered`` tells its numbers from what captions begin
# with.
LAYOUTS = {
    # ``results_20130124.token``, ``…8k.token.txt``: 1000.jpg#0<tab>a dog
    "token": re.compile(rf"{IMAGE}#\d+\s*\t(?P<caption>.*)"),
    # Kaggle's ``results.csv``: 1000.jpg| 0| a dog, a bar missing once
    "bars": re.compile(rf"{IMAGE}\s*\|\s*\d+\s*\|?(?P<caption>.*)"),
    # clip_benchmark's ``…_test_karpathy.txt``: 1000.jpg,a dog, not quoted
    "plain": re.compile(rf"{IMAGE}\s*,(?P<caption>.*)"),
    # Kaggle's ``captions.txt``: 1000.jpg,0,a dog
    "numbered": re.compile(rf"{IMAGE}\s*,\s*\d+\s*,(?P<caption>.*)"),
}
NUMBERED_HEADER = ["image_name", "comment_number", "comment"]


def read_lines(text: str, where: str) -> dict[str, list[str]]:
    """Return the captions of each image, in the order of the lines.

    Kaggle's ``captions.txt`` is CSV, with the columns ``image,caption`` or ``NUMBERED_HEADER``.

    Args:
        text: the file's content.
        where: the file, for the message.

    Raises:
        UserError: a line holds no image and caption; names the line.
    """
    lines = [line.rstrip("\r") for line in text.split("\n")]  # not at Unicode's line breaks
    is_numbered = [name.strip() for name in lines[0].split(",")] == NUMBERED_HEADER
    layouts = ("token", "bars", "numbered" if is_numbered else "plain")
    pairs = None
    if not any(_matched(line, layouts[:2]) for line in lines[:2]):
        pairs = _read_csv(text, 3 if is_numbered else 2)
    if pairs is None:
        pairs = _read_lines(lines, layouts, where)
    captions: dict[str, list[str]] = {}
    for image, caption in pairs:
        captions.setdefault(image, []).append(caption)
    return captions


def _matched(line: str, layouts: Iterable[str]) -> re.Match[str] | None:
    return next(filter(None, (LAYOUTS[name].fullmatch(line) for name in layouts)), None)


def _read_csv(text: str, columns: int) -> list[tuple[str, str]] | None:
    """Read a CSV file; None where a line is not CSV: then no mark in the file is CSV's.

    A caption that begins with a quotation mark of its own would else swallow the lines after it.
    """
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        rows = [row for row in reader if any(row)]
    except csv.Error:
        return None
    if rows and not rows[0][0].strip().endswith(".jpg"):
        del rows[0]  # the header
    for row in rows:
        swallowed = any(LAYOUTS["plain"].match(line) for line in row[-1].split("\n")[1:])
        if len(row) != columns or swallowed or not re.fullmatch(IMAGE, row[0].strip()):
            return None
    return [(row[0].strip(), row[-1]) for row in rows]


def _read_lines(lines: list[str], layouts: tuple[str, ...], where: str) -> list[tuple[str, str]]:
    """Read lines whose captions are taken as they are, but for blanks before them."""
    pairs = []
    for number, line in enumerate(lines, 1):
        if match := _matched(line, layouts):
            pairs.append((match["image"], match["caption"].lstrip()))
        elif line.strip() and number > 1:  # the first may be a header
            raise UserError(f"{where} line {number} is no image and caption: {line[:60]}")
    return pairs
