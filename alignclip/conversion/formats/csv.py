"""CSV and TSV files of image paths and captions, split into pieces of 10,000 rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from alignclip.conversion import text_tables
from alignclip.conversion.formats import columns
from alignclip.conversion.formats.columns import CAPTION_COLUMNS, PATH_COLUMNS, find_column
from alignclip.conversion.formats.declaration import InputFormat
from alignclip.conversion.samples import (
    TOO_MANY_FIELDS,
    Item,
    Reading,
    Sample,
    Skipped,
    caption_of,
    pair,
)
from alignclip.conversion.text_tables import Table
from alignclip.conversion.wording import listing
from alignclip.errors import UserError
from alignclip.storage.copies import fetched


class Csv(InputFormat):
    """CSV and TSV files with a header; paths are relative to the file's folder."""

    words = "CSV, TSV"
    described = (
        "CSV, TSV",
        "`image` or `filepath` (below the file's folder, or absolute), `caption` or `title`, "
        "`key` where there is one; `--image-key` and `--caption-key` name other columns; 10,000 "
        "rows at a time. Commas, tabs, semicolons or bars, whatever the file is called; UTF-8, "
        "UTF-16, or what `--encoding` names. A list of URLs is refused with img2dataset's "
        "command that downloads it",
    )
    flags = ("--caption-key", "--image-key", "--encoding")
    endings = (".csv", ".tsv")
    has_parts = True

    def parts(self, place: str, reading: Reading) -> list[str]:
        """See the base class.

        Raises:
            UserError: the table is remote, a list of URLs, has no such columns, is in an encoding
                that nobody has named, or has a quotation mark that swallows rows.
        """
        with fetched(place) as path:
            if "://" in place:
                raise UserError(
                    f"{place}: a CSV file names local images, so it has to be a local file itself"
                )
            table = _look_at_csv(path, reading)
            if not table.columns:
                return []
            _csv_columns(table, reading)
            text_tables.check_encoding(table, reading.encoding)
            return _pieces(table)

    def shard_name(self, place: str, part: str) -> str:
        """See the base class."""
        return columns.piece_name(super().shard_name(place, part), part)

    def read(self, path: Path, part: str, reading: Reading) -> Iterator[Item]:
        """See the base class."""
        first, last, place = columns.piece(part)
        table = _look_at_csv(path, reading)
        image_column, caption_column = _csv_columns(table, reading)
        names = table.columns
        with table.open() as file:
            file.seek(place)  # not row by row: a part of a long file would pass over millions
            for values in islice(filter(None, table.reader(file)), last - first):
                row = dict(zip(names, values, strict=False))  # may lack the last fields
                name = row.get(image_column, "")
                key = row.get("key") or name
                image = columns.local_image(path.parent / name, key)
                if isinstance(image, Skipped):
                    yield image
                    continue
                item = pair(key, image, caption_of(row, caption_column))
                if isinstance(item, Sample) and any(values[len(names) :]):
                    item = replace(item, notes=(*item.notes, TOO_MANY_FIELDS))
                yield item


def _look_at_csv(path: Path, reading: Reading) -> Table:
    chosen = filter(None, (reading.caption_key, reading.image_key))
    known = {*PATH_COLUMNS, *CAPTION_COLUMNS, "key", *chosen}
    return text_tables.look_at_table(path, known, reading.encoding)


def _pieces(table: Table) -> list[str]:
    """Name the pieces of a table, which is read once for that.

    Raises:
        UserError: the table is damaged, or a quotation mark opens a field that runs over rows.
    """
    places, number = list[int](), 0
    with table.open() as file:
        rows = table.reader(iter(file.readline, ""))  # a file that is iterated tells no place
        try:
            next(rows, None)
            place, line = file.tell(), rows.line_num
            for row in rows:
                if row:
                    if number % columns.ROWS_A_PIECE == 0:
                        places.append(place)
                    number += 1
                if rows.line_num > line + 1:
                    _check_one_row(table, row, line + 1)
                line = rows.line_num
                if number % columns.ROWS_A_PIECE == 0:
                    place = file.tell()
        except csv.Error as error:
            unclosed = "a quotation mark that nothing closes?"
            hint = unclosed if "field" in str(error) else "is it damaged?"
            raise UserError(f"{table.path}, line {rows.line_num}: {error} ({hint})") from None
    return columns.pieces(places, number)


def _check_one_row(table: Table, row: list[str], line: int) -> None:
    """Refuse a row whose field has swallowed the rows after it, as a lone quotation mark does."""
    for field in row:
        for inner in (text.split(table.delimiter) for text in field.splitlines()[1:]):
            if len(inner) > 1 and any(map(text_tables.IMAGE_PATH.fullmatch, inner)):
                raise UserError(
                    f"{table.path}, line {line:,}: a field begins with a quotation mark and goes "
                    "on over the rows that follow; write such a field in quotation marks, those "
                    "in it doubled"
                )


def _csv_columns(table: Table, reading: Reading) -> tuple[str, str]:
    """Return the columns of images and of captions.

    Raises:
        UserError: the table is a list of URLs, its first row is no header, or a column is missing.
    """
    usual = [reading.image_key] if reading.image_key else PATH_COLUMNS
    found = next((name for name in usual if name in table.columns), None)
    if urls := text_tables.list_of_urls(table, found):
        raise UserError(urls)
    if not table.has_header():
        raise UserError(
            f"{table.path} has no header: its first row is data ({listing(table.columns)}); write "
            "the names of its columns above that, image and caption"
        )
    separators = text_tables.one_column(table)

    def column(what: str, usual: tuple[str, ...], wanted: str | None) -> str:
        remarks = (f"; --{what}-key names another", separators)
        return find_column(what, usual, wanted, table.columns, table.path, remarks)

    return (
        column("image", PATH_COLUMNS, reading.image_key),
        column("caption", CAPTION_COLUMNS, reading.caption_key),
    )
