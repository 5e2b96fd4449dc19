"""Tables of image–caption pairs: img2dataset's parquet files, which hold the images, and CSV files of paths."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from alignclip.conversion import csv_tables
from alignclip.conversion.csv_tables import Table
from alignclip.conversion.samples import (
    BROKEN_INPUT,
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    MAX_IMAGE_BYTES,
    MISSING_IMAGE,
    PLAIN,
    TOO_MANY_FIELDS,
    Reading,
    Sample,
    Skipped,
    caption_of,
    listable,
    pair,
)
from alignclip.errors import UserError, nearest, one_line

ROWS = 10_000  # of a CSV file, converted as one piece
ROWS_AT_ONCE, BYTES_AT_ONCE = (
    32,
    8 * 2**20,
)  # of a parquet file, in memory: the fewer rows, the larger they are
# What a column may be called, the first that is there: img2dataset's and Hugging Face's names; open_clip's for CSV
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
PATH_COLUMNS = ("image", "filepath", "path", "image_path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "title", "txt")


def read_parquet(
    path: Path, caption_key: str | None = None, how: Reading = PLAIN
) -> Iterator[Sample | Skipped]:
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
        table = parquet.ParquetFile(
            path, buffer_size=2**20, pre_buffer=False
        )  # or a row group is in memory
        names, types = table.schema_arrow.names, table.schema_arrow.types
    except broken as error:
        yield Skipped("", BROKEN_INPUT, one_line(error))
        return
    if urls := _parquet_of_urls(path, names, how):
        raise UserError(urls)
    image_column = _column("image", IMAGE_COLUMNS, how.image_key, names, path)
    caption_column = _column("caption", CAPTION_COLUMNS, caption_key, names, path)
    stored = types[names.index(image_column)]
    if pyarrow.types.is_struct(stored):
        stored = next((field.type for field in stored if field.name == "bytes"), stored)
    if not (pyarrow.types.is_binary(stored) or pyarrow.types.is_large_binary(stored)):
        kind = str(stored).split("<")[0]
        raise UserError(
            f"{path}: the column '{image_column}' has to hold image files' bytes; it is of type {kind}"
        )
    columns = list(
        dict.fromkeys([image_column, caption_column, *(["key"] if "key" in names else [])])
    )
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


def _parquet_of_urls(path: Path, names: Sequence[str], how: Reading) -> str | None:
    """Say where the images of a list of URLs are, which img2dataset's metadata is as well; None of others."""
    url = next((name for name in names if name in csv_tables.URL_COLUMNS), None)
    if url is None or {how.image_key, *IMAGE_COLUMNS} & set(names):
        return None
    beside = path.with_suffix(".tar")
    caption = next((name for name in csv_tables.CAPTIONS if name in names), None)
    way = (
        f"they lie in {beside}"
        if beside.exists()
        else csv_tables.download(path, "", url, caption, "parquet")
    )
    return f"{path} is a list of URLs, and what is converted are images: {way}"


def _batches(table: Any, columns: Sequence[str]) -> Iterator[Any]:
    """The rows, few at a time where they are large."""
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        rows = BYTES_AT_ONCE * about.num_rows // max(about.total_byte_size, 1)
        rows = min(max(rows, 1), ROWS_AT_ONCE)
        yield from table.iter_batches(
            rows, row_groups=[group], columns=list(columns), use_threads=False
        )


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


def parts_of_csv(
    path: Path, caption_key: str | None = None, how: Reading = PLAIN
) -> list[tuple[int, int, int]]:
    """The rows of a CSV or TSV file in pieces of :data:`ROWS`: first row, the one after the last, where the first is.

    Args:
        path: the file.
        caption_key: see :func:`read_csv`.
        how: see :func:`read_csv`.

    Raises:
        UserError: it is a list of URLs, has no such columns, is in an encoding that nobody has named, or has a
            quotation mark that opens a field which runs over the rows that follow.
    """
    table = look_at_csv(path, caption_key, how)
    if not table.columns:
        return []
    _columns_of_csv(table, caption_key, how)
    csv_tables.check_encoding(table, how.encoding)
    places, number = list[int](), 0
    with table.open() as file:
        rows = table.reader(iter(file.readline, ""))  # a file that is iterated tells no place
        try:
            next(rows, None)
            place, line = file.tell(), rows.line_num
            for row in rows:
                if row:
                    if number % ROWS == 0:
                        places.append(place)
                    number += 1
                if rows.line_num > line + 1:
                    _check_one_row(table, row, line + 1)
                line = rows.line_num
                if number % ROWS == 0:
                    place = file.tell()
        except csv.Error as error:
            hint = (
                "a quotation mark that nothing closes?"
                if "field" in str(error)
                else "is it damaged?"
            )
            raise UserError(f"{path}, line {rows.line_num}: {error} ({hint})") from None
    return [(i * ROWS, min((i + 1) * ROWS, number), place) for i, place in enumerate(places)]


