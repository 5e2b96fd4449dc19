"""Tables of pairs: their columns, lists of URLs, pieces of rows, images in files of their own."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

from alignclip.conversion.formats.declaration import InputFormat
from alignclip.conversion.samples import (
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    MAX_IMAGE_BYTES,
    MISSING_IMAGE,
    Reading,
    Skipped,
    as_utf8,
)
from alignclip.conversion.wording import listable, listing
from alignclip.errors import UserError, nearest

Row = TypeVar("Row")

ROWS_A_PIECE = 10_000  # rows of a table of paths, converted as one piece
# What a column may be called, the first that is there: img2dataset's, Hugging Face's, open_clip's
# names
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
PATH_COLUMNS = ("image", "filepath", "path", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "title", "txt")
URL_LIST_CAPTIONS = (*CAPTION_COLUMNS, "TEXT", "CAPTION")


class PathTable(InputFormat):
    """A table that names images in files of their own. Pieces of 10,000 rows are input shards."""

    has_parts: ClassVar[bool] = True

    def shard_name(self, place: str, part: str) -> str:
        """See the base class; the table's name with a running number."""
        return f"{super().shard_name(place, part)}-{_numbers_of_piece(part)[0] // ROWS_A_PIECE:05}"


def pieces(rows: Iterable[Any], tell: Callable[[], int]) -> list[str]:
    """Name the pieces of a table: first row, the row after the last, the place of the first row.

    A piece's name stands in the records of its set, so the name must stay what it was.

    Args:
        rows: read the table, one after the other. A blank line is an empty row, and is no sample.
        tell: gives the place in the file where the next row begins.
    """
    places, number, place = list[int](), 0, tell()
    for row in rows:
        if row:
            if number % ROWS_A_PIECE == 0:
                places.append(place)
            number += 1
        if number % ROWS_A_PIECE == 0:
            place = tell()
    return [
        f"{first}-{min(first + ROWS_A_PIECE, number)}-{place}"
        for first, place in zip(range(0, number, ROWS_A_PIECE), places, strict=False)
    ]


def rows_of_piece(file: IO[Any], rows: Iterator[Row], part: str) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a piece with their numbers; a file's earlier rows are passed over."""
    first, last, place = _numbers_of_piece(part)
    file.seek(place)
    return zip(range(first, last), rows, strict=False)


def _numbers_of_piece(part: str) -> tuple[int, int, int]:
    """Return the numbers in a name of :func:`pieces`."""
    first, last, place = map(int, part.split("-"))
    return first, last, place


def find_columns(
    names: Sequence[str],
    reading: Reading,
    where: Path | str,
    images: Sequence[str] = PATH_COLUMNS,
    another: str = "; --{}-key names another",
    separators: str = "",
) -> tuple[str, str]:
    """Return the columns of images and of captions: named by a person, else the first usual ones.

    Args:
        names: the table's columns.
        reading: may name either column.
        where: the table, for the message.
        images: usual names of the images' column; case doesn't matter.
        another: what the message says after the usual names.
        separators: what the message says before the table's columns.

    Raises:
        UserError: there is no such column.
    """
    lower = {name.lower(): name for name in reversed(names)}

    def find(what: str, usual: Sequence[str], wanted: str | None) -> str:
        if wanted in names:
            return str(wanted)
        if wanted:
            hint = nearest(wanted, listable(names))
            raise UserError(f"{where} has no column '{wanted}'{separators}; {hint}")
        found = [name for name in usual if name in names]
        found += [lower[name] for name in usual if name in lower]
        if not found:
            raise UserError(
                f"{where} has no {what} column ({', '.join(usual)}{another.format(what)})"
                f"{separators}; it has {listing(names)}"
            )
        return found[0]

    return (
        find("image", images, reading.image_key),
        find("caption", CAPTION_COLUMNS, reading.caption_key),
    )


def refuse_urls(
    place: Path | str,
    kind: str,
    names: Collection[str],
    url: str | None,
    reading: Reading,
    images: Sequence[str] = PATH_COLUMNS,
    listed: Path | None = None,
    first: str = "",
) -> None:
    """Refuse a list of URLs: a table whose column of images, if any, holds web addresses.

    Args:
        place: the table.
        kind: img2dataset's ``--input_format``.
        names: the table's columns.
        url: the column of web addresses, where there is one.
        reading: may name the column of images.
        images: usual names of this column.
        listed: the file for img2dataset, where that is not ``place``.
        first: what has to be done before the images are downloaded.

    Raises:
        UserError: with the way to the images.
    """
    # a mistyped key is told of where the table has images
    image = next((name for name in (reading.image_key, *images) if name in names), None)
    if url is None or image not in (None, url):
        return
    listed = listed or Path(place)
    folder = listed.with_suffix("")
    words = ["img2dataset", "--url_list", str(listed), "--input_format", kind, "--url_col", url]
    for caption in [name for name in URL_LIST_CAPTIONS if name in names][:1]:
        words += ["--caption_col", caption]
    words += ["--output_format", "webdataset", "--output_folder", str(folder)]
    way = f"{first}download them with img2dataset: {shlex.join(words)}"
    way += f"; then convert the tars in {folder}"
    beside = Path(place).with_suffix(".tar")  # img2dataset's metadata is a list of URLs, too
    if beside.exists():
        way = f"they lie in {beside}"
    raise UserError(f"{place} is a list of URLs, and what is converted are images: {way}")


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
