"""Inputs that are tables: parquet, CSV and TSV files; and the layouts that hubs have."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from conversions import peak_memory
from pyarrow import parquet
from tarballs import assert_three_tars, draw, items_of, quick, read_back, three_tars, write_tar

from alignclip.conversion import samples, text_tables
from alignclip.conversion.formats import columns as table_columns
from alignclip.conversion.inputs import expand, opened
from alignclip.conversion.samples import Sample, Skipped
from alignclip.errors import UserError


def write_parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def img2dataset(path: Path, first: int = 0, number: int = 10, **options: Any) -> Path:
    """The columns of ``img2dataset --output_format parquet`` that matter, and one that does not."""
    numbers = range(first, first + number)
    columns = {
        "caption": [f"picture {i}" for i in numbers],
        "url": ["http://x"] * number,
        "key": [f"{i:09}" for i in numbers],
        "jpg": [draw(i) for i in numbers],
    }
    return write_parquet(path, columns, **options)


def texts(*values: bytes | None) -> Any:
    """A column of texts, UTF-8 or not."""
    return pyarrow.Array.from_buffers(
        pyarrow.string(),
        len(values),
        pyarrow.array(values, pyarrow.binary()).buffers(),
        null_count=-1,
    )


# parquet


def test_parquet_of_img2dataset(tmp_path: Path) -> None:
    for i in range(2):
        img2dataset(tmp_path / "in" / f"{i:05}.parquet", 10 * i, row_group_size=3)
        (tmp_path / "in" / f"{i:05}_stats.json").write_text("{}")
    assert parquet.ParquetFile(tmp_path / "in" / "00000.parquet").num_row_groups == 4
    counts = quick([tmp_path / "in"], tmp_path / "out")
    assert (counts.written, counts.bad, counts.inputs) == (20, 0, 2)
    rows = read_back(None, tmp_path / "out")
    assert list(rows) == [f"{i:09}" for i in range(20)]
    for i, row in enumerate(rows.values()):
        assert (row["image"], row["caption"]) == (draw(i), f"picture {i}")


def test_rows_are_as_few_at_a_time_as_they_are_large(tmp_path: Path) -> None:
    """48 images of 4 MB: what is in memory is a row group of 3, compressed and decompressed, and an image."""
    rng, size = np.random.default_rng(0), 4 * 2**20
    columns = {"caption": ["a"] * 48, "jpg": [rng.bytes(size) for _ in range(48)]}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=3)
    number, peak = peak_memory(
        "from alignclip.conversion.inputs import opened",
        f"len([len(s.image) for s in opened({str(path)!r}).__enter__().items])",
    )
    assert number == 48
    assert peak < 100e6


def test_images_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 2000)
    columns = {
        "key": ["0", "1"],
        "jpg": [draw(0)[:1900], draw(0, size=(200, 200))],
        "caption": ["a", "b"],
    }
    small, large = items_of(write_parquet(tmp_path / "a.parquet", columns))
    assert isinstance(small, Sample)
    assert large == Skipped("1", samples.IMAGE_TOO_LARGE)


@pytest.mark.parametrize("with_path", [True, False])
def test_parquet_of_hugging_face(tmp_path: Path, with_path: bool) -> None:
    """A struct of bytes and path, no key, large strings, and captions by their dictionary."""
    images = [{"bytes": draw(i), **({"path": f"{i}.jpg"} if with_path else {})} for i in range(70)]
    captions = pyarrow.array(
        [f"picture {i % 7}" for i in range(70)], pyarrow.large_string()
    ).dictionary_encode()
    path = write_parquet(
        tmp_path / "train-00000-of-00001.parquet", {"text": captions, "image": images}
    )
    assert items_of(path) == [
        Sample(f"train-00000-of-00001-{i:08}", draw(i), f"picture {i % 7}") for i in range(70)
    ]


def test_parquet_with_gaps(tmp_path: Path) -> None:
    columns = {
        "key": pyarrow.array([0, None, 2, 3, 4, 5, 6], pyarrow.int64()),
        "jpg": [draw(0), draw(1), None, b"", draw(4), draw(5), draw(6)],
        "caption": texts(b"a", b"K\xe4se", b"c", b"d", None, b" ", b"\xef\xbb\xbfg"),
    }
    found = items_of(write_parquet(tmp_path / "a.parquet", columns))
    assert found == [
        Sample("0", draw(0), "a"),
        Sample("a-00000001", draw(1), "K\ufffdse"),
        Skipped("2", samples.MISSING_IMAGE),
        Skipped("3", samples.EMPTY_IMAGE),
        Skipped("4", samples.MISSING_CAPTION),
        Skipped("5", samples.EMPTY_CAPTION),
        Sample("6", draw(6), "g"),
    ]
    assert isinstance(found[1], Sample)
    assert found[1].notes == (samples.INVALID_UTF8,)
    indexed = {"key": ["0"], "jpg": [draw(0)], "caption": texts(b"K\xe4se").dictionary_encode()}
    path = write_parquet(tmp_path / "indexed.parquet", indexed)
    assert items_of(path) == [Sample("0", draw(0), "K\ufffdse")]
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    nulls = {
        "image": pyarrow.array([None, {"bytes": None, "path": "x.jpg"}], struct),
        "caption": ["a", "b"],
    }
    for item in items_of(write_parquet(tmp_path / "b.parquet", nulls)):
        assert isinstance(item, Skipped)
        assert item.reason == samples.MISSING_IMAGE
    empty = write_parquet(
        tmp_path / "c.parquet", {"jpg": pyarrow.array([], pyarrow.binary()), "caption": texts()}
    )
    assert items_of(empty) == []
    with pytest.raises(UserError, match=r"^no sample was written from 1 input; skipped: nothing$"):
        quick([empty], tmp_path / "out")


def test_a_truncated_parquet_file_is_converted_again(tmp_path: Path) -> None:
    """Its footer is at the end: nothing can be read, but the other files are."""
    source, out = tmp_path / "in", tmp_path / "out"
    for i in range(2):
        img2dataset(source / f"{i:05}.parquet", 10 * i)
    whole = (source / "00001.parquet").read_bytes()
    (source / "00001.parquet").write_bytes(whole[:-100])
    counts = quick([source], out)
    assert (counts.written, counts.skipped, counts.broken) == (
        10,
        {samples.BROKEN_INPUT: 1},
        ["00001"],
    )
    (source / "00001.parquet").write_bytes(whole)
    again = quick([source], out)
    assert (again.written, again.resumed, again.broken) == (20, 10, [])


def test_a_hole_in_a_parquet_file_ends_it(tmp_path: Path) -> None:
    path = img2dataset(tmp_path / "a.parquet", number=70, row_group_size=32, compression="zstd")
    images = parquet.ParquetFile(path).metadata.row_group(1).column(3)
    data, at = path.read_bytes(), images.data_page_offset
    path.write_bytes(data[:at] + bytes(200) + data[at + 200 :])
    *found, last = items_of(path)
    assert found == [Sample(f"{i:09}", draw(i), f"picture {i}") for i in range(32)]
    assert isinstance(last, Skipped)
    assert last.reason == samples.BROKEN_INPUT


@pytest.mark.parametrize(
    ("columns", "key", "message"),
    [
        (
            {"jpg": [b"x"], "captions": ["a"]},
            "caption",
            r"has no column 'caption'; did you mean 'captions'\?",
        ),
        (
            {"jpg": [b"x"], "alt": ["a"]},
            None,
            r"has no caption column \(caption, text, title, txt\); it has jpg, alt",
        ),
        (
            {"pixels": [b"x"], "text": ["a"]},
            None,
            r"has no image column \(jpg, .*, image\); it has pixels, text",
        ),
        ({"jpg": [b"x"], "text": ["a"]}, "zzz", r"has no column 'zzz'; valid: jpg, text"),
        (
            {"image": ["1.jpg"], "text": ["a"]},
            None,
            r"the column 'image' .* bytes; it is of type string",
        ),
        (
            {"image": [{"path": "1"}], "text": ["a"]},
            None,
            r"the column 'image' .* bytes; it is of type struct",
        ),
    ],
)
def test_parquet_without_the_columns(
    tmp_path: Path, columns: Any, key: str | None, message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=rf"a\.parquet:? {message}$"):
        quick([path], tmp_path / "out", caption_key=key)
    assert not (tmp_path / "out" / "index.json").exists()


def test_another_caption_column(tmp_path: Path) -> None:
    columns = {"jpg": [draw(0)], "caption": ["a caption"], "alt_text": ["another"]}
    assert items_of(write_parquet(tmp_path / "a.parquet", columns), "alt_text") == [
        Sample("a-00000000", draw(0), "another")
    ]


# CSV and TSV


def write_csv(path: Path, rows: list[list[Any]], **options: Any) -> Path:
    file = io.StringIO()
    csv.writer(file, **options).writerows(rows)
    path.write_bytes(file.getvalue().encode())
    return path


def read_part(part: str) -> list[Any]:
    with opened(part) as source:
        return list(source.items)


def read_table(path: Path, caption_key: str | None = None) -> list[Sample | Skipped]:
    return items_of(path, caption_key)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 0.jpg to 4.jpg in the sub-folder images."""
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(draw(i))
    return tmp_path


