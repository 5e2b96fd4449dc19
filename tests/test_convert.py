"""Pairs to MDS: what is written, what a second run does, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from streaming import MDSWriter
from tarballs import (
    assert_three_tars,
    contents,
    cut,
    draw,
    load_json,
    pairs,
    quick,
    read_back,
    refused,
    serve,
    stage,
    three_tars,
    write_tar,
)

from alignclip.conversion import dataset, samples
from alignclip.conversion.cc12m import summary
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.mds_writer import JoinedShardWriter
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts, total_of
from alignclip.conversion.shards import position
from alignclip.errors import UserError
from alignclip.storage.staging import OutputFolder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of three tars."""
    return three_tars(tmp_path / "in")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_local_shards_are_read_back_equal(source: Path, out: Path) -> None:
    counts = quick(source, out, size_limit="4kb")
    assert counts.written == 15
    assert_three_tars(out)
    shards = load_json(out / "index.json")["shards"]
    assert len(shards) > 3
    assert sum(shard["raw_data"]["bytes"] for shard in shards) == counts.bytes
    for shard in shards:
        assert shard["hashes"] == ["xxh64"]
        columns = zip(shard["column_names"], shard["column_encodings"], strict=True)
        assert dict(columns) == {"key": "str", "image": "bytes", "caption": "str"}
    assert not list(out.glob(".partial-*"))


def test_a_second_run_goes_on(source: Path, out: Path) -> None:
    quick(source / "{00000..00001}.tar", out)
    assert quick(source, out).resumed == 10
    (out / "00001" / "index.json").unlink()
    (out / "index.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}

    again = quick(source, out)
    assert (again.written, again.resumed) == (15, 10)
    changed = {path for path in out.glob("*/*") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == set(out.glob("00001/*"))
    assert_three_tars(out)

    assert quick(source, out).resumed == 15


def test_what_was_begun_otherwise_is_refused(source: Path, out: Path, tmp_path: Path) -> None:
    quick(source / "00000.tar", out)
    for changes, message in (
        ({"size_limit": "1mb"}, "--size-limit 32mb, this run has --size-limit 1mb"),
        ({"images": ImageOptions(check="none")}, "--check decode, this run has --check none"),
        ({"images": ImageOptions(resize=8, quality=50)}, "no --resize, this run has --resize 8"),
        ({"held_out": 0.1}, "--held-out 0.0, this run has --held-out 0.1"),
        ({"compression": "zstd"}, "no --compression, this run has --compression zstd"),
    ):
        end = f"with the same options, choose another --out or delete {out} to start again$"
        refused(f"begun with {message}: finish it {end}", source, out, **changes)
    plan = load_json(out / "convert.json")
    for size in ("infmb", "", [2**25], 1.5):  # damaged
        (out / "convert.json").write_text(json.dumps(plan | {"size_limit": size}))
        refused("begun with --size-limit ", source, out)
    (out / "convert.json").write_text(json.dumps(plan))
    other = three_tars(tmp_path / "other")
    refused(r"out/00000 was made from .*/in/00000\.tar, not from .*/other/00000\.tar", other, out)
    refused(r"would both become '00000'", [source, other], tmp_path / "both")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text("{}")
    refused("already holds a data set that is not this converter's", source, tmp_path / "foreign")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size_limit": "much"}, "^--size-limit much: Unsupported value"),
        ({"size_limit": "1e400mb"}, "^--size-limit 1e400mb: cannot convert float infinity"),
        ({"size_limit": "0"}, "^--size-limit 0: must be positive"),
        (
            {"compression": "rar"},
            r"^--compression rar .*; "
            r"valid: br\[:0-11\], bz2\[:1-9\], gz\[:0-9\], snappy, zstd\[:1-22\]$",
        ),
        (
            {"compression": "zstd:23"},
            r"^--compression zstd:23 is not one of Streaming's; valid: br",
        ),
        (
            {"out": "s3:/bucket/x"},
            r"^--out=s3:/bucket/x has one slash; did you mean 's3://bucket/x'\?",
        ),
        ({"hashes": ["xxh46"]}, r"^--hashes xxh46 .* Streaming's; did you mean 'xxh64'\?$"),
        ({"processes": 0}, "--processes must be at least 1, not 0"),
        (
            {"out": "ftp://host/x"},
            r"cannot write to 'ftp://host/x': Streaming knows s3://, gs://, .* and local folders",
        ),
    ],
)
def test_options_are_checked_up_front(
    source: Path, out: Path, changes: dict[str, Any], message: str
) -> None:
    refused(message, source, **{"out": out, **changes})
    assert not out.exists()


