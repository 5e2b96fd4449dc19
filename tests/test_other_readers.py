"""Other libraries read the sets that the converters write, or fail as docs/data.md says.

They live in an environment of their own: ``make test-readers``. What a library can't do is
asserted, too, so that a version that can is noticed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mds_sets import PAIR, edit, pair_rows, write_rows
from miniatures import captioned, labelled, write
from other_readers import LIBRARIES, plain
from tarballs import FakeEncoder, draw, give_encoder, pairs, quick, read_back, write_tar

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("READERS_PYTHON")
with_readers = pytest.mark.skipif(
    not PYTHON,
    reason="READERS_PYTHON names no interpreter that has the other libraries (make test-readers)",
)
DIMENSION = 768


def converted(folder: Path, **options: Any) -> Path:
    """The sub-folder that the converter makes of one input: a set of its own."""
    tar = write_tar(folder / "in" / "00000.tar", pairs(0, 4))
    quick(tar, folder / "out", **options)
    return folder / "out" / "00000"


def retrieval(folder: Path) -> Path:
    """What ``convert/retrieval.py`` writes."""
    for i in range(2):
        write(folder / f"{i}.jpg", draw(i))
    lines = write(folder / "my.csv", "image,caption\n0.jpg,a\n0.jpg,ein Bär\n1.jpg,c\n1.jpg,d\n")
    captioned("pairs", folder, lines, folder / "set")
    return folder / "set"


def lists(folder: Path, **options: Any) -> Path:
    """That, converted by ``convert/cc12m.py``."""
    quick(retrieval(folder) / "index.json", folder / "out", compression="zstd", **options)
    return next((folder / "out").glob("*/index.json")).parent


def classification(folder: Path) -> Path:
    """What ``convert/classification.py`` writes."""
    for i, name in enumerate(["auk", "auk", "wren"]):
        write(folder / "birds" / name / f"{i}.jpg", draw(i))
    labelled("folder", folder / "birds", folder / "set")
    return folder / "set"


def labels(folder: Path) -> Path:
    rows = [{**row, "label": int(row["key"])} for row in pair_rows(4)]
    columns = {"key": "str", "image": "bytes", "label": "int"}
    wanted = [{name: row[name] for name in columns} for row in rows]
    return write_rows(folder / "set", wanted, columns, compression="zstd")


def another_compression(name: str) -> Callable[[Path], Path]:
    return lambda folder: converted(folder, compression=name)


# the first cell of a row of docs/data.md -> (a set, the error of each library that can't read it)
CANT_NEPRR = "supported compression is zstd"
CANT_COMPRESSION = "isn't available in"
CANT_UNCOMPRESSED = "'NoneType' object is not subscriptable"  # zip_data of the index
CANT: dict[str, list[tuple[Callable[[Path], Path], dict[str, str]]]] = {
    "`key`, `image`, `caption`": [(another_compression("zstd"), {})],
    "`caption` as a list (`json`)": [(lists, {})],
    "`label` (`int`)": [(labels, {})],
    "`semantic` (`ndarray:float16:768`)": [
        (lambda folder: converted(folder, semantic=True, compression="zstd"),
         {"litdata": "too many values to unpack"}),
    ],
    "`semantic` of lists (`ndarray:float16`)": [
        (lambda folder: lists(folder, semantic=True), {"litdata": "KeyError: 'ndarray'"}),
    ],
    "no compression": [
        (converted, {"litdata": CANT_UNCOMPRESSED}),
        (retrieval, {"litdata": CANT_UNCOMPRESSED}),
        (classification, {"litdata": CANT_UNCOMPRESSED}),
    ],
    "`zstd`": [(another_compression("zstd"), {})],
    "`zstd` with a level (`zstd:3`)": [
        # it looks for files called .zstd:3, and takes compressed bytes for samples
        (another_compression("zstd:3"), {"litdata": "Error: "}),
    ],
    "`gz`, `br`, `bz2`, `snappy`": [
        (another_compression(name), {"neprr-streaming": CANT_NEPRR, "litdata": CANT_COMPRESSION})
        for name in ("gz", "br", "bz2", "snappy")
    ],
    "an index over sub-folders": [
        (lambda folder: converted(folder, compression="zstd").parent,
         {"litdata": "The provided filename doesn't exist"}),
    ],
}  # fmt: skip
MADE = [(name, number) for name, made in CANT.items() for number in range(len(made))]


def read(library: str, folders: list[str]) -> tuple[str, list[Any]]:
    """The library's version, and what it reads of each folder: rows, or an error."""
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "tests" / "other_readers.py"), library],
        input=json.dumps(folders),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["version"], answer["sets"]


