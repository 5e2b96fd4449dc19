"""Text tables as people have them: no header, other separators and encodings than the name says, lists of URLs."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from pyarrow import csv as arrow
from tarballs import draw, items_of, quick, read_back
from test_tables import write_parquet

from alignclip.conversion import text_tables
from alignclip.conversion.samples import TOO_MANY_FIELDS, Reading, Sample
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
    """A folder with 0.jpg to 2.jpg."""
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(draw(i))
    return tmp_path


def samples_of(path: Path, how: Reading | None = None) -> list[Sample]:
    items = items_of(path, **vars(how or Reading()))
    return [item for item in items if isinstance(item, Sample)]


# lists of URLs


def write_list(folder: Path, name: str, suffix: str = ".tsv") -> Path:
    path = folder / f"{name}{suffix}"
    path.write_text("\n".join(PUBLISHED[name]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".csv"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_list_is_told_how_to_be_downloaded(
    tmp_path: Path, name: str, suffix: str
) -> None:
    """Both commands in the message do what it says: the first writes a header that img2dataset's reader takes."""
    path = write_list(tmp_path, name, suffix)
    with pytest.raises(UserError, match=r"is a list of URLs, .* img2dataset --url_list") as refused:
        quick([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written, _, rest = str(refused.value).partition("write one: ")[2].partition("; then ")
    subprocess.run(written, shell=True, check=True)
    words = shlex.split(rest.partition("img2dataset: ")[2].partition(";")[0])
    assert words[words.index("--input_format") + 1] == "tsv"
    options = arrow.ParseOptions(delimiter="\t")
    table = arrow.read_csv(words[words.index("--url_list") + 1], parse_options=options)
    urls = table[words[words.index("--url_col") + 1]].to_pylist()
    captions = table[words[words.index("--caption_col") + 1]].to_pylist()
    assert [url.startswith("http") for url in urls] == [True] * 3
    assert [caption.startswith("a drawing") for caption in captions] == [True] * 3


def test_the_first_step_of_the_documents_takes_the_published_list_as_it_is(tmp_path: Path) -> None:
    block = next(
        text
        for text in re.findall(r"```bash\n(.*?)```", CONVERT.read_text(encoding="utf-8"), re.DOTALL)
        if "--url_list" in text
    )
    write_list(tmp_path, "cc12m")
    first, _, command = block.partition("img2dataset ")
    subprocess.run(first, shell=True, check=True, cwd=tmp_path)
    words = shlex.split(command)
    table = arrow.read_csv(
        tmp_path / words[words.index("--url_list") + 1],
        parse_options=arrow.ParseOptions(delimiter="\t"),
    )
    assert table.num_rows == 3
    assert table.column_names == [
        words[words.index(name) + 1] for name in ("--url_col", "--caption_col")
    ]


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("url,caption\nhttps://e.org/0.jpg,a\n", "url"),
        ("image,caption\nhttps://e.org/0.jpg,a\n", "image"),
        ("caption;image_url\na;https://e.org/0.jpg\n", "image_url"),
    ],
)
def test_a_list_of_urls_with_a_header(tmp_path: Path, text: str, column: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"a list of URLs, .* --url_col {column} --caption_col caption"
    ):
        quick([path], tmp_path / "out")


def test_urls_beside_images_are_no_list(images: Path) -> None:
    path = images / "a.csv"
    path.write_text("filepath,caption,url\n0.jpg,a,https://e.org/0.jpg\n", encoding="utf-8")
    assert [sample.caption for sample in samples_of(path)] == ["a"]


def test_a_parquet_file_of_urls(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"url": ["https://e.org/0.jpg"], "TEXT": ["a"]})
    with pytest.raises(
        UserError,
        match=r"a list of URLs, .* --input_format parquet --url_col url --caption_col TEXT",
    ):
        quick([path], tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=rf"a list of URLs, .* they lie in {tmp_path}/a\.tar$"):
        quick([path], tmp_path / "out")


