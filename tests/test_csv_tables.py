"""Text tables as people have them: no header, other separators and encodings than the name says,
lists of URLs.
"""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pyarrow import csv as arrow
from tarballs import captions_of, draw, items_of, quick, refused, write_images

from alignclip.conversion import samples, text_tables
from alignclip.conversion.formats import columns
from alignclip.conversion.inputs import expand_inputs, opened
from alignclip.conversion.samples import Sample, Skipped
from alignclip.conversion.text_tables import look_at_table, rows_of
from alignclip.conversion.wording import listing
from alignclip.errors import UserError, nearest

CONVERT = Path(__file__).parents[1] / "docs" / "convert.md"
PUBLISHED = {  # the first lines of the published lists, which have no header
    "cc12m": [f"https://example.org/pictures/{i}.jpg\ta drawing, of thing {i}" for i in range(3)],
    "cc3m": [f"a drawing of thing {i}\thttp://example.org/pictures/{i}.jpg" for i in range(3)],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 0.jpg to 4.jpg."""
    return write_images(tmp_path)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path: Path, rows: list[list[Any]], **how: Any) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **how).writerows(rows)
    return path


# what is taken

TEXT = "image,caption\n0.jpg,Käse aus Zürich\n1.jpg,ein Haus\n"
CHEESE = ["Käse aus Zürich", "ein Haus"]
MARKED = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")
# name of the file -> content, captions, settings of reading
TAKEN: dict[str, tuple[str | bytes, list[str], dict[str, str]]] = {
    "no-end.csv": ("image,caption\n0.jpg,a", ["a"], {}),
    "windows.csv": ("image,caption\r\n\r\n0.jpg,a\r\n", ["a"], {}),
    "damaged.csv": (
        "image,caption\n0.jpg,Käse ".encode() + b"K\xe4se\n",
        ["Käse K\ufffdse"],
        {},
    ),
    "damaged-before.csv": ("image,caption\n0.jpg,K\ufffdse\n", ["K\ufffdse"], {}),
    "tabs.tsv": ('image\tcaption\n0.jpg\ta, "b"\n', ['a, "b"'], {}),
    "TABS.TSV": ("image\tcaption\n0.jpg\ta,b\n", ["a,b"], {}),
    "open_clip.csv": (",title,filepath\n0,a,0.jpg\n", ["a"], {}),
    "entities.csv": ("path,text\n0.jpg,a &amp; b\n", ["a & b"], {}),
    "urls-beside.csv": ("filepath,caption,url\n0.jpg,a,https://e.org/0.jpg\n", ["a"], {}),
    "capitals.csv": ("Image, Caption\n0.jpg,a\n", ["a"], {}),
    "mark-before-a-quote.csv": ('"image","caption"\n"0.jpg","a"\n'.encode("utf-16"), ["a"], {}),
    "quotes.csv": (
        'caption,image\n"a house,\nthe ""big"" one",0.jpg\na 5" disk,1.jpg\n',
        ['a house,\nthe "big" one', 'a 5" disk'],
        {},
    ),
    "named.csv": ("photo,says\n0.jpg,a\n", ["a"], {"image_key": "photo", "caption_key": "says"}),
    **{f"{name}.csv": (TEXT.encode(name), CHEESE, {}) for name in MARKED},
    **{
        f"{name}.csv": (TEXT.encode(name), CHEESE, {"encoding": name})
        for name in ("cp1252", "latin-1", "mac-roman")
    },
}


@pytest.mark.parametrize("rows_a_piece", [1, 10_000])
@pytest.mark.parametrize("name", TAKEN)
def test_ways_to_write_a_table(
    images: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows_a_piece: int
) -> None:
    monkeypatch.setattr(columns, "ROWS_A_PIECE", rows_a_piece)
    content, captions, how = TAKEN[name]
    assert captions_of(write(images / name, content), **how) == captions


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", text_tables.SEPARATORS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_separator_is_what_the_header_has(
    images: Path, suffix: str, delimiter: str, end: str
) -> None:
    rows = [["0.jpg", "one, two; three | four\tfive"], ["1.jpg", 'the "other"']]
    path = write_rows(
        images / f"a{suffix}",
        [["image", "caption"], *rows],
        delimiter=delimiter,
        lineterminator=end,
    )
    assert captions_of(path) == [caption for _, caption in rows]
    assert list(rows_of(look_at_table(path, {"image", "caption"}), "--annotations a")) == rows


@pytest.mark.parametrize("name", MARKED)
def test_annotations_in_encodings_that_a_file_shows(tmp_path: Path, name: str) -> None:
    table = look_at_table(write(tmp_path / "a.csv", TEXT.encode(name)))
    assert next(rows_of(table, "--annotations a")) == ["0.jpg", CHEESE[0]]


def test_csv_of_paths(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    rows = [
        ["image", "caption"],
        ["images/0.jpg", "relative to the table"],
        [images / "1.jpg", "absolute"],
        ["images/gone.jpg", "missing"],
        ["", "no path"],
        ["images", "a folder"],
        ["x" * 5_000, "too long a name"],
        ["images/0.jpg\0", "a zero"],
        ["images/2.jpg", 'quotes "", commas,\nand\r\nlines'],
        ["images/3.jpg"],
        ["images/3.jpg", "one", "too many"],
        ["images/4.jpg", "x" * 2_000_000],
        ["images/4.jpg", "the last"],
    ]
    path = write_rows(tmp_path / "a.csv", rows)
    missing = ["images/gone.jpg", "", "images", "x" * 5_000, "images/0.jpg\0"]
    assert items_of(path) == [
        Sample("images/0.jpg", draw(0), "relative to the table"),
        Sample(f"{images}/1.jpg", draw(1), "absolute"),
        *(Skipped(key, samples.MISSING_IMAGE) for key in missing),
        Sample("images/2.jpg", draw(2), 'quotes "", commas,\nand\r\nlines'),
        Skipped("images/3.jpg", samples.MISSING_CAPTION),
        Sample("images/3.jpg", draw(3), "one"),
        Skipped("images/4.jpg", samples.LONG_CAPTION),
        Sample("images/4.jpg", draw(4), "the last"),
    ]
    counts = quick([path], tmp_path / "out", max_bad=0.9)
    assert (counts.written, counts.bad) == (5, 7)
    assert counts.noted == {samples.TOO_MANY_FIELDS: 1}
    assert f"no file {images}/gone.jpg" in (tmp_path / "out" / "report.md").read_text()


def test_a_table_with_keys_and_a_chosen_column(images: Path) -> None:
    path = write(images / "a.csv", "key,alt,caption,filepath\nk0,an alt,a,0.jpg\n,b,c,1.jpg\n")
    assert items_of(path, "alt") == [
        Sample("k0", draw(0), "an alt"),
        Sample("1.jpg", draw(1), "b"),
    ]


def test_an_empty_field_too_many_is_none(images: Path) -> None:
    path = write(images / "a.csv", "image,caption\n0.jpg,a house, and a tree\n1.jpg,a cat,\n")
    assert quick([path], images / "out").noted == {samples.TOO_MANY_FIELDS: 1}


# what is refused

HEADER = "image,caption\n"
URL = "https://e.org/0.jpg"
# content, message, settings of reading
REFUSED: list[tuple[str | bytes, str, dict[str, str]]] = [
    *(
        ("".join(text), rf"a list of URLs, .* --url_col {column} --caption_col caption", {})
        for *text, column in (
            ["url,caption\n", f"{URL},a\n", "url"],
            [HEADER, f"{URL},a\n", "image"],
            ["caption;image_url\n", f"a;{URL}\n", "image_url"],
        )
    ),
    (
        "0.jpg,a caption\n1.jpg,another\n",
        r"no header: its first row is data \(0\.jpg, a caption\); write the names of its columns "
        r"above",
        {},
    ),
    *(
        (
            f"filepath{one}title\n0.jpg{one}a\n",
            r"no image column \(image, .*; --image-key names another\), and one column only: "
            r"fields "
            rf"have to be separated by commas, tabs, semicolons or bars; it has "
            rf"filepath{one}title$",
            {},
        )
        for one in "# :"
    ),
    ("photo,says\n0.jpg,a\n", r"no image column \(.*--image-key.*\); it has photo, says$", {}),
    (
        "photo,says\n0.jpg,a\n",
        r"no caption column \(.*; --caption-key names another\); it has photo, says$",
        {"image_key": "photo"},
    ),
    ("photo,caption\n", r"no column 'foto'; did you mean 'photo'\?$", {"image_key": "foto"}),
    ("image,alt\n", r"a\.tsv has no column 'atl'; did you mean 'alt'\?$", {"caption_key": "atl"}),
    ("\ttitle,filepath\n0,0.jpg\n", r"a\.tsv has no caption column .*; it has filepath$", {}),
    (b"\x1b[2J\n0\n", r"it has '\\x1b\[2J'$", {}),
    *(
        (
            TEXT.encode(name),
            r"a\.tsv is not UTF-8 \(line 2\); name its encoding, e\.g\. --encoding cp1252",
            {},
        )
        for name in ("cp1252", "latin-1", "mac-roman")
    ),
    *(
        (TEXT, rf"^--encoding {name} is not known; for instance utf-8,", {"encoding": name})
        for name in ("windows", "base64", "rot13")
    ),
    (  # a field that ends where the next one does: three pairs would be one
        'caption\timage\n"big\t0.jpg\na house\t1.jpg\n5"\t2.jpg\n',
        r"a\.tsv, line 2: a field begins with a quotation mark and goes on over",
        {},
    ),
    (
        f'{HEADER}0.jpg,a\n1.jpg,"b\n' + "x" * 1_000,
        r"a\.tsv, line \d+: field larger .* \(a quotation mark that nothing closes\?\)$",
        {},
    ),
    *(
        (text, "^no sample was written from 0 inputs; skipped: nothing$", {})
        for text in (HEADER, "")
    ),
]


@pytest.mark.parametrize(("content", "message", "how"), REFUSED, ids=range(len(REFUSED)))
def test_tables_that_are_refused(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | bytes,
    message: str,
    how: dict[str, str],
) -> None:
    monkeypatch.setattr(text_tables, "MAX_FIELD", 900)
    refused(message, [write(images / "a.tsv", content)], images / "out", **how)
    assert not (images / "out").exists()


def test_utf8_by_name_is_what_sets_were_begun_with(images: Path) -> None:
    """A set that was begun before encodings were asked for is finished with ``--encoding
    utf-8``.
    """
    path, out = write(images / "a.csv", TEXT.encode("latin-1")), images / "out"
    for name in ("utf-8", "UTF_8", "utf8"):
        assert quick([path], out, encoding=name).written == 2
    message = "was begun with no --encoding, this run has --encoding latin-1"
    refused(message, [path], out, encoding="latin-1")


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_list_is_told_how_to_be_downloaded(
    tmp_path: Path, name: str, suffix: str
) -> None:
    """Both commands in the message do what it says: the first writes a header that img2dataset's
    reader takes.
    """
    path = write(tmp_path / f"{name}{suffix}", "\n".join([*PUBLISHED[name], ""]))
    with pytest.raises(UserError, match=r"is a list of URLs, .* img2dataset --url_list") as error:
        expand_inputs([str(path)])
    written, _, rest = str(error.value).partition("write one: ")[2].partition("; then ")
    table, words = downloaded(written, rest.partition("img2dataset: ")[2].partition(";")[0])
    assert words["--input_format"] == "tsv"
    urls, captions = (table[words[flag]].to_pylist() for flag in ("--url_col", "--caption_col"))
    assert [url.startswith("http") for url in urls] == [True] * 3
    assert [caption.startswith("a drawing") for caption in captions] == [True] * 3


def test_the_first_step_of_the_documents_takes_the_published_list_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", CONVERT.read_text(encoding="utf-8"), re.DOTALL)
    first, _, command = next(text for text in blocks if "--url_list" in text).partition(
        "img2dataset "
    )
    write(tmp_path / "cc12m.tsv", "\n".join([*PUBLISHED["cc12m"], ""]))
    monkeypatch.chdir(tmp_path)
    table, words = downloaded(first, f"img2dataset {command}")
    assert table.num_rows == 3
    assert table.column_names == [words["--url_col"], words["--caption_col"]]


def downloaded(first: str, command: str) -> tuple[Any, dict[str, str]]:
    """The list that the first command writes for img2dataset, and img2dataset's flags."""
    subprocess.run(first, shell=True, check=True)
    words = shlex.split(command)[1:]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    options = arrow.ParseOptions(delimiter="\t")
    return arrow.read_csv(flags["--url_list"], parse_options=options), flags


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"0.jpg,a\n1.jpg,b,c\n", r"line 3: more than 2 columns \("),
        (b"0.jpg\n", r"line 2: less than 2 columns \("),
        (b'0.jpg,"a" b\n', r"line 2: .* \(captions with separators or quotation"),
        (b"0.jpg,a\0b\n", "line 2: (a zero byte|line contains NUL)"),
    ],
)
def test_annotations_are_read_strictly(tmp_path: Path, rows: bytes, message: str) -> None:
    path = write(tmp_path / "a.csv", HEADER.encode() + rows)
    with pytest.raises(UserError, match=f"^--annotations a {message}"):
        list(rows_of(look_at_table(path), "--annotations a"))


