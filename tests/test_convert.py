"""Pairs to MDS: what is written, what a second run does, and what it refuses."""

from __future__ import annotations

import functools
import http.server
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from tarballs import (
    assert_three_tars,
    cut,
    draw,
    pairs,
    quick,
    read_back,
    serve,
    stage,
    three_tars,
    write_tar,
)

from alignclip.conversion import dataset, samples
from alignclip.conversion.cc12m import summary
from alignclip.conversion.dataset import convert
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.mds_writer import JoinedShardWriter
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts, total_of
from alignclip.conversion.shards import position
from alignclip.errors import UserError
from alignclip.storage.staging import OutputFolder


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


def test_a_second_run_goes_on(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    quick([source / "{00000..00001}.tar"], out)
    assert quick([source], out).resumed == 10
    (out / "00001" / "index.json").unlink()
    (out / "index.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}

    again = quick([source], out)
    assert (again.written, again.resumed) == (15, 10)
    changed = {
        str(path.relative_to(out))
        for path in out.glob("*/*")
        if path.stat().st_mtime_ns != before.get(path)
    }
    assert changed == {f"00001/{name}" for name in ("shard.00000.mds", "counts.json", "index.json")}
    assert_three_tars(read_back(None, out))

    assert quick([source], out).resumed == 15


def test_what_was_begun_otherwise_is_refused(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    quick([source / "00000.tar"], out)
    for changes, message in (
        ({"size_limit": "1mb"}, "begun with --size-limit 32mb, this run has --size-limit 1mb"),
        (
            {"images": ImageOptions(check="none")},
            "begun with --check decode, this run has --check none",
        ),
        (
            {"images": ImageOptions(resize=8, quality=50)},
            "begun with no --resize, this run has --resize 8",
        ),
        ({"held_out": 0.1}, "begun with --held-out 0.0, this run has --held-out 0.1"),
        ({"compression": "zstd"}, "begun with no --compression, this run has --compression zstd"),
    ):
        end = (
            f"finish it with the same options, choose another --out or delete {out} to start again$"
        )
        with pytest.raises(UserError, match=f"{message}: {end}"):
            quick([source], out, **changes)
    other = three_tars(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"out/00000 was made from .*/in/00000\.tar, not from .*/other/00000\.tar"
    ):
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
        ({"size_limit": "0"}, "^--size-limit 0: must be positive"),
        (
            {"compression": "rar"},
            r"^--compression rar .*; valid: br\[:0-11\], bz2\[:1-9\], gz\[:0-9\], snappy, "
            r"zstd\[:1-22\]$",
        ),
        (
            {"compression": "zstd:23"},
            r"^--compression zstd:23 is not one of Streaming's; valid: br",
        ),
        (
            {"out": "s3:/bucket/x"},
            r"^--out=s3:/bucket/x has one slash; did you mean 's3://bucket/x'\?",
        ),
        ({"processes": 0}, "--processes must be at least 1, not 0"),
        (
            {"out": "ftp://host/x"},
            r"cannot write to 'ftp://host/x': Streaming knows s3://, gs://, .* and local folders",
        ),
    ],
)
def test_options_are_checked_up_front(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    source = three_tars(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        quick([source], **{"out": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_staged_shows_nothing_after_an_error(tmp_path: Path) -> None:
    store = OutputFolder(str(tmp_path / "out"))

    def fail() -> None:
        with store.staged("part") as folder:
            (folder / "index.json").write_text("{}")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert store.listing() == set()
    assert list((tmp_path / "out").iterdir()) == []


# what was truncated, or converted with a mistake in the command, is done again


def assert_index_is_what_is_there(out: Path) -> None:
    index = json.loads((out / "index.json").read_text())
    named = {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in index["shards"]}
    assert named == {
        str(path.relative_to(out)): path.stat().st_size for path in out.glob("*/*.mds")
    }


def test_a_truncated_tar_is_converted_again_once_it_is_whole(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    counts = quick([source], out, size_limit="4kb")
    assert (counts.written, counts.skipped, counts.broken) == (
        12,
        {samples.BROKEN_INPUT: 1},
        ["00001"],
    )
    options = ConvertOptions([str(source)], str(out), semantic=False)
    hint = "\n1 input is truncated (00001): fetch it again and repeat this command\n"
    assert hint in summary(counts, options)

    unchanged = quick([source], out, size_limit="4kb")
    assert (unchanged.resumed, unchanged.converted, unchanged.broken) == (12, 0, ["00001"])
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
    assert {shard["raw_data"]["basename"] for shard in index["shards"]} == {
        p.name for p in out.glob("*/*.mds")
    }


def test_a_part_that_is_being_replaced_is_incomplete(tmp_path: Path) -> None:
    store = OutputFolder(str(tmp_path / "out"))
    stage(store, "shard.00000.mds", "index.json", "counts.json")
    (
        tmp_path / "out" / "00000" / "shard.00001.mds"
    ).mkdir()  # can't be unlinked and ends it there, as a kill would
    with pytest.raises(OSError, match=r"shard\.00001\.mds"):
        stage(store, "shard.00000.mds", "index.json", "counts.json")
    assert "00000/counts.json" not in store.listing()


def test_a_run_that_fails_while_it_replaces_leaves_a_smaller_set_that_is_whole(
    tmp_path: Path,
) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    with serve(
        functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(source))
    ) as url:
        every = [url + "/{00000..00002}.tar"]
        assert quick(every, out).written == 12
        (source / "00001.tar").unlink()
        with pytest.raises(UserError, match="HTTP Error 404"):
            quick(every, out)
        assert list(read_back(None, out)) == [f"{i:05}" for i in (*range(5), *range(20, 25))]
        assert json.loads((out / "dataset.json").read_text())["samples"] == 10
        (source / "00001.tar").write_bytes(whole)
        again = quick(every, out)
    assert (again.written, again.resumed, again.broken) == (15, 10, [])
    assert_three_tars(read_back(None, out))


def test_a_wrong_caption_key_can_be_corrected(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    message = (
        r"^no sample was written from 3 inputs; skipped: missing caption 15\. --caption-key "
        r"'captoin' is no text in "
        r"the json members; they have: caption, title; did you mean 'caption'\?$"
    )
    with pytest.raises(UserError, match=message):
        quick([source], out, caption_key="captoin")
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"they have: caption, title$"):
        quick([source], out, caption_key="zzz")
    assert quick([source], out, caption_key="title").written == 15
    assert {row["caption"] for row in read_back(None, out).values()} >= {"title 0", "title 24"}
    with pytest.raises(
        UserError, match="begun with --caption-key title, this run has --caption-key caption"
    ):
        quick([source], out, caption_key="caption")


@pytest.mark.parametrize("name", ["letter.txt", "photos/2020/a.jpg"])
def test_a_folder_of_other_files_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "documents"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError,
        match=rf"documents holds other files \({name}\); give --out a new or empty folder$",
    ):
        quick([source], out, encoder="does/not-exist", semantic=True)
    assert sorted(tmp_path.rglob("*")) == there


def test_what_a_folder_may_hold_before(tmp_path: Path) -> None:
    """Hidden files, empty folders, a split that was converted first, and what a killed
    conversion has left.
    """
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    assert quick([source / "00001.tar"], out / "val").written == 5
    (out / "lost+found").mkdir(parents=True)
    for name in (".DS_Store", ".partial-x/convert.json", ".lock"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("")
    assert quick([source / "00000.tar"], out).written == 5
    (out / "notes.txt").write_text("beside a set of ours")
    for name in ("index.json", "dataset.json"):
        (out / name).unlink()
    assert quick([source], out).written == 15


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a hidden file"])
@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_a_table_of_wrong_paths_says_where_it_looked_and_leaves_nothing(
    tmp_path: Path, before: str, held_out: float
) -> None:
    table, out = tmp_path / "set" / "a.csv", tmp_path / "new" / "deep" / "out"
    table.parent.mkdir()
    table.write_text("image,caption\npics/1.jpg,a\npics/2.jpg,b\n", encoding="utf-8")
    if before != "nothing":
        out.mkdir(parents=True)
    if before == "a hidden file":
        (out / ".DS_Store").write_text("")
    message = (
        rf"^no sample was written from 1 input; skipped: missing image 2\. The first: no file "
        rf"{tmp_path}/set/pics/1\.jpg \(a table's relative paths begin at its own folder\)$"
    )
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        quick([table], out, held_out=held_out)
    assert sorted(tmp_path.rglob("*")) == there


def test_inputs_without_a_sample_leave_nothing(tmp_path: Path) -> None:
    broken = write_tar(
        tmp_path / "in" / "a.tar",
        [(f"{i}.{kind}", b"x") for i in range(2) for kind in ("jpg", "txt")],
    )
    message = (
        r"^no sample was written from 1 input; skipped: not JPEG, PNG or WebP 2\. The first: "
        r"0: it begins"
    )
    with pytest.raises(UserError, match=message):
        quick([broken], tmp_path / "out")
    with pytest.raises(UserError, match=r"^no sample was written from 2 inputs"):
        quick([broken, write_tar(tmp_path / "in" / "b.tar", [])], tmp_path / "out", processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_set_to_which_nothing_was_written_points_to_its_report(tmp_path: Path) -> None:
    """What a run that was killed has left stays where it is."""
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "convert.json").write_text("{}")
    with pytest.raises(UserError, match=rf"did you mean 'caption'\?; {out}/report\.md says more$"):
        quick([source], out, caption_key="captoin")
    assert (out / "report.md").exists()


def test_where_captions_are_when_none_were_found(tmp_path: Path) -> None:
    meta = json.dumps({"alt": "an old clock", "width": 40, "other": None}).encode()
    path = write_tar(tmp_path / "a.tar", [("0.jpg", draw(0)), ("0.json", meta)])
    with pytest.raises(
        UserError,
        match=r"no txt members, and no 'caption' in json members; they have: alt \(--capt",
    ):
        quick([path], tmp_path / "out")
    with pytest.raises(
        UserError, match=r"--caption-key 'width' is no text in the json members; they have: alt$"
    ):
        quick([path], tmp_path / "out", caption_key="width")
    write_tar(path, [("0.jpg", draw(0))])
    with pytest.raises(
        UserError, match=r"There are no texts in json members, and there are no txt members$"
    ):
        quick([path], tmp_path / "out")
    write_tar(path, [])
    with pytest.raises(UserError, match=r"from 1 input; skipped: nothing$"):
        quick([path], tmp_path / "out")


# --- one conversion at a time, whole files, odd names ---------------------------------------------


def test_a_second_conversion_into_a_folder_is_refused(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    with (
        OutputFolder(str(out)).locked(),
        pytest.raises(UserError, match=f"another conversion into {out} is running"),
    ):
        quick([source], out)
    assert quick([source], out).written == 15
    assert not list(out.glob(".*"))


def test_a_lock_that_was_removed_is_none(tmp_path: Path) -> None:
    """Whoever opens it before its owner removes it would else hold a file that nobody else can
    see.
    """
    out = tmp_path / "out"
    with OutputFolder(str(out)).locked():
        (out / ".lock").unlink()
        with OutputFolder(str(out)).locked():
            assert (out / ".lock").exists()


@pytest.mark.parametrize("broken", ["", "{", '{"written": 5'])
def test_a_part_with_broken_counts_is_converted_again(tmp_path: Path, broken: str) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    quick([source], out)
    (out / "00001" / "counts.json").write_text(broken)
    again = quick([source], out)
    assert (again.written, again.resumed) == (15, 10)
    assert_three_tars(read_back(None, out))
    (out / "convert.json").write_text(broken)
    with pytest.raises(UserError, match=r"convert\.json is broken; delete .* to start again"):
        quick([source], out)


def test_what_another_process_removes_is_missed(tmp_path: Path) -> None:
    store = OutputFolder(str(tmp_path / "out"))
    index = {"shards": [{"raw_data": {"basename": "shard.00000.mds"}, "zip_data": None}]}
    with (
        pytest.raises(UserError, match=r"shard\.00000\.mds was removed by another process"),
        store.staged("a") as folder,
    ):
        (folder / "index.json").write_text(json.dumps(index))
    assert not (tmp_path / "out" / "a").exists()


def test_odd_names(tmp_path: Path) -> None:
    """A # begins no part, a ? no query, where the file is a local one.

    A hidden file would have no name.
    """
    names = ["a#1.tar", "b?x=1.tar", "c d.tar", "é.tar"]
    for i, name in enumerate(names):
        write_tar(tmp_path / "in" / name, pairs(10 * i, 3))
    write_tar(tmp_path / "in" / ".d.tar", pairs(90, 3))
    assert quick([tmp_path / "in"], tmp_path / "out").written == 12
    parts = {path.parent.name for path in (tmp_path / "out").glob("*/index.json")}
    assert parts == {"a#1", "b?x=1", "c d", "é"}
    assert len(read_back(None, tmp_path / "out")) == 12
    with pytest.raises(UserError, match="is a hidden file; rename it"):
        quick([tmp_path / "in" / ".d.tar"], tmp_path / "other")


def test_a_relative_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick([three_tars(tmp_path / "in")], "out")
    assert_three_tars(read_back(None, tmp_path / "out"))
    assert quick(["in"], "./out/").converted == 0


def test_an_executor_of_ones_own(tmp_path: Path) -> None:
    """Which goes on to be of use."""
    options = ConvertOptions(
        [str(three_tars(tmp_path / "in"))], str(tmp_path / "out"), semantic=False, progress=False
    )
    with ThreadPoolExecutor(2) as executor:
        assert convert(options, executor).written == 15
        assert executor.submit(int, "7").result() == 7
    assert_three_tars(read_back(None, tmp_path / "out"))


class Elsewhere(ThreadPoolExecutor):
    """Workers that see another folder of the name, as those of other machines do."""

    def submit(self, work: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *rest, options, witness = arguments
        assert witness.startswith(options.out)
        return super().submit(work, *rest, options, witness + "-elsewhere")


def test_workers_that_do_not_see_the_output(tmp_path: Path) -> None:
    """Found out by the first of them, not when all is written somewhere else."""
    options = ConvertOptions(
        [str(three_tars(tmp_path / "in"))], str(tmp_path / "out"), semantic=False, progress=False
    )
    message = (
        r"^the worker on .* does not see .*/out, where this command writes: a local --out "
        r"has to be a folder that"
    )
    with Elsewhere(1) as executor, pytest.raises(UserError, match=message):
        convert(options, executor)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["convert.json"]


def test_parts_of_held_out_samples_alone(tmp_path: Path) -> None:
    """An input may have no other; the training split is without it, and nothing is converted
    twice.
    """
    keys = [f"{i:05}" for i in range(400)]
    held = [key for key in keys if position(key) < 0.2][:3]
    kept = [key for key in keys if position(key) >= 0.2][:3]
    for name, chosen in (("held", held), ("kept", kept)):
        members = [
            (f"{key}.{end}", data)
            for key in chosen
            for end, data in (("jpg", draw(int(key))), ("txt", b"x"))
        ]
        write_tar(tmp_path / "in" / f"{name}.tar", members)
    counts = quick([tmp_path / "in"], tmp_path / "out", held_out=0.2)
    assert (counts.written, counts.held_out) == (6, 3)
    assert sorted(read_back(None, tmp_path / "out")) == kept
    assert sorted(read_back(None, tmp_path / "out" / "val")) == held
    assert quick([tmp_path / "in"], tmp_path / "out", held_out=0.2).converted == 0


@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_shards_are_streamings_own(tmp_path: Path, compression: str | None) -> None:
    """Byte for byte what MDSWriter writes: any sizes, samples that exceed the limit first, last
    and in between.
    """
    rng, columns = random.Random(0), {"key": "str", "image": "bytes", "caption": "str"}
    for i in range(25):
        limit = rng.choice(["300b", "1kb", "4kb", "64kb"])
        ours, theirs = tmp_path / f"ours-{i}", tmp_path / f"theirs-{i}"
        ours.mkdir()
        own = MDSWriter(
            columns=columns,
            out=str(theirs),
            hashes=["xxh64"],
            size_limit=limit,
            compression=compression,
        )
        with own, JoinedShardWriter(columns, ours, ["xxh64"], limit, compression) as writer:
            for key in range(rng.randint(0, 40)):
                image = rng.randbytes(rng.choice([0, 1, 10, 200, 3000, rng.randint(0, 9000)]))
                sample = {"key": str(key), "image": image, "caption": "x" * rng.randint(0, 50)}
                own.write(sample)
                writer.write(sample)
        assert sorted(path.name for path in ours.iterdir()) == sorted(
            path.name for path in theirs.iterdir()
        )
        for path in theirs.iterdir():
            assert (ours / path.name).read_bytes() == path.read_bytes(), (i, path.name)


# --- what belongs to a set ------------------------------------------------------------------------


def test_no_input_of_a_half_finished_set_is_left_out(tmp_path: Path) -> None:
    """Others would else be published as the whole, with what happens to be there of the first
    ones.
    """
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    other = write_tar(tmp_path / "more" / "other.tar", pairs(50, 5))
    quick([source], out)
    for name in ("index.json", "dataset.json", "00001/counts.json"):  # as a kill leaves it
        (out / name).unlink()
    message = (
        rf"begun with other --inputs, and 1 of its inputs is not converted yet "
        rf"\({source}/00001\.tar\): name it"
    )
    for inputs in ([other], [source / "00000.tar"], [source / "00000.tar", other]):
        with pytest.raises(UserError, match=message):
            quick(inputs, out)
        assert not (out / "index.json").exists()
    assert quick([source, other], out).written == 20
    assert json.loads((out / "dataset.json").read_text())["inputs"] == 4


def test_a_finished_set_takes_more_inputs(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    assert quick([source / "{00000..00001}.tar"], out).written == 10
    assert quick([source / "00002.tar"], out).written == 15
    assert_three_tars(read_back(None, out))
    plan = json.loads((out / "convert.json").read_text())["inputs"]
    assert plan == {f"{i:05}": f"{source}/{i:05}.tar" for i in range(3)}
    said = [f"{source}/{{00000..00001}}.tar", f"{source}/00002.tar"]
    assert json.loads((out / "dataset.json").read_text())["source"] == said
    assert (
        quick([source / "00000.tar"], out).converted == 0
    )  # whoever mends one input need not name all
    assert json.loads((out / "dataset.json").read_text())["source"] == [
        *said,
        f"{source}/00000.tar",
    ]


def test_a_driver_that_was_started_before_another_one_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there counts once nobody else can change it."""
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    check = dataset._try_options

    def meanwhile(options: ConvertOptions) -> None:
        monkeypatch.setattr(dataset, "_try_options", check)
        quick([source / "{00000..00001}.tar"], out)
        check(options)

    monkeypatch.setattr(dataset, "_try_options", meanwhile)
    counts = quick([source / "{00001..00002}.tar"], out)
    assert (counts.written, counts.resumed, counts.converted) == (15, 10, 1)
    assert_three_tars(read_back(None, out))


def test_equal_options_are_the_same(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    quick([source], out, size_limit="32mb", hashes=["xxh64", "sha1"])
    assert (
        quick([source], out, size_limit=str(32 * 2**20), hashes=["sha1", "xxh64", "sha1"]).converted
        == 0
    )


def test_a_held_out_split_that_is_gone_is_made_again(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    first = quick([source], out, held_out=0.4)
    kept = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out / "val")
    again = quick([source], out, held_out=0.4)
    assert (again.written, again.held_out) == (15, first.held_out)
    assert {
        path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()
    } == kept


def test_too_many_truncated_inputs(tmp_path: Path) -> None:
    """Of each it is one bad sample that is counted, and there may be thousands behind it."""
    for i in range(5):
        write_tar(tmp_path / "in" / f"{i:05}.tar", pairs(10 * i, 10))
        if i < 3:
            cut(tmp_path / "in" / f"{i:05}.tar", 4)
    message = (
        r"^3 of 5 inputs are truncated, more than --max-bad 0\.5 \(00000, 00001, 00002\): "
        r"fetch them again"
    )
    with pytest.raises(UserError, match=message):
        quick([tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    assert quick([tmp_path / "in"], tmp_path / "out", max_bad=0.6).resumed == 32


def test_the_report_of_what_was_mended_does_not_stay(tmp_path: Path) -> None:
    source, out = three_tars(tmp_path / "in"), tmp_path / "out"
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    quick([source], out)
    assert "00001.tar" in (out / "report.md").read_text()
    (source / "00001.tar").write_bytes(whole)
    quick([source], out)
    assert (
        (out / "report.md")
        .read_text()
        .endswith("15 samples read from 3 inputs, 15 written, 0 skipped.\n")
    )


def test_adding_inputs_up_copies_nothing_for_each() -> None:
    class Sides(list[int]):
        def __radd__(self, other: Any) -> Any:
            raise AssertionError("the sides of all inputs before are copied")

    parts = [Counts(written=1, sides=Sides([side])) for side in range(3)]
    total = total_of(parts)
    assert (total.written, total.sides, parts[0].sides) == (3, [0, 1, 2], [0])
