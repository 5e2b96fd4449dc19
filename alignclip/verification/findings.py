"""What checking an MDS set has found: its problems, its numbers, and what is worth knowing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from alignclip.data.mds_index import ShardEntry

SHOWN = 20  # problems of a kind


@dataclass
class Problems:
    """Lines to print by kind, at most :data:`SHOWN` of each; ``numbers`` has all.

    ``parts``: the sub-folders that converting them again would mend, "" being the set's own folder.
    """

    lines: dict[str, list[str]] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)
    parts: set[str] = field(default_factory=set)

    @property
    def number(self) -> int:
        """Of all kinds."""
        return sum(self.numbers.values())

    def add(self, kind: str, file: str, text: str | None = None, mend: bool = True) -> None:
        """One more, of ``file``; ``text`` is the kind unless it says more."""
        self.numbers[kind] += 1
        lines = self.lines.setdefault(kind, [])
        if len(lines) < SHOWN:
            lines.append(f"{file}: {text or kind}")
        if mend:
            self.parts.add(folder_of(file))

    def merge(self, other: Problems) -> None:
        """Add another shard's."""
        self.numbers.update(other.numbers)
        self.parts |= other.parts
        for kind, lines in other.lines.items():
            mine = self.lines.setdefault(kind, [])
            mine += lines[: SHOWN - len(mine)]

    def text(self) -> str:
        """A line each, and one for what is beyond."""
        lines = []
        for kind, some in self.lines.items():
            lines += some
            if self.numbers[kind] > len(some):
                lines.append(f"… and {self.numbers[kind] - len(some):,} more: {kind}")
        return "\n".join(f"  {line}" for line in lines)


@dataclass
class Overview:
    """What was found without opening a shard.

    Attributes:
        entries: of the shards that hold samples and can be read, as far as the index and a listing tell.
        shards, samples, bytes: numbers according to the index; ``bytes`` are those of the files as they are stored.
        indexed: samples by sub-folder, "" being the set's own.
        columns: name -> MDS encoding, of most shards.
        dataset: the contents of ``dataset.json``, empty where there is none.
        classes: the class names of ``classes.json``, None where there is none.
        written, held_out, skipped: what the converter has counted; ``written`` is None where it hasn't.
        is_held_out: whether the set is the split that the converter has taken from another one.
        notes: what is worth knowing and no problem.
    """

    entries: list[ShardEntry] = field(default_factory=list)
    shards: int = 0
    samples: int = 0
    bytes: int = 0
    indexed: Counter[str] = field(default_factory=Counter)
    columns: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    written: int | None = None
    held_out: int = 0
    is_held_out: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


def folder_of(name: str) -> str:
    """The folder part of a name below the set, "" for the set's own."""
    return name.rpartition("/")[0]