def test_csv_of_paths(images: Path) -> None:
    rows = [
        ["image", "caption"],
        ["images/0.jpg", "relative to the table"],
        [images / "images" / "1.jpg", "absolute"],
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
    path = write_csv(images / "a.csv", rows)
    found = read_table(path)
    missing = ["images/gone.jpg", "", "images", "x" * 5_000, "images/0.jpg\0"]
    assert found == [
        Sample("images/0.jpg", draw(0), "relative to the table"),
        Sample(str(images / "images" / "1.jpg"), draw(1), "absolute"),
        *(Skipped(key, samples.MISSING_IMAGE) for key in missing),
        Sample("images/2.jpg", draw(2), 'quotes "", commas,\nand\r\nlines'),
        Skipped("images/3.jpg", samples.MISSING_CAPTION),
        Sample("images/3.jpg", draw(3), "one"),
        Skipped("images/4.jpg", samples.LONG_CAPTION),
        Sample("images/4.jpg", draw(4), "the last"),
    ]
    counts = quick([path], images / "out", max_bad=0.9)
    assert (counts.written, counts.bad) == (5, 7)
    assert f"no file {images}/images/gone.jpg" in (images / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("mark.csv", b"\xef\xbb\xbfimage,caption\nimages/0.jpg,a\n", ["a"]),
        ("no-end.csv", b"image,caption\nimages/0.jpg,a", ["a"]),
        ("windows.csv", b"image,caption\r\n\r\nimages/0.jpg,a\r\n", ["a"]),
        (
            "damaged.csv",
            "image,caption\nimages/0.jpg,Käse ".encode() + b"K\xe4se\n",
            ["Käse K\ufffdse"],
        ),
        ("tabs.tsv", b'image\tcaption\nimages/0.jpg\ta, "b"\n', ['a, "b"']),
        ("TABS.TSV", b"image\tcaption\nimages/0.jpg\ta,b\n", ["a,b"]),
        ("clip.csv", b"\ttitle,filepath\n0,images/0.jpg\n", []),
        ("open_clip.csv", b",title,filepath\n0,a,images/0.jpg\n", ["a"]),
        ("entities.csv", b"path,text\nimages/0.jpg,a &amp; b\n", ["a & b"]),
        ("only-a-header.csv", b"image,caption\n", []),
        ("empty.csv", b"", []),
    ],
)
def test_ways_to_write_a_table(images: Path, name: str, text: bytes, expected: list[str]) -> None:
    path = images / name
    path.write_bytes(text)
    if name == "clip.csv":
        with pytest.raises(
            UserError, match=r"clip\.csv has no caption column .*; it has filepath$"
        ):
            read_table(path)
        return
    assert [sample.caption for sample in read_table(path) if isinstance(sample, Sample)] == expected
    if not expected:
        with pytest.raises(
            UserError, match=r"^no sample was written from 0 inputs; skipped: nothing$"
        ):
            quick([path], images / "out")


