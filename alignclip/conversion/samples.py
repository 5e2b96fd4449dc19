"""Image–caption pairs that every input format yields, and pairs left out, with the reason."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignclip.checked_json import parse_json
from alignclip.config.setting import setting
from alignclip.conversion.wording import listable
from alignclip.data.mds_index import BROKEN_INPUT as BROKEN_INPUT

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 64 * 2**20  # of one file; larger ones are not even read
MAX_TEXT_BYTES = 2**20  # of a txt or json member
MAX_CAPTION = 10_000  # characters; a model reads some 300, and a longer text is a page

MISSING_IMAGE = "missing image"
EMPTY_IMAGE = "empty image"
MISSING_CAPTION = "missing caption"
EMPTY_CAPTION = "empty caption"
LONG_CAPTION = "caption too long"
DUPLICATE_KEY = "duplicate key"
IMAGE_TOO_LARGE = "image too large"
FIRST_DOT = "key cut at its first dot"
NO_EMBEDDING = "caption without an embedding"
LIE_APART = "image and caption lie apart"
NO_OBJECT = "line without a JSON object"
UNREADABLE_FILE = "file that can't be read"

HTML_ENTITIES = "caption: HTML entities"
BAD_CAPTIONS = "caption: one of several left out"
INVALID_UTF8 = "caption: invalid UTF-8"
CUT_CAPTION = "caption: longer than the sentence encoder reads"
TOO_MANY_FIELDS = "row: more fields than the header; is the caption quoted?"


@dataclass(frozen=True)
class Reading:
    """Settings of how inputs are read.

    Attributes:
        caption_key: the captions' entry of ``json`` members, ending or column; None: the usual
            ones.
        encoding: of texts; None: UTF-8, or what a table's beginning says.
        image_key: the images' ending in tars (``input.jpg``), or their column; None: the usual
            ones.
        last_dot: a tar's key goes to the last dot of the file name; False: to the first, as
            webdataset has it.
        unsorted: put the halves of pairs together that lie apart in their tar.
    """

    caption_key: str | None = setting(
        None,
        metavar="KEY",
        help="the caption's entry in json members, or column of tables (default: txt, or caption)",
    )
    encoding: str | None = setting(
        None,
        metavar="NAME",
        help="of tables' text, as cp1252 (default: UTF-8, or by its mark)",
    )
    image_key: str | None = setting(
        None,
        metavar="KEY",
        help="the images' ending, as input.jpg, or the table's column of images",
    )
    last_dot: bool = setting(
        False, help="names of pairs are cut at the last dot (default: the first)"
    )
    unsorted: bool = setting(False, help="join image and caption that lie apart in a tar")


DEFAULT_READING = Reading()


@dataclass(frozen=True)
class Sample:
    """A pair: the key in its source, the image file's bytes as they are, the caption or several.

    ``notes``: what was mended or is unusual, counted like the reasons for leaving samples out.
    """

    key: str
    image: bytes
    caption: str | list[str]
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Skipped:
    """A pair left out, or with :data:`BROKEN_INPUT` the unreadable rest of a source, and why.

    Attributes:
        key: the pair's.
        reason: one of the constants above.
        detail: more about the reason, for the report.
        texts: with :data:`MISSING_CAPTION` the entries that could have been captions.
        endings: those of the pair's files, where one of its halves is missing.
    """

    key: str
    reason: str
    detail: str = field(default="", compare=False)
    texts: tuple[str, ...] = field(default=(), compare=False)
    endings: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Ignored:
    """A file of a source that is no part of a pair: its name, and what it is."""

    name: str
    what: str


Item = Sample | Skipped | Ignored  # what a source is made of


def caption_of(entries: Any, caption_key: str) -> str | None:
    """Return the caption in a parsed ``json`` member or a row; None where there is no such text."""
    caption = entries.get(caption_key) if isinstance(entries, Mapping) else None
    if not isinstance(caption, str):
        return None
    return as_utf8(caption)


def as_utf8(text: str) -> str:
    """Return a text with ``?`` for what UTF-8 has no form of, as JSON's ``\\ud800``."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def member_json(data: bytes | None) -> Any:
    """Parse a ``json`` member; None where it is missing or broken."""
    try:
        return parse_json((data or b"").decode("utf-8-sig", errors="replace"))
    except ValueError:
        return None


def pair(
    key: str, image: bytes | None, caption: str | None, entries: Any = None
) -> Sample | Skipped:
    """Make a sample of its parts, or say why it is none; HTML entities become their characters."""
    if image is None:
        return Skipped(key, MISSING_IMAGE)
    if not image:
        return Skipped(key, EMPTY_IMAGE)
    if len(image) > MAX_IMAGE_BYTES:
        return Skipped(key, IMAGE_TOO_LARGE, f"{len(image):,} bytes")
    if caption is None:
        texts = entries.items() if isinstance(entries, Mapping) else ()
        named = listable(name for name, value in texts if isinstance(value, str))
        return Skipped(key, MISSING_CAPTION, texts=named)
    if len(caption) > MAX_CAPTION:
        return Skipped(key, LONG_CAPTION, f"{len(caption):,} characters")
    caption = caption.removeprefix("\ufeff")  # a byte order mark
    notes = [INVALID_UTF8] if "\ufffd" in caption else []
    if "&" in caption and (plain := html.unescape(html.unescape(caption))) != caption:
        # unescaped twice, as open_clip's tokeniser does: the sentence encoder sees the same text
        caption = plain
        notes += [HTML_ENTITIES]
    if not caption.strip():
        return Skipped(key, EMPTY_CAPTION)
    return Sample(key, image, caption, tuple(notes))


def pair_with_captions(key: str, image: bytes | None, captions: Any) -> Sample | Skipped:
    """Make a sample of an image with several captions; leave out what :func:`pair` leaves out."""
    if not isinstance(captions, list) or not captions:
        return pair(key, image, None)
    each = [pair(key, image, as_utf8(one) if isinstance(one, str) else None) for one in captions]
    good = [one for one in each if isinstance(one, Sample)]
    if not good:
        return each[0]
    notes = dict.fromkeys(note for one in good for note in one.notes)
    if len(good) < len(each):
        notes[BAD_CAPTIONS] = None
    return Sample(key, good[0].image, [str(one.caption) for one in good], tuple(notes))
