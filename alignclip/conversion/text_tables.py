"""Tables of text (CSV, TSV): a file's encoding, its separator, its header and its rows.

The file's name says little: a ``.csv`` may hold tabs or semicolons, and spreadsheets write UTF-16 or Windows' own
encoding. :func:`look` finds out what a file is, or says in one line what the user has to say.
"""

from __future__ import annotations

import codecs
import csv
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from alignclip.errors import UserError

MAX_FIELD = 2**24  # characters of a field; a longer one is a quotation mark that nothing closes
HEAD = 2**16  # bytes or characters of a file's beginning
CHUNK = 2**20  # bytes
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
URL = re.compile(r"(?:https?|ftp)://\S+", re.IGNORECASE)
IMAGE_PATH = re.compile(r".*\.(?:jpe?g|png|webp|gif|bmp|tiff?)", re.IGNORECASE | re.DOTALL)
# UTF-32's mark begins like UTF-16's, so it comes first
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
UTF8 = "utf-8-sig"  # with or without a mark
URL_COLUMNS = frozenset({"url", "URL", "image_url", "img_url", "link", "urls"})
CAPTIONS = (
    "caption",
    "text",
    "title",
    "txt",
    "TEXT",
    "CAPTION",
)  # what a list's captions may be called


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
    columns: tuple[str, ...]
    first: tuple[str, ...] = ()

    def open(self) -> TextIO:
        """Open the file for reading, behind the mark at its beginning; what is not its encoding becomes U+FFFD."""
        file = self.path.open(encoding=self.encoding, errors="replace", newline="")
        if file.read(1) != "\ufeff":  # utf-8-sig drops the mark itself
            file.seek(0)
        return file

    def reader(self, lines: Iterable[str], strict: bool = False) -> Any:
        """A :func:`csv.reader` of lines of text, as such a table separates them."""
        csv.field_size_limit(MAX_FIELD)
        return csv.reader(lines, delimiter=self.delimiter, strict=strict)

    def has_header(self) -> bool:
        """Whether the first row can be names of columns: no field of it is a URL or the path of an image."""
        return not any(_is_data(field) for field in self.columns)


def look(path: Path, known: Collection[str] = (), encoding: str | None = None) -> Table:
    """Find a table's encoding, separator and columns from its beginning.

    Args:
        path: a local file.
        known: names of columns that may be there; they tell the separators apart.
        encoding: a codec's name; None: by the mark at the beginning, else UTF-16 where every second byte is zero, else
            UTF-8.

    Raises:
        UserError: no such encoding, or the file begins with something that is no table.
    """
    encoding = _checked(encoding) if encoding else _encoding(path)
    usual, names = _usual(path), URL_COLUMNS.union(known)
    try:
        with Table(path, encoding, usual, ()).open() as file:
            line = file.readline(HEAD)
        delimiter = max((usual, *SEPARATORS), key=lambda one: _score(line, one, names))
        found = Table(path, encoding, delimiter, ())
        with found.open() as file:
            rows = found.reader(file)
            header: list[str] = next(rows, [])
            with suppress(csv.Error):  # whoever reads the rows says more about it
                found = replace(found, first=tuple(next(filter(None, rows), [])))
    except (csv.Error, UnicodeError) as error:
        raise UserError(f"{path} is no table of text: {error}") from None
    return replace(found, columns=tuple(name.strip(" ") for name in header))


def check_encoding(table: Table, given: str | None, flag: str = "--encoding") -> None:
    """Refuse a file that is in another encoding than UTF-8 and doesn't say so; the whole file is read.

    A file of UTF-8 with some damaged bytes is fine: they become U+FFFD.

    Args:
        table: what :func:`look` has found.
        given: the encoding that the user has named; None: none.
        flag: the option that names one.

    Raises:
        UserError: names the first such line, and what it would be in Windows' encoding.
    """
    if given or table.encoding != UTF8 or (bad := _first_bad_line(table.path)) is None:
        return
    with table.open() as file:
        text = file.read(2**26)
    if len(text) - len(text.encode("ascii", "ignore")) >= 2 * text.count("\ufffd"):
        return  # more of it is UTF-8 than is not
    number, line = bad
    shown = "".join(
        letter if letter.isprintable() else " " for letter in line.decode("cp1252", "replace")
    ).strip()
    raise UserError(
        f"{table.path} is not UTF-8 (line {number:,}); name its encoding, e.g. {flag} cp1252 (Windows; "
        f"the line then reads '{shown[:80]}'); {flag} utf-8 puts U+FFFD in the place of what is no UTF-8"
    )


def rows_of(table: Table, what: str) -> Iterator[list[str]]:
    """The rows after the header, each with as many fields as that, strictly: for annotations, which are kept whole.

    Args:
        table: what :func:`look` has found.
        what: the option and the file, for messages: ``--annotations captions.csv``.

    Raises:
        UserError: names the first line that has more or less fields, a stray quotation mark or a zero byte.
    """
    hint = "captions with separators or quotation marks are quoted, and the marks doubled"
    with table.open() as file:
        rows = table.reader(file, strict=True)
        whole = 0  # lines up to here are
        try:
            next(rows, None)
            whole = rows.line_num
            for row in rows:
                if row and len(row) != len(table.columns):
                    more = "more" if len(row) > len(table.columns) else "less"
                    raise csv.Error(f"{more} than {len(table.columns)} columns")
                if any("\0" in field for field in row):
                    raise csv.Error(
                        "a zero byte: is the file damaged, or in another encoding (--encoding)?"
                    )
                if row:
                    yield row
                whole = rows.line_num
        except csv.Error as error:
            raise UserError(f"{what} line {whole + 1}: {error} ({hint})") from None


