"""Parts of a published set, found where people have them, laid out as torchvision expects them.

Archives unpack into other folders than publishers' pages show: Kaggle nests a folder in one of its
own name (``cars_test/cars_test``), mirrors rename the folder above, and label files lie beside the
folder that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alignclip.errors import UserError
from alignclip.storage.temporary import temporary_folder

DEPTH = 4  # folders below --root that are searched
IMAGES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Part:
    """A file or folder of a set.

    Attributes:
        shown: words for the error message.
        fits: whether a path is the part.
    """

    shown: str
    fits: Callable[[Path], bool]


@dataclass(frozen=True)
class Layout:
    """A folder with a link to each part, at the part's published place.

    Attributes:
        root: the folder of links.
        links: published place, relative to ``root`` -> the part itself.
    """

    root: Path
    links: dict[str, Path]

    def locate(self, file: str | Path) -> tuple[str, Path]:
        """Return the published path of a file below ``root``, and the file itself.

        Raises:
            ValueError: the file is in none of the parts.
        """
        place = Path(file).relative_to(self.root).as_posix()
        for name, part in self.links.items():
            if place == name or place.startswith(f"{name}/"):
                return place, part / place[len(name) + 1 :]
        raise ValueError(f"{place} is in none of {', '.join(self.links)}")


def file_named(*patterns: str) -> Part:
    """Describe a file whose name matches one of these patterns."""
    shown = " or ".join(patterns)
    return Part(f"file {shown}", lambda path: any(map(path.match, patterns)) and path.is_file())


def folder_named(name: str, member: str = "*") -> Part:
    """Describe a folder of this name that holds an entry which matches ``member``."""
    shown = f"folder '{name}'" + (f" with {member}" if member != "*" else "")
    return Part(shown, lambda path: path.name == name and holds(path, member))


def folder_with(name: str, *members: str) -> Part:
    """Describe a folder of this name, or of any name that holds all of ``members``."""

    def fits(path: Path) -> bool:
        return path.is_dir() and (path.name == name or all(holds(path, m) for m in members))

    return Part(f"folder '{name}'", fits)


def holds(folder: Path, member: str) -> bool:
    """Say whether a folder has an entry that matches ``member``."""
    return folder.is_dir() and next(folder.glob(member), None) is not None


def find_part(root: Path, part: Part) -> Path | None:
    """Return the part nearest to ``root``: ``root`` itself, or :data:`DEPTH` folders below."""
    level = [root]
    for depth in range(DEPTH + 1):
        if found := next(filter(part.fits, level), None):
            return found
        if depth < DEPTH:
            level = [entry for folder in level for entry in _entries(folder)]
    return None


def _entries(folder: Path) -> list[Path]:
    """List a folder, sorted, without hidden entries and images: an image is no part of a set."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:  # a file, or a folder of somebody else's
        return []
    return sorted(entry for entry in entries if entry.suffix.lower() not in IMAGES)


@contextmanager
def laid_out(root: Path, parts: Mapping[str, Part], advice: str) -> Iterator[Layout]:
    """Yield a temporary folder of links that has each part at its published place.

    Args:
        root: the folder that is searched.
        parts: published place -> the part that belongs there.
        advice: end of the error message.

    Raises:
        UserError: a part is not at ``root`` and not below; names the part.
    """
    links: dict[str, Path] = {}
    for place, part in parts.items():
        found = find_part(root, part)
        if found is None:
            where = f"in --root {root} and the {DEPTH} levels of folders below"
            raise UserError(f"there is no {part.shown} {where}; {advice}")
        links[place] = found.absolute()
    with temporary_folder() as temporary:
        for place, found in links.items():
            link = temporary / place
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(found)
        yield Layout(temporary, links)
