"""Tables of text (CSV, TSV): a file's encoding, its separator, its header and its rows.

The file's name says little: a ``.csv`` may hold tabs or semicolons, and spreadsheets write UTF-16
or Windows' own encoding. :func:`look_at_table` finds out what a file is, or says in one line what
the user has to say.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from alignclip.errors import UserError

MAX_FIELD = 2**24  # characters of a field; a longer one is a quotation mark that nothing closes
HEAD = 2**16  # bytes or characters of a file's beginning
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
URL = re.compile(r"(?:https?|ftp)://\S+", re.IGNORECASE)
IMAGE_PATH = re.compile(r".*\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE | re.DOTALL)
UTF8 = "utf-8-sig"  # with or without a mark
# UTF-32's mark begins like UTF-16's, so it comes first
MARKS = {
    codecs.BOM_UTF8: UTF8,
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
URL_COLUMNS = frozenset({"url", "URL", "image_url", "img_url", "link", "urls"})


@dataclass(frozen=True)
class Table:
    """The look of a text table.

    Attributes:
        path: the local file.
        encoding: the codec's name.
        delimiter: the character between two fields.
        columns: the fields of the first row, without spaces around.
        first: the fields of the second row.
    """

    path: Path
    encoding: str
    delimiter: str
    columns: tuple[str, ...] = ()
    first: tuple[str, ...] = ()

    def open(self) -> TextIO:
        """Open the file behind its mark; what is not its encoding becomes U+FFFD."""
        file = self.path.open(encoding=self.encoding, errors="replace", newline="")
        if file.read(1) != "\ufeff":  # utf-8-sig drops the mark itself
            file.seek(0)
        return file

    def reader(self, lines: Iterable[str], strict: bool = False) -> Any:
        """Return a :func:`csv.reader` of lines of text, as the table separates them."""
        csv.field_size_limit(MAX_FIELD)
        return csv.reader(lines, delimiter=self.delimiter, strict=strict)

    def has_header(self) -> bool:
        """Say whether no field of the first row is a URL or the path of an image."""
        return not any(_is_data(field) for field in self.columns)


def look_at_table(path: Path, known: Collection[str] = (), encoding: str | None = None) -> Table:
    """Find a table's encoding, separator and columns from its beginning.

    Args:
        path: a local file.
        known: names of columns that may be there; they tell the separators apart.
        encoding: a codec's name; None: by the mark at the beginning, else UTF-16 where every second
            byte is zero, else UTF-8.

    Raises:
        UserError: no such encoding, or the file begins with something that is no table.
    """
    encoding = _checked(encoding) if encoding else _guessed_encoding(path)
    usual = "\t" if path.suffix.lower() in (".tsv", ".tab") else ","
    names = URL_COLUMNS.union(known)
    try:
        with Table(path, encoding, usual).open() as file:
            line = file.readline(HEAD)
        delimiter = max((usual, *SEPARATORS), key=lambda one: _score(line, one, names))
        found = Table(path, encoding, delimiter)
        with found.open() as file:
            rows = found.reader(file)
            header: list[str] = next(rows, [])
            with suppress(csv.Error):  # whoever reads the rows says more about it
                found = replace(found, first=tuple(next(filter(None, rows), [])))
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path} is no table of text: {error}") from None
    return replace(found, columns=tuple(name.strip(" ") for name in header))


def check_encoding(table: Table, given: str | None) -> None:
    """Refuse a file in another encoding than UTF-8 that doesn't say so; read the whole file.

    A file of UTF-8 with some damaged bytes is fine: they become U+FFFD.

    Args:
        table: what :func:`look_at_table` has found.
        given: the encoding that the user has named; None: none.

    Raises:
        UserError: names the first such line, and what it would be in Windows' encoding.
    """
    if given or table.encoding != UTF8:
        return
    first, odd, broken = (0, b""), 0, 0  # the first such line; letters beyond ASCII; no letters
    with table.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isascii():
                text = line.decode("utf-8", "replace")
                odd += len(text) - len(text.encode("ascii", "ignore"))
                broken += text.count("\ufffd")
                if not first[0] and text.encode() != line:
                    first = number, line[:HEAD]
    number, line = first
    if not number or odd >= 2 * broken:  # more of it is UTF-8 than is not
        return
    letters = line.decode("cp1252", "replace")
    shown = "".join(letter if letter.isprintable() else " " for letter in letters).strip()
    raise UserError(
        f"{table.path} is not UTF-8 (line {number:,}); name its encoding, e.g. --encoding cp1252 "
        f"(Windows; the line then reads '{shown[:80]}'); --encoding utf-8 puts U+FFFD in the place "
        "of what is no UTF-8"
    )


def rows_of(table: Table, what: str) -> Iterator[list[str]]:
    """Yield the rows after the header strictly: for annotations, which are kept whole.

    Args:
        table: what :func:`look_at_table` has found.
        what: the option and the file, for messages: ``--annotations captions.csv``.

    Raises:
        UserError: names the first line that has more or less fields, a stray quotation mark or a
            zero byte.
    """
    hint = "captions with separators or quotation marks are quoted, and the marks doubled"
    columns = len(table.columns)
    with table.open() as file:
        rows = table.reader(file, strict=True)
        whole = 0  # lines up to here are
        try:
            next(rows, None)
            whole = rows.line_num
            for row in rows:
                if row and len(row) != columns:
                    more = "more" if len(row) > columns else "less"
                    raise csv.Error(f"{more} than {columns} columns")
                if any("\0" in field for field in row):
                    raise csv.Error(
                        "a zero byte: is the file damaged, or in another encoding (--encoding)?"
                    )
                if row:
                    yield row
                whole = rows.line_num
        except csv.Error as error:
            raise UserError(f"{what} line {whole + 1}: {error} ({hint})") from None


def is_web_address(value: object) -> bool:
    """Say whether a field is a web address."""
    return isinstance(value, str) and URL.fullmatch(value.strip()) is not None


def is_utf8(encoding: str | None) -> bool:
    """Say whether that is a name of UTF-8, with or without a mark."""
    name = (encoding or "").lower().replace("_", "-")
    return name in ("utf-8", "utf8", "utf-8-sig")


def _checked(encoding: str) -> str:
    """Return the codec's own name; ours for UTF-8, so that a mark is dropped."""
    try:
        name = codecs.lookup(encoding).name
        "a".encode(name)
    except (LookupError, UnicodeError, TypeError):
        raise UserError(
            f"--encoding {encoding} is not known; for instance utf-8, utf-16, cp1252 (Windows), "
            "gb18030, shift_jis"
        ) from None
    return UTF8 if is_utf8(name) else name


def _guessed_encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(HEAD)
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    half = len(head) // 2
    even, odd = head[0 : 2 * half : 2].count(0), head[1 : 2 * half : 2].count(0)
    if half >= 4 and max(even, odd) > 0.4 * half and min(even, odd) < 0.1 * half:
        # mostly Latin letters, whose second byte is zero
        return "utf-16-le" if odd > even else "utf-16-be"
    return UTF8


def _score(line: str, delimiter: str, known: Collection[str]) -> tuple[int, int]:
    """Count the known names, URLs and paths among a header's fields, and the fields up to two."""
    row: Sequence[str] = next(csv.reader([line], delimiter=delimiter), [])
    fields = [field.strip() for field in row]
    return sum(field in known or _is_data(field) for field in fields), min(len(fields), 2)


def _is_data(field: str) -> bool:
    return is_web_address(field) or IMAGE_PATH.fullmatch(field.strip()) is not None