def one_column(table: Table) -> str:
    """The clause that a table's fields may be separated by what is not taken; "" where it has several columns."""
    if len(table.columns) != 1:
        return ""
    *most, last = SEPARATORS.values()
    return f", and one column only: fields have to be separated by {', '.join(most)} or {last}"


def list_of_urls(table: Table, image_column: str | None = None) -> str | None:
    """Say how the images of a list of URLs are downloaded; None where a table is no such list.

    Args:
        table: what :func:`look` has found.
        image_column: the column that is taken for images' paths, where there is one.
    """
    row = table.first if table.has_header() else table.columns
    place = next((i for i, field in enumerate(row) if is_url(field)), None)
    if place is None or (table.has_header() and image_column not in (None, table.columns[place])):
        return None
    file, names, first = table.path, list(table.columns), ""
    if not table.has_header():
        names = _names_of(row, place)
        file = table.path.with_name(f"{table.path.stem}-urls{table.path.suffix}")
        header = table.delimiter.join(names).replace("\t", r"\t")
        written = f"printf '{header}\\n' | cat - {_word(table.path)} > {_word(file)}"
        first = f"it has no header, so write one: {written}; then "
    caption = next((name for name in CAPTIONS if name in names), None)
    kind = "tsv" if table.delimiter == "\t" else "csv"
    how = download(file, kind, names[place], caption)
    return f"{table.path} is a list of URLs, and what is converted are images: {first}{how}"


def download(file: Path, kind: str, url: str, caption: str | None) -> str:
    """Return the img2dataset command that downloads a list's images, and what comes after it.

    Args:
        file: the list.
        kind: img2dataset's ``--input_format``.
        url: the column of web addresses.
        caption: the column of captions, where there is one.
    """
    folder = file.with_suffix("")
    words = ["img2dataset", "--url_list", str(file), "--input_format", kind, "--url_col", url]
    words += ["--caption_col", caption] if caption else []
    words += ["--output_format", "webdataset", "--output_folder", str(folder)]
    return f"download them with img2dataset: {shlex.join(words)}; then convert the tars in {folder}"


def is_url(value: object) -> bool:
    """Say whether a field is a web address."""
    return isinstance(value, str) and URL.fullmatch(value.strip()) is not None


def _names_of(row: Sequence[str], url: int) -> list[str]:
    """Names for the columns of a list without a header: the longest other field is the caption."""
    others = [i for i in range(len(row)) if i != url]
    caption = max(others, key=lambda i: len(row[i]), default=None)
    return [
        "url" if i == url else "caption" if i == caption else f"column{i + 1}"
        for i in range(len(row))
    ]


def _word(path: Path) -> str:
    return shlex.quote(str(path))


def is_utf8(encoding: str | None) -> bool:
    """Whether that is a name of UTF-8, with or without a mark."""
    return encoding is not None and encoding.lower().replace("_", "-") in (
        "utf-8",
        "utf8",
        "utf-8-sig",
    )


def _checked(encoding: str) -> str:
    """The codec's own name; ours for UTF-8, so that a mark is dropped."""
    try:
        name = codecs.lookup(encoding).name
        "a".encode(name)
    except (LookupError, UnicodeError, TypeError):
        raise UserError(
            f"--encoding {encoding} is not known; for instance utf-8, utf-16, cp1252 (Windows), gb18030, shift_jis"
        ) from None
    return UTF8 if name in ("utf-8", "utf-8-sig") else name


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(HEAD)
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    half = len(head) // 2
    even, odd = head[0 : 2 * half : 2].count(0), head[1 : 2 * half : 2].count(0)
    if half >= 4 and max(even, odd) > 0.4 * half and min(even, odd) < 0.1 * half:
        return (
            "utf-16-le" if odd > even else "utf-16-be"
        )  # mostly Latin letters, whose second byte is zero
    return UTF8


def _usual(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","


def _score(line: str, delimiter: str, known: Collection[str]) -> tuple[int, int]:
    """How many fields of a header are known names (or URLs and paths, of a first row that is data), and how many."""
    row = next(csv.reader([line], delimiter=delimiter), [])
    fields = [field.strip() for field in row]
    return sum(field in known or _is_data(field) for field in fields), min(len(fields), 2)


def _is_data(field: str) -> bool:
    return is_url(field) or IMAGE_PATH.fullmatch(field.strip()) is not None


def _first_bad_line(path: Path) -> tuple[int, bytes] | None:
    """The first line that is no UTF-8, and its number; None where there is none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        try:
            while chunk := file.read(CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
            return None
        except UnicodeDecodeError:
            file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number, line[:HEAD]
    return None
