"""Tables of image–caption pairs: img2dataset's parquet files, which hold the images, and CSV files of paths."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from alignclip.errors import UserError, nearest, one_line
from convert.samples import (
    BROKEN_INPUT,
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    MAX_IMAGE_BYTES,
    MISSING_IMAGE,
    Sample,
    Skipped,
    caption_of,
    listable,
    pair,
)

ROWS = 10_000  # of a CSV file, converted as one piece
ROWS_AT_ONCE, BYTES_AT_ONCE = 32, 8 * 2**20  # of a parquet file, in memory: the fewer rows, the larger they are
# What a column may be called, the first that is there: img2dataset's and Hugging Face's names; open_clip's for CSV
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
PATH_COLUMNS = ("image", "filepath", "path", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "title", "txt")
MAX_FIELD = 2**24  # characters of a CSV file's field: what is longer is a quotation mark that nothing closes


def read_parquet(path: Path, caption_key: str | None = None) -> Iterator[Sample | Skipped]:
    """The pairs of a parquet file with a column of image files (bytes, or Hugging Face's ``{bytes, path}``).

    What is in memory is a few rows, and besides a page of the file, compressed and decompressed: pyarrow reads no less.
    A page may be as large as a row group's images.

    Raises:
        UserError: pyarrow is not installed, or there is no such column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'alignclip[convert]'") from None
    broken = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        table = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)  # or a row group is in memory
        names, types = table.schema_arrow.names, table.schema_arrow.types
    except broken as error:
        yield Skipped("", BROKEN_INPUT, one_line(error))
        return
    image_column = _column("image", IMAGE_COLUMNS, None, names, path)
    caption_column = _column("caption", CAPTION_COLUMNS, caption_key, names, path)
    stored = types[names.index(image_column)]
    if pyarrow.types.is_struct(stored):
        stored = next((field.type for field in stored if field.name == "bytes"), stored)
    if not (pyarrow.types.is_binary(stored) or pyarrow.types.is_large_binary(stored)):
        kind = str(stored).split("<")[0]
        raise UserError(f"{path}: the column '{image_column}' has to hold image files' bytes; it is of type {kind}")
    columns = list(dict.fromkeys([image_column, caption_column, *(["key"] if "key" in names else [])]))
    number = 0
    try:
        for batch in _batches(table, columns):
            values = {name: _values(batch.column(name)) for name in columns if name != image_column}
            images = _images(batch.column(image_column))
            for i in range(len(batch)):
                row = {name: column[i] for name, column in values.items()}
                key = row.get("key")
                key = f"{path.stem}-{number:08}" if key is None or key == "" else str(key)
                number += 1
                yield pair(key, images[i].as_py(), caption_of(row, caption_column))
    except broken as error:
        yield Skipped("", BROKEN_INPUT, one_line(error))


def _batches(table: Any, columns: Sequence[str]) -> Iterator[Any]:
    """The rows, few at a time where they are large."""
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        rows = BYTES_AT_ONCE * about.num_rows // max(about.total_byte_size, 1)
        rows = min(max(rows, 1), ROWS_AT_ONCE)
        yield from table.iter_batches(rows, row_groups=[group], columns=list(columns), use_threads=False)


def _images(column: Any) -> Any:
    """The files of a column, copied when each is asked for; of a struct its ``bytes``."""
    import pyarrow
    from pyarrow import compute

    return compute.struct_field(column, "bytes") if pyarrow.types.is_struct(column.type) else column


def _values(column: Any) -> list[Any]:
    """The values of a column; invalid UTF-8, at which pyarrow raises, becomes U+FFFD."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        texts = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", "replace") for text in texts]
    values: list[Any] = column.to_pylist()
    return values


def parts_of_csv(path: Path) -> list[tuple[int, int, int]]:
    """The rows of a CSV or TSV file in pieces of :data:`ROWS`: first row, the one after the last, where the first is.

    Raises:
        UserError: a field that does not end.
    """
    csv.field_size_limit(MAX_FIELD)
    places, number = list[int](), 0
    with _open(path) as file:
        rows = csv.reader(iter(file.readline, ""), delimiter=_delimiter(path))  # a file that is iterated tells no place
        try:
            next(rows, None)
            place = file.tell()
            for row in rows:
                if row:
                    if number % ROWS == 0:
                        places.append(place)
                    number += 1
                if number % ROWS == 0:
                    place = file.tell()
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: {error} (a quotation mark that nothing closes?)") from None
    return [(i * ROWS, min((i + 1) * ROWS, number), place) for i, place in enumerate(places)]


def read_csv(
    path: Path, first: int, last: int, place: int, folder: Path, caption_key: str | None
) -> Iterator[Sample | Skipped]:
    """The pairs of the rows [first, last) of a CSV file (comma) or TSV file (tab) with a header.

    Args:
        path: the file.
        first: row after the header.
        last: the row to stop before.
        place: where the first row is in the file, as :func:`parts_of_csv` has it.
        folder: what relative image paths belong to.
        caption_key: the column with the captions; None: the first of :data:`CAPTION_COLUMNS`.

    Raises:
        UserError: there is no such column.
    """
    csv.field_size_limit(MAX_FIELD)
    with _open(path) as file:
        names = next(csv.reader(file, delimiter=_delimiter(path)), [])
        image_column = _column("image", PATH_COLUMNS, None, names, path)
        caption_column = _column("caption", CAPTION_COLUMNS, caption_key, names, path)
        file.seek(place)  # not row by row: a part of a long file would pass over millions of them
        rows = filter(None, csv.reader(file, delimiter=_delimiter(path)))
        for values in islice(rows, last - first):
            row: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, values, strict=False))
            yield _of_row(row, row[image_column] or "", folder, caption_of(row, caption_column))


def _of_row(row: Mapping[str, str], name: str, folder: Path, caption: str | None) -> Sample | Skipped:
    key = row.get("key") or name
    image = folder / name
    try:
        if not image.is_file():
            return Skipped(key, MISSING_IMAGE, f"no file {image}")
        if (size := image.stat().st_size) > MAX_IMAGE_BYTES:
            return Skipped(key, IMAGE_TOO_LARGE, f"{size:,} bytes")
        return pair(key, image.read_bytes(), caption)
    except OSError as error:  # a name too long, no permission
        return Skipped(key, MISSING_IMAGE, f"{error.strerror}: {image}")


def _open(path: Path) -> Any:
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _column(what: str, usual: Sequence[str], wanted: str | None, names: Sequence[str], path: Path) -> str:
    found = [name for name in ([wanted] if wanted else usual) if name in names]
    if found:
        return found[0]
    there = listable(names)
    if wanted:
        raise UserError(f"{path} has no column '{wanted}'; {nearest(wanted, there)}")
    raise UserError(f"{path} has no {what} column ({', '.join(usual)}); it has {', '.join(there)}")