def test_a_table_with_keys_and_a_chosen_column(images: Path) -> None:
    rows = [
        ["key", "alt", "caption", "filepath"],
        ["k0", "an alt", "a", "images/0.jpg"],
        ["", "b", "c", "images/1.jpg"],
    ]
    path = write_csv(images / "a.csv", rows)
    assert read_table(path, "alt") == [
        Sample("k0", draw(0), "an alt"),
        Sample("images/1.jpg", draw(1), "b"),
    ]
    with pytest.raises(UserError, match=r"a\.csv has no column 'atl'; did you mean 'alt'\?$"):
        read_table(path, "atl")


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_part_of_a_table_begins_where_it_is(
    images: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, end: bytes
) -> None:
    """What comes before is not read again, which for the last part of a long table would be nearly all."""
    monkeypatch.setattr(table_columns, "ROWS_A_PIECE", 3)
    texts = [f'images/{i % 5}.jpg,"K\xe4se {i},\n\u2603"' for i in range(8)]
    lines = [text.encode("latin-1" if i % 2 else "utf-8", "ignore") for i, text in enumerate(texts)]
    path = images / "a.csv"
    path.write_bytes(start + end.join([b"image,caption", b"", *lines[:4], b"", *lines[4:]]) + end)
    parts = expand([str(path)])
    whole = [read_part(part) for part in parts]
    captions = [sample.caption for some in whole for sample in some if isinstance(sample, Sample)]
    assert captions == [f"K\ufffdse {i},\n" if i % 2 else f"K\xe4se {i},\n\u2603" for i in range(8)]
    data, at = (
        path.read_bytes(),
        path.read_bytes().index(b"image,caption") + len(b"image,caption" + end),
    )
    place = int(parts[-1].rpartition("-")[2]) % 2**64  # above are the decoder's flags
    path.write_bytes(data[:at] + b'"' * (place - at) + data[place:])
    assert read_part(parts[-1]) == whole[-1]


