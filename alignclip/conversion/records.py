"""Counts of pairs, and the JSON files that a set has beside its shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

from alignclip.conversion.formats.declaration import OpenInput
from alignclip.conversion.samples import BROKEN_INPUT

CARD_FILE = "dataset.json"  # at a set's root, written last but for the index
KEPT_EXAMPLES = 5  # of each reason, kept of an input shard for the report
LONGEST_TEXT = 200  # characters of a key or detail

Example = list[str]  # a key, and a detail about it


@dataclass
class Counts:
    """Pairs written and left out, and files that are no part of a pair.

    Attributes:
        written: pairs in the set: ``held_out`` of them in its split, ``resumed`` by earlier runs.
        skipped: reason -> pairs left out.
        noted: note -> pairs that were mended or are unusual.
        ignored: what they are -> files that are no part of a pair.
        bytes: of the stored shards.
        examples: reason, note or kind of file -> a few (key, detail).
        texts: see :class:`alignclip.conversion.samples.Skipped`, of the first such sample of each
            input.
        endings: see the same, a few.
        sides: the shorter sides of a few images of each input, in pixels.
        inputs: inputs that a whole run was given; it has ``converted`` so many in ``seconds``.
        broken: the sub-folders of truncated inputs in the set.
    """

    written: int = 0
    held_out: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    examples: dict[str, list[Example]] = field(default_factory=dict)
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
        """The number of pairs left out."""
        return self.skipped.total()

    @property
    def is_broken(self) -> bool:
        """True where an input was truncated."""
        return BROKEN_INPUT in self.skipped

    def skip(self, reason: str, key: str = "", detail: str = "") -> None:
        """Count a sample as left out."""
        self._count(self.skipped, reason, key, detail)

    def note(self, note: str, key: str = "") -> None:
        """Count a sample as mended or unusual."""
        self._count(self.noted, note, key)

    def ignore(self, what: str, name: str) -> None:
        """Count a file that is no part of a pair."""
        self._count(self.ignored, what, name)

    def _count(self, counter: Counter[str], what: str, key: str, detail: str = "") -> None:
        counter[what] += 1
        kept = self.examples.setdefault(what, [])
        if len(kept) < KEPT_EXAMPLES:
            kept.append([key[:LONGEST_TEXT], detail[:LONGEST_TEXT]])


def total_of(parts: Iterable[Counts]) -> Counts:
    """Add up the counts of input shards; examples stay with each."""
    total = Counts()
    for part in parts:
        for name in ("written", "held_out", "bytes", "resumed"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        for name in ("skipped", "noted", "ignored", "texts", "endings"):
            getattr(total, name).update(getattr(part, name))
        total.sides.extend(part.sides)  # a sum of lists would copy all of them for each input
    return total


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """``counts.json`` of a complete sub-folder.

    Attributes:
        source: the name of the input shard.
        source_bytes: its size when it was read.
        source_modified: when it was changed before, in ns since the epoch.
        written: samples in the sub-folder; ``held_out`` more are in the split's.
    """

    source: str
    source_bytes: int = 0
    source_modified: int = 0
    written: int
    held_out: int
    skipped: dict[str, int]
    noted: dict[str, int]
    ignored: dict[str, int] = field(default_factory=dict)  # missing in early versions, as are sides
    sides: list[int] = field(default_factory=list)
    bytes: int
    examples: dict[str, list[Example]]

    @classmethod
    def of(cls, source: str, opened: OpenInput, counts: Counts) -> InputRecord:
        """Record what an input shard has become."""
        return cls(
            source=source,
            source_bytes=opened.size,
            source_modified=opened.modified,
            written=counts.written - counts.held_out,
            held_out=counts.held_out,
            skipped=counts.skipped,
            noted=counts.noted,
            ignored=counts.ignored,
            sides=counts.sides,
            bytes=counts.bytes,
            examples=counts.examples,
        )

    @classmethod
    def parse(cls, content: object) -> InputRecord | None:
        """Take a record from parsed JSON; None where it is another file's, or damaged."""
        if not isinstance(content, dict):
            return None
        try:
            return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})
        except TypeError:  # an entry is missing
            return None

    @property
    def samples(self) -> int:
        """The number of samples, held-out ones included."""
        return self.written + self.held_out

    def counts(self) -> Counts:
        """Return the counts of a sub-folder that an earlier run has written."""
        return Counts(
            written=self.samples,
            held_out=self.held_out,
            skipped=Counter(self.skipped),
            noted=Counter(self.noted),
            ignored=Counter(self.ignored),
            bytes=self.bytes,
            examples=self.examples,
            resumed=self.samples,
            sides=self.sides,
        )


@dataclass(frozen=True)
class Plan:
    """``convert.json``: what a set was begun with.

    Attributes:
        settings: the options that every part of the set shares, by name.
        columns: of the MDS shards; None: an early version's plan.
        inputs: sub-folder -> input shard, of all runs so far.
    """

    settings: dict[str, Any]
    columns: dict[str, str] | None
    inputs: dict[str, str]

    @classmethod
    def parse(cls, content: object) -> Plan | None:
        """Take a plan from parsed JSON; None where it is damaged."""
        if not isinstance(content, dict):
            return None
        settings = dict(content)
        columns, inputs = settings.pop("columns", None), settings.pop("inputs", None)
        return cls(settings, columns, inputs if isinstance(inputs, dict) else {})

    def text(self) -> str:
        """Return the file's text."""
        return to_json({**self.settings, "columns": self.columns, "inputs": self.inputs})


@dataclass(frozen=True)
class DatasetCard:
    """``dataset.json``: what a finished set is.

    Attributes:
        encoder: of the captions, and its ``dimension``; None where there are no embeddings.
        source: what was named as inputs, in all runs.
        inputs: input shards in the set.
        samples: outside of the held-out split.
        options: the settings that every part shares.
        versions: of the packages that wrote the set.
    """

    encoder: str | None
    dimension: int | None
    source: list[str]
    inputs: int
    samples: int
    held_out: int
    skipped: dict[str, int]
    noted: dict[str, int]
    ignored: dict[str, int]
    bytes: int
    options: dict[str, Any]
    versions: dict[str, str]


def to_json(record: object) -> str:
    """Return a record's JSON text."""
    return json.dumps(record if isinstance(record, dict) else vars(record), indent=2)
