"""The pairs in a tar: what the members of one key make, halves that lie apart, several pairs under one key."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from alignclip.conversion.samples import (
    FIRST_DOT,
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    LIE_APART,
    LONG_CAPTION,
    MISSING_CAPTION,
    MISSING_IMAGE,
    Ignored,
    Item,
    Reading,
    Sample,
    Skipped,
    caption_of,
    listable,
    pair,
    parse_json,
)
from alignclip.errors import UserError

TEXT_EXTENSIONS = ("txt", "json")
MOST_HALVES = 100_000  # that wait for their other halves, 1 KB each; others count as halves
OTHER_FILE = "file of another ending"
NO_PAIR = "text file without a caption"
FURTHER_PAIR = "further pair of the same key"


@dataclass
class Group:
    """The consecutive members of one key.

    Attributes:
        key: what the names of the members have in common.
        members: ending -> bytes, of those that are read.
        too_large: ending -> bytes of those that are too large to be read.
        others: endings of those that are not read, as they are written.
        places: ending -> offset and size in the tar, of ``members``; a size of -1: not in one piece.
    """

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    too_large: dict[str, int] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Half:
    """An image without a caption, or a caption without an image: the item that says so, and where it lies."""

    item: Skipped
    is_image: bool
    places: dict[str, tuple[int, int]]


class Pairing:
    """What the groups of a tar are: pairs, and halves that wait for their other halves.

    Attributes:
        images: endings of images, the first of them first.
        texts: endings of texts.
        source: the open tar, to read again what lies apart; None: it is compressed.
    """

    def __init__(self, path: Path, caption_key: str | None, how: Reading) -> None:
        own = how.image_key.lower().lstrip(".") if how.image_key else None
        self.images = IMAGE_EXTENSIONS if own is None else (own,)
        self._text = "txt" if caption_key is None else caption_key.lower().lstrip(".")
        self.texts = tuple(dict.fromkeys((*TEXT_EXTENSIONS, self._text)))
        self.source: BinaryIO | None = None
        self._path = path
        self._caption_key = caption_key
        self._how = how
        self._halves: dict[str, _Half] = {}

    def items(self, group: Group) -> Iterator[Item]:
        """Yield the pair of a group, or what the group is instead."""
        item = self._pair(group.key, group.members, group.too_large)
        if isinstance(item, Sample):
            for stem in _pairs_in(group.others)[0] if group.others else ():
                yield Ignored(f"{group.key}.{stem}", FURTHER_PAIR)
            yield item
        elif item.reason not in (MISSING_IMAGE, MISSING_CAPTION):
            yield item
        else:
            yield from self._incomplete(group, item)

    def rest(self) -> Iterator[Skipped]:
        """Yield the halves whose other halves have not come."""
        while self._halves:
            yield self._halves.pop(next(iter(self._halves))).item

    def _pair(
        self, key: str, members: dict[str, bytes], too_large: dict[str, int]
    ) -> Sample | Skipped:
        image = next(
            (members[extension] for extension in self.images if extension in members), None
        )
        if image is None and (
            large := next((ending for ending in self.images if ending in too_large), None)
        ):
            return Skipped(key, IMAGE_TOO_LARGE, f"{large} member of {too_large[large]:,} bytes")
        has_text = self._text in members or self._text in too_large
        if (used := self._text if has_text else "json") in too_large:
            return Skipped(key, LONG_CAPTION, f"{used} member of {too_large[used]:,} bytes")
        if has_text:
            return pair(
                key,
                image,
                members[self._text].decode(self._how.encoding or "utf-8", errors="replace"),
            )
        entries = parse_json(members.get("json"))
        return pair(key, image, caption_of(entries, self._caption_key or "caption"), entries)

    def _incomplete(self, group: Group, item: Skipped) -> Iterator[Item]:
        """Yield what the group is of which an image or a caption is missing: half a pair, several, or none."""
        whole, images, texts = _pairs_in(group.others) if group.others else ([], [], [])
        for stem in whole:
            yield Skipped(f"{group.key}.{stem}", FIRST_DOT)
        has_image = item.reason == MISSING_CAPTION
        has_text = not has_image and self._has_caption(group)
        endings = listable((*group.members, *group.others))
        told = Skipped(
            group.key, item.reason, f"its files: {', '.join(endings)}", item.texts, endings
        )
        if not whole and (has_image or images) and (has_text or texts):
            yield told  # under other endings than those that are read
        elif has_image or has_text:
            yield from self._half(_Half(told, has_image, group.places))
        elif images or texts:
            yield from self._inner_halves(group.key, images, texts, told)
        elif not whole:
            for ending in group.others:
                yield Ignored(f"{group.key}.{ending}", OTHER_FILE)
            for ending in group.members:  # a list or statistics beside the pairs
                yield Ignored(f"{group.key}.{ending}", NO_PAIR)

    def _inner_halves(
        self, key: str, images: list[str], texts: list[str], told: Skipped
    ) -> Iterator[Item]:
        """Yield halves of keys that go on after the first dot; one alone may be of another ending instead."""
        for stems, reason in ((images, MISSING_CAPTION), (texts, MISSING_IMAGE)):
            for stem in stems:
                name = key if len(images) + len(texts) == 1 else f"{key}.{stem}"
                half = Skipped(name, reason, told.detail, endings=told.endings)
                yield from self._half(_Half(half, reason == MISSING_CAPTION, {}))

    def _has_caption(self, group: Group) -> bool:
        if self._text in group.members:
            return True
        return (
            caption_of(parse_json(group.members.get("json")), self._caption_key or "caption")
            is not None
        )

    def _half(self, half: _Half) -> Iterator[Item]:
        """Yield what half a pair makes with its other half, where that has come; else let it wait."""
        key = half.item.key
        other = self._halves.get(key)
        if other is None and len(self._halves) < MOST_HALVES:
            self._halves[key] = half
        elif other is None or other.is_image == half.is_image:
            yield half.item
        else:
            del self._halves[key]
            yield (
                self._joined(key, other.places | half.places)
                if self._how.unsorted
                else Skipped(key, LIE_APART)
            )

    def _joined(self, key: str, places: dict[str, tuple[int, int]]) -> Sample | Skipped:
        """The pair of two halves that lie apart, read again.

        Raises:
            UserError: the tar is compressed, and would be read from the beginning for each.
        """
        if self.source is None:
            raise UserError(
                f"{self._path} is compressed, and --unsorted reads plain tars only: unpack it with gunzip"
            )
        if not places or any(size < 0 for _, size in places.values()):
            return Skipped(key, LIE_APART)
        number = self.source.fileno()
        members = {
            ending: os.pread(number, size, offset) for ending, (offset, size) in places.items()
        }
        return self._pair(key, members, {})


def _pairs_in(endings: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The pairs that have become one at the first dot: of these endings, what comes before the last dot.

    Returns:
        the stems that have an image and a text, only an image, only a text.
    """
    kinds: dict[str, set[bool]] = {}
    for ending in endings:
        stem, dot, last = ending.rpartition(".")
        if dot and (last := last.lower()) in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS):
            kinds.setdefault(stem, set()).add(last in IMAGE_EXTENSIONS)
    whole = [stem for stem, found in kinds.items() if len(found) == 2]
    return (
        whole,
        [s for s, found in kinds.items() if found == {True}],
        [s for s, found in kinds.items() if found == {False}],
    )