def test_a_first_row_that_is_data(images: Path) -> None:
    path = images / "a.csv"
    path.write_text("0.jpg,a caption\n1.jpg,another\n", encoding="utf-8")
    message = r"has no header: its first row is data \(0\.jpg, a caption\); write the names of its columns above"
    with pytest.raises(UserError, match=message):
        quick([path], images / "out")


# separators


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", text_tables.SEPARATORS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_separator_is_what_the_header_has(
    images: Path, suffix: str, delimiter: str, end: str
) -> None:
    path = images / f"a{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter=delimiter, lineterminator=end)
        rows.writerows(
            [
                ["image", "caption"],
                ["0.jpg", "one, two; three | four\tfive"],
                ["1.jpg", 'the "other"'],
            ]
        )
    assert [sample.caption for sample in samples_of(path)] == [
        "one, two; three | four\tfive",
        'the "other"',
    ]
    table = look_at_table(path, {"image", "caption"})
    assert list(rows_of(table, "--annotations a")) == [
        ["0.jpg", "one, two; three | four\tfive"],
        ["1.jpg", 'the "other"'],
    ]


def test_names_of_columns_in_another_case_or_with_spaces(images: Path) -> None:
    path = images / "a.csv"
    path.write_text("Image, Caption\n0.jpg,a\n", encoding="utf-8")
    assert [sample.caption for sample in samples_of(path)] == ["a"]


def test_a_column_of_images_that_is_named(images: Path) -> None:
    path = images / "a.csv"
    path.write_text("photo,caption\n0.jpg,a\n", encoding="utf-8")
    assert [sample.key for sample in samples_of(path, Reading(image_key="photo"))] == ["0.jpg"]
    with pytest.raises(UserError, match=r"has no image column \(.*\); it has photo, caption$"):
        samples_of(path)
    with pytest.raises(UserError, match=r"has no column 'foto'; did you mean 'photo'\?$"):
        samples_of(path, Reading(image_key="foto"))


@pytest.mark.parametrize("separator", ["#", " ", ":"])
def test_separators_that_are_taken_are_named(images: Path, separator: str) -> None:
    path = images / "a.csv"
    path.write_text(f"filepath{separator}title\n0.jpg{separator}a\n", encoding="utf-8")
    message = (
        rf"has no image column \(image, .*; --image-key names another\), and one column only: fields have to be "
        rf"separated by commas, tabs, semicolons or bars; it has filepath{separator}title$"
    )
    with pytest.raises(UserError, match=message):
        quick([path], images / "out")


def test_columns_of_other_names_are_named_by_options(images: Path) -> None:
    path = images / "a.csv"
    path.write_text("photo,says\n0.jpg,a\n", encoding="utf-8")
    for key, chosen in (("image", None), ("caption", "photo")):
        with pytest.raises(
            UserError,
            match=rf"has no {key} column \(.*; --{key}-key names another\); it has photo, says$",
        ):
            quick([path], images / "out", reading=Reading(image_key=chosen))
    assert (
        quick(
            [path], images / "out", reading=Reading(image_key="photo"), caption_key="says"
        ).written
        == 1
    )


# encodings

TEXT = "image,caption\n0.jpg,Käse aus Zürich\n1.jpg,ein Haus\n"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_encodings_that_a_file_shows(
    images: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignclip.conversion.formats.columns.ROWS_A_PIECE", 1)
    path = images / "a.csv"
    path.write_bytes(TEXT.encode(encoding))
    assert [sample.caption for sample in samples_of(path)] == ["Käse aus Zürich", "ein Haus"]
    assert next(rows_of(look_at_table(path), "--annotations a")) == ["0.jpg", "Käse aus Zürich"]


def test_a_mark_before_a_name_in_quotation_marks(images: Path) -> None:
    path = images / "a.csv"
    path.write_bytes('"image","caption"\n"0.jpg","a"\n'.encode("utf-16"))
    assert [sample.caption for sample in samples_of(path)] == ["a"]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "mac-roman"])
