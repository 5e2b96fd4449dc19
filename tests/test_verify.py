"""Sound sets are found sound; every kind of damage is found and its shard named; what can't be checked is one line."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streaming import MDSWriter
from streaming.base.hashing import get_hash

from alignclip.conversion.formats import FORMATS
from alignclip.verification import contact_sheet
from alignclip.verification.command import main
from alignclip.verification.index import INPUTS

REPOSITORY = Path(__file__).parents[1]
COLUMNS = {"key": "str", "image": "bytes", "caption": "str", "semantic": "ndarray:float16:8"}
PARTS, SAMPLES = 3, 6  # samples of a part, two in a shard
SHARD = "00001/shard.00001.mds"  # holds samples 8 and 9 of the set

Row = dict[str, Any]
Change = Callable[[int, Row], None]
Verify = Callable[..., tuple[int, str]]


def draw(seed: int, image_format: str = "JPEG", size: tuple[int, int] = (60, 40)) -> bytes:
    colour = tuple(int(value) for value in np.random.default_rng(seed).integers(0, 256, 3))
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, image_format)
    return file.getvalue()


def row_of(number: int) -> Row:
    semantic = np.random.default_rng(number).normal(size=8)
    return {
        "key": f"{number // SAMPLES:05}{number % SAMPLES:04}",
        "image": draw(number, ("JPEG", "PNG", "WEBP")[number % 3]),
        "caption": f"picture {number}",
        "semantic": (semantic / np.linalg.norm(semantic)).astype(np.float16),
    }


def write_shards(folder: Path, columns: dict[str, str], rows: list[Row], **options: Any) -> None:
    """Shards of two samples each, and their index."""
    with MDSWriter(
        out=str(folder), columns=columns, hashes=["xxh64"], size_limit=None, **options
    ) as writer:
        for i, row in enumerate(rows):
            if i and i % 2 == 0:
                writer.flush_shard()
                writer._reset_cache()
            writer.write(row)


def write_root(out: Path) -> None:
    """What convert/cc12m.py writes above the sub-folders that are there."""
    shards = []
    for index in sorted(out.glob("*/index.json")):
        for shard in json.loads(index.read_text())["shards"]:
            for file in (shard["raw_data"], shard["zip_data"]):
                if file:
                    file["basename"] = f"{index.parent.name}/{file['basename']}"
            shards.append(shard)
    dataset = {
        "inputs": PARTS,
        "samples": sum(shard["samples"] for shard in shards),
        "dimension": 8,
        "encoder": "e",
    }
    (out / "dataset.json").write_text(json.dumps(dataset))
    (out / "convert.json").write_text("{}")
    (out / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


def write_set(out: Path, change: Change | None = None, **options: Any) -> Path:
    for part in range(PARTS):
        rows = []
        for number in range(part * SAMPLES, (part + 1) * SAMPLES):
            rows.append(row_of(number))
            if change:
                change(number, rows[-1])
        folder = out / f"{part:05}"
        write_shards(folder, COLUMNS, rows, **options)
        counts = {
            "source": f"{part:05}.tar",
            "written": SAMPLES,
            "skipped": {"empty caption": part},
            "bytes": 0,
        }
        (folder / "counts.json").write_text(json.dumps(counts))
    write_root(out)
    return out


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run the command: its exit status, and what it prints with single spaces."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        status = 0
        try:
            main([str(argument) for argument in (*arguments, "--processes", 1)])
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        if status == 2:
            assert captured.out == ""
            return status, captured.err
        return status, "\n".join(" ".join(line.split()) for line in captured.out.splitlines())

    return run


def problems(text: str) -> list[str]:
    """The lines below ``N problems:``, which come before an empty one; ``N`` is their number."""
    if text.endswith("\nsound"):
        return []
    heading, below = text.split(" problem", 1)
    lines = below.splitlines()[1:]
    lines = lines[: lines.index("")] if "" in lines else lines
    if not any(line.startswith("…") for line in lines):
        assert int(heading.splitlines()[-1]) == len(lines)
    return lines


# sound sets


@pytest.mark.parametrize("options", [{}, {"compression": "zstd:3"}])
def test_a_sound_set(tmp_path: Path, verify: Verify, options: dict[str, str]) -> None:
    out = write_set(tmp_path / "out", **options)
    status, text = verify(out, "--decode", 1)
    assert (status, problems(text)) == (0, [])
    index = json.loads((out / "index.json").read_text())
    size = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in index["shards"])
    rows = [
        f"set {out}",
        "shards 9",
        "samples 18",
        f"size {size / 2**20:,.1f} MiB",
        "images decoded 18",
    ]
    rows += [
        "embeddings 18 of 8 dimensions",
        "read from source 21",
        "written 18",
        "skipped 3",
        "empty caption 3",
    ]
    for row in rows:
        assert row in text.splitlines()
    norms = [np.linalg.norm(row_of(i)["semantic"].astype(np.float64)) for i in range(18)]
    assert (
        f"norm {min(norms):.4f} / {np.mean(norms):.4f} / {max(norms):.4f} (min / mean / max)"
        in text
    )
    assert "note" not in text

    assert verify(out, "--fast")[0] == 0
    assert not list(out.rglob("*.mds")) or not options  # nothing is decompressed into the set


def test_a_fraction_of_the_images_is_decoded(tmp_path: Path, verify: Verify) -> None:
    def spoil(number: int, row: Row) -> None:
        row["image"] = b"no image"

    out = write_set(tmp_path / "out", spoil)
    assert verify(out, "--decode", 0)[0] == 0
    numbers = set()
    for seed in range(4):
        chosen = problems(verify(out, "--decode", 0.5, "--seed", seed)[1])
        assert chosen == problems(verify(out, "--decode", 0.5, "--seed", seed)[1])
        assert 2 < len(chosen) < 16
        numbers.add(tuple(chosen))
    assert len(numbers) == 4


def test_a_classification_set(tmp_path: Path, verify: Verify) -> None:
    def write(name: str, labels: list[int], image_format: str = "GIF") -> Path:
        out = tmp_path / name
        columns = {"key": "str", "image": "bytes", "label": "int"}
        rows = [
            {"key": f"{i}", "image": draw(i, image_format), "label": label}
            for i, label in enumerate(labels)
        ]
        write_shards(out, columns, rows)
        (out / "classes.json").write_text(
            json.dumps({"classnames": ["cat", "dog"], "templates": ["{c}"]})
        )
        dataset = {
            "dataset": "folder",
            "split": "test",
            "samples": len(labels),
            "skipped": {"unreadable image": 2},
        }
        (out / "dataset.json").write_text(json.dumps(dataset))
        return out

    sound = write("sound", [0, 1, 1, 0])
    status, text = verify(sound, "--decode", 1)
    assert (status, problems(text)) == (0, [])
    assert "read from source 6\nwritten 4\nskipped 2\nunreadable image 2\n" in text
    assert "note" not in text
    assert verify(tmp_path, "--split", "sound") == verify(sound)

    broken = write("broken", [0, 1, 2, -1])
    status, text = verify(broken)
    assert status == 1
    assert problems(text) == [
        f"shard.00001.mds: sample {i} (key {i + 2}): label is none of the classes" for i in range(2)
    ]
    assert f"to mend it: delete {broken}, then run the convert command again" in text


def test_a_retrieval_set(tmp_path: Path, verify: Verify) -> None:
    rows = [
        {"key": f"{i}", "image": draw(i), "caption": [f"picture {i}", "another"]} for i in range(4)
    ]
    columns = {"key": "str", "image": "bytes", "caption": "json"}
    write_shards(tmp_path / "sound", columns, rows)
    assert verify(tmp_path / "sound")[0] == 0
    rows[2]["caption"], rows[3]["caption"] = [], ["good", " "]
    write_shards(tmp_path / "broken", columns, rows)
    end = "caption is empty or no text"
    status, text = verify(tmp_path / "broken")
    assert (status, problems(text)) == (
        1,
        [f"shard.00001.mds: sample {i} (key {i + 2}): {end}" for i in range(2)],
    )


def test_what_lies_around_is_noted(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    (out / "00002" / "shard.00009.mds").write_bytes(b"old")
    (out / "report.md").write_text("ours")
    write_set(out / "val")  # a set of its own
    status, text = verify(out)
    assert (status, problems(text)) == (0, [])
    assert "note: files that no index names: 1 (00002/shard.00009.mds)\n" in text


def test_a_held_out_split(tmp_path: Path, verify: Verify) -> None:
    """As convert/cc12m.py --held-out writes it."""
    out = write_set(tmp_path / "out")
    held_out = write_set(out / "val")
    for name in ("dataset.json", "convert.json"):
        (held_out / name).unlink()
    for path in (held_out / "00000").iterdir():
        path.unlink()
    write_shards(held_out / "00000", COLUMNS, [])
    (held_out / "00000" / "counts.json").write_text(json.dumps({"written": 0, "skipped": {}}))
    edit(held_out / "index.json", lambda index: index.update(shards=index["shards"][3:]))
    for part in range(1, PARTS):
        edit(out / f"{part:05}" / "counts.json", lambda counts: counts.update(held_out=SAMPLES))
    status, text = verify(out)
    assert (status, problems(text)) == (0, [])
    assert "read from source 33\nwritten 18\nheld out 12\nskipped 3\n" in text
    assert "note: below are other sets, to be checked with --split: val\n" in text
    assert text.count("note:") == 1
    status, text = verify(out, "--split", "val")
    assert (status, problems(text)) == (0, [])
    assert "samples 12\n" in text

    edit(out / "dataset.json", lambda dataset: dataset.update(held_out=12))
    flip(held_out / SHARD)
    assert verify(out)[0] == 0
    status, text = verify(out, "--split", "val")
    assert (status, problems(text)) == (1, [f"{SHARD}: hash xxh64 differs"])
    assert f"to mend it: delete {out}/00001, then run the convert command again" in text


@pytest.mark.parametrize("gone", [False, True])
def test_a_held_out_split_that_is_not_whole(tmp_path: Path, verify: Verify, gone: bool) -> None:
    out = write_set(tmp_path / "out")
    held_out = write_set(out / "val")
    edit(out / "dataset.json", lambda dataset: dataset.update(held_out=18))
    for part in range(PARTS):
        edit(out / f"{part:05}" / "counts.json", lambda counts: counts.update(held_out=SAMPLES))
    assert verify(out)[0] == 0
    if gone:
        shutil.rmtree(held_out)
    else:
        edit(held_out / "index.json", lambda index: index["shards"].pop())
    status, text = verify(out, "--fast")
    what = "and val/index.json is gone" if gone else "val/index.json has 16"
    assert (status, problems(text)) == (1, [f"dataset.json: says 18 samples are held out, {what}"])
    assert "to mend it: run the convert command again" in text


# damage to files


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize("compression", [None, "zstd:3"])
@pytest.mark.parametrize(
    ("damage", "message", "fast"),
    [
        (flip, "hash xxh64 differs", False),
        (cut, r"{cut} bytes, the index says {size}", True),
        (Path.unlink, "missing", True),
    ],
)
def test_damaged_files(
    tmp_path: Path, verify: Verify, compression: str | None, damage: Any, message: str, fast: bool
) -> None:
    out = write_set(tmp_path / "out", compression=compression)
    name = f"{SHARD}.zstd" if compression else SHARD
    size = (out / name).stat().st_size
    damage(out / name)
    status, text = verify(out)
    assert (status, problems(text)) == (
        1,
        [f"{name}: {message.format(cut=f'{size - 5:,}', size=f'{size:,}')}"],
    )
    assert f"to mend it: delete {out}/00001, then run the convert command again" in text
    assert verify(out, "--fast")[0] == int(fast)


def rehash(out: Path) -> None:
    """Make the index agree with the damaged file."""

    def change(index: Any) -> None:
        (file,) = (
            shard["raw_data"] for shard in index["shards"] if shard["raw_data"]["basename"] == SHARD
        )
        data = (out / SHARD).read_bytes()
        file["bytes"], file["hashes"] = len(data), {"xxh64": get_hash("xxh64", data)}

    edit(out / "index.json", change)


def test_a_sample_that_cannot_be_read(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    data = (out / SHARD).read_bytes()
    (out / SHARD).write_bytes(data.replace(b"picture ", b"picture\xff"))
    rehash(out)
    status, text = verify(out)
    assert (status, len(problems(text))) == (1, 2)  # and they have no key twice
    for i, line in enumerate(problems(text)):
        assert line.startswith(
            f"{SHARD}: sample {i} can't be read: 'utf-8' codec can't decode byte 0xff"
        )

    (out / SHARD).write_bytes((7).to_bytes(4, "little") + data[4:])
    rehash(out)
    assert problems(verify(out)[1]) == [f"{SHARD}: holds 7 samples, the index says 2"]


# damage to samples, hashes being right


def no_image(row: Row) -> None:
    row["image"] = b"<html>404</html>"


def half_image(row: Row) -> None:
    row["image"] = draw(9, "PNG")[:-30]


def another_format(row: Row) -> None:
    row["image"] = draw(9, "GIF")


def empty_image(row: Row) -> None:
    row["image"] = b""


def zero(row: Row) -> None:
    row["semantic"] = np.zeros(8, np.float16)


def not_a_number(row: Row) -> None:
    row["semantic"][3] = np.nan


def infinite(row: Row) -> None:
    row["semantic"][7] = -np.inf


def no_caption(row: Row) -> None:
    row["caption"] = " \n"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (no_image, "image can't be decoded"),
        (half_image, "image can't be decoded"),
        (another_format, "image can't be decoded"),
        (empty_image, "image is empty or no file"),
        (zero, "embedding is zero"),
        (not_a_number, "embedding isn't finite"),
        (infinite, "embedding isn't finite"),
        (no_caption, "caption is empty or no text"),
    ],
)
def test_damaged_samples(
    tmp_path: Path, verify: Verify, damage: Callable[[Row], None], problem: str
) -> None:
    out = write_set(tmp_path / "out", lambda number, row: damage(row) if number == 9 else None)
    status, text = verify(out, "--decode", 1)
    assert (status, problems(text)) == (1, [f"{SHARD}: sample 1 (key 000010003): {problem}"])


def test_duplicate_and_empty_keys(tmp_path: Path, verify: Verify) -> None:
    def repeat(number: int, row: Row) -> None:
        row["key"] = {9: row_of(7)["key"], 4: ""}.get(number, row["key"])

    status, text = verify(write_set(tmp_path / "out", repeat))
    assert status == 1
    assert problems(text) == [
        "00000/shard.00002.mds: sample 0 (key ): key is empty",
        f"{SHARD}: sample 1 has the key of sample 1 in 00001/shard.00000.mds (000010001)",
    ]
    assert "note" not in text


def test_keys_that_come_in_several_inputs_are_a_note(tmp_path: Path, verify: Verify) -> None:
    def repeat(number: int, row: Row) -> None:
        row["key"] = {9: row_of(2)["key"], 17: row_of(2)["key"]}.get(number, row["key"])

    status, text = verify(write_set(tmp_path / "out", repeat))
    assert (status, problems(text)) == (0, [])
    first = f"{SHARD}, sample 1 has the key of sample 0 in 00000/shard.00001.mds (000000002)"
    assert f"note: keys that come in several inputs: 2 (the first: {first})\n" in text


def test_embeddings_whose_norm_is_far_from_the_others(tmp_path: Path, verify: Verify) -> None:
    def scale(number: int, row: Row) -> None:
        row["semantic"] = row["semantic"] * np.float16({9: 20, 10: 0.05, 11: 5}.get(number, 1))

    status, text = verify(write_set(tmp_path / "out", scale))
    assert (status, problems(text)) == (
        1,
        [
            f"{SHARD}: sample 1: embedding has the norm 20, where 1 is usual",
            "00001/shard.00002.mds: sample 0: embedding has the norm 0.05, where 1 is usual",
        ],
    )


def test_truncated_inputs_are_named(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    edit(
        out / "00001" / "counts.json",
        lambda counts: counts["skipped"].update({"truncated file": 1}),
    )
    for arguments in ((), ("--fast",)):
        status, text = verify(out, *arguments)
        (line,) = problems(text)
        end = "00001.tar was truncated: fetch it again and run the convert command again"
        assert (status, line) == (1, f"00001/counts.json: {end}")
        assert "delete" not in text


def test_an_input_that_was_planned_and_is_not_there(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    planned = {f"{part:05}": f"in/{part:05}.tar" for part in range(PARTS)}
    edit(out / "convert.json", lambda plan: plan.update(inputs=planned))
    assert verify(out, "--fast")[0] == 0
    edit(out / "convert.json", lambda plan: plan["inputs"].update({"00007": "in/00007.tar"}))
    status, text = verify(out, "--fast")
    assert (status, problems(text)) == (1, ["convert.json: in/00007.tar was not converted"])
    assert "to mend it: run the convert command again" in text


def test_many_problems_are_cut_short(tmp_path: Path, verify: Verify) -> None:
    rows = [{"key": "the same", "image": b"no image", "caption": "a"} for _ in range(30)]
    write_shards(tmp_path / "out", {"key": "str", "image": "bytes", "caption": "str"}, rows)
    status, text = verify(tmp_path / "out", "--decode", 1)
    lines = problems(text)
    assert (status, len(lines)) == (1, 42)
    assert "\n59 problems:\n" in text
    assert lines[20] == "… and 10 more: image can't be decoded"
    assert lines[41] == "… and 9 more: key is there twice"

    write_shards(tmp_path / "gone", {"key": "str"}, [{"key": f"{i}"} for i in range(44)])
    for path in (tmp_path / "gone").glob("*.mds"):
        path.unlink()
    status, text = verify(tmp_path / "gone")
    lines = problems(text)
    assert (status, len(lines), lines[19:]) == (
        1,
        21,
        ["shard.00019.mds: missing", "… and 2 more: missing"],
    )
    assert "\n22 problems:\n" in text


# what the set says about itself


def test_counts_that_disagree(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    edit(out / "dataset.json", lambda dataset: dataset.update(samples=17))
    edit(out / "00001" / "counts.json", lambda counts: counts.update(written=7))
    for arguments in ([], ["--fast"]):
        status, text = verify(out, *arguments)
        assert (status, problems(text)) == (
            1,
            [
                "dataset.json: says 17 samples, the index has 18",
                "00001/counts.json: says 7 written, the index has 6",
            ],
        )


def test_parts_that_are_missing(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    (out / "00000" / "counts.json").unlink()
    (out / "00001" / "counts.json").write_text("{")

    def forget(index: Any) -> None:
        index["shards"] = [
            shard
            for shard in index["shards"]
            if not shard["raw_data"]["basename"].startswith("00002")
        ]

    edit(out / "index.json", forget)
    edit(out / "dataset.json", lambda dataset: dataset.update(samples=12))
    status, text = verify(out)
    assert status == 1
    missing, unreadable, forgotten = problems(text)
    assert missing == "00000/counts.json: is missing: the conversion of this part was not finished"
    assert unreadable.startswith("00001/counts.json: can't be read: Expecting property name")
    assert (
        forgotten == f"00002/counts.json: says 6 written, and {out}/index.json names none of them"
    )


def test_entries_of_the_index(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")

    def spoil(index: Any) -> None:
        shards = index["shards"]
        del shards[0]["samples"]
        shards[1]["raw_data"]["basename"] = "../secret.mds"
        shards[2]["column_encodings"] = ["pkl"] * 4
        shards[3]["format"] = "csv"
        shards[4] |= {"column_names": ["key"], "column_encodings": ["str"], "column_sizes": [None]}
        shards[6] = shards[5]

    edit(out / "index.json", spoil)
    status, text = verify(out, "--fast")
    assert status == 1
    lines = [
        line
        for line in problems(text)
        if "written, the index" not in line and "dataset.json" not in line
    ]
    assert lines[0] == "index.json: shard 0 lacks samples"
    assert lines[1] == "index.json: shard 1 names a file outside the set: ../secret.mds"
    assert (
        lines[2]
        == "index.json: shard 2 stores the column caption as pkl, which executes code when it is read"
    )
    assert lines[3] == "index.json: shard 3 has the format csv, not mds"
    assert lines[4] == f"{SHARD}: its columns are others: key str"
    assert lines[5] == "00001/shard.00002.mds: the index names it 2 times"


# nothing can be checked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no MDS set at {out} (no index.json there)"),
        ("[", "{out}/index.json is not JSON: Expecting value: line 1 column 2 (char 1)"),
        ('{"features": []}', "{out}/index.json is not a streaming index"),
        ('{"version": 1, "shards": []}', "{out}/index.json has version 1; Streaming reads 2"),
    ],
)
def test_no_set(tmp_path: Path, verify: Verify, content: str | None, message: str) -> None:
    if content:
        (tmp_path / "index.json").write_text(content)
    assert verify(tmp_path) == (2, f"error: {message.format(out=tmp_path)}\n")


def test_what_is_there_instead(tmp_path: Path, verify: Verify) -> None:
    for name in ("val", "train"):
        write_set(tmp_path / name)
    expected = f"error: no MDS set at {tmp_path} (no index.json there); there is one in train, val: --split train\n"
    assert verify(tmp_path) == (2, expected)
    (tmp_path / "val" / "index.json").unlink()
    status, text = verify(tmp_path, "--split", "val")
    assert (status, text.count("\n")) == (2, 1)
    assert text.endswith("; its conversion was not finished: run the convert command again\n")


def test_the_hint_knows_every_input_format() -> None:
    """The verifier stands beside the converter, and may not import its formats."""
    assert tuple(one.endings for one in FORMATS if one.endings) == INPUTS


def test_inputs_are_no_set_yet(tmp_path: Path, verify: Verify) -> None:
    for name in ("00001.tar", "00000.tar", "00000.parquet"):
        (tmp_path / name).write_bytes(b"")
    end = "it holds inputs (00000.tar, …), which convert/cc12m.py makes a set of"
    assert verify(tmp_path) == (
        2,
        f"error: no MDS set at {tmp_path} (no index.json there); {end}\n",
    )


def test_a_set_of_a_misspelt_name(tmp_path: Path, verify: Verify) -> None:
    write_set(tmp_path / "data" / "emoji")
    (tmp_path / "data" / "emojiz").mkdir()
    place, near = tmp_path / "data" / "emojis", tmp_path / "data" / "emoji"
    expected = f"error: no MDS set at {place} (no index.json there); did you mean '{near}'?\n"
    assert verify(place) == (2, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3:/bucket/x"], "set=s3:/bucket/x has one slash; did you mean 's3://bucket/x'?"),
        (["x", "--decode", "2"], "--decode is a fraction between 0 and 1, not 2.0"),
        (["x", "--sample", "0"], "--sample must be at least 1, not 0"),
        (["x", "--sample", "4", "--to", "a.jpg"], "--to a.jpg must be a local .png file"),
        (
            ["x", "--sample", "4", "--to", "/none/a.png"],
            "--to /none/a.png: there is no folder /none",
        ),
    ],
)
def test_options_are_checked_up_front(verify: Verify, arguments: list[str], message: str) -> None:
    assert verify(*arguments) == (2, f"error: {message}\n")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """As a person calls it, shards being checked by two processes."""
    out = write_set(tmp_path / "out")
    for part in range(PARTS, 6):
        write_shards(
            out / f"{part:05}", COLUMNS, [row_of(part * SAMPLES + i) for i in range(SAMPLES)]
        )
        (out / f"{part:05}" / "counts.json").write_text(
            json.dumps({"written": SAMPLES, "skipped": {}})
        )
    write_root(out)
    flip(out / SHARD)
    command = [sys.executable, "convert/verify.py", str(out), "--processes", "2"]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 1, result.stderr
    assert problems(result.stdout) == [f"  {SHARD}: hash xxh64 differs"]
    assert all(
        "verifying" in line
        for line in result.stderr.replace("\r", "\n").split("\n")
        if line.strip()
    )


# a bucket


def test_a_bucket(s3: Any, tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out")
    bucket = s3.bucket()
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    for name in names:
        s3.client.put_object(
            Bucket=bucket.removeprefix("s3://"), Key=f"a/b/{name}", Body=(out / name).read_bytes()
        )
    status, text = verify(f"{bucket}/a/b/", "--decode", 1)
    assert (status, problems(text)) == (0, [])
    assert f"set {bucket}/a/b\nshards 9\nsamples 18\n" in text

    first, second, third = (f"0000{part}/shard.00001.mds" for part in range(PARTS))
    for name, damage in ((first, flip), (second, cut)):
        damage(out / name)
        s3.client.put_object(
            Bucket=bucket.removeprefix("s3://"), Key=f"a/b/{name}", Body=(out / name).read_bytes()
        )
    s3.client.delete_object(Bucket=bucket.removeprefix("s3://"), Key=f"a/b/{third}")
    status, text = verify(f"{bucket}/a/b")
    size = (out / second).stat().st_size
    assert (status, problems(text)) == (
        1,
        [
            f"{third}: missing",
            f"{first}: hash xxh64 differs",
            f"{second}: {size:,} bytes, the index says {size + 5:,}",
        ],
    )
    status, text = verify(f"{bucket}/a/b", "--fast")
    assert (status, problems(text)) == (1, [f"{third}: missing"])
    status, text = verify(f"{bucket}/nothing")
    assert (status, text.count("\n")) == (2, 1)
    assert text.startswith(
        f"error: no MDS set at {bucket}/nothing (cannot read {bucket}/nothing/index.json: not found"
    )


# the contact sheet


def test_contact_sheet(tmp_path: Path, verify: Verify) -> None:
    out, path = write_set(tmp_path / "out"), tmp_path / "sheet.png"
    status, text = verify(out, "--fast", "--sample", 8, "--to", path)
    assert status == 0
    assert f"contact sheet {path} (8 samples)" in text
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.size == contact_sheet.size(8)
        centres = []
        for i in range(8):
            column, row = i % 3, i // 3
            x = (
                contact_sheet.GAP
                + column * (contact_sheet.CELL[0] + contact_sheet.GAP)
                + contact_sheet.BOX // 2
            )
            y = (
                contact_sheet.TITLE
                + row * (contact_sheet.CELL[1] + contact_sheet.GAP)
                + contact_sheet.BOX // 2
            )
            centres.append(sheet.getpixel((x, y)))
    # eight shards' samples, two at most of each, evenly: every second one
    expected = [
        Image.open(io.BytesIO(row_of(i)["image"])).convert("RGB").getpixel((30, 20))
        for i in range(0, 16, 2)
    ]
    for centre, colour in zip(centres, expected, strict=True):
        np.testing.assert_allclose(centre, colour, atol=2)


def test_contact_sheet_of_few_and_small_shards(tmp_path: Path, verify: Verify) -> None:
    out, path = write_set(tmp_path / "out"), tmp_path / "sheet.png"
    for wanted, drawn in ((1, 1), (17, 17), (100, 18)):
        assert (
            f"contact sheet {path} ({drawn} sample"
            in verify(out, "--fast", "--sample", wanted, "--to", path)[1]
        )
        with Image.open(path) as sheet:
            assert sheet.size == contact_sheet.size(drawn)
