"""Collect what checking an MDS set has found: problems, numbers, notes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from alignclip.data.mds_index import ShardEntry
from alignclip.storage import Store

LINES_A_KIND = 20  # problems of a kind that are printed


def folder_of(name: str) -> str:
    """Return the folder part of a name below the set, "" for the set's own folder."""
    return name.rpartition("/")[0]


@dataclass
class Problems:
    """Problems by kind.

    Attributes:
        lines: kind -> lines to print, at most :data:`LINES_A_KIND`.
        numbers: kind -> the number of all problems.
        parts: the sub-folders that converting them again would mend, "" being the set's own folder.
    """

    lines: dict[str, list[str]] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)
    parts: set[str] = field(default_factory=set)

    def add(self, kind: str, file: str, text: str | None = None, mend: bool = True) -> None:
        """Add a problem of ``file``; ``text`` is the kind unless it says more."""
        parts = {folder_of(file)} if mend else set()
        self.merge(Problems({kind: [f"{file}: {text or kind}"]}, Counter([kind]), parts))

    def merge(self, other: Problems) -> None:
        """Add the problems of another shard."""
        self.numbers.update(other.numbers)
        self.parts |= other.parts
        for kind, lines in other.lines.items():
            self.lines[kind] = [*self.lines.get(kind, []), *lines][:LINES_A_KIND]

    def text(self) -> str:
        """Return a line for each problem, and one for the problems of a kind that aren't shown."""
        text = []
        for kind, lines in self.lines.items():
            text += lines
            if more := self.numbers[kind] - len(lines):
                text.append(f"… and {more:,} more: {kind}")
        return "\n".join(f"  {line}" for line in text)


@dataclass
class SetSummary:
    """A set as far as it is known without opening a shard.

    Attributes:
        store: where it lies.
        names: its files, without those of other sets below; as the set names them where the store
            can't be listed.
        entries: of the shards that hold samples and can be read, as far as index and listing tell.
        shards, samples, bytes: numbers of the index; ``bytes`` of the files as they are stored.
        indexed: samples by sub-folder, "" being the set's own.
        columns: name -> MDS encoding, of most shards.
        dataset: the contents of ``dataset.json``, empty where there is none.
        classes: the class names of ``classes.json``, None where there is none.
        written, held_out, skipped: the converter's counts; ``written`` is None where there are
            none.
        is_held_out: whether the set is the split that the converter has taken from another one.
        notes: what is worth knowing and no problem.
    """

    store: Store
    names: set[str] = field(default_factory=set)
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