# what was truncated, or converted with a mistake in the command, is done again


def assert_index_is_what_is_there(out: Path) -> None:
    files = [shard["raw_data"] for shard in load_json(out / "index.json")["shards"]]
    named = {out / file["basename"]: file["bytes"] for file in files}
    assert named == {path: path.stat().st_size for path in out.glob("*/*.mds")}


def test_a_truncated_tar_is_converted_again_once_it_is_whole(source: Path, out: Path) -> None:
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    counts = quick(source, out, size_limit="4kb")
    assert (counts.written, counts.skipped) == (12, {samples.BROKEN_INPUT: 1})
    assert counts.broken == ["00001"]
    options = ConvertOptions([str(source)], str(out), semantic=False)
    hint = "\n1 input is truncated (00001): fetch it again and repeat this command\n"
    assert hint in summary(counts, options)
    assert "00001.tar" in (out / "report.md").read_text()

    unchanged = quick(source, out, size_limit="4kb")
    assert (unchanged.resumed, unchanged.converted, unchanged.broken) == (12, 0, ["00001"])
    assert hint in summary(unchanged, options)

    (source / "00001.tar").write_bytes(whole)
    again = quick(source, out, size_limit="4kb")
    assert (again.written, again.resumed, again.converted, again.skipped) == (15, 10, 1, {})
    assert "fetch" not in summary(again, options)
    end = "15 samples read from 3 inputs, 15 written, 0 skipped.\n"
    assert (out / "report.md").read_text().endswith(end)
    assert_three_tars(out)
    assert_index_is_what_is_there(out)
    assert quick(source, out, size_limit="4kb").converted == 0


def test_a_broken_tar_is_converted_again_though_its_size_stays(source: Path, out: Path) -> None:
    whole = (source / "00002.tar").read_bytes()
    at = whole.rindex(b"00024.jpg") + 10
    (source / "00002.tar").write_bytes(whole[:at] + b"\xff" * 300 + whole[at + 300 :])
    assert quick(source, out).written == 14
    (source / "00002.tar").write_bytes(whole)
    assert quick(source, out).converted == 1
    assert_three_tars(out)


@pytest.mark.slow
def test_another_tar_of_the_same_name_replaces_the_shards_of_the_first(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for first, number in ((0, 40), (40, 20)):
        write_tar(source / "a.tar", pairs(first, number))
        counts = quick(source, out, held_out=0.3, size_limit="2kb")
        (out / "a" / "notes.txt").write_text("not the converter's")
    held_out = {f"{i:05}" for i in range(40, 60) if position(f"{i:05}") < 0.3}
    assert (counts.written, counts.held_out) == (20, len(held_out))
    assert set(read_back(None, out, split="val")) == held_out
    assert len(read_back(None, out)) == 20 - len(held_out)
    assert {path.name for path in (out / "a").iterdir()} >= {"notes.txt", "counts.json"}
    for folder in (out, out / "val"):
        assert_index_is_what_is_there(folder)


def test_a_part_that_is_being_replaced_is_incomplete(out: Path) -> None:
    store = OutputFolder(str(out))
    stage(store, "shard.00000.mds", "index.json", "counts.json")
    # can't be unlinked and ends it there, as a kill would
    (out / "00000" / "shard.00001.mds").mkdir()
    with pytest.raises(OSError, match=r"shard\.00001\.mds"):
        stage(store, "shard.00000.mds", "index.json", "counts.json")
    assert "00000/counts.json" not in store.listing()


def test_a_run_that_fails_while_it_replaces_leaves_a_smaller_set_that_is_whole(
    source: Path,
    out: Path,
) -> None:
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 2)
    with serve(source) as url:
        every = [url + "/{00000..00002}.tar"]
        assert quick(every, out).written == 12
        (source / "00001.tar").unlink()
        refused(rf"cannot fetch {url}/00001\.tar: HTTP Error 404", every, out)
        assert list(read_back(None, out)) == [f"{i:05}" for i in (*range(5), *range(20, 25))]
        assert load_json(out / "dataset.json")["samples"] == 10
        (source / "00001.tar").write_bytes(whole)
        again = quick(every, out)
    assert (again.written, again.resumed, again.broken) == (15, 10, [])
    assert_three_tars(out)


