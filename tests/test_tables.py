"""Parquet files, and the layouts that hubs have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from conversions import peak_memory
from pyarrow import parquet
from tarballs import (
    assert_three_tars,
    draw,
    items_of,
    quick,
    read_back,
    refused,
    three_tars,
    write_tar,
)

from alignclip.conversion import samples
from alignclip.conversion.samples import Sample, Skipped


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


@pytest.mark.slow
def test_rows_are_as_few_at_a_time_as_they_are_large(tmp_path: Path) -> None:
    """48 images of 4 MB: what is in memory is a row group of 3, compressed and decompressed, and
    an image.
    """
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
    columns = {"key": ["0", "1"], "jpg": [bytes(1900), bytes(2001)], "caption": ["a", "b"]}
    small, large = items_of(write_parquet(tmp_path / "a.parquet", columns))
    assert (small, large) == (
        Sample("0", bytes(1900), "a"),
        Skipped("1", samples.IMAGE_TOO_LARGE),
    )


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
    assert found[1].notes == (samples.INVALID_UTF8,)
    indexed = {"key": ["0"], "jpg": [draw(0)], "caption": texts(b"K\xe4se").dictionary_encode()}
    path = write_parquet(tmp_path / "indexed.parquet", indexed)
    assert items_of(path) == [Sample("0", draw(0), "K\ufffdse")]
    struct = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    nulls = {
        "image": pyarrow.array([None, {"bytes": None, "path": "x.jpg"}], struct),
        "caption": ["a", "b"],
    }
    assert items_of(write_parquet(tmp_path / "b.parquet", nulls)) == [
        Skipped(f"b-{i:08}", samples.MISSING_IMAGE) for i in range(2)
    ]
    empty = write_parquet(
        tmp_path / "c.parquet", {"jpg": pyarrow.array([], pyarrow.binary()), "caption": texts()}
    )
    assert items_of(empty) == []
    refused("^no sample was written from 1 input; skipped: nothing$", [empty], tmp_path / "out")


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
    assert items_of(path) == [
        *(Sample(f"{i:09}", draw(i), f"picture {i}") for i in range(32)),
        Skipped("", samples.BROKEN_INPUT),
    ]


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
        ({"jpg": [b"x"], "text": ["a"]}, "zzz", "has no column 'zzz'; valid: jpg, text"),
        (
            {"image": ["1.jpg"], "text": ["a"]},
            None,
            "the column 'image' .* bytes; it is of type string",
        ),
        (
            {"image": [{"path": "1"}], "text": ["a"]},
            None,
            "the column 'image' .* bytes; it is of type struct",
        ),
        (
            {"url": ["https://e.org/0.jpg"], "TEXT": ["a"]},
            None,
            "is a list of URLs, .* --input_format parquet --url_col url --caption_col TEXT .*",
        ),
    ],
)
def test_parquet_without_the_columns(
    tmp_path: Path, columns: Any, key: str | None, message: str
) -> None:
    path = write_parquet(tmp_path / "a.parquet", columns)
    refused(rf"a\.parquet:? {message}$", [path], tmp_path / "out", caption_key=key)
    assert not (tmp_path / "out" / "index.json").exists()
    (tmp_path / "a.tar").write_bytes(b"")
    if "URLs" in message:
        refused(rf"a list of URLs, .* they lie in {tmp_path}/a\.tar$", [path], tmp_path / "out")


def test_a_mistyped_image_key_is_told_of_where_addresses_lie_beside_images(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "a.parquet", {"url": ["https://e.org/0.jpg"], "jpg": [b"x"], "caption": ["a"]}
    )
    refused(r"no column 'jpge'; did you mean 'jpg'\?$", [path], tmp_path / "out", image_key="jpge")


def test_another_caption_column(tmp_path: Path) -> None:
    columns = {"jpg": [draw(0)], "caption": ["a caption"], "alt_text": ["another"]}
    assert items_of(write_parquet(tmp_path / "a.parquet", columns), "alt_text") == [
        Sample("a-00000000", draw(0), "another")
    ]


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
            meta = {"caption": "of json", "url": "http://x", "key": key, "exif": "{}", "width": 40}
            beside = {"json": json.dumps(meta), "txt": f"picture {number}"}
            members += [(f"{key}.jpg", draw(number))]
            members += [(f"{key}.{ending}", text.encode()) for ending, text in beside.items()]
        write_tar(tmp_path / "in" / f"cc12m-train-{i:04}.tar", members)
    assert quick([tmp_path / "in" / "cc12m-train-{0000..0001}.tar"], tmp_path / "out").written == 8
    rows = read_back(None, tmp_path / "out")
    assert (rows["000100003"]["image"], rows["000100003"]["caption"]) == (draw(3), "picture 3")
    assert (tmp_path / "out" / "cc12m-train-0001" / "index.json").exists()
