"""A conversion that ends at any of its operations and is started again: the set is what it would
have been.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from faults import every_point, prepare_for_forks
from processes import call
from s3 import S3Server
from tarballs import cut, pairs, quick, write_tar

from alignclip.errors import UserError
from alignclip.storage import staging
from alignclip.storage.staging import MARK, PARTIAL, OutputFolder, shown
from alignclip.storage.store import Store

OPTIONS = {"size_limit": "2kb", "held_out": 0.3}
START = (
    "start"  # of the operations: nothing is there, or a set of which an input was truncated then
)
MENDED = "mended"


def contents(out: str) -> dict[str, bytes]:
    """Every file of a set that isn't hidden."""
    store = OutputFolder(out)
    return {name: store.files.read_bytes(name) for name in shown(store.listing())}


def put(files: dict[str, bytes], out: str, scratch: Path) -> None:
    """Make ``out`` a set of these files."""
    store = OutputFolder(out)
    for name, content in files.items():
        scratch.write_bytes(content)
        if store.is_remote:
            store.files.put(scratch, name)
        else:
            path = Path(out, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(scratch, path)


def assert_no_index_names_what_is_not_there(out: str) -> None:
    files = contents(out)
    for split in ("", "val/"):
        index = json.loads(files.get(f"{split}index.json", b'{"shards": []}'))
        for shard in index["shards"]:
            name = split + shard["raw_data"]["basename"]
            assert len(files[name]) == shard["raw_data"]["bytes"], name


def interrupt_everywhere(folder: Path, uri: str, case: str, kind: str) -> int:
    """Interrupt a conversion at each of its operations, and finish it.

    Return how many these are.
    """
    prepare_for_forks("://" in uri)
    source, begun = folder / "in", {}
    for i in range(2):
        write_tar(source / f"{i}.tar", pairs(10 * i, 4))

    def convert(out: str) -> int:
        return quick(source, out, **OPTIONS).written

    if case == MENDED:
        whole = (source / "1.tar").read_bytes()
        cut(source / "1.tar", 2)
        convert(str(folder / "begun"))
        begun = contents(str(folder / "begun"))
        (source / "1.tar").write_bytes(whole)
    put(begun, str(folder / "expected"), folder / "file")
    assert convert(str(folder / "expected")) == 8
    expected = contents(str(folder / "expected"))
    assert len(expected) > 12

    def act(at: int) -> None:
        convert(f"{uri}/{at}")

    def finish(at: int) -> None:
        assert_no_index_names_what_is_not_there(f"{uri}/{at}")
        convert(f"{uri}/{at}")
        found = contents(f"{uri}/{at}")
        assert not list(Path(f"{uri}/{at}").glob(f"{PARTIAL}*"))
        assert not found.keys() ^ expected.keys(), found.keys() ^ expected.keys()
        for name in expected:
            assert found[name] == expected[name], name

    at = 0
    for at in every_point(act, kind, folder, lambda at: put(begun, f"{uri}/{at}", folder / "file")):
        try:
            finish(at)
        except Exception as error:
            raise AssertionError(f"after operation {at}") from error
        if "://" not in uri:
            shutil.rmtree(f"{uri}/{at}")
    return at


@pytest.mark.slow
@pytest.mark.parametrize("case", [START, MENDED])
@pytest.mark.parametrize("kind", ["dies", "fails"])
@pytest.mark.parametrize("to", ["folder", pytest.param("bucket", marks=pytest.mark.full)])
def test_a_conversion_is_interrupted_at_every_operation(
    s3: Any, tmp_path: Path, case: str, to: str, kind: str
) -> None:
    uri = f"{s3.bucket()}/out" if to == "bucket" else str(tmp_path / "out")
    assert call(interrupt_everywhere, tmp_path, uri, case, kind, timeout=500) > 40


@pytest.mark.parametrize("is_bucket", [False, True])
def test_what_was_begun_for_an_earlier_run_does_not_appear(
    s3: S3Server, tmp_path: Path, is_bucket: bool
) -> None:
    out = f"{s3.bucket()}/out" if is_bucket else str(tmp_path / "out")

    def write_beside_the_next_run(folder: Path) -> None:
        (folder / "index.json").write_text("{}")
        with OutputFolder(out).marked():
            pass

    with (
        OutputFolder(out).marked() as mark,
        pytest.raises(UserError, match=r"(that asked for this|or the command) is over"),
        OutputFolder(out, mark).staged("a") as folder,
    ):
        write_beside_the_next_run(folder)
    assert OutputFolder(out).listing() == set()


def test_a_run_that_ends_or_is_refused_leaves_the_mark_of_another(tmp_path: Path) -> None:
    out, tar = str(tmp_path / "out"), tmp_path / "in" / "0.tar"
    write_tar(tar, pairs(0, 4))
    quick(tar.parent, out)
    store = OutputFolder(out)
    first = store.marked()
    first.__enter__()
    with store.marked() as mark:
        first.__exit__(None, None, None)
        assert store.files.read_text(MARK) == mark
        with pytest.raises(UserError, match="was begun with"):
            quick(tar.parent, out, held_out=0.3)
        assert store.files.read_text(MARK) == mark
    assert MARK not in store.listing()


@pytest.mark.parametrize("is_bucket", [False, True])
def test_a_part_that_is_replaced_has_its_counts_last(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_bucket: bool
) -> None:
    """The old counts.json goes first. The new one follows the index, and that the shards."""
    store = OutputFolder(f"{s3.bucket()}/out" if is_bucket else str(tmp_path / "out"))
    done: list[str] = []

    def spy(owner: Any, name: str, at: int) -> None:
        real = getattr(owner, name)

        def act(*arguments: Any, **named: Any) -> Any:
            done.append(f"{name} {Path(arguments[at]).name}")
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, act)

    def write() -> None:
        with store.staged("a") as folder:
            for name in ("counts.json", "index.json", "shard.00000.mds"):
                (folder / name).write_text("{}")

    write()
    remove, put = ("delete", "put") if is_bucket else ("unlink", "replace")
    spy(Store if is_bucket else Path, remove, int(is_bucket))
    spy(Store if is_bucket else Path, put, 1 + is_bucket)
    spy(staging, "to_disk", 0)
    write()
    removed = [one for one in done if one.startswith(remove)]
    assert removed[0] == f"{remove} counts.json"
    assert len(removed) == 3
    on_disk = [] if is_bucket else ["to_disk a"]
    last = [f"{put} shard.00000.mds", f"{put} index.json", *on_disk, f"{put} counts.json", *on_disk]
    assert done[-len(last) :] == last
    assert done.index(removed[-1]) < done.index(last[0])