def test_a_long_table_is_several_inputs(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_columns, "ROWS_A_PIECE", 4)
    rows = [
        ["key", "image", "caption"],
        *([f"{i:05}", f"images/{i % 5}.jpg", f"line {i}\nand on"] for i in range(10)),
    ]
    path = write_csv(images / "a.csv", [*rows, *[[]] * 8])  # empty lines are no rows
    parts = expand([str(path)])
    assert [part.rpartition("#")[2].rpartition("-")[0] for part in parts] == ["0-4", "4-8", "8-10"]
    counts = quick([path], images / "out", processes=1)
    assert (counts.written, counts.inputs) == (10, 3)
    assert sorted(folder.name for folder in (images / "out").glob("a-*")) == [
        "a-00000",
        "a-00001",
        "a-00002",
    ]
    rows_back = read_back(None, images / "out")
    assert list(rows_back) == [f"{i:05}" for i in range(10)]
    assert rows_back["00007"] == {"key": "00007", "image": draw(2), "caption": "line 7\nand on"}
    assert quick([path], images / "out").converted == 0


def test_a_quotation_mark_that_nothing_closes(images: Path) -> None:
    path = images / "a.csv"
    path.write_text(
        'image,caption\nimages/0.jpg,a\nimages/1.jpg,"b\n' + "x" * (text_tables.MAX_FIELD + 10)
    )
    with pytest.raises(
        UserError,
        match=r"a\.csv, line \d+: field larger .* \(a quotation mark that nothing closes\?\)$",
    ):
        quick([path], images / "out")


# layouts


def test_a_folder_of_tars_and_their_tables(tmp_path: Path) -> None:
    """img2dataset's webdataset output has a parquet file of metadata beside each tar."""
    three_tars(tmp_path / "in")
    for i in range(3):
        write_parquet(tmp_path / "in" / f"{i:05}.parquet", {"url": ["http://x"], "caption": ["a"]})
    assert quick([tmp_path / "in"], tmp_path / "out").written == 15
    assert_three_tars(read_back(None, tmp_path / "out"))


def test_cc12m_of_hugging_face(tmp_path: Path) -> None:
    """pixparse/cc12m-wds: key.jpg, key.txt and key.json in cc12m-train-0000.tar."""
    for i in range(2):
        members = []
        for number in range(4):
            key = f"{i:04}{number:05}"
            meta = {
                "caption": "of json",
                "url": "http://x",
                "key": key,
                "status": "success",
                "exif": "{}",
                "width": 40,
            }
            members += [(f"{key}.jpg", draw(number)), (f"{key}.json", json.dumps(meta).encode())]
            members += [(f"{key}.txt", f"picture {number}".encode())]
        write_tar(tmp_path / "in" / f"cc12m-train-{i:04}.tar", members)
    assert quick([tmp_path / "in" / "cc12m-train-{0000..0001}.tar"], tmp_path / "out").written == 8
    rows = read_back(None, tmp_path / "out")
    assert (rows["000100003"]["image"], rows["000100003"]["caption"]) == (draw(3), "picture 3")
    assert (tmp_path / "out" / "cc12m-train-0001" / "index.json").exists()