def _check_one_row(table: Table, row: list[str], line: int) -> None:
    """Refuse a row whose field has swallowed the rows that follow, because it begins with a lone quotation mark."""
    for field in row:
        inner = [text.split(table.delimiter) for text in field.splitlines()[1:]]
        if any(
            len(parts) > 1 and any(map(csv_tables.IMAGE_PATH.fullmatch, parts)) for parts in inner
        ):
            raise UserError(
                f"{table.path}, line {line:,}: a field begins with a quotation mark and goes on over the rows that "
                "follow; write such a field in quotation marks, those in it doubled"
            )


def read_csv(
    path: Path,
    first: int,
    last: int,
    place: int,
    caption_key: str | None = None,
    how: Reading = PLAIN,
) -> Iterator[Sample | Skipped]:
    """The pairs of the rows [first, last) of a CSV or TSV file with a header; paths are relative to its folder.

    Args:
        path: the file.
        first: row after the header.
        last: the row to stop before.
        place: where the first row is in the file, as :func:`parts_of_csv` has it.
        caption_key: the column with the captions; None: the first of :data:`CAPTION_COLUMNS`.
        how: the column with the paths (None: the first of :data:`PATH_COLUMNS`), and the encoding.

    Raises:
        UserError: there is no such column.
    """
    table = look_at_csv(path, caption_key, how)
    image_column, caption_column = _columns_of_csv(table, caption_key, how)
    names, folder = table.columns, path.parent
    with table.open() as file:
        file.seek(place)  # not row by row: a part of a long file would pass over millions of them
        for values in islice(filter(None, table.reader(file)), last - first):
            row: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, values, strict=False))
            item = _of_row(row, row[image_column] or "", folder, caption_of(row, caption_column))
            if isinstance(item, Sample) and any(values[len(names) :]):
                item = replace(item, notes=(*item.notes, TOO_MANY_FIELDS))
            yield item


def look_at_csv(path: Path, caption_key: str | None, how: Reading) -> Table:
    """The look of a table of image-caption pairs."""
    known = {*PATH_COLUMNS, *CAPTION_COLUMNS, "key", *filter(None, (caption_key, how.image_key))}
    return csv_tables.look(path, known, how.encoding)


def _columns_of_csv(table: Table, caption_key: str | None, how: Reading) -> tuple[str, str]:
    """The columns of images and of captions.

    Raises:
        UserError: the table is a list of URLs, its first row is no header, or there is no such column.
    """
    usual = [how.image_key] if how.image_key else PATH_COLUMNS
    found = next((name for name in usual if name in table.columns), None)
    if urls := csv_tables.list_of_urls(table, found):
        raise UserError(urls)
    if not table.has_header():
        raise UserError(
            f"{table.path} has no header: its first row is data ({csv_tables.listing(table.columns)}); write the "
            "names of its columns above that, image and caption"
        )
    images = _column("image", PATH_COLUMNS, how.image_key, table.columns, table.path, table)
    return images, _column(
        "caption", CAPTION_COLUMNS, caption_key, table.columns, table.path, table
    )


def _of_row(
    row: Mapping[str, str], name: str, folder: Path, caption: str | None
) -> Sample | Skipped:
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


def _column(
    what: str,
    usual: Sequence[str],
    wanted: str | None,
    names: Sequence[str],
    path: Path,
    text: Table | None = None,
) -> str:
    """The column of that kind: the one that is wanted, else the first of the usual ones, in any case."""
    lower = {name.lower(): name for name in reversed(names)}
    found = [name for name in ([wanted] if wanted else usual) if name in names]
    found = found or [lower[name] for name in ([] if wanted else usual) if name in lower]
    if found:
        return found[0]
    separators = csv_tables.one_column(text) if text else ""
    if wanted:
        raise UserError(
            f"{path} has no column '{wanted}'{separators}; {nearest(wanted, listable(names))}"
        )
    another = f"; --{what}-key names another" if text else ""
    there = csv_tables.listing(names)
    raise UserError(
        f"{path} has no {what} column ({', '.join(usual)}{another}){separators}; it has {there}"
    )