def test_an_encoding_that_a_file_does_not_show_is_asked_for(images: Path, encoding: str) -> None:
    path = images / "a.csv"
    path.write_bytes(TEXT.encode(encoding))
    with pytest.raises(
        UserError,
        match=r"a\.csv is not UTF-8 \(line 2\); name its encoding, e\.g\. --encoding cp1252",
    ):
        quick([path], images / "out")
    assert not (images / "out").exists()
    counts = quick([path], images / "out", reading=Reading(encoding=encoding))
    assert (counts.written, counts.noted) == (2, {})
    assert {row["caption"] for row in read_back(None, images / "out").values()} == {
        "Käse aus Zürich",
        "ein Haus",
    }


def test_utf8_by_name_is_what_sets_were_begun_with(images: Path) -> None:
    """A set that was begun before encodings were asked for is finished with ``--encoding utf-8``."""
    path = images / "a.csv"
    path.write_bytes(TEXT.encode("latin-1"))
    for name in ("utf-8", "UTF_8", "utf8"):
        assert quick([path], images / "out", reading=Reading(encoding=name)).written == 2
    with pytest.raises(
        UserError, match=r"was begun with no --encoding, this run has --encoding latin-1"
    ):
        quick([path], images / "out", reading=Reading(encoding="latin-1"))


def test_no_such_encoding(images: Path) -> None:
    path = images / "a.csv"
    path.write_text(TEXT, encoding="utf-8")
    for name in ("windows", "base64", "rot13"):
        with pytest.raises(
            UserError, match=rf"^--encoding {name} is not known; for instance utf-8,"
        ):
            quick([path], images / "out", reading=Reading(encoding=name))


# rows


def test_a_lone_quotation_mark_swallows_no_rows(images: Path) -> None:
    """It opens a field that ends where the next one does: three pairs would be one."""
    path = images / "a.tsv"
    path.write_text('caption\timage\n"big\t0.jpg\na house\t1.jpg\n5"\t2.jpg\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"a\.tsv, line 2: a field begins with a quotation mark and goes on over"
    ):
        quick([path], images / "out")
    path.write_text(
        'caption,image\n"a house,\nthe ""big"" one",0.jpg\na 5" disk,1.jpg\n', encoding="utf-8"
    )
    assert [sample.caption for sample in samples_of(path)] == [
        'a house,\nthe "big" one',
        'a 5" disk',
    ]


def test_captions_that_are_cut_at_a_separator_are_counted(images: Path) -> None:
    path = images / "a.csv"
    path.write_text("image,caption\n0.jpg,a house, and a tree\n1.jpg,a cat,\n", encoding="utf-8")
    assert quick([path], images / "out").noted == {TOO_MANY_FIELDS: 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"image,caption\n0.jpg,a\n1.jpg,b,c\n",
            r"^--annotations a line 3: more than 2 columns \(",
        ),
        (b"image,caption\n0.jpg\n", r"^--annotations a line 2: less than 2 columns \("),
        (
            b'image,caption\n0.jpg,"a" b\n',
            r"^--annotations a line 2: .* \(captions with separators or quotation",
        ),
        (
            b"image,caption\n0.jpg,a\0b\n",
            r"^--annotations a line 2: (a zero byte|line contains NUL)",
        ),
    ],
)
def test_annotations_are_read_strictly(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        list(rows_of(look_at_table(path), "--annotations a"))


def test_lists_in_messages_are_never_empty(images: Path) -> None:
    assert nearest("x", []) == "valid: none"
    assert listing([]) == "none"
    assert listing(["\t", "\x1b[2J"]) == r"'\t', '\x1b[2J'"
    assert listing([f"c{i}" for i in range(30)]).endswith("c19, …")
    path = images / "a.csv"
    path.write_bytes(b"\x1b[2J\n0\n")
    with pytest.raises(UserError, match=r"it has '\\x1b\[2J'$"):
        quick([path], images / "out")
