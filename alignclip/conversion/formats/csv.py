"""CSV and TSV files of image paths and captions, split into pieces of 10,000 rows."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignclip.conversion import text_tables
from alignclip.conversion.formats.columns import (
    CAPTION_COLUMNS,
    PATH_COLUMNS,
    PathTable,
    find_columns,
    local_image,
    pieces,
    refuse_urls,
    rows_of_piece,
)
from alignclip.conversion.samples import (
    TOO_MANY_FIELDS,
    Item,
    Reading,
    Sample,
    Skipped,
    caption_of,
    pair,
)
from alignclip.conversion.text_tables import SEPARATORS, Table, is_web_address
from alignclip.conversion.wording import listing
from alignclip.errors import UserError
from alignclip.storage.copies import fetched


class Csv(PathTable):
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
            with table.open() as file:
                rows = table.reader(iter(file.readline, ""))  # a file's own iterator tells no place
                next(rows, None)
                return pieces(_whole_rows(table, rows), file.tell)

    def read(self, path: Path, part: str, reading: Reading) -> Iterator[Item]:
        """See the base class."""
        table = _look_at_csv(path, reading)
        image_column, caption_column = _csv_columns(table, reading)
        with table.open() as file:
            for _, values in rows_of_piece(file, filter(None, table.reader(file)), part):
                row = dict(zip(table.columns, values, strict=False))  # may lack the last fields
                name = row.get(image_column, "")
                key = row.get("key") or name
                image = local_image(path.parent / name, key)
                if isinstance(image, Skipped):
                    yield image
                    continue
                item = pair(key, image, caption_of(row, caption_column))
                if isinstance(item, Sample) and any(values[len(table.columns) :]):
                    item = replace(item, notes=(*item.notes, TOO_MANY_FIELDS))
                yield item


def _look_at_csv(path: Path, reading: Reading) -> Table:
    chosen = filter(None, (reading.caption_key, reading.image_key))
    known = {*PATH_COLUMNS, *CAPTION_COLUMNS, "key", *chosen}
    return text_tables.look_at_table(path, known, reading.encoding)


def _whole_rows(table: Table, rows: Any) -> Iterator[list[str]]:
    """Yield the rows of a reader.

    Raises:
        UserError: the table is damaged, or a quotation mark opens a field that runs over rows.
    """
    line = rows.line_num
    try:
        for row in rows:
            if rows.line_num > line + 1:
                _check_one_row(table, row, line + 1)
            line = rows.line_num
            yield row
    except csv.Error as error:
        unclosed = "a quotation mark that nothing closes?"
        hint = unclosed if "field" in str(error) else "is it damaged?"
        raise UserError(f"{table.path}, line {rows.line_num}: {error} ({hint})") from None


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
    _refuse_list(table, reading)
    if not table.has_header():
        raise UserError(
            f"{table.path} has no header: its first row is data ({listing(table.columns)}); write "
            "the names of its columns above that, image and caption"
        )
    separators = ""
    if len(table.columns) == 1:
        *most, last = SEPARATORS.values()
        separators = (
            f", and one column only: fields have to be separated by {', '.join(most)} or {last}"
        )
    return find_columns(table.columns, reading, table.path, separators=separators)


def _refuse_list(table: Table, reading: Reading) -> None:
    """Refuse a list of URLs; where it has no header, say how one is written."""
    has_header = table.has_header()
    row = table.first if has_header else table.columns
    at = next((i for i, field in enumerate(row) if is_web_address(field)), None)
    if at is None:
        return
    kind = "tsv" if table.delimiter == "\t" else "csv"
    if has_header:
        refuse_urls(table.path, kind, table.columns, table.columns[at], reading)
        return
    names = [f"column{i + 1}" for i in range(len(row))]
    others = [i for i in range(len(row)) if i != at]
    for longest in sorted(others, key=lambda i: -len(row[i]))[:1]:
        names[longest] = "caption"
    names[at] = "url"
    new = table.path.with_name(f"{table.path.stem}-urls{table.path.suffix}")
    header = table.delimiter.join(names).replace("\t", r"\t")
    old, written = (shlex.quote(str(path)) for path in (table.path, new))
    first = f"it has no header, so write one: printf '{header}\\n' | cat - {old} > {written}; then "
    refuse_urls(table.path, kind, names, "url", reading, listed=new, first=first)
