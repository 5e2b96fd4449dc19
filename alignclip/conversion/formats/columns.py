"""Tables of pairs: what columns may be called, and images in files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignclip.conversion.samples import (
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    MAX_IMAGE_BYTES,
    MISSING_IMAGE,
    Skipped,
    as_utf8,
)
from alignclip.conversion.wording import listable, listing
from alignclip.errors import UserError, nearest

ROWS_A_PIECE = 10_000  # rows of a table of paths, converted as one piece
# What a column may be called, the first that is there: img2dataset's, Hugging Face's, open_clip's
# names
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
PATH_COLUMNS = ("image", "filepath", "path", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "title", "txt")


def find_column(
    what: str,
    usual: Sequence[str],
    wanted: str | None,
    names: Sequence[str],
    where: Path | str,
    remarks: tuple[str, str] = ("", ""),
) -> str:
    """Return the column that is wanted, else the first of the usual ones, in any case.

    Args:
        what: ``image`` or ``caption``.
        usual: names that such a column may have.
        wanted: the name that a person has given.
        names: the table's columns.
        where: the table, for the message.
        remarks: what the message says after the usual names, and after their list.

    Raises:
        UserError: there is no such column.
    """
    lower = {name.lower(): name for name in reversed(names)}
    found = [name for name in ([wanted] if wanted else usual) if name in names]
    if not wanted:
        found += [lower[name] for name in usual if name in lower]
    if found:
        return found[0]
    another, separators = remarks
    if wanted:
        hint = nearest(wanted, listable(names))
        raise UserError(f"{where} has no column '{wanted}'{separators}; {hint}")
    raise UserError(
        f"{where} has no {what} column ({', '.join(usual)}{another}){separators}; "
        f"it has {listing(names)}"
    )


def pieces(places: Sequence[int], rows: int) -> list[str]:
    """Name the pieces of a table: first row, the row after the last, the place of the first row.

    Args:
        places: where each piece begins in the file.
        rows: of the whole table.
    """
    return [
        f"{i * ROWS_A_PIECE}-{min((i + 1) * ROWS_A_PIECE, rows)}-{place}"
        for i, place in enumerate(places)
    ]


def piece(part: str) -> tuple[int, int, int]:
    """Return the numbers in a name of :func:`pieces`."""
    first, last, place = map(int, part.split("-"))
    return first, last, place


def piece_name(stem: str, part: str) -> str:
    """Return the sub-folder's name of a piece: the table's with a running number."""
    return f"{stem}-{piece(part)[0] // ROWS_A_PIECE:05}"


def local_image(path: Path, key: str) -> bytes | Skipped:
    """Return the bytes of a local image, or why there are none."""
    try:
        if not path.is_file():
            return Skipped(key, MISSING_IMAGE, f"no file {as_utf8(str(path))}")
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            return Skipped(key, IMAGE_TOO_LARGE, f"{size:,} bytes")
        return path.read_bytes()
    except OSError as error:  # a name too long, no permission
        return Skipped(key, MISSING_IMAGE, f"{error.strerror}: {as_utf8(str(path))}")
