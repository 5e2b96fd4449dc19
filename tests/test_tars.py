"""Reading tars: what belongs together, and what is left of a broken one."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from mutations import encode
from PIL import Image
from tarballs import draw, items_of, pairs, quick, read_back, refused, write_tar

from alignclip.conversion import samples
from alignclip.conversion.images import (
    UNDECODABLE_IMAGE,
    UNKNOWN_FORMAT,
    ImageOptions,
    prepare_image,
)
from alignclip.conversion.samples import Ignored, Sample, Skipped


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
    assert all(prepare_image(one.image, ImageOptions())[0] == one.image for one in found)


JPEG, PNG, TEXT = ("jpg", draw(1)), ("png", draw(1, "PNG")), ("txt", b"a caption")
# reason -> the members of pairs that are left out for it
BAD_SAMPLES: dict[str, list[list[tuple[str, bytes]]]] = {
    samples.MISSING_IMAGE: [[TEXT]],
    samples.EMPTY_IMAGE: [[("jpg", b""), TEXT]],
    samples.MISSING_CAPTION: [
        [JPEG],
        *([JPEG, ("json", data)] for data in (b'{"caption": null}', b"[1]", b'{"cap')),
    ],
    samples.EMPTY_CAPTION: [[JPEG, ("txt", b" \n ")]],
    UNDECODABLE_IMAGE: [[(ending, data[:-400]), TEXT] for ending, data in (JPEG, PNG)],
    UNKNOWN_FORMAT: [[("jpg", b"<html>gone</html>"), TEXT]],
    samples.IMAGE_TOO_LARGE: [[("png", encode(Image.new("1", (10_000, 10_000)), "PNG")), TEXT]],
}
OF_CONTENT = (UNDECODABLE_IMAGE, UNKNOWN_FORMAT, samples.IMAGE_TOO_LARGE)


def test_bad_samples_are_skipped_and_counted(tmp_path: Path) -> None:
    expected = {reason: len(bad) for reason, bad in BAD_SAMPLES.items()}
    groups = [group for bad in BAD_SAMPLES.values() for group in bad]
    members = [(f"bad-{i}.{end}", data) for i, group in enumerate(groups) for end, data in group]
    path, out = write_tar(tmp_path / "a.tar", [*pairs(0, 1), *members, *pairs(1, 1)]), tmp_path
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end])  # without the zero blocks that mark the end
    expected[samples.BROKEN_INPUT] = 1

    counts = quick([path], out / "out", max_bad=1)
    assert (counts.written, counts.skipped) == (2, expected)
    assert list(read_back(None, out / "out")) == ["00000", "00001"]
    dataset = json.loads((out / "out" / "dataset.json").read_text())
    assert (dataset["samples"], dataset["skipped"], dataset["encoder"]) == (2, expected, None)

    unchecked = quick([path], out / "unchecked", images=ImageOptions(check="none"), max_bad=1)
    assert unchecked.written == 2 + sum(expected[reason] for reason in OF_CONTENT)


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
    assert end.reason == samples.BROKEN_INPUT
    assert found == [Sample(f"{i:05}", draw(i), f"picture {i}") for i in range(4)]


def test_what_is_no_tar_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_text("404 not found")
    assert items_of(path) == [Skipped("", samples.BROKEN_INPUT)]
    message = "no sample was written from 1 input; skipped: truncated file 1$"
    refused(message, [path], tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_captions_from_another_entry(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 1))
    assert items_of(path, "title") == [Sample("00000", draw(0), "title 0")]
    assert items_of(path, "nothing") == [Skipped("00000", samples.MISSING_CAPTION)]


IMAGE, LARGE = samples.MAX_IMAGE_BYTES + 1, samples.MAX_TEXT_BYTES + 1


@pytest.mark.parametrize(
    ("members", "key", "expected"),
    [
        ({"jpg": 0, "txt": 0, "json": LARGE}, None, "picture"),
        ({"jpg": 0, "png": IMAGE, "txt": 0}, None, "picture"),
        ({"jpg": IMAGE, "png": 0, "txt": 0}, None, "picture"),
        ({"jpg": 0, "txt": LARGE, "json": 0}, "title", "title"),
        ({"jpg": 0, "txt": LARGE, "json": 0}, None, samples.LONG_CAPTION),
        ({"jpg": 0, "txt": 0, "json": LARGE}, "title", samples.LONG_CAPTION),
        ({"jpg": IMAGE, "txt": 0}, None, samples.IMAGE_TOO_LARGE),
    ],
)
def test_only_a_huge_member_that_is_needed_matters(
    tmp_path: Path, members: dict[str, int], key: str | None, expected: str
) -> None:
    small = {"jpg": JPEG[1], "png": PNG[1], "txt": b"picture", "json": b'{"title": "title"}'}
    written = [(f"0.{end}", bytes(size) if size else small[end]) for end, size in members.items()]
    (found,) = items_of(write_tar(tmp_path / "a.tar", written), key)
    assert (found.reason if isinstance(found, Skipped) else found.caption) == expected
