"""Thousands of damaged inputs: nothing but a person's mistake raises, every sample is written or
counted.

What is written can be read by Streaming, and by the decoder of training.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from mutations import (
    BLOCK,
    SIZE,
    caption,
    compressed,
    csv_file,
    damage,
    damage_parquet,
    damage_tar,
    name,
    parquet_files,
    pictures,
    set_field,
)
from tarballs import draw, pairs, quick, write_tar

from alignclip.conversion import samples
from alignclip.conversion.formats.tars import read_tar
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.inputs import expand_inputs, name_of, opened
from alignclip.conversion.samples import Ignored
from alignclip.data.transforms import decode_image
from alignclip.errors import UserError

# Readers run in the test's own thread before a converter's worker does: there a hang ends with a
# stack trace
pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]

TARS, SAMPLES = 16, 250  # of mutated samples; samples each
NUMBER = re.compile(r"[0-9]+$")  # of a sample, at the end of its key
BROKEN_TARS = 1_000
TABLES = 250  # of each format
SETS = 60


def rows_of(out: Path) -> Iterator[dict[str, Any]]:
    """All that was written, read as Streaming does."""
    from streaming.base.format import reader_from_json

    for shard in json.loads((out / "index.json").read_text())["shards"]:
        yield from reader_from_json(str(out), "", shard)


def counted(path: Path) -> int:
    counts = json.loads(path.read_text(encoding="utf-8"))
    return counts["written"] + sum(counts["skipped"].values())


@pytest.fixture(scope="module")
def mutated(tmp_path_factory: pytest.TempPathFactory, fuzz: Any) -> tuple[Path, list[bytes]]:
    """A folder of whole tars of mutated samples, and the images by the number in the key."""
    folder = tmp_path_factory.mktemp("mutated")
    rng = fuzz.rng(1)
    good, images = list(pictures().values()), []
    for i in range(fuzz.count(TARS)):
        tar_format = rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        members = []
        for number in range(i * SAMPLES, (i + 1) * SAMPLES):
            image, stem, text = rng.choice(good), f"{number}", ("txt", b"a caption")
            kind = rng.random()
            if kind < 0.6:
                image = damage(image, rng, good)
            elif kind < 0.8:
                text = caption(rng)
            else:
                stem = name(rng, number)
            images.append(image)
            members.append((f"{stem}.{rng.choice(['jpg', 'png', 'webp', 'JPEG'])}", image))
            members.append((f"{stem}.{text[0]}", text[1]))
        write_tar(folder / f"{i:05}.tar", members, format=tar_format)
    return folder, images


@pytest.mark.parametrize(
    ("check", "resize"), [("decode", None), ("decode", 16), ("header", None), ("none", None)]
)
def test_mutated_samples(
    mutated: tuple[Path, list[bytes]], tmp_path: Path, check: str, resize: int | None
) -> None:
    options = ImageOptions(check=check, resize=resize)
    folder, images = mutated
    counts = quick([folder], tmp_path / "out", images=options, max_bad=1.0)
    assert counts.written + counts.bad == len(images) > 2 * SAMPLES
    assert samples.BROKEN_INPUT not in counts.skipped
    rows = list(rows_of(tmp_path / "out"))
    assert len(rows) == counts.written > len(images) / 5
    assert len({row["key"] for row in rows}) == len(rows)
    for row in rows:
        original = images[int(NUMBER.search(row["key"])[0])]
        # of 16 bits a channel, a PNG is stored with 8
        assert resize or row["image"] == original or original[24] == 16
        if check == "decode":
            assert decode_image(row["image"]).shape[0] == 3
        assert 0 < len(row["caption"]) <= samples.MAX_CAPTION


def yielded(file: Path) -> dict[str, int]:
    """Sub-folder -> how many pairs the reader of that input yields."""
    numbers = {}
    for shard in expand_inputs([str(file)]):
        with opened(shard) as source:
            items = [*islice(source.items, 100)]
        assert len(items) < 100
        numbers[name_of(shard)] = sum(not isinstance(item, Ignored) for item in items)
    return numbers


def assert_all_are_counted(files: list[Path], numbers: dict[str, int], out: Path) -> None:
    """Convert these inputs in one go: of each, written and skipped are what its reader yields."""
    counts = quick(files, out, max_bad=1.0)
    assert {path.parent.name: counted(path) for path in out.glob("*/counts.json")} == numbers
    rows = list(rows_of(out))
    assert len(rows) == counts.written > 0
    for row in rows:
        assert decode_image(row["image"]).shape[0] == 3


@pytest.mark.slow
def test_tars_of_damaged_structure(tmp_path: Path, fuzz: Any) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(0, 4)).read_bytes()
    rng = fuzz.rng(2)
    numbers: dict[str, int] = {}
    (tmp_path / "in").mkdir()
    for i in range(fuzz.count(BROKEN_TARS)):
        path = tmp_path / "in" / f"{i:05}.tar"
        path.write_bytes(compressed(whole, rng) if i % 6 == 0 else damage_tar(whole, rng))
        numbers |= yielded(path)
    assert len(numbers) == fuzz.count(BROKEN_TARS)
    assert_all_are_counted([tmp_path / "in"], numbers, tmp_path / "out")


def header(member: str, kind: bytes, number: int, **sparse: str) -> bytes:
    """A tar header, without a check of the size."""
    info = tarfile.TarInfo(member)
    info.type = kind
    info.pax_headers = {f"GNU.sparse.{name}": value for name, value in sparse.items()}
    data = info.tobuf(tarfile.PAX_FORMAT)
    field = (number % 256**12).to_bytes(12, "big")
    return data[:-BLOCK] + set_field(data[-BLOCK:], SIZE, field) if number else data


INSERTED = {
    "circle": header("folder", b"Z", -512),
    "back": header("x.jpg", b"0", -512),
    "before": header("x.jpg", b"0", -(2**40)),
    "beyond": header("x.jpg", b"0", 2**64 + 2**95),
    "memory": header("x", b"L", 2**62 + 2**95),
    "map": header("x.jpg", b"0", 0, map="a,b", size="5"),
    "no-map": header("x.jpg", b"0", 0, major="1", minor="0", realsize="5"),
    "names": header("x", b"L", 0) * 3_000,
    "hole": bytes(BLOCK),
    "end": bytes(4 * BLOCK),
}


@pytest.mark.parametrize("inserted", INSERTED.values(), ids=INSERTED)
def test_what_tarfile_does_not_call_an_error(tmp_path: Path, inserted: bytes) -> None:
    """It goes round in circles, stops in silence or raises anything."""
    path = write_tar(tmp_path / "a.tar", pairs(0, 4))
    every, data = list(read_tar(path)), path.read_bytes()
    at = data.index(b"00002.jpg")
    path.write_bytes(data[:at] + inserted + data[at:])
    *found, last = islice(read_tar(path), 100)
    assert last.reason == samples.BROKEN_INPUT
    assert found in (every[:1], every[:2])


def test_a_tar_cut_anywhere_gives_what_is_before(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(0, 4))
    data, every = whole.read_bytes(), list(read_tar(whole))
    with tarfile.open(whole) as tar:
        # a sample is known to be complete by the header after it
        ends = [*(member.offset + BLOCK for member in tar.getmembers()[3::3]), tar.offset + BLOCK]
    path = tmp_path / "cut.tar"
    for at in (block + more for block in range(0, len(data), BLOCK) for more in (0, 1, 300, 511)):
        path.write_bytes(data[:at])
        found = list(read_tar(path))
        if at >= ends[-1]:
            assert found == every
            continue
        assert found.pop().reason == samples.BROKEN_INPUT
        complete = [sample for sample, end in zip(every, ends, strict=True) if at >= end]
        assert found[: len(complete)] == complete
        assert [sample.key for sample in found[len(complete) :]] in ([], [f"{len(complete):05}"])


def assert_tables_are_counted(files: list[Path], out: Path) -> None:
    """A damaged table is no table for which there is one line to say, or is read as far as that
    goes.
    """
    numbers: dict[str, int] = {}
    readable, messages = [], []
    for file in files:
        try:
            numbers |= yielded(file)
            readable.append(file)
        except UserError as error:
            messages.append(str(error))
    assert all("\n" not in message and len(message) < 2_000 for message in messages)
    assert len(readable) > len(files) / 3
    assert_all_are_counted(readable, numbers, out)


def test_damaged_parquet_files(tmp_path: Path, fuzz: Any) -> None:
    rng = fuzz.rng(3)
    whole = parquet_files()
    files = []
    for i in range(fuzz.count(TABLES)):
        files.append(tmp_path / f"{i:05}.parquet")
        files[-1].write_bytes(damage_parquet(rng.choice(whole), rng))
    assert_tables_are_counted(files, tmp_path / "out")


def test_damaged_csv_files(tmp_path: Path, fuzz: Any) -> None:
    rng = fuzz.rng(4)
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(draw(i))
    files = []
    for i in range(fuzz.count(TABLES)):
        files.append(tmp_path / f"{i:05}.{rng.choice(['csv', 'tsv'])}")
        files[-1].write_bytes(
            csv_file(rng, str(tmp_path), "\t" if files[-1].suffix == ".tsv" else ",")
        )
    assert_tables_are_counted(files, tmp_path / "out")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damaged_mds_sets(tmp_path: Path, compression: str | None, fuzz: Any) -> None:
    rng = fuzz.rng(5)
    write_tar(tmp_path / "in" / "a.tar", pairs(0, 6))
    quick([tmp_path / "in"], tmp_path / "whole", size_limit="4kb", compression=compression)
    shards = sorted((tmp_path / "whole").glob("a/shard*"))
    index = tmp_path / "whole" / "index.json"
    whole = {path: path.read_bytes() for path in (*shards, index)}
    messages = []
    for i in range(fuzz.count(SETS)):
        path = rng.choice([*shards, *shards, index])
        path.write_bytes(damage(whole[path], rng))
        try:
            assert_all_are_counted([index], yielded(index), tmp_path / "out" / str(i))
        except UserError as error:
            messages.append(str(error))
        path.write_bytes(whole[path])
    assert all("\n" not in message for message in messages)
    assert len(messages) < fuzz.count(SETS) / 2