def test_lists_in_messages_are_never_empty() -> None:
    assert nearest("x", []) == "valid: none"
    assert listing([]) == "none"
    assert listing(["\t", "\x1b[2J"]) == r"'\t', '\x1b[2J'"
    assert listing([f"c{i}" for i in range(30)]).endswith("c19, …")


# pieces


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_part_of_a_table_begins_where_it_is(
    images: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, end: bytes
) -> None:
    """What comes before is not read again, which for the last part of a long table would be
    nearly all.
    """

    def read_part(part: str) -> list[Any]:
        with opened(part) as source:
            return list(source.items)

    monkeypatch.setattr(columns, "ROWS_A_PIECE", 3)
    texts = [f'{i % 5}.jpg,"K\xe4se {i},\n\u2603"' for i in range(8)]
    lines = [text.encode("latin-1" if i % 2 else "utf-8", "ignore") for i, text in enumerate(texts)]
    head = start + b"image,caption" + end
    data = head + end.join([b"", *lines[:4], b"", *lines[4:]]) + end
    path = write(images / "a.csv", data)
    parts = expand_inputs([str(path)])
    whole = [read_part(part) for part in parts]
    captions = [sample.caption for some in whole for sample in some]
    assert captions == [f"K\ufffdse {i},\n" if i % 2 else f"K\xe4se {i},\n\u2603" for i in range(8)]
    place = int(parts[-1].rpartition("-")[2]) % 2**64  # above are the decoder's flags
    write(path, head + b'"' * (place - len(head)) + data[place:])
    assert read_part(parts[-1]) == whole[-1]
