"""What a conversion is to do, and what it has counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignclip.conversion.captions import DEFAULT_ENCODER
from alignclip.conversion.csv_tables import is_utf8
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.samples import PLAIN, Reading

EXAMPLES = 5  # of each reason, kept of an input shard for the report


@dataclass
class ConvertOptions:
    """What is converted, where to, and how.

    Attributes:
        inputs: patterns (see :func:`alignclip.conversion.inputs.expand`).
        caption_key: take captions from that entry of the ``json`` members, that member or that column; None: see the
            input's format.
        reading: how inputs are read otherwise.
        held_out: the share of the samples, chosen by a hash of their keys, that becomes the split ``val``.
        size_limit: with ``compression`` and ``hashes`` an argument of :class:`streaming.MDSWriter`.
        max_bad: the share of bad samples above which the conversion fails.
        scheduler: a Dask scheduler's address; None: ``processes`` on this machine.
        next_step: the summary ends with the command that trains on the set.
    """

    inputs: Sequence[str]
    out: str
    encoder: str = DEFAULT_ENCODER
    semantic: bool = True
    caption_key: str | None = None
    reading: Reading = PLAIN
    images: ImageOptions = field(default_factory=ImageOptions)
    held_out: float = 0.0
    size_limit: str | int = (
        "32mb"  # larger ones cost a third of the speed: the C library gives their memory back each time
    )
    compression: str | None = None
    hashes: Sequence[str] = ("xxh64",)  # what training validates
    max_bad: float = 0.5
    processes: int = 1
    scheduler: str | None = None
    progress: bool = True
    next_step: bool = True

    def __post_init__(self) -> None:
        """Make local paths absolute: they are the same however they are written, and wherever a worker runs."""
        if ":/" not in self.out:  # with one slash it is a mistake, which is told later
            self.out = str(Path(self.out).expanduser().resolve())
        if (folder := Path(self.encoder).expanduser()).is_dir():
            self.encoder = str(folder.resolve())

    def fixed(self) -> dict[str, Any]:
        """The options that every part of one set has to share."""
        return {
            "encoder": self.encoder if self.semantic else None,
            "caption_key": self.caption_key,
            **self._fixed_reading(),
            "check": self.images.check,
            "min_side": self.images.min_side,
            "resize": self.images.resize,
            "quality": self.images.quality if self.images.resize else None,
            "held_out": self.held_out,
            "size_limit": self.size_limit,
            "compression": self.compression,
            "hashes": sorted(set(self.hashes)),
        }

    def _fixed_reading(self) -> dict[str, Any]:
        """How inputs are read; None where that is how sets were read before there was a choice."""
        how = {key: value or None for key, value in asdict(self.reading).items()}
        return how | {"encoding": None if is_utf8(self.reading.encoding) else self.reading.encoding}


@dataclass
class Counts:
    """Pairs written and left out, and files that are no part of a pair.

    Attributes:
        written: pairs in the set, ``held_out`` of them in its split, ``resumed`` by earlier runs.
        skipped: reason -> pairs left out.
        noted: note -> pairs that were mended or are unusual.
        ignored: what they are -> files that are no part of a pair.
        bytes: of the stored shards.
        examples: of each reason, note or kind of file a few (key, detail).
        texts: see :class:`alignclip.conversion.samples.Skipped`, of the first such sample of each input.
        endings: see the same, a few.
        sides: the shorter sides of a few images of each input, in pixels.
        inputs: of a whole run those that it was given, ``converted`` of them by itself in ``seconds``.
        broken: the sub-folders of truncated inputs in the set.
    """

    written: int = 0
    held_out: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    examples: dict[str, list[list[str]]] = field(default_factory=dict)
    resumed: int = 0
    texts: set[str] = field(default_factory=set)
    endings: set[str] = field(default_factory=set)
    sides: list[int] = field(default_factory=list)
    inputs: int = 0
    converted: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bad(self) -> int:
        """How many pairs were left out."""
        return sum(self.skipped.values())

    def skip(self, reason: str, key: str = "", detail: str = "") -> None:
        """Count a sample as left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self._keep(reason, key, detail)

    def note(self, note: str, key: str = "") -> None:
        """Count a sample as mended or unusual."""
        self.noted[note] = self.noted.get(note, 0) + 1
        self._keep(note, key, "")

    def ignore(self, what: str, name: str) -> None:
        """Count a file that is no part of a pair."""
        self.ignored[what] = self.ignored.get(what, 0) + 1
        self._keep(what, name, "")

    def _keep(self, what: str, key: str, detail: str) -> None:
        kept = self.examples.setdefault(what, [])
        if len(kept) < EXAMPLES:
            kept.append([key[:200], detail[:200]])

    def add(self, other: Counts) -> None:
        """Count what ``other``, of one input, has counted."""
        self.written += other.written
        self.held_out += other.held_out
        self.bytes += other.bytes
        self.resumed += other.resumed
        self.texts |= other.texts
        self.endings |= other.endings
        self.sides += other.sides
        kinds = ("skipped", "noted", "ignored")
        for mine, theirs in ((getattr(self, kind), getattr(other, kind)) for kind in kinds):
            for reason, number in theirs.items():
                mine[reason] = mine.get(reason, 0) + number
