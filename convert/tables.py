"""Tables of image–caption pairs: img2dataset's parquet files, which hold the images, and CSV files of paths."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from alignclip.errors import UserError, nearest, one_line
from convert.samples import (
    BROKEN_INPUT,
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Sample,
    Skipped,
    caption_of,
    pair,
)

ROWS = 10_000  # of a CSV file, converted as one piece
ROWS_AT_ONCE = 32  # of a parquet file, in memory
# What a column may be called, the first that is there: img2dataset's and Hugging Face's names; open_clip's for CSV
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
PATH_COLUMNS = ("image", "filepath", "path", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "title", "txt")


def read_parquet(path: Path, caption_key: str | None = None) -> Iterator[Sample | Skipped]:
    """The pairs of a parquet file with a column of image files (bytes, or Hugging Face's ``{bytes, path}``).

    Raises:
        UserError: pyarrow is not installed, or there is no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'alignclip[convert]'") from None
    try:
        table = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        yield Skipped("", BROKEN_INPUT, one_line(error))
        return
    image_column = _column("image", IMAGE_COLUMNS, None, table.schema_arrow.names, path)
    caption_column = _column("caption", CAPTION_COLUMNS, caption_key, table.schema_arrow.names, path)
    columns = [image_column, caption_column, *(["key"] if "key" in table.schema_arrow.names else [])]
    number = 0
    try:
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                key = str(row.get("key") or f"{path.stem}-{number:08}")
                number += 1
                image = row[image_column]
                if isinstance(image, dict):
                    image = image.get("bytes")
                yield pair(key, image, caption_of(row, caption_column))
    except (pyarrow.ArrowException, OSError) as error:
        yield Skipped("", BROKEN_INPUT, one_line(error))


def parts_of_csv(path: Path) -> list[tuple[int, int]]:
    """The rows of a CSV or TSV file in pieces of :data:`ROWS`: first row and the one after the last."""
    with _open(path) as file:
        number = max(sum(1 for _ in csv.reader(file, delimiter=_delimiter(path))) - 1, 0)
    return [(first, min(first + ROWS, number)) for first in range(0, number, ROWS)]


def read_csv(path: Path, first: int, last: int, folder: Path, caption_key: str | None) -> Iterator[Sample | Skipped]:
    """The pairs of the rows [first, last) of a CSV file (comma) or TSV file (tab) with a header.

    Args:
        path: the file.
        first: row after the header.
        last: the row to stop before.
        folder: what relative image paths belong to.
        caption_key: the column with the captions; None: the first of :data:`CAPTION_COLUMNS`.

    Raises:
        UserError: there is no such column.
    """
    csv.field_size_limit(MAX_TEXT_BYTES)
    with _open(path) as file:
        rows = csv.DictReader(file, delimiter=_delimiter(path))
        names = list(rows.fieldnames or ())
        image_column = _column("image", PATH_COLUMNS, None, names, path)
        caption_column = _column("caption", CAPTION_COLUMNS, caption_key, names, path)
        try:
            for row in islice(rows, first, last):
                name = row[image_column] or ""
                key = row.get("key") or name
                image = folder / name
                caption = caption_of(row, caption_column)
                if not name or not image.is_file():
                    yield pair(key, None, caption)
                elif image.stat().st_size > MAX_IMAGE_BYTES:
                    yield Skipped(key, IMAGE_TOO_LARGE, f"{image.stat().st_size:,} bytes")
                else:
                    yield pair(key, image.read_bytes(), caption)
        except (csv.Error, OSError) as error:
            yield Skipped("", BROKEN_INPUT, one_line(error))


def _open(path: Path) -> Any:
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _column(what: str, usual: Sequence[str], wanted: str | None, names: Sequence[str], path: Path) -> str:
    found = [name for name in ([wanted] if wanted else usual) if name in names]
    if found:
        return found[0]
    if wanted:
        raise UserError(f"{path} has no column '{wanted}'; {nearest(wanted, names)}")
    raise UserError(f"{path} has no {what} column ({', '.join(usual)}); it has {', '.join(names)}")
