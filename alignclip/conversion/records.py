"""Counts of pairs, and the JSON files that a set has beside its shards."""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from alignclip.checked_json import has_type
from alignclip.conversion.samples import BROKEN_INPUT, Ignored, Skipped
from alignclip.conversion.wording import MAX_NAMES
from alignclip.errors import without_secrets

CARD_FILE = "dataset.json"  # at a set's root, written last but for the index
KEPT_EXAMPLES = 5  # of each reason, kept of an input shard for the report
LONGEST_EXAMPLE = 200  # characters of a key or detail
# entries of an input's record, about the input and what was counted: the type of each in JSON
SOURCE: dict[str, Any] = {"source": str, "source_bytes": int, "source_modified": int}
COUNTED: dict[str, Any] = {
    "written": int,
    "held_out": int,
    "skipped": dict[str, int],
    "noted": dict[str, int],
    "ignored": dict[str, int],
    "sides": list[int],
    "bytes": int,
    "examples": dict[str, list[tuple[str, str]]],  # a key, and a detail about it
}
MISSING_IN_EARLY_RECORDS = {"source_bytes": 0, "source_modified": 0, "ignored": {}, "sides": []}

Example = list[str]  # a key, and a detail about it


@dataclass
class Counts:
    """Pairs written and left out, and files that are no part of a pair.

    Attributes:
        written: pairs in the set: ``held_out`` of them in its split, ``resumed`` by earlier runs.
        skipped: reason -> pairs left out.
        noted: note -> pairs that were mended or are unusual.
        ignored: what they are -> files that are no part of a pair.
        sides: the shorter sides of a few images of each input, in pixels.
        bytes: of the stored shards.
        examples: reason, note or kind of file -> a few (key, detail).
        texts: see :class:`alignclip.conversion.samples.Skipped`, of the first such sample of each
            input.
        endings: see the same, a few.
        inputs: inputs that a whole run was given; it has ``converted`` so many in ``seconds``.
        broken: the sub-folders of truncated inputs in the set.
    """

    written: int = 0
    held_out: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    bytes: int = 0
    examples: dict[str, list[Example]] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    endings: set[str] = field(default_factory=set)
    resumed: int = 0
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

    def skip(self, pair: Skipped) -> None:
        """Count a pair as left out."""
        self.texts = self.texts or set(pair.texts)
        if len(self.endings) < MAX_NAMES:
            self.endings.update(pair.endings)
        self._count(self.skipped, pair.reason, pair.key, pair.detail)

    def note(self, note: str, key: str) -> None:
        """Count a pair as mended or unusual."""
        self._count(self.noted, note, key)

    def ignore(self, file: Ignored) -> None:
        """Count a file that is no part of a pair."""
        self._count(self.ignored, file.what, file.name)

    def _count(self, counter: Counter[str], what: str, key: str, detail: str = "") -> None:
        counter[what] += 1
        kept = self.examples.setdefault(what, [])
        if len(kept) < KEPT_EXAMPLES:
            kept.append([key[:LONGEST_EXAMPLE], detail[:LONGEST_EXAMPLE]])


def total_of(parts: Iterable[Counts]) -> Counts:
    """Add up the counts of input shards; examples stay with each."""
    total = Counts()
    for part in parts:
        for name in ("written", "held_out", "bytes"):
            setattr(total, name, getattr(total, name) + getattr(part, name))
        for name in ("skipped", "noted", "ignored", "texts", "endings"):
            getattr(total, name).update(getattr(part, name))
        total.sides.extend(part.sides)  # a sum of lists would copy all of them for each input
    return total


@dataclass(frozen=True)
class InputRecord:
    """``counts.json`` of a complete sub-folder.

    In the file, ``written`` is without the held-out samples: those are in the split's sub-folder.

    Attributes:
        source: the name of the input shard.
        source_bytes: its size when it was read.
        source_modified: when it was changed before, in ns since the epoch.
        counts: what became of it.
    """

    source: str
    source_bytes: int
    source_modified: int
    counts: Counts

    @classmethod
    def parse(cls, content: object) -> InputRecord | None:
        """Take a record from parsed JSON; None where it is another file's, or damaged."""
        if not isinstance(content, dict):
            return None
        entries: dict[str, Any] = MISSING_IN_EARLY_RECORDS | content
        kinds = (SOURCE | COUNTED).items()
        if not all(has_type(entries.get(name), kind) for name, kind in kinds):
            return None
        counts = Counts(**{name: entries[name] for name in COUNTED})
        for name in ("skipped", "noted", "ignored"):
            setattr(counts, name, Counter(entries[name]))
        counts.written += counts.held_out
        # earlier versions wrote signed URLs down
        entries["source"] = without_secrets(entries["source"])
        return cls(**{name: entries[name] for name in SOURCE}, counts=counts)

    def text(self) -> str:
        """Return the file's text."""
        counted = {name: getattr(self.counts, name) for name in COUNTED}
        counted["written"] -= self.counts.held_out
        source = {name: getattr(self, name) for name in SOURCE}
        return to_json(source | counted)


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
        texts = dict[str, str] | None
        if not has_type(columns, texts) or not has_type(inputs, texts):
            return None
        said = {name: without_secrets(source) for name, source in (inputs or {}).items()}
        return cls(settings, columns, said)

    def text(self) -> str:
        """Return the file's text."""
        return to_json({**self.settings, "columns": self.columns, "inputs": self.inputs})


def to_json(entries: dict[str, Any]) -> str:
    """Return the text of one of the JSON files."""
    return json.dumps(entries, indent=2)


def package_versions(*more: str) -> dict[str, str]:
    """Return the versions of the packages that write every set, and of these."""
    packages = ("alignclip", "mosaicml-streaming", "pillow", *more)
    return {name: _version(name) for name in packages}


_version = cache(importlib.metadata.version)  # which parses a long file
