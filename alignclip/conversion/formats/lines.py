"""Lists of a pair a line: packed or not, copied once from elsewhere, in pieces of 10,000 lines."""

from __future__ import annotations

import gzip
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, cast

from alignclip.conversion.formats.columns import pieces, rows_of_piece
from alignclip.conversion.formats.remote import read_ahead
from alignclip.conversion.samples import BROKEN_INPUT, Item, Skipped
from alignclip.errors import UserError, one_line
from alignclip.storage.copies import fetched
from alignclip.storage.temporary import make_temporary_folder

LONGEST_LINE = 2**24  # bytes; a longer line is no pair's
_DAMAGE = (OSError, EOFError, zlib.error)  # what gzip raises; its own OSErrors have no number

_copying = threading.Lock()


@contextmanager
def fetched_once(place: str, anew: bool = False) -> Iterator[Path]:
    """Give the file, or this process's copy of a remote one, of which it converts many pieces.

    The copy of an earlier file goes when no thread uses the copy any more.

    Args:
        place: path or URL.
        anew: fetch a remote file that this process may have a copy of already.

    Raises:
        UserError: the file cannot be fetched.
    """
    if anew:
        _temporary_copy.cache_clear()
    if "://" not in place:
        yield Path(place)
        return
    with _copying:  # a thread waits for another's copy of the same file
        held = _temporary_copy(place)
    yield held[1]


def open_unpacked(path: Path) -> BinaryIO:
    """Open a file; what is gzipped, whatever it is called, is read as if it weren't."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path) if is_packed else path.open("rb"))


def every_line(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines; meanwhile the file tells where the next line begins."""
    return iter(partial(file.readline, LONGEST_LINE), b"")


def lines_not_blank(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines that are not blank."""
    return filter(bytes.strip, every_line(file))


@contextmanager
def refuse_damage(place: str) -> Iterator[None]:
    """Refuse a file that the block can't read to the end.

    Raises:
        UserError: the file can't be read, or is damaged.
    """
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot read {place}: {error.strerror}") from None
        raise UserError(f"{place} is damaged: {one_line(error)}; fetch it again") from None


def pieces_of_lines(file: BinaryIO) -> list[str]:
    """Name the pieces of a list, as :func:`pieces` does; blank lines don't count."""
    return pieces(map(bytes.strip, every_line(file)), file.tell)


def items_of_lines(
    file: BinaryIO, part: str, item_of: Callable[[int, bytes], Item]
) -> Iterator[Item]:
    """Yield what the lines of a piece stand for; the lines before damage, and then the damage.

    Args:
        file: the list.
        part: one of :func:`pieces_of_lines`.
        item_of: makes an item of a line and the line's number. Threads call it for several lines
            at a time, because most of its time is the image's.

    Raises:
        OSError: the disk's trouble, which is not the file's.
    """

    def jobs() -> Iterator[Callable[[], Item]]:
        try:
            for number, line in rows_of_piece(file, lines_not_blank(file), part):
                yield partial(item_of, number, line)
        except _DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            yield partial(Skipped, "", BROKEN_INPUT, one_line(error))

    return read_ahead(jobs())


@lru_cache(1)
def _temporary_copy(url: str) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    folder = make_temporary_folder()
    with fetched(url) as path:
        return folder, path.rename(Path(folder.name, path.name))