def test_a_wrong_caption_key_can_be_corrected(source: Path, out: Path) -> None:
    message = (
        r"^no sample was written from 3 inputs; skipped: missing caption 15\. "
        r"--caption-key 'captoin' is no text in the json members; "
        r"they have: caption, title; did you mean 'caption'\?$"
    )
    refused(message, [source], out, caption_key="captoin")
    assert not (out / "index.json").exists()
    refused(r"they have: caption, title$", source, out, caption_key="zzz")
    assert quick(source, out, caption_key="title").written == 15
    assert {row["caption"] for row in read_back(None, out).values()} >= {"title 0", "title 24"}
    message = "begun with --caption-key title, this run has --caption-key caption"
    refused(message, source, out, caption_key="caption")


@pytest.mark.parametrize("name", ["letter.txt", "photos/2020/a.jpg"])
def test_a_folder_of_other_files_is_refused_before_anything_is_written(
    source: Path, out: Path, tmp_path: Path, name: str
) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    there = sorted(tmp_path.rglob("*"))
    message = rf"out holds other files \({name}\); give --out a new or empty folder$"
    refused(message, source, out, encoder="does/not-exist", semantic=True)
    assert sorted(tmp_path.rglob("*")) == there


def test_what_a_folder_may_hold_before(source: Path, out: Path) -> None:
    """Hidden files, empty folders, a split that came first, what a killed conversion has left."""
    assert quick(source / "00001.tar", out / "val").written == 5
    (out / "lost+found").mkdir(parents=True)
    for name in (".DS_Store", ".partial-x/convert.json", ".lock"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("")
    assert quick(source / "00000.tar", out).written == 5
    (out / "notes.txt").write_text("beside a set of ours")
    for name in ("index.json", "dataset.json"):
        (out / name).unlink()
    assert quick(source, out).written == 15


@pytest.mark.parametrize(
    ("before", "held_out"), [("nothing", 0.0), ("an empty folder", 0.5), ("a hidden file", 0.0)]
)
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
    refused(message, table, out, held_out=held_out)
    assert sorted(tmp_path.rglob("*")) == there


def test_inputs_without_a_sample_leave_nothing(tmp_path: Path, out: Path) -> None:
    members = [("0.jpg", b"x"), ("0.txt", b"x")]
    broken = write_tar(tmp_path / "in" / "a.tar", members)
    skipped = r"skipped: not JPEG, PNG or WebP 1\. The first: 0: it begins"
    refused(rf"^no sample was written from 1 input; {skipped}", broken, out)
    other = write_tar(tmp_path / "in" / "b.tar", [])
    refused(r"^no sample was written from 2 inputs", [broken, other], out, processes=2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_set_to_which_nothing_was_written_points_to_its_report(source: Path, out: Path) -> None:
    """What a run that was killed has left stays where it is."""
    out.mkdir()
    (out / "convert.json").write_text("{}")
    message = rf"did you mean 'caption'\?; {out}/report\.md says more$"
    refused(message, source, out, caption_key="captoin")
    assert (out / "report.md").exists()


def test_where_captions_are_when_none_were_found(tmp_path: Path, out: Path) -> None:
    meta = json.dumps({"alt": "an old clock", "width": 40, "other": None}).encode()
    image = ("0.jpg", draw(0))
    none = r"no txt members, and no 'caption' in json members; they have: alt \(--capt"
    width = r"--caption-key 'width' is no text in the json members; they have: alt$"
    for members, key, message in (
        ([image, ("0.json", meta)], None, none),
        ([image, ("0.json", meta)], "width", width),
        ([image], None, "There are no texts in json members, and there are no txt members$"),
        ([], None, "from 1 input; skipped: nothing$"),
    ):
        path = write_tar(tmp_path / "a.tar", members)
        refused(message, path, out, caption_key=key)


# one conversion at a time, whole files, odd names


def test_a_second_conversion_into_a_folder_is_refused(source: Path, out: Path) -> None:
    with (
        OutputFolder(str(out)).locked(),
        pytest.raises(UserError, match=f"another conversion into {out} is running"),
    ):
        quick(source, out)
    assert quick(source, out).written == 15
    assert not list(out.glob(".*"))


def test_a_lock_that_was_removed_is_none(tmp_path: Path) -> None:
    """Who opens it before its owner removes it would else hold a file that nobody can see."""
    out = tmp_path / "out"
    with OutputFolder(str(out)).locked():
        (out / ".lock").unlink()
        with OutputFolder(str(out)).locked():
            assert (out / ".lock").exists()


def test_broken_files_of_a_conversion(source: Path, out: Path) -> None:
    """A part is converted again; a set whose plan nobody knows is refused."""
    quick(source, out)
    record = load_json(out / "00001" / "counts.json")
    nulls = [json.dumps(record | {name: None}) for name in record]
    odd = [json.dumps(record | {name: [None]}) for name in ("sides", "skipped", "examples")]
    for broken in ("", '{"written": 5', '{"written": 5}', "[]", *nulls, *odd):
        (out / "00001" / "counts.json").write_text(broken)
        assert quick(source, out).resumed == 10, broken
    assert_three_tars(out)
    for broken in ("", "[]"):
        (out / "convert.json").write_text(broken)
        refused(r"convert\.json is broken; delete .* to start again", source, out)


def test_what_another_process_removes_is_missed(tmp_path: Path) -> None:
    store = OutputFolder(str(tmp_path / "out"))
    index = {"shards": [{"raw_data": {"basename": "shard.00000.mds"}, "zip_data": None}]}
    with (
        pytest.raises(UserError, match=r"shard\.00000\.mds was removed by another process"),
        store.staged("a") as folder,
    ):
        (folder / "index.json").write_text(json.dumps(index))
    assert not (tmp_path / "out" / "a").exists()


def test_odd_names(tmp_path: Path, out: Path) -> None:
    """A # of a local file begins no part, a ? no query; a hidden file would have no name."""
    source, names = tmp_path / "in", ["a#1", "b?x=1", "c d", "é", ""]
    for i, name in enumerate(names):
        write_tar(source / f"{name}.tar", pairs(10 * i, 3))
    assert quick(source, out).written == 12
    assert sorted(path.parent.name for path in out.glob("*/index.json")) == names[:-1]
    assert len(read_back(None, out)) == 12
    refused("is a hidden file; rename it", source / ".tar", tmp_path / "other")


def test_a_relative_out(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out.parent)
    quick(source, "out")
    assert_three_tars(out)
    assert quick("in", "./out/").converted == 0


def test_an_executor_of_ones_own(source: Path, out: Path) -> None:
    """Which goes on to be of use."""
    with ThreadPoolExecutor(2) as executor:
        assert quick(source, out, executor=executor).written == 15
        assert executor.submit(int, "7").result() == 7
    assert_three_tars(out)


class Elsewhere(ThreadPoolExecutor):
    """Workers that see another folder of the name, as those of other machines do."""

    def submit(self, work: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *rest, options, mark = arguments
        return super().submit(work, *rest, replace(options, out=f"{options.out}-other"), mark)


def test_workers_that_do_not_see_the_output(source: Path, out: Path) -> None:
    """Found out by the first of them, not when all is written somewhere else."""
    message = (
        "^the worker on .* does not see .*/out-other, where the command writes, or the command is "
        "over: a local --out has to be a folder that"
    )
    with Elsewhere(1) as executor:
        refused(message, source, out, executor=executor)
    assert [path.name for path in out.iterdir()] == ["convert.json"]


class Late(ThreadPoolExecutor):
    """A cluster that loses a run, and comes to the run's tasks when another run is done."""

    tasks: ClassVar[list[Callable[[], Any]]] = []

    def submit(self, work: Any, *arguments: Any) -> Any:  # type: ignore[override]
        self.tasks.append(partial(work, *arguments))
        lost: Future[Any] = Future()
        lost.set_exception(UserError("the connection is lost"))
        return lost


def test_a_task_of_an_earlier_run_writes_nothing(source: Path, out: Path) -> None:
    with Late(1) as executor:
        refused("^the connection is lost", source, out, executor=executor)
    quick(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for task in executor.tasks:
        with pytest.raises(UserError, match="or the command is over"):
            task()
    assert len(executor.tasks) == 3
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("compression", [None, "zstd:3"])
def test_shards_are_streamings_own(tmp_path: Path, compression: str | None) -> None:
    """Any sizes, samples that exceed the limit first, last and in between."""
    rng, columns = random.Random(0), {"key": "str", "image": "bytes", "caption": "str"}
    for i in range(25):
        limit = rng.choice(["300b", "1kb", "4kb", "64kb"])
        ours, theirs = tmp_path / f"ours-{i}", tmp_path / f"theirs-{i}"
        ours.mkdir()
        options = {"size_limit": limit, "compression": compression}
        own = MDSWriter(columns=columns, out=str(theirs), hashes=["xxh64"], **options)
        with own, JoinedShardWriter(columns, ours, ["xxh64"], limit, compression) as writer:
            for key in range(rng.randint(0, 40)):
                image = rng.randbytes(rng.choice([0, 1, 10, 200, 3000, rng.randint(0, 9000)]))
                sample = {"key": str(key), "image": image, "caption": "x" * rng.randint(0, 50)}
                own.write(sample)
                writer.write(sample)
        assert contents(ours) == contents(theirs), i


def test_no_second_is_waited_for_the_writers_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("Streaming looks after the threads again later")

    monkeypatch.setattr("streaming.base.format.base.writer.sleep", sleep)
    with JoinedShardWriter({"key": "str"}, tmp_path) as writer:
        writer.write({"key": "a"})
        for _ in range(64):  # more than there are threads
            writer.executor.submit(time.sleep, 0.02)
    assert (tmp_path / "index.json").exists()


# what belongs to a set


def test_no_input_of_a_half_finished_set_is_left_out(
    source: Path, out: Path, tmp_path: Path
) -> None:
    """Others would else be published as the whole, with what is there of the first ones."""
    other = write_tar(tmp_path / "more" / "other.tar", pairs(50, 5))
    quick(source, out)
    for name in ("index.json", "dataset.json", "00001/counts.json"):  # as a kill leaves it
        (out / name).unlink()
    left = rf"1 of its inputs is not converted yet \({source}/00001\.tar\): name it"
    message = f"begun with other --inputs, and {left}"
    for inputs in ([other], [source / "00000.tar"], [source / "00000.tar", other]):
        refused(message, inputs, out)
        assert not (out / "index.json").exists()
    assert quick([source, other], out).written == 20
    assert load_json(out / "dataset.json")["inputs"] == 4


def test_a_finished_set_takes_more_inputs(source: Path, out: Path) -> None:
    assert quick(source / "{00000..00001}.tar", out).written == 10
    assert quick(source / "00002.tar", out).written == 15
    assert_three_tars(out)
    plan = load_json(out / "convert.json")["inputs"]
    assert plan == {f"{i:05}": f"{source}/{i:05}.tar" for i in range(3)}
    said = [f"{source}/{{00000..00001}}.tar", f"{source}/00002.tar"]
    assert load_json(out / "dataset.json")["source"] == said
    # whoever mends one input need not name all
    assert quick(source / "00000.tar", out).converted == 0
    said.append(f"{source}/00000.tar")
    assert load_json(out / "dataset.json")["source"] == said


def test_a_driver_that_was_started_before_another_one_finished(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there counts once nobody else can change it."""
    check = dataset._try_options

    def meanwhile(options: ConvertOptions) -> None:
        monkeypatch.setattr(dataset, "_try_options", check)
        quick(source / "{00000..00001}.tar", out)
        check(options)

    monkeypatch.setattr(dataset, "_try_options", meanwhile)
    counts = quick(source / "{00001..00002}.tar", out)
    assert (counts.written, counts.resumed, counts.converted) == (15, 10, 1)
    assert_three_tars(out)


def test_equal_options_are_the_same(source: Path, out: Path) -> None:
    quick(source, out, size_limit="32mb", hashes=["xxh64", "sha1"])
    same = {"size_limit": str(32 * 2**20), "hashes": ["sha1", "xxh64", "sha1"]}
    assert quick(source, out, **same).converted == 0


def test_a_held_out_split_that_is_gone_is_made_again(source: Path, out: Path) -> None:
    first = quick(source, out, held_out=0.4)
    kept = contents(out)
    shutil.rmtree(out / "val")
    again = quick(source, out, held_out=0.4)
    assert (again.written, again.held_out) == (15, first.held_out)
    assert contents(out) == kept


def test_too_many_truncated_inputs(tmp_path: Path) -> None:
    """Of each it is one bad sample that is counted, and there may be thousands behind it."""
    for i in range(5):
        write_tar(tmp_path / "in" / f"{i:05}.tar", pairs(10 * i, 10))
        if i < 3:
            cut(tmp_path / "in" / f"{i:05}.tar", 4)
    message = (
        r"^3 of 5 inputs are truncated, more than --max-bad 0\.5 \(00000, 00001, 00002\): fetch"
    )
    refused(message, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    assert quick(tmp_path / "in", tmp_path / "out", max_bad=0.6).resumed == 32


def test_adding_inputs_up_copies_nothing_for_each() -> None:
    class Sides(list[int]):
        def __radd__(self, other: Any) -> Any:
            raise AssertionError("the sides of all inputs before are copied")

    parts = [Counts(written=1, sides=Sides([side])) for side in range(3)]
    total = total_of(parts)
    assert (total.written, total.sides, parts[0].sides) == (3, [0, 1, 2], [0])
