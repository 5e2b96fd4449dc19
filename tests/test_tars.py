"""Reading tars: what belongs together, and what is left of a broken one."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tarballs import draw, items_of, pairs, quick, read_back, write_tar

from alignclip.conversion import samples
from alignclip.conversion.images import (
    UNDECODABLE_IMAGE,
    UNKNOWN_FORMAT,
    ImageOptions,
    prepare_image,
)
from alignclip.conversion.samples import Ignored, Sample, Skipped
from alignclip.errors import UserError


def test_members_group_as_in_webdataset(tmp_path: Path) -> None:
    members = [
        ("a/b/001.txt", b"in a folder"),
        ("a/b/001.jpg", draw(1)),
        ("a/002.JPG", draw(2)),
        ("a/002.txt", b"upper case"),
        ("003.seg.png", b"another file of sample 003"),
        ("003.png", draw(3, "PNG")),
        ("003.json", b'{"caption": "from json"}'),
        (".hidden", b"no key"),
        ("004.webp", draw(4, "WEBP")),
        ("004.txt", b"\xff\xfe latin"),
        ("005.jpeg", draw(5)),
        ("005.json", b'{"caption": "half a pair \\ud83d"}'),
    ]
    found = items_of(write_tar(tmp_path / "a.tar", members))
    found.remove(Ignored(".hidden", "hidden file"))
    assert found == [
        Sample("a/b/001", draw(1), "in a folder"),
        Sample("a/002", draw(2), "upper case"),
        Sample("003", draw(3, "PNG"), "from json"),
        Sample("004", draw(4, "WEBP"), "\ufffd\ufffd latin"),
        Sample("005", draw(5), "half a pair ?"),
    ]
    assert all(
        prepare_image(sample.image, ImageOptions())[0] == sample.image
        for sample in found
        if isinstance(sample, Sample)
    )


BAD_SAMPLES = {
    "only-text": ([("txt", b"a caption")], samples.MISSING_IMAGE),
    "empty-image": ([("jpg", b""), ("txt", b"a caption")], samples.EMPTY_IMAGE),
    "only-image": ([("jpg", draw(1))], samples.MISSING_CAPTION),
    "null-caption": ([("jpg", draw(1)), ("json", b'{"caption": null}')], samples.MISSING_CAPTION),
    "list-json": ([("jpg", draw(1)), ("json", b"[1]")], samples.MISSING_CAPTION),
    "broken-json": ([("jpg", draw(1)), ("json", b'{"cap')], samples.MISSING_CAPTION),
    "blank": ([("jpg", draw(1)), ("txt", b" \n ")], samples.EMPTY_CAPTION),
    "half-jpeg": ([("jpg", draw(1)[:-400]), ("txt", b"a caption")], UNDECODABLE_IMAGE),
    "half-png": ([("png", draw(1, "PNG")[:-400]), ("txt", b"a caption")], UNDECODABLE_IMAGE),
    "html": ([("jpg", b"<html>gone</html>"), ("txt", b"a caption")], UNKNOWN_FORMAT),
}


OF_IMAGES = (
    UNDECODABLE_IMAGE,
    UNKNOWN_FORMAT,
    samples.IMAGE_TOO_LARGE,
)  # what a check of the content finds


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def test_bad_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    members = pairs(0, 1)
    expected: dict[str, int] = {}
    for key, (parts, reason) in BAD_SAMPLES.items():
        members += [(f"{key}.{extension}", data) for extension, data in parts]
        expected[reason] = expected.get(reason, 0) + 1
    members += [("huge.png", bomb()), ("huge.txt", b"a caption"), *pairs(1, 1)]
    expected[samples.IMAGE_TOO_LARGE] = 1
    path = write_tar(tmp_path / "bad.tar", members)
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end])  # without the zero blocks that mark the end
    expected[samples.BROKEN_INPUT] = 1

    counts = quick([path], tmp_path / "out", max_bad=1)
    assert (counts.written, counts.skipped) == (2, expected)
    assert list(read_back(None, tmp_path / "out")) == ["00000", "00001"]
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (dataset["samples"], dataset["skipped"], dataset["encoder"]) == (2, expected, None)

    unchecked = quick([path], tmp_path / "unchecked", images=ImageOptions(check="none"), max_bad=1)
    assert unchecked.written == 2 + sum(expected[reason] for reason in OF_IMAGES)


def break_inside_a_file(data: bytes) -> bytes:
    return data[: data.rindex(b"picture 4") + 3]


def break_a_header(data: bytes) -> bytes:
    at = data.rindex(b"00004.jpg") + 10
    return data[:at] + b"\xff" * 300 + data[at + 300 :]


def break_gzip(data: bytes) -> bytes:
    return gzip.compress(data)[:-500]


@pytest.mark.parametrize("damage", [break_inside_a_file, break_a_header, break_gzip])
def test_a_broken_tar_gives_what_is_whole(tmp_path: Path, damage: Any) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 5))
    path.write_bytes(damage(path.read_bytes()))
    *found, end = items_of(path)
    assert isinstance(end, Skipped)
    assert end.reason == samples.BROKEN_INPUT
    assert found == [Sample(f"{i:05}", draw(i), f"picture {i}") for i in range(4)]


def test_what_is_no_tar_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_text("404 not found")
    assert items_of(path) == [Skipped("", samples.BROKEN_INPUT)]
    with pytest.raises(
        UserError, match=r"no sample was written from 1 input; skipped: truncated file 1$"
    ):
        quick([path], tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_captions_from_another_entry(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 1))
    assert items_of(path, "title") == [Sample("00000", draw(0), "title 0")]
    assert items_of(path, "nothing") == [Skipped("00000", samples.MISSING_CAPTION)]


@pytest.mark.parametrize(
    ("members", "key", "expected"),
    [
        ({"jpg": 0, "txt": 0, "json": samples.MAX_TEXT_BYTES + 1}, None, "picture"),
        ({"jpg": 0, "png": samples.MAX_IMAGE_BYTES + 1, "txt": 0}, None, "picture"),
        ({"jpg": samples.MAX_IMAGE_BYTES + 1, "png": 0, "txt": 0}, None, "picture"),
        ({"jpg": 0, "txt": samples.MAX_TEXT_BYTES + 1, "json": 0}, "title", "title"),
        ({"jpg": 0, "txt": samples.MAX_TEXT_BYTES + 1, "json": 0}, None, samples.LONG_CAPTION),
        ({"jpg": 0, "txt": 0, "json": samples.MAX_TEXT_BYTES + 1}, "title", samples.LONG_CAPTION),
        ({"jpg": samples.MAX_IMAGE_BYTES + 1, "txt": 0}, None, samples.IMAGE_TOO_LARGE),
    ],
)
def test_only_a_huge_member_that_is_needed_matters(
    tmp_path: Path, members: dict[str, int], key: str | None, expected: str
) -> None:
    small = {
        "jpg": draw(0),
        "png": draw(0, "PNG"),
        "txt": b"picture",
        "json": b'{"title": "title"}',
    }
    written = [
        (f"0.{ending}", bytes(size) if size else small[ending]) for ending, size in members.items()
    ]
    (found,) = items_of(write_tar(tmp_path / "a.tar", written), key)
    assert (found.reason if isinstance(found, Skipped) else found.caption) == expected
