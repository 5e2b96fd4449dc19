"""Files whose names share a key are a pair: the members of a tar, the files of a folder.

A pair is an image and a caption side by side. Halves that lie apart wait for each other; several
pairs that share the key up to the first dot are told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from alignclip.conversion.samples import (
    FIRST_DOT,
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    LIE_APART,
    LONG_CAPTION,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    MISSING_CAPTION,
    MISSING_IMAGE,
    Ignored,
    Item,
    Reading,
    Sample,
    Skipped,
    caption_of,
    member_json,
    pair,
)
from alignclip.conversion.wording import listable
from alignclip.errors import UserError

TEXT_EXTENSIONS = ("txt", "json")
MOST_HALVES = 100_000  # that wait for their other halves, 1 KB each; others count as halves
OTHER_FILE = "file of another ending"
NO_PAIR = "text file without a caption"
FURTHER_PAIR = "further pair of the same key"
# webdataset's: the key is the path up to the first dot of the file name
TO_FIRST_DOT = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
TO_LAST_DOT = re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]*)", re.DOTALL)

TarPlace = tuple[int, int]  # offset and size in a tar; a size of -1: not in one piece
Places = dict[str, TarPlace]  # by ending
RefusedFiles = dict[str, tuple[str, str]]  # reason and detail, by ending


@dataclass
class Group:
    """The consecutive files of one key.

    Attributes:
        key: what the names of the files have in common.
        members: ending -> bytes of the files that are read.
        refused: ending -> reason and detail, of the files that can't be taken.
        others: endings of the files that are not read, as they are written.
        places: ending -> where the file is in the tar, of ``members``.
    """

    key: str = ""
    members: dict[str, bytes] = field(default_factory=dict)
    refused: RefusedFiles = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    places: Places = field(default_factory=dict)


class Pairing:
    """Puts files together to pairs, in the order in which the files come.

    The caption is the ``txt`` file, or else ``caption`` in the ``json`` file; with a caption key it
    is the file of that ending, or else that entry of the ``json`` file. Invalid UTF-8 becomes
    U+FFFD.

    Attributes:
        source: the open tar, to read again what lies apart; None: the tar is compressed.
    """

    def __init__(self, reading: Reading, place: str) -> None:
        own = reading.image_key.lower().lstrip(".") if reading.image_key else None
        self._images = IMAGE_EXTENSIONS if own is None else (own,)
        self._text = (reading.caption_key or "txt").lower().lstrip(".")
        self._limits = dict.fromkeys(self._images, MAX_IMAGE_BYTES)
        self._limits |= dict.fromkeys((*TEXT_EXTENSIONS, self._text), MAX_TEXT_BYTES)
        self._pattern = TO_LAST_DOT if reading.last_dot else TO_FIRST_DOT
        self._reading = reading
        self._place = place
        self._group = Group()
        self._halves: dict[str, tuple[Skipped, Places]] = {}
        self.source: BinaryIO | None = None

    @property
    def key(self) -> str:
        """The key of the files that came last."""
        return self._group.key

    def split(self, name: str) -> tuple[str, str] | None:
        """Return key and ending of a file name; None where the name can't be a part of a pair."""
        match = self._pattern.fullmatch(name)
        return (match[1], match[2]) if match else None

    def reads(self, ending: str) -> bool:
        """Say whether files of an ending are read."""
        return ending.lower() in self._limits

    def is_complete(self, key: str, ending: str) -> bool:
        """Say whether a file begins another pair than the files that came last."""
        group, known = self._group, ending.lower()
        return key != group.key or known in group.members or known in group.refused

    def add(
        self, key: str, ending: str, size: int, read: Callable[[], bytes], place: TarPlace = (0, -1)
    ) -> None:
        """Take a file of the pair that came last, or the first file of another pair."""
        group, known = self._group, ending.lower()
        group.key = key
        limit = self._limits.get(known)
        if limit is None:
            group.others.append(ending)
        elif size > limit:
            self.refuse(key, ending, f"{known} member of {size:,} bytes")
        else:
            group.members[known] = read()
            group.places[known] = place

    def refuse(self, key: str, ending: str, detail: str, reason: str | None = None) -> None:
        """Take a file that is too large, or without content for another reason; see :meth:`add`."""
        known = ending.lower()
        too_large = IMAGE_TOO_LARGE if known in self._images else LONG_CAPTION
        self._group.key = key
        self._group.refused[known] = (reason or too_large, detail)

    def finish(self) -> Iterator[Item]:
        """Yield the pair of the files that came last, or what they are instead."""
        group, self._group = self._group, Group()
        if not group.key:
            return
        item = self._pair(group.key, group.members, group.refused)
        if isinstance(item, Sample):
            for stem, reason in _inner_pairs(group.others).items():
                if reason == FIRST_DOT:
                    yield Ignored(f"{group.key}.{stem}", FURTHER_PAIR)
            yield item
        elif item.reason in (MISSING_IMAGE, MISSING_CAPTION):
            yield from self._incomplete(group, item)
        else:
            yield item

    def drop(self) -> str:
        """Forget the files that came last, and return their key."""
        group, self._group = self._group, Group()
        return group.key

    def halves(self) -> Iterator[Skipped]:
        """Yield the halves whose other halves have not come."""
        while self._halves:
            yield self._halves.pop(next(iter(self._halves)))[0]

    def _pair(self, key: str, members: dict[str, bytes], refused: RefusedFiles) -> Sample | Skipped:
        image = next((members[ending] for ending in self._images if ending in members), None)
        text = self._text if self._text in members or self._text in refused else "json"
        for ending in (*(self._images if image is None else ()), text):
            if ending in refused:
                return Skipped(key, *refused[ending])
        if text in members and text == self._text:
            encoding = self._reading.encoding or "utf-8"
            return pair(key, image, members[text].decode(encoding, errors="replace"))
        entries = member_json(members.get("json"))
        return pair(key, image, self._entry(entries), entries)

    def _entry(self, entries: object) -> str | None:
        return caption_of(entries, self._reading.caption_key or "caption")

    def _has_caption(self, members: dict[str, bytes]) -> bool:
        return self._text in members or self._entry(member_json(members.get("json"))) is not None

    def _incomplete(self, group: Group, item: Skipped) -> Iterator[Item]:
        """Yield a group without an image or a caption: half a pair, several pairs, or no pair."""
        inner = [(f"{group.key}.{stem}", why) for stem, why in _inner_pairs(group.others).items()]
        whole = [Skipped(key, why) for key, why in inner if why == FIRST_DOT]
        yield from whole
        inner = [(key, why) for key, why in inner if why != FIRST_DOT]
        if len(inner) == 1:  # one alone may be of another ending instead
            inner = [(group.key, inner[0][1])]
        endings = listable((*group.members, *group.others))
        detail = f"its files: {', '.join(endings)}"
        is_half = item.reason == MISSING_CAPTION or self._has_caption(group.members)
        halves = [(group.key, item.reason)] if is_half else inner
        if not whole and len({why for _, why in (*halves, *inner)}) == 2:
            # under other endings than those that are read
            yield Skipped(group.key, item.reason, detail, item.texts, endings)
            return
        for key, why in halves:
            half = Skipped(key, why, detail, item.texts, endings)
            yield from self._match(half, group.places if is_half else {})
        if not whole and not halves:
            for ending in group.others:
                yield Ignored(f"{group.key}.{ending}", OTHER_FILE)
            for ending in group.members:  # a list or statistics beside the pairs
                yield Ignored(f"{group.key}.{ending}", NO_PAIR)

    def _match(self, half: Skipped, places: Places) -> Iterator[Item]:
        """Yield what a half makes with its other half; let it wait where that hasn't come."""
        other, other_places = self._halves.get(half.key, (None, {}))
        if other is None and len(self._halves) < MOST_HALVES:
            self._halves[half.key] = (half, places)
        elif other is None or other.reason == half.reason:
            yield half
        else:
            del self._halves[half.key]
            yield self._joined(half.key, other_places | places)

    def _joined(self, key: str, places: Places) -> Sample | Skipped:
        """Read two halves again that lie apart.

        Raises:
            UserError: the tar is compressed, and would be read from the beginning for each pair.
        """
        if not self._reading.unsorted:
            return Skipped(key, LIE_APART)
        if self.source is None:
            raise UserError(
                f"{self._place} is compressed, and --unsorted reads plain tars only: unpack it "
                "with gunzip"
            )
        if not places or any(size < 0 for _, size in places.values()):
            return Skipped(key, LIE_APART)
        file = self.source.fileno()
        return self._pair(key, {end: os.pread(file, n, at) for end, (at, n) in places.items()}, {})


def name_in_utf8(name: str) -> str:
    """Return a file's name with U+FFFD for bytes that are no UTF-8, which come as surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def kind_of_name(name: str) -> str:
    """Say what a file is whose name can't be a part of a pair."""
    base = name.rpartition("/")[2]
    if base.startswith("._"):
        return "macOS's ._ file"
    return "hidden file" if base.startswith(".") else "file without an ending"


def _inner_pairs(endings: Iterable[str]) -> dict[str, str]:
    """Find the pairs that have become one at the first dot of their names.

    Args:
        endings: of the files that are not read; the keys go on up to the last dot of each.

    Returns:
        stem -> :data:`FIRST_DOT` where it has an image and a text, else the reason of such a half.
    """
    found: dict[str, str] = {}
    for ending in endings:
        stem, dot, last = ending.rpartition(".")
        if dot and last.lower() in (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS):
            reason = MISSING_CAPTION if last.lower() in IMAGE_EXTENSIONS else MISSING_IMAGE
            found[stem] = reason if found.get(stem, reason) == reason else FIRST_DOT
    return found
