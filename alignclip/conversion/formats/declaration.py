"""The declaration of an input format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlparse

from alignclip.conversion.samples import IMAGE_EXTENSIONS, Item, Reading
from alignclip.storage.copies import fetched

PAIR_COLUMNS = {"key": "str", "image": "bytes", "caption": "str"}  # name -> how MDS stores it
CAPTION_LISTS = "json"  # how MDS stores the captions of images that have several


@dataclass(frozen=True)
class Listing:
    """A folder's content.

    Attributes:
        place: path or URL of the folder, without a slash at its end.
        files: names of the files in the folder, hidden ones left out.
        folders: names of the sub-folders, hidden ones left out.
        names_in: lists the files of a sub-folder.
    """

    place: str
    files: Sequence[str]
    folders: Sequence[str]
    names_in: Callable[[str], Iterable[str]]

    def at(self, name: str) -> str:
        """Return the path or URL of a file or sub-folder."""
        return f"{self.place}/{name}"

    def holds_images(self, folder: str) -> bool:
        """Say whether a sub-folder holds image files."""
        return any(has_ending(name, IMAGE_EXTENSIONS) for name in self.names_in(folder))


@dataclass(frozen=True)
class OpenInput:
    """An input shard that is being read.

    Attributes:
        size: bytes of the source; 0 where nobody has counted them.
        modified: when the source was changed, in ns since the epoch.
        items: what the shard holds, in order, few in memory at a time.
    """

    size: int
    modified: int
    items: Iterator[Item]


class InputFormat:
    """A kind of input. An input shard is a file, or a part of a file, that becomes one sub-folder.

    Attributes:
        words: what the format is called in ``--help``.
        described: the cells ``input`` and ``what is taken`` of the table in ``docs/convert.md``.
        flags: the command's options that change how the format is read.
        endings: of file names, in lower case. A folder stands for its files with these endings.
        has_parts: whether a file is several input shards.
    """

    words: ClassVar[str]
    described: ClassVar[tuple[str, str]]
    flags: ClassVar[tuple[str, ...]] = ("--caption-key",)
    endings: ClassVar[tuple[str, ...]] = ()
    has_parts: ClassVar[bool] = False

    def fits(self, place: str) -> bool:
        """Say whether a path or URL is of the format by its name."""
        return path_of(place).lower().endswith(self.endings)

    def begins(self, head: bytes) -> bool:
        """Say whether a file of another name is of the format by its first 512 bytes."""
        return False

    def in_folder(self, listing: Listing) -> list[str]:
        """Return the paths or URLs that a folder stands for; none where it holds other things.

        Raises:
            UserError: the folder has to be named otherwise.
        """
        return [listing.at(name) for name in self.among(listing.files)]

    def among(self, names: Iterable[str]) -> list[str]:
        """Return the names with the format's endings, sorted."""
        return sorted(name for name in names if name.lower().endswith(self.endings))

    def parts(self, place: str, reading: Reading) -> list[str]:
        """Return the names of a file's parts; an empty name stands for the whole file.

        Raises:
            UserError: the file can't be read, or not with these settings.
        """
        return [""]

    def columns(self, place: str, reading: Reading) -> dict[str, str]:
        """Return the file's columns for an image–text set, and how MDS would store each."""
        return PAIR_COLUMNS

    def shard_name(self, place: str, part: str) -> str:
        """Return the name of the sub-folder: the file's, or a bucket's, up to the first dot."""
        name = path_of(place).rpartition("/")[2] or urlparse(place).netloc
        return name.split(".")[0]

    def file_of(self, place: str, part: str) -> str:
        """Return the path or URL of the file that holds an input shard."""
        return place

    def shard_size(self, place: str, part: str) -> tuple[int, int] | None:
        """Return bytes and samples of an input that shall stay one output shard; None elsewhere."""
        return None

    def stamp(self, path: Path) -> tuple[int, int]:
        """Return the size in bytes and the time of change in ns, which tell a changed local source.

        Raises:
            FileNotFoundError: the source is not there any more.
        """
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns

    @contextmanager
    def opened(self, place: str, part: str, reading: Reading) -> Iterator[OpenInput]:
        """Fetch an input shard where it is remote, and read it.

        Raises:
            UserError: the shard can't be fetched or has no such columns.
        """
        with fetched(place) as path:
            # the time before it is read: a file that still grows will be another one
            yield OpenInput(*self.stamp(path), self.read(path, part, reading))

    def read(self, path: Path, part: str, reading: Reading) -> Iterator[Item]:
        """Yield the pairs of a local input shard, and whatever is no pair, with the reason.

        A format that overrides :meth:`opened` may do without.
        """
        raise NotImplementedError


def has_ending(name: str, endings: tuple[str, ...]) -> bool:
    """Say whether a file name ends in a dot and one of these, in capitals or not."""
    return name.rpartition(".")[2].lower() in endings


def is_web(place: str) -> bool:
    """Say whether a place is a web server's URL."""
    return place.lower().startswith(("http://", "https://"))


def path_of(place: str) -> str:
    """Return the path, of a URL without its query."""
    return urlparse(place).path if "://" in place else place