def place(library: str, folder: Path) -> str:
    """What the library is given for a folder: LitData works in the folder itself otherwise."""
    return f"local:{folder}" if library == "litdata" else str(folder)


def rows_of(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """The set as Streaming reads it."""
    rows = read_back(str(folder), cache)
    return [{name: plain(value) for name, value in rows[key].items()} for key in sorted(rows)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    made = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        give_encoder(monkeypatch, FakeEncoder(DIMENSION, lambda caption: len(caption) / 8))
        for name, number in MADE:
            make, _ = CANT[name][number]
            made[name, number] = make(tmp_path_factory.mktemp("set"))
    return made


@pytest.fixture(scope="module", params=LIBRARIES)
def answers(
    request: pytest.FixtureRequest, sets: dict[tuple[str, int], Path]
) -> tuple[str, dict[tuple[str, int], Any]]:
    """A library, and what it reads of all sets."""
    library = request.param
    _, found = read(library, [place(library, folder) for folder in sets.values()])
    return library, dict(zip(sets, found, strict=True))


@with_readers
@pytest.mark.slow
@pytest.mark.parametrize("made", MADE, ids=lambda made: f"{made[0]} {made[1]}")
def test_a_library_reads_what_was_written_or_fails_as_it_did(
    answers: Any, made: tuple[str, int], sets: dict[tuple[str, int], Path], tmp_path: Path
) -> None:
    library, found = answers
    name, number = made
    if error := CANT[name][number][1].get(library):
        assert error in found[made].get("error", ""), f"{library} has changed: change docs/data.md"
    else:
        assert found[made] == {"rows": rows_of(sets[made], tmp_path / "cache")}


@with_readers
@pytest.mark.slow
def test_one_library_checks_hashes(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "set", pair_rows(3), PAIR, compression="zstd")
    edit(folder / "index.json", lambda index: index["shards"][0]["zip_data"]["hashes"].update(
        xxh64="0" * 16
    ))  # fmt: skip
    _, (checked,) = read("neprr-streaming", [place("neprr-streaming", folder)])
    assert "hash mismatch" in checked["error"]
    _, (unchecked,) = read("litdata", [place("litdata", folder)])
    assert len(unchecked["rows"]) == 3


@with_readers
@pytest.mark.slow
def test_litdata_replaces_the_shards_of_a_plain_folder(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "set", pair_rows(3), PAIR, compression="zstd")
    read("litdata", [f"local:{folder}"])
    assert [path.name for path in folder.glob("*.mds*")] == ["shard.00000.mds.zstd"]
    read("litdata", [str(folder)])
    assert [path.name for path in folder.glob("*.mds*")] == ["shard.00000.mds"]


def requirement(library: str) -> str:
    text = (ROOT / "requirements-readers.txt").read_text(encoding="utf-8")
    return re.findall(rf"^{library}==(\S+)$", text, re.MULTILINE)[0]


@with_readers
@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_versions_are_those_of_the_page(library: str) -> None:
    assert read(library, [])[0] == requirement(library)


def test_the_page_says_what_is_tested() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## Other readers")[1].split("\n## ")[0]
    header, _, *rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    assert f"neprr-streaming {requirement('neprr-streaming')}" in header
    assert f"LitData {requirement('litdata')}" in header
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [
        [name, *("no" if library in cant[0][1] else "yes" for library in LIBRARIES)]
        for name, cant in CANT.items()
    ]
