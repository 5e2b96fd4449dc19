"""The table of input formats, and the two formats of loose files: JSON lines, img2dataset's
folders.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from conversions import COMMAND
from tarballs import (
    captions_of,
    cut,
    draw,
    items_of,
    pairs,
    put,
    quick,
    read_back,
    refused,
    serve,
    three_tars,
    write_images,
    write_tar,
)

from alignclip.conversion import samples
from alignclip.conversion.cc12m import main
from alignclip.conversion.formats import INPUT_FORMATS, columns, format_of
from alignclip.conversion.formats.remote import image_place
from alignclip.conversion.inputs import expand_inputs, name_of, opened
from alignclip.conversion.samples import Ignored, Sample, Skipped
from alignclip.errors import UserError
from alignclip.storage import clouds
from alignclip.storage.copies import fetched

PAGE = (COMMAND.parents[1] / "docs" / "convert.md").read_text(encoding="utf-8")


def test_the_documented_formats_are_the_table() -> None:
    rows = [f"| {name} | {taken} |" for name, taken in (one.described for one in INPUT_FORMATS)]
    assert "\n".join(["| input | what is taken |", "|---|---|", *rows, ""]) in PAGE


def test_the_flags_of_formats_are_options_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for one in INPUT_FORMATS for flag in one.flags)


def test_the_command_takes_files_of_several_formats(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_files(images / "in"), images / "out"
    lines = write_lines(images / "a.jsonl", {"image": "images/4.jpg", "caption": "a line"})
    patterns = [str(source / "{00000..00001}"), str(lines.with_name("*.jsonl"))]
    command = ["--tars", *patterns, "--out", str(out), "--no-semantic", "--processes", "1"]
    for this_run in ("7 samples in", "all 3 inputs were complete already"):
        main(command)
        assert this_run in capsys.readouterr().out
    keys = [f"{i:05}" for i in (0, 1, 2, 10, 11, 12)]
    assert list(read_back(None, out)) == [*keys, "images/4.jpg"]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"PAR1", "parquet"),
        (b' {"image": "0.jpg"}', "JSON lines"),
        (bytes(257) + b"ustar", "tars (img2dataset, webdataset)"),
        (b"anything", "tars (img2dataset, webdataset)"),
    ],
)
def test_a_file_without_an_ending_is_recognised_by_its_beginning(
    tmp_path: Path, head: bytes, words: str
) -> None:
    (tmp_path / "file").write_bytes(head)
    assert format_of(str(tmp_path / "file")).words == words


# JSON lines


def write_lines(path: Path, *rows: Any) -> Path:
    """Write a line for each row; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    data = b"\n".join([*lines, b""])
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with 0.jpg to 4.jpg in the sub-folder images."""
    return write_images(tmp_path / "images").parent


def test_json_lines_and_what_is_wrong_with_some(images: Path) -> None:
    path = write_lines(
        images / "a.jsonl",
        b"no object",
        {"image": "images/0.jpg", "caption": "relative &amp; mended"},
        b"",
        {"image": str(images / "images" / "1.jpg"), "caption": "absolute", "key": "own"},
        b'{"image": "images/2.jpg", "caption": ',
        b"[1]",
        {"image": "images/gone.jpg", "caption": "missing"},
        {"image": 5, "caption": "a number"},
        {"image": "http://x/0.jpg", "caption": "a web address"},
        {"image": "images/2.jpg"},
        {"image": "images/2.jpg", "caption": ["one", "two"]},
        b'{"image": "images/2.jpg", "caption": "K\xe4se", "key": 7}',
        {"image": "images/0.jpg", "caption": "half \ud800", "key": "\ud800"},
        {"image": "images/\ud800.jpg", "caption": "an image of no name"},
        {"image": "s3://bucket/\ud800.jpg", "caption": "nor has a bucket one"},
        {"image": "file:///x.jpg", "caption": "no storage"},
        {"image": "s3://[x/0.jpg", "caption": "no URL"},
    )
    found = items_of(path)
    assert found == [
        Skipped("a-00000000", samples.NO_OBJECT),
        Sample("images/0.jpg", draw(0), "relative & mended"),
        Sample("own", draw(1), "absolute"),
        Skipped("a-00000003", samples.NO_OBJECT),
        Skipped("a-00000004", samples.NO_OBJECT),
        Skipped("images/gone.jpg", samples.MISSING_IMAGE),
        Skipped("5", samples.MISSING_IMAGE),
        Skipped("http://x/0.jpg", samples.MISSING_IMAGE),
        Skipped("images/2.jpg", samples.MISSING_CAPTION),
        Skipped("images/2.jpg", samples.MISSING_CAPTION),
        Sample("7", draw(2), "K\ufffdse"),
        Sample("?", draw(0), "half ?"),
        Skipped("images/?.jpg", samples.MISSING_IMAGE),
        Skipped("s3://bucket/?.jpg", samples.MISSING_IMAGE),
        Skipped("file:///x.jpg", samples.MISSING_IMAGE),
        Skipped("s3://[x/0.jpg", samples.MISSING_IMAGE),
    ]
    counts = quick([path], images / "out", max_bad=0.9)
    assert (counts.written, counts.bad) == (4, 12)
    report = (images / "out" / "report.md").read_text(encoding="utf-8")
    assert f"no file {images}/images/gone.jpg" in report
    assert "`a-00000000` in" in report


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz", "a"])
def test_json_lines_by_any_name(images: Path, name: str) -> None:
    rows = [{"file_name": f"images/{i}.jpg", "text": f"picture {i}"} for i in range(5)]
    quick([write_lines(images / name, *rows)], images / "out")
    written = read_back(None, images / "out").values()
    assert [row["caption"] for row in written] == [f"picture {i}" for i in range(5)]
    assert (images / "out" / "a-00000" / "counts.json").exists()
    in_folders = [str(images / name)] if name.startswith(("a.jsonl", "a.ndjson")) else []
    try:
        assert [place.partition("#")[0] for place in expand_inputs([str(images)])] == in_folders
    except UserError:
        assert not in_folders


@pytest.mark.parametrize(
    ("name", "head", "line"),
    [
        ("a.jsonl", b"", b'{"image": "0", "caption": "a"}\n'),
        ("a.csv", b"image,caption\n", b"0,a\n"),
    ],
)
def test_pieces_begin_at_their_first_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, head: bytes, line: bytes
) -> None:
    """Sets that were begun by earlier versions hold these names."""
    monkeypatch.setattr(columns, "ROWS_A_PIECE", 2)
    first = head + b"\n\n"
    second = first + line + b"\n" + line + b"\n\n"
    path = tmp_path / name
    path.write_bytes(second + line + b"\n")
    parts = [f"0-2-{len(first)}", f"2-3-{len(second)}"]
    assert expand_inputs([str(path)]) == [f"{path}#{part}" for part in parts]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_long_table_is_several_inputs(
    images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(columns, "ROWS_A_PIECE", 4)
    path, out = images / name, images / "out"
    rows = [
        {"key": f"{i:05}", "image": f"images/{i % 5}.jpg", "caption": f"line {i}\nand on"}
        for i in range(10)
    ]
    if name == "a.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
            file.write("\r\n" * 8)  # empty lines are no rows
    else:
        write_lines(path, *rows[:3], b"", *rows[3:])
    parts = expand_inputs([str(path)])
    assert [part.rpartition("#")[2].rpartition("-")[0] for part in parts] == ["0-4", "4-8", "8-10"]
    counts = quick([path], out)
    assert (counts.written, counts.inputs) == (10, 3)
    made = sorted(folder.name for folder in out.glob("a-*"))
    assert made == [*map(name_of, parts)] == ["a-00000", "a-00001", "a-00002"]
    got = read_back(None, out)
    assert list(got) == [f"{i:05}" for i in range(10)]
    assert got["00007"] == {"key": "00007", "image": draw(2), "caption": "line 7\nand on"}
    assert quick([path], out).converted == 0


def test_json_lines_with_lists_of_captions(images: Path) -> None:
    path = write_lines(
        images / "a.jsonl",
        {"image": "images/0.jpg", "caption": ["one", "two"]},
        {"image": "images/1.jpg", "caption": "alone"},
        {"image": "images/2.jpg", "caption": ["", "not empty"]},
        {"image": "images/3.jpg", "caption": ["half \ud800"]},
    )
    quick([path], images / "out")
    got = [row["caption"] for row in read_back(None, images / "out").values()]
    assert got == [["one", "two"], ["alone"], ["not empty"], ["half ?"]]
    one = write_lines(images / "b.jsonl", {"image": "images/0.jpg", "caption": "one"})
    message = r"a\.jsonl has lists of captions, other inputs have one"
    refused(message, [path, one], images / "both")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([b"[", b"1]"], "is no JSON lines: none of its first lines is an object$"),
        (
            [{"img": "0.jpg", "caption": "a"}],
            r"has no image column \(image, .*\); it has img, caption$",
        ),
        ([{"image": "0.jpg", "says": "a"}], r"has no caption column \(.*\); it has image, says$"),
        (
            [{"url": "http://x/0.jpg", "caption": "a"}],
            "is a list of URLs, .* img2dataset --url_list .* --input_format jsonl --url_col url "
            "--caption_col caption ",
        ),
    ],
)
def test_what_is_no_json_lines_of_pairs(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", *rows)
    refused(rf"^{path} {message}", [path], tmp_path / "out")


def test_a_mistyped_key_is_told_of_where_addresses_lie_beside_images(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"url": "http://x/0.jpg", "path": "0", "caption": "a"})
    refused(r"no column 'pth'; did you mean 'path'\?$", [path], tmp_path / "out", image_key="pth")


def test_a_list_in_the_root_names_what_lies_beside_it() -> None:
    assert image_place("0.jpg", "") == "/0.jpg"
    assert image_place("a/0.jpg", "/data") == "/data/a/0.jpg"


def test_damaged_gzip_is_told(images: Path) -> None:
    rows = [{"image": f"images/{i % 5}.jpg", "caption": f"{i}" * 50} for i in range(300)]
    path = write_lines(images / "a.jsonl.gz", *rows)
    path.write_bytes(path.read_bytes()[:-20])
    refused(r"a\.jsonl\.gz is damaged: .*; fetch it again$", [path], images / "out")


def test_a_list_that_is_damaged_while_it_is_converted(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole before the damage is converted, and the rest is told of."""
    monkeypatch.setattr(columns, "ROWS_A_PIECE", 500)
    generator = random.Random(0)
    rows = [
        {"image": f"images/{i % 5}.jpg", "caption": f"{generator.random()}"} for i in range(1000)
    ]
    path = write_lines(images / "a.jsonl.gz", *rows)
    first, second = expand_inputs([str(path)])
    path.write_bytes(path.read_bytes()[:-2000])
    with opened(first) as source:
        assert len([item for item in source.items if isinstance(item, Sample)]) == 500
    with opened(second) as source:
        *whole, last = source.items
    assert 100 < len([item for item in whole if isinstance(item, Sample)]) < 500
    assert last == Skipped("", samples.BROKEN_INPUT)


