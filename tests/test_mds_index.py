"""A stranger's set: names that lead elsewhere, columns that execute code, numbers that can't be."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mds_sets import edit, pair_rows, shards_of, write_rows

from alignclip.config.schema import DataConfig, SetConfig, StreamConfig
from alignclip.conversion.cc12m import main as convert
from alignclip.data.mds_index import read_shards, why_not_plain, why_unusable
from alignclip.data.streams import check_streams
from alignclip.errors import UserError
from alignclip.evaluation.sets import OpenSets
from alignclip.verification.command import main as verify

Entry = dict[str, Any]
OUTSIDE = [
    "../x.mds", "../../x.mds", "a/../../x.mds", "a/..", "..", "/etc/passwd", "//server/share",
    "..\\x.mds", "a\\..\\x.mds", "C:\\x.mds", "C:/x.mds", "C:x.mds", "\\\\server\\share",
]  # fmt: skip
NO_NAMES: list[Any] = [
    "", "x\0.mds", ".", "./x.mds", "a//x.mds", "a/", "x" * 256, "x\n.mds", "\x1b[2J", "\ud800",
    None, 5, ["x"], {"x": 1}
]  # fmt: skip


@pytest.mark.parametrize("name", [*OUTSIDE, *NO_NAMES], ids=ascii)
def test_what_is_no_plain_name(name: Any) -> None:
    why = why_not_plain(name)
    assert why is not None
    assert why.isprintable()
    assert len(why) < 130
    assert ("outside the set" in why) == (name in OUTSIDE)


@pytest.mark.parametrize(
    "name",
    [
        "shard.00000.mds",
        "00000/shard.00000.mds.zstd",
        "a b/ü.mds",
        "~/x",
        "..x/y..",
        "x" * 255,
        "日本/1.mds",
    ],
)
def test_a_plain_name(name: str) -> None:
    assert why_not_plain(name) is None


def write(folder: Path, **options: Any) -> list[Entry]:
    """Write a set; return the entries of its index."""
    return shards_of(write_rows(folder, pair_rows(24), size_limit="10kb", **options))


def index(folder: Path, entries: Any) -> None:
    edit(folder / "index.json", lambda content: content.update(shards=entries))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return write(tmp_path_factory.mktemp("whole"), compression="zstd")[0]


def stored_as(encoding: str, size: int | None = None) -> Entry:
    """Changes to the first column."""
    return {"column_encodings": [encoding, "bytes", "str"], "column_sizes": [size, None, None]}


RAW, ZIP = "shard.00000.mds", "shard.00000.mds.zstd"
NO_FILE = "has no file with a basename, bytes and hashes"
NO_SIZE = f"has no size or no hashes of {RAW}"
CANT = "which Streaming can't read"
UNEVEN = "has not one name, encoding and size for each column"
# what an entry has instead (of a file, what is to be changed of it; None: nothing), and why it
# can't be read
BROKEN: list[tuple[Entry, str]] = [
    ({"raw_data": {"basename": "../x.mds"}}, "names a file outside the set: ../x.mds"),
    ({"zip_data": {"basename": "/x.mds"}}, "names a file outside the set: /x.mds"),
    ({"raw_data": {"basename": "index.json"}}, "names the index as a shard: index.json"),
    ({"zip_data": {"basename": "a/index.json"}}, "names the index as a shard: a/index.json"),
    ({"raw_data": {"basename": ZIP}}, f"has one name for two files: {ZIP}"),
    *(({"raw_data": {"bytes": size}}, NO_SIZE) for size in (-1, 2**32 + 1, True, 1e3)),
    *(({"zip_data": {"hashes": h}}, f"{NO_SIZE}.zstd") for h in (["xxh64"], {"xxh64": 5})),
    ({"raw_data": {"extra": 1}}, NO_FILE),
    ({"raw_data": None}, NO_FILE),
    ({"raw_data": {"bytes": 2**32}}, "would unpack 4,294,967,296 bytes in"),
    ({"raw_data": RAW}, NO_FILE),
    ({"zip_data": None}, "is compressed and has no zip_data"),
    ({"compression": None}, "is compressed and has no zip_data"),
    ({"compression": "rar"}, f"is compressed with rar, {CANT}"),
    ({"compression": ["zstd"]}, f"is compressed with ['zstd'], {CANT}"),
    ({"samples": -1}, "has -1 samples"),
    ({"samples": True}, "has True samples"),
    ({"samples": 10**12}, "has 1,000,000,000,000 samples in"),
    ({"format": "csv"}, "has the format csv, not mds"),
    ({"format": "json", "raw_meta": {"basename": "../x"}}, "has the format json, not mds"),
    ({"version": 1}, "has version 1; Streaming reads 2"),
    ({"raw_meta": {"basename": "../x"}}, "has raw_meta, which no MDS shard has"),
    ({"column_names": ["key", "key", "caption"]}, UNEVEN),
    ({"column_names": "key"}, "has no names, encodings and sizes of columns"),
    ({"column_sizes": [None]}, UNEVEN),
    ({"hashes": "xxh64"}, "has no list of hashes, or no size limit"),
    *(
        (stored_as(e), f"as {e}, which executes code when it is read")
        for e in ("pkl", "pkl:", "pkl:x")
    ),
    *((stored_as(e), f"as {e}, {CANT}") for e in ("PKL", "list[pkl]", "ndarray:object", "str:x")),
    (stored_as("ndarray:float16:-1", -2), f"as ndarray:float16:-1, {CANT}"),
    (stored_as("str", -5), "in -5 bytes"),
    (stored_as("str", 0), "in 0 bytes"),
]


@pytest.mark.parametrize(("change", "why"), BROKEN, ids=[why for _, why in BROKEN])
def test_an_entry_that_can_not_be_read_safely(whole: Entry, change: Entry, why: str) -> None:
    assert why_unusable(whole) is None
    inner = {
        name: {**whole[name], **value}
        for name, value in change.items()
        if name in ("raw_data", "zip_data") and isinstance(value, dict)
    }
    said = why_unusable({**whole, **change, **inner})
    assert said is not None
    assert why in said
    assert said.isprintable()


def test_an_entry_without_a_field(whole: Entry) -> None:
    assert why_unusable({k: v for k, v in whole.items() if k != "samples"}) == "lacks samples"


def test_any_value_in_any_place_is_told_and_never_raised(whole: Entry) -> None:
    files: list[Any] = [{}, {"basename": "x"}, [], [None], [[["pkl"]]]]
    for value in (None, True, -1, 1e308, 10**30, "", "../x", *files):
        assert why_unusable(value) is not None
        for name in whole:
            why_unusable({**whole, name: value})
            for file in ("raw_data", "zip_data"):
                for part in whole[file]:
                    why_unusable({**whole, file: {**whole[file], part: value}})


@pytest.mark.parametrize(
    "text", ["", "5", "[]", "{}", '{"shards": 5}', "[" * 100_000, '{"version": 1, "shards": []}']
)
def test_a_file_that_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"is not a streaming index|has version 1; Streaming reads 2"
    ):
        read_shards(tmp_path / "index.json")


def test_every_encoding_of_streaming_is_data_or_refused(whole: Entry) -> None:
    from streaming.base.format.mds.encodings import get_mds_encoded_size, get_mds_encodings

    for encoding in get_mds_encodings():
        entry = {**whole, **stored_as(encoding, get_mds_encoded_size(encoding))}
        assert (why_unusable(entry) is None) == (encoding != "pkl"), encoding


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def convert_set(stream: SetConfig) -> None:
    place = stream.remote or stream.local
    convert(["--inputs", f"{place}/index.json", "--out", f"{place}/out", "--no-semantic"])


READERS: dict[str, Callable[[StreamConfig], Any]] = {
    "training": lambda stream: check_streams(DataConfig(streams={"a": stream}), semantic=False),
    "evaluation": lambda stream: OpenSets().open(stream),
    "verifier": lambda stream: verify([str(stream.remote or stream.local)]),
    "converter": convert_set,
}


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("what", ["name", "pickle"])
@pytest.mark.parametrize("reader", READERS)
def test_a_strangers_set_is_refused(
    tmp_path: Path, reader: str, what: str, is_remote: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, cache = tmp_path / "deep/er/set", tmp_path / "cache/a/b"
    entries = write(folder)
    shard = folder / entries[0]["raw_data"]["basename"]
    if what == "name":
        why = "names a file outside the set"
        shard.rename(tmp_path / "deep/escaped.mds")
        entries[0]["raw_data"]["basename"] = "../../escaped.mds"
    else:
        why = "executes code when it is read"
        shard.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
        entries[0]["column_encodings"][0] = "pkl"
    index(folder, entries)
    cache.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    places = {"remote": str(folder), "local": str(cache)} if is_remote else {"local": str(folder)}
    with pytest.raises((UserError, SystemExit)) as raised:
        READERS[reader](StreamConfig(**places))
    said = capsys.readouterr()
    text = f"{raised.value}{said.out}{said.err}"
    assert "shard 0 " in text
    assert why in text
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_that_differ_in_their_columns_are_told_before_they_are_read(tmp_path: Path) -> None:
    entries = write(tmp_path)
    entries[-1]["column_names"] = ["key", "picture", "caption"]
    index(tmp_path, entries)
    stream = {"mine": StreamConfig(local=str(tmp_path))}
    with pytest.raises(
        UserError,
        match=r"streams.mine lacks the columns \['image'\]; it has \['caption', 'key', 'pic",
    ):
        check_streams(DataConfig(streams=stream), semantic=False)
    entries[-1] |= {
        "column_names": ["key", "image", "caption"],
        "column_encodings": ["str", "jpeg", "str"],
    }
    index(tmp_path, entries)
    with pytest.raises(UserError, match="stores the column image as jpeg, not as bytes"):
        check_streams(DataConfig(streams=stream), semantic=False)