@pytest.mark.parametrize("name", ["a.jsonl", "a"])
def test_files_that_cannot_be_opened_are_one_line(
    images: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, opens = write_lines(images / name, {"image": "images/0.jpg", "caption": "a"}), Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(path))
        return opens(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    refused(rf"^cannot read {path}: Permission denied$", [path], images / "out")


def test_json_lines_in_a_bucket(s3: Any, tmp_path: Path) -> None:
    """Images lie beside the file, in another bucket, or nowhere; one client reads them all."""
    raw, other = s3.bucket(), s3.bucket()
    put(s3, f"{other}/deep/3.jpg", draw(3))
    for i in range(2):
        put(s3, f"{raw}/set/images/{i}/0.jpg", draw(i))
    rows = [
        *({"image": f"images/{i}/0.jpg", "caption": f"picture {i}"} for i in range(2)),
        {"image": f"{other}/deep/3.jpg", "caption": "picture 3"},
        {"image": "images/gone.jpg", "caption": "gone"},
    ]
    put(s3, f"{raw}/set/a.jsonl", write_lines(tmp_path / "a.jsonl", *rows).read_bytes())
    clouds._s3_client.cache_clear()
    assert len(items_of(f"{raw}/set/a.jsonl")) == 4
    assert clouds._s3_client.cache_info().misses == 1
    counts = quick([f"{raw}/set"], tmp_path / "out")
    assert (counts.written, counts.skipped) == (3, {samples.MISSING_IMAGE: 1})
    got = read_back(None, tmp_path / "out")
    assert list(got) == ["images/0/0.jpg", "images/1/0.jpg", f"{other}/deep/3.jpg"]
    assert [row["image"] for row in got.values()] == [draw(0), draw(1), draw(3)]


@pytest.mark.parametrize("files", ["aaaa", "aabb"])
def test_threads_that_convert_pieces_of_files_in_a_bucket(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str
) -> None:
    """Each thread has its copy to the end, whatever the others copy meanwhile."""
    bucket, copied = s3.bucket(), list[str]()
    lines = write_lines(tmp_path / "lines", {"image": "0.jpg", "caption": "a"}).read_bytes()
    put(s3, f"{bucket}/0.jpg", draw(0))
    for name in set(files):
        put(s3, f"{bucket}/{name}.jsonl", lines)

    def counted(url: str) -> Any:
        copied.append(url)
        return fetched(url)

    monkeypatch.setattr("alignclip.conversion.formats.lines.fetched", counted)
    begun = threading.Barrier(len(files), timeout=60)

    def read(name: str) -> list[Any]:
        with opened(f"{bucket}/{name}.jsonl#0-1-0") as source:
            begun.wait()
            return list(source.items)

    with ThreadPoolExecutor(len(files)) as pool:
        assert list(pool.map(read, files)) == [[Sample("0.jpg", draw(0), "a")]] * len(files)
    assert len(copied) == 1 or files != "aaaa"


@pytest.mark.slow
def test_a_list_from_elsewhere_names_nothing_on_this_machine(s3: Any, images: Path) -> None:
    """A stranger's list, in a bucket or on a web server, would put files of this machine into
    the set.
    """
    bucket, secret = s3.bucket(), images / "images" / "0.jpg"
    (images / "x:").mkdir()
    names = [
        str(secret),
        f"/{secret}",
        f"file://{secret}",
        f"FILE://{secret}",
        f" file://{secret}",
        f"fi\tle://{secret}",
        f"{images}/x://../images/0.jpg",  # Streaming takes this for a path
        f"://{secret}",
        f"..{secret}",
        f"images/../{'../' * 20}{secret}",
        "../0.jpg",
        "..",
    ]
    rows = [{"image": name, "caption": "a", "key": f"{i}"} for i, name in enumerate(names)]
    lines = write_lines(images / "a.jsonl", *rows)
    put(s3, f"{bucket}/set/a.jsonl", lines.read_bytes())
    expected = [Skipped(f"{i}", samples.MISSING_IMAGE) for i in range(len(names))]
    with serve(partial(SimpleHTTPRequestHandler, directory=str(images))) as url:
        for place in (f"{bucket}/set/a.jsonl", f"{url}/a.jsonl"):
            found = items_of(place)
            assert found == expected
            for item, name in zip(found, names, strict=True):
                why = "no storage is known as" if "://" in name else "names what lies below it, or"
                assert why in item.detail
    assert isinstance(items_of(lines)[0], Sample)  # a list of this machine may


@pytest.mark.slow
def test_images_whose_names_no_store_has_cost_their_pairs_alone(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket()
    put(s3, f"{bucket}/0.jpg", draw(0))
    names = [
        "s3://a b/0.jpg",
        "s3://A_/0.jpg",
        "s3:///0.jpg",
        "s3://not-there/0.jpg",
        bucket,
        f"{bucket}/../0.jpg",
        "http://127.0.0.1:1/a b.jpg",
        f"{bucket}/0.jpg",
    ]
    rows = [{"image": name, "caption": "a"} for name in names]
    *skipped, last = items_of(write_lines(tmp_path / "a.jsonl", *rows))
    assert skipped == [Skipped(name, samples.MISSING_IMAGE) for name in names[:-1]]
    assert all(item.detail for item in skipped)
    assert last == Sample(names[-1], draw(0), "a")


def test_json_lines_on_a_web_server(images: Path, tmp_path: Path) -> None:
    names = ["a b.jpg", "ä.jpg", "c%20d.jpg", "gone.jpg"]
    for i, name in enumerate(names[:3]):
        (images / "images" / unquote(name)).write_bytes(draw(i))
    write_lines(images / "a.jsonl", *({"image": f"images/{n}", "caption": n} for n in names))
    handler = partial(SimpleHTTPRequestHandler, directory=str(images))
    with serve(handler) as url:
        found = items_of(f"{url}/a.jsonl")
    good = [Sample(f"images/{name}", draw(i), name) for i, name in enumerate(names[:3])]
    assert found == [*good, Skipped("images/gone.jpg", samples.MISSING_IMAGE)]


def test_nothing_waits_for_reads_after_ctrl_c() -> None:
    code = """if True:
        import os, signal, threading, time
        from alignclip.conversion.formats.remote import read_ahead
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            list(read_ahead([lambda: time.sleep(300)] * 40))
        except KeyboardInterrupt:
            print("interrupted")
    """
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


# img2dataset's folders of files


def write_folder(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    folder.mkdir(parents=True)
    for name, data in members:
        (folder / name).write_bytes(data)
    return folder


def write_files(folder: Path) -> Path:
    """Two shards as img2dataset writes them, with its lists and statistics beside."""
    for shard in range(2):
        name = f"{shard:05}"
        write_folder(folder / name, pairs(10 * shard, 3))
        (folder / f"{name}.parquet").write_bytes(b"PAR1")
        (folder / f"{name}_stats.json").write_text("{}")
    return folder


def test_folders_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_files(tmp_path / "in")
    assert expand_inputs([str(source)]) == [f"{source}/00000/", f"{source}/00001/"]
    assert expand_inputs([str(source / "{00000..00001}")]) == expand_inputs([str(source)])
    assert capsys.readouterr().err == ""
    counts = quick([source], tmp_path / "out")
    assert (counts.written, counts.bad, counts.inputs) == (6, 0, 2)
    got = read_back(None, tmp_path / "out")
    assert list(got) == [f"{i:05}" for i in (0, 1, 2, 10, 11, 12)]
    assert got["00011"] == {"key": "00011", "image": draw(11), "caption": "picture 11"}
    assert quick([source], tmp_path / "out").converted == 0
    (source / "00001" / "00013.jpg").write_bytes(draw(13))
    (source / "00001" / "00013.txt").write_text("picture 13")
    again = quick([source], tmp_path / "out")
    assert (again.written, again.converted) == (7, 1)


def test_files_are_counted_as_the_members_of_a_tar(tmp_path: Path) -> None:
    members = [
        *pairs(0, 2),
        ("00002.jpg", draw(2)),
        ("00003.txt", b"no image"),
        ("00004.jpg", b""),
        ("00004.txt", b"empty"),
        ("list.txt2", b""),
        ("README", b""),
        ("._00000.jpg", b""),
        ("00005.jpg", draw(5)),
        ("00005.json", b'{"caption": "of json"}'),
    ]
    folder = write_folder(tmp_path / "00000", members)
    (folder / "below").mkdir()
    found = items_of(f"{folder}/")
    in_a_tar = items_of(write_tar(tmp_path / "a.tar", sorted(members)))
    assert sorted(map(repr, found)) == sorted(map(repr, [*in_a_tar, Ignored("below", "folder")]))
    assert Sample("00005", draw(5), "of json") in found
    assert captions_of(f"{folder}/", caption_key="title") == ["title 0", "title 1"]


def test_folders_of_files_in_a_bucket(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket()
    for path in sorted(write_files(tmp_path / "in").rglob("*")):
        if path.is_file():
            put(s3, f"{bucket}/raw/{path.relative_to(tmp_path / 'in')}", path.read_bytes())
    put(s3, f"{bucket}/raw/00001/notes", b"")
    places = [f"{bucket}/raw/00000/", f"{bucket}/raw/00001/"]
    assert (
        expand_inputs([f"{bucket}/raw"])
        == expand_inputs([f"{bucket}/raw/{{00000..00001}}"])
        == places
    )
    counts = quick([f"{bucket}/raw"], f"{bucket}/out")
    assert (counts.written, counts.ignored) == (6, {"file without an ending": 1})
    local = items_of(f"{tmp_path}/in/00001/")
    assert items_of(places[1]) == [Ignored("notes", "file without an ending"), *local]
    assert quick([f"{bucket}/raw"], f"{bucket}/out").converted == 0


def test_files_that_cannot_be_read_cost_their_pairs_alone(tmp_path: Path) -> None:
    members = [member for member in pairs(0, 4) if not member[0].endswith("json")]
    folder = write_folder(tmp_path / "00000", members)
    for name in ("00000.jpg", "00002.txt", "00004.jpg"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("nowhere")
    (folder / "00001.jpg").unlink()
    os.mkfifo(folder / "00001.jpg")
    counts = quick([f"{folder}/"], tmp_path / "out", max_bad=0.9)
    assert counts.written == 1
    assert counts.skipped == {samples.MISSING_IMAGE: 2, samples.MISSING_CAPTION: 1}
    assert counts.ignored == {"file that can't be read": 4}
    assert quick([f"{folder}/"], tmp_path / "out", max_bad=0.9).converted == 0


def test_files_that_a_bucket_refuses_cost_their_pairs_alone(refusing: Any, tmp_path: Path) -> None:
    for name, data in pairs(0, 5):
        refusing.objects["b", f"00000/{name}"] = data
    denied = ["00000/00000.jpg", "00000/00001.txt", "00000/00002.jpg", "00000/00002.txt"]

    def refuse(request: Any) -> Any:
        return (403, "AccessDenied") if request.key in denied else None

    refusing.refuse = refuse
    counts = quick(["s3://b/00000/"], tmp_path / "out", max_bad=0.9)
    assert (counts.written, counts.skipped) == (2, {samples.UNREADABLE_FILE: 3})
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("access denied: the key may not read it (s3:GetObject)") == 3
    refusing.without_right("read")
    message = "The first: 00000: .*access denied: the key may not read"
    refused(message, ["s3://b/00000/"], tmp_path / "none")


def test_names_of_files_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "00000"
    folder.mkdir()
    for name, data in (("Käse.jpg", draw(0)), ("Käse.txt", b"cheese"), ("Käse", b"")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name.encode("latin-1"))).write_bytes(data)
    assert items_of(f"{folder}/") == [
        Ignored("K\ufffdse", "file without an ending"),
        Sample("K\ufffdse", draw(0), "cheese"),
    ]
    assert quick([f"{folder}/"], tmp_path / "out").written == 1


def test_pairs_at_the_root_of_a_bucket(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket()
    for name, data in pairs(0, 2):
        put(s3, f"{bucket}/{name}", data)
    assert quick([f"{bucket}/"], tmp_path / "out").written == 2
    assert (tmp_path / "out" / bucket.removeprefix("s3://") / "counts.json").exists()


def test_parquet_files_beside_folders_of_other_things(tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000" / "notes.txt").write_text("")
    (tmp_path / "00001" / "0.jpg").write_bytes(draw(0))
    assert expand_inputs([str(tmp_path)]) == [f"{tmp_path}/00000.parquet"]


def test_a_folder_of_tars_comes_first(tmp_path: Path) -> None:
    source = write_files(three_tars(tmp_path))
    cut(source / "00002.tar", 2)
    assert expand_inputs([str(source)]) == [f"{source}/{i:05}.tar" for i in range(3)]
