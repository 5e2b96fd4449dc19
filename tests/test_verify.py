"""Sound sets are found sound; every kind of damage is found and its shard named.

What can't be checked is one line.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mds_sets import PAIR, Row, edit, shards_of, write_rows
from PIL import Image
from processes import python
from streaming.base.hashing import get_hash

from alignclip.verification import contact_sheet
from alignclip.verification.command import main

REPOSITORY = Path(__file__).parents[1]
COLUMNS = {**PAIR, "semantic": "ndarray:float16:8"}
PARTS, SAMPLES = 3, 6  # samples of a part, two in a shard
SHARD = "00001/shard.00001.mds"  # holds samples 8 and 9 of the set
AGAIN = "run the convert command again"

Verify = Callable[..., tuple[int, str]]


def draw(seed: int, image_format: str = "JPEG") -> bytes:
    colour = tuple(int(value) for value in np.random.default_rng(seed).integers(0, 256, 3))
    file = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(file, image_format)
    return file.getvalue()


def row_of(number: int) -> Row:
    semantic = np.random.default_rng(number).normal(size=8)
    return {
        "key": f"{number // SAMPLES:05}{number % SAMPLES:04}",
        "image": draw(number, ("JPEG", "PNG", "WEBP")[number % 3]),
        "caption": f"picture {number}",
        "semantic": (semantic / np.linalg.norm(semantic)).astype(np.float16),
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def write_root(out: Path) -> None:
    """What convert/cc12m.py writes above the sub-folders that are there."""
    shards = []
    for index in sorted(out.glob("*/index.json")):
        for shard in shards_of(index.parent):
            for file in filter(None, (shard["raw_data"], shard["zip_data"])):
                file["basename"] = f"{index.parent.name}/{file['basename']}"
            shards.append(shard)
    samples = sum(shard["samples"] for shard in shards)
    dataset = {"inputs": PARTS, "samples": samples, "dimension": 8, "encoder": "e"}
    write_json(out / "dataset.json", dataset)
    write_json(out / "convert.json", {})
    write_json(out / "index.json", {"version": 2, "shards": shards})


def write_set(
    out: Path, change: Callable[[int, Row], None] | None = None, parts: int = PARTS, **options: Any
) -> Path:
    for part in range(parts):
        rows = [row_of(number) for number in range(part * SAMPLES, (part + 1) * SAMPLES)]
        for number, row in enumerate(rows, part * SAMPLES):
            if change:
                change(number, row)
        folder = write_rows(out / f"{part:05}", rows, COLUMNS, each=2, **options)
        counts = {"source": f"{part:05}.tar", "written": SAMPLES, "bytes": 0}
        write_json(folder / "counts.json", {**counts, "skipped": {"empty caption": part}})
    write_root(out)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_set(tmp_path / "out")


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run the command: its exit status, and what it prints with single spaces."""

    def run(*arguments: str | Path) -> tuple[int, str]:
        status = 0
        try:
            main(["--processes", "1", "--decode", "1", *map(str, arguments)])
        except SystemExit as end:
            status = int(end.code or 0)
        captured = capsys.readouterr()
        if status == 2:
            assert captured.out == ""
            return status, captured.err
        return status, "\n".join(" ".join(line.split()) for line in captured.out.splitlines())

    return run


def problems(found: tuple[int, str]) -> list[str]:
    """The lines below ``N problems:``, which come before an empty one; ``N`` is their number."""
    status, text = found
    if status == 0:
        assert text.endswith(("\nsound", "(--fast)"))
        return []
    assert status == 1
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
    found = verify(out)
    assert problems(found) == []
    size = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards_of(out))
    norms = [np.linalg.norm(row_of(i)["semantic"].astype(np.float64)) for i in range(18)]
    shown = " / ".join(f"{norm:.4f}" for norm in (min(norms), np.mean(norms), max(norms)))
    lines = f"""set {out}
shards 9
samples 18
size {size / 2**20:,.1f} MiB
columns {", ".join(f"{name} {encoding}" for name, encoding in sorted(COLUMNS.items()))}
images decoded 18 of 18
embeddings 18 of 8 dimensions
norm {shown} (min / mean / max)
read from source 21
written 18
skipped 3
empty caption 3

sound"""
    assert found[1] == lines
    assert problems(verify(out, "--fast")) == []
    assert not list(out.rglob("*.mds")) or not options  # nothing is decompressed into the set


def test_a_fraction_of_the_images_is_decoded(tmp_path: Path, verify: Verify) -> None:
    out = write_set(tmp_path / "out", lambda number, row: row.update(image=b"no image"))
    status, text = verify(out, "--decode", 0)
    assert status == 0
    assert "images decoded 0 of 18\n" in text
    assert text.endswith("\n\nno problems; no image was decoded (--decode 0)")
    numbers = set()
    for seed in range(4):
        chosen, again = (problems(verify(out, "--decode", 0.5, "--seed", seed)) for _ in range(2))
        assert chosen == again
        assert 2 < len(chosen) < 16
        numbers.add(tuple(chosen))
    assert len(numbers) == 4


@pytest.mark.slow
def test_a_classification_set(tmp_path: Path, verify: Verify) -> None:
    def write(name: str, *labels: int) -> Path:
        rows = [{"key": f"{i}", "image": draw(i, "GIF"), "label": y} for i, y in enumerate(labels)]
        columns = {"key": "str", "image": "bytes", "label": "int"}
        folder = write_rows(tmp_path / name, rows, columns, each=2)
        classes = {"classnames": ["cat", "dog"], "templates": ["{c}"]}
        write_json(folder / "classes.json", classes)
        skipped = {"unreadable image": 2}
        dataset = {"dataset": "folder", "split": "test", "samples": 4, "skipped": skipped}
        write_json(folder / "dataset.json", dataset)
        return folder

    found = verify(write("sound", 0, 1, 1, 0))
    assert problems(found) == []
    assert "read from source 6\nwritten 4\nskipped 2\nunreadable image 2\n" in found[1]
    assert "note" not in found[1]
    assert verify(tmp_path, "--split", "sound") == found

    found = verify(write("broken", 0, 1, 2, -1))
    label = "shard.00001.mds: sample {} (key {}): label is none of the classes"
    assert problems(found) == [label.format(0, 2), label.format(1, 3)]
    assert f"to mend it: delete {tmp_path / 'broken'}, then {AGAIN}" in found[1]


def test_a_retrieval_set(tmp_path: Path, verify: Verify) -> None:
    rows: list[Row] = [
        {"key": f"{i}", "image": draw(i), "caption": [f"picture {i}", "another"]} for i in range(4)
    ]
    columns = {**PAIR, "caption": "json"}
    assert problems(verify(write_rows(tmp_path / "sound", rows, columns, each=2))) == []
    rows[2]["caption"], rows[3]["caption"] = [], ["good", " "]
    caption = "shard.00001.mds: sample {} (key {}): caption is empty or no text"
    broken = write_rows(tmp_path / "broken", rows, columns, each=2)
    assert problems(verify(broken)) == [caption.format(0, 2), caption.format(1, 3)]


def test_what_lies_around_is_noted(out: Path, verify: Verify) -> None:
    (out / "00002" / "shard.00009.mds").write_bytes(b"old")
    (out / "report.md").write_text("ours")
    write_set(out / "val")  # a set of its own
    found = verify(out)
    assert problems(found) == []
    assert "note: files that no index names: 1 (00002/shard.00009.mds)\n" in found[1]


def update(out: Path, *files: str, **values: Any) -> None:
    """Set values of JSON files of a set."""
    for file in files:
        edit(out / file, lambda content: content.update(values))


COUNTS = [f"{part:05}/counts.json" for part in range(PARTS)]


def test_a_held_out_split(out: Path, verify: Verify) -> None:
    """As convert/cc12m.py --held-out writes it."""
    held_out = write_set(out / "val")
    for name in ("dataset.json", "convert.json"):
        (held_out / name).unlink()
    shutil.rmtree(held_out / "00000")
    write_rows(held_out / "00000", [], COLUMNS)
    write_json(held_out / "00000" / "counts.json", {"written": 0, "skipped": {}})
    update(held_out, "index.json", shards=shards_of(held_out)[3:])
    update(out, *COUNTS[1:], held_out=SAMPLES)
    found = verify(out)
    assert problems(found) == []
    assert "read from source 33\nwritten 18\nheld out 12\nskipped 3\n" in found[1]
    assert "note: below are other sets, to be checked with --split: val\n" in found[1]
    assert found[1].count("note:") == 1
    found = verify(out, "--split", "val")
    assert problems(found) == []
    assert "samples 12\n" in found[1]

    update(out, "dataset.json", held_out=12)
    flip(held_out / SHARD)
    assert verify(out)[0] == 0
    found = verify(out, "--split", "val")
    assert problems(found) == [f"{SHARD}: hash xxh64 differs"]
    assert f"to mend it: delete {out}/00001, then {AGAIN}" in found[1]


@pytest.mark.parametrize("gone", [False, True])
def test_a_held_out_split_that_is_not_whole(out: Path, verify: Verify, gone: bool) -> None:
    held_out = write_set(out / "val")
    update(out, "dataset.json", held_out=18)
    update(out, *COUNTS, held_out=SAMPLES)
    assert verify(out)[0] == 0
    if gone:
        shutil.rmtree(held_out)
    else:
        edit(held_out / "index.json", lambda index: index["shards"].pop())
    found = verify(out, "--fast")
    what = "and val/index.json is gone" if gone else "val/index.json has 16"
    assert problems(found) == [f"dataset.json: says 18 samples are held out, {what}"]
    assert f"to mend it: {AGAIN}" in found[1]


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
        (cut, r"{cut:,} bytes, the index says {size:,}", True),
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
    found = verify(out)
    assert problems(found) == [f"{name}: {message.format(cut=size - 5, size=size)}"]
    assert f"to mend it: delete {out}/00001, then {AGAIN}" in found[1]
    assert verify(out, "--fast")[0] == int(fast)


def test_a_sample_that_cannot_be_read(out: Path, verify: Verify) -> None:
    def replace(data: bytes) -> list[str]:
        """Put data in the place of a shard, with which the index then agrees."""
        (out / SHARD).write_bytes(data)
        file = {"bytes": len(data), "hashes": {"xxh64": get_hash("xxh64", data)}}
        edit(out / "index.json", lambda index: index["shards"][4]["raw_data"].update(file))
        return problems(verify(out))

    data = (out / SHARD).read_bytes()
    found = replace(data.replace(b"picture ", b"picture\xff"))
    assert len(found) == 2  # and they have no key twice
    for i, line in enumerate(found):
        why = "'utf-8' codec can't decode byte 0xff"
        assert line.startswith(f"{SHARD}: sample {i} can't be read: {why}")
    found = replace((7).to_bytes(4, "little") + data[4:])
    assert found == [f"{SHARD}: holds 7 samples, the index says 2"]


# damage to samples, hashes being right

EMBEDDING = row_of(9)["semantic"]
NINE = f"{SHARD}: sample 1 (key 000010003): "
NORM = "embedding has the norm {}, where 1 is usual"
TWICE = f"{SHARD}: sample 1 has the key of sample 1 in 00001/shard.00000.mds (000010001)"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({9: {"image": b"<html>404</html>"}}, [f"{NINE}image can't be decoded"]),
        ({9: {"image": draw(9, "PNG")[:-30]}}, [f"{NINE}image can't be decoded"]),
        ({9: {"image": draw(9, "GIF")}}, [f"{NINE}image can't be decoded"]),
        ({9: {"image": b""}}, [f"{NINE}image is empty or no file"]),
        ({9: {"semantic": 0 * EMBEDDING}}, [f"{NINE}embedding is zero"]),
        ({9: {"semantic": EMBEDDING * np.float16(np.nan)}}, [f"{NINE}embedding isn't finite"]),
        ({9: {"semantic": EMBEDDING * np.float16(np.inf)}}, [f"{NINE}embedding isn't finite"]),
        ({9: {"caption": " \n"}}, [f"{NINE}caption is empty or no text"]),
        (
            {9: {"key": row_of(7)["key"]}, 4: {"key": ""}},
            ["00000/shard.00002.mds: sample 0 (key ): key is empty", TWICE],
        ),
        (
            {
                i: {"semantic": row_of(i)["semantic"] * np.float16(n)}
                for i, n in ((9, 20), (10, 0.05), (11, 5))
            },
            [
                f"{SHARD}: sample 1: {NORM.format(20)}",
                f"00001/shard.00002.mds: sample 0: {NORM.format(0.05)}",
            ],
        ),
    ],
    ids=lambda value: value[-1][-40:] if isinstance(value, list) else "",
)
def test_damaged_samples(
    tmp_path: Path, verify: Verify, changes: dict[int, Row], expected: list[str]
) -> None:
    out = write_set(tmp_path / "out", lambda number, row: row.update(changes.get(number, {})))
    found = verify(out)
    assert problems(found) == expected
    assert "note" not in found[1]


def test_keys_that_come_in_several_inputs_are_a_note(tmp_path: Path, verify: Verify) -> None:
    def repeat(number: int, row: Row) -> None:
        row["key"] = row_of(2)["key"] if number in (9, 17) else row["key"]

    found = verify(write_set(tmp_path / "out", repeat))
    assert problems(found) == []
    first = f"{SHARD}, sample 1 has the key of sample 0 in 00000/shard.00001.mds (000000002)"
    assert f"note: keys that come in several inputs: 2 (the first: {first})\n" in found[1]


def test_many_problems_are_cut_short(tmp_path: Path, verify: Verify) -> None:
    rows = [{"key": "the same", "image": b"no image", "caption": "a"} for _ in range(30)]
    found = verify(write_rows(tmp_path / "out", rows, each=2))
    lines = problems(found)
    assert len(lines) == 42
    assert "\n59 problems:\n" in found[1]
    assert lines[20] == "… and 10 more: image can't be decoded"
    assert lines[41] == "… and 9 more: key is there twice"

    gone = write_rows(
        tmp_path / "gone", ({"key": f"{i}"} for i in range(44)), {"key": "str"}, each=2
    )
    for path in gone.glob("*.mds"):
        path.unlink()
    found = verify(gone)
    assert problems(found)[19:] == ["shard.00019.mds: missing", "… and 2 more: missing"]
    assert "\n22 problems:\n" in found[1]


# what the set says about itself


def plan(out: Path) -> None:
    planned = {f"{part:05}": f"in/{part:05}.tar" for part in (*range(PARTS), 7)}
    update(out, "convert.json", inputs=planned)


def disagree(out: Path) -> None:
    update(out, "dataset.json", samples=17)
    update(out, COUNTS[1], written=7)


def truncate(out: Path) -> None:
    edit(out / COUNTS[1], lambda counts: counts["skipped"].update({"truncated file": 1}))


def lose_parts(out: Path) -> None:
    (out / COUNTS[0]).unlink()
    (out / COUNTS[1]).write_text("{")
    update(out, "index.json", shards=shards_of(out)[:6])
    update(out, "dataset.json", samples=12)


def spoil_entries(out: Path) -> None:
    shards = shards_of(out)
    del shards[0]["samples"]
    shards[1]["raw_data"]["basename"] = "../secret.mds"
    shards[2]["column_encodings"] = ["pkl"] * 4
    shards[3]["format"] = "csv"
    shards[4] |= {"column_names": ["key"], "column_encodings": ["str"], "column_sizes": [None]}
    shards[6] = shards[5]
    update(out, "index.json", shards=shards)


@pytest.mark.parametrize(
    ("damage", "expected", "advice"),
    [
        (plan, ["convert.json: in/00007.tar was not converted"], f"to mend it: {AGAIN}"),
        (
            disagree,
            [
                "dataset.json: says 17 samples, the index has 18",
                "00001/counts.json: says 7 written, the index has 6",
            ],
            "to mend it: delete {out}/00001, then",
        ),
        (
            truncate,
            [f"00001/counts.json: 00001.tar was truncated: fetch it again and {AGAIN}"],
            "",
        ),
        (
            lose_parts,
            [
                "00000/counts.json: is missing: the conversion of this part was not finished",
                "00001/counts.json: can't be read: Expecting property name",
                "00002/counts.json: says 6 written, and {out}/index.json names none of them",
            ],
            "to mend it: delete {out}/00000 (and likewise 00001, 00002), then",
        ),
        (
            spoil_entries,
            [
                "index.json: shard 0 lacks samples",
                "index.json: shard 1 names a file outside the set: ../secret.mds",
                "index.json: shard 2 stores the column caption as pkl, which executes code when it "
                "is read",
                "index.json: shard 3 has the format csv, not mds",
                f"{SHARD}: its columns are others: key str",
                "00001/shard.00002.mds: the index names it 2 times",
            ],
            "to mend it: delete",
        ),
    ],
)
def test_what_the_set_says_of_itself(
    out: Path, verify: Verify, damage: Callable[[Path], None], expected: list[str], advice: str
) -> None:
    damage(out)
    for arguments in ((), ("--fast",)):
        found = verify(out, *arguments)
        lines = [
            line for line in problems(found) if damage is disagree or "the index has" not in line
        ]
        for line, start in zip(lines, expected, strict=damage is not spoil_entries):
            assert line.startswith(start.format(out=out))
        assert advice.format(out=out) in found[1]
        assert advice or "delete" not in found[1]


# nothing can be checked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no MDS set at {out} (no index.json there)"),
        ("[", "{out}/index.json is not JSON: Expecting value: line 1 column 2 (char 1)"),
        ('{"features": []}', "{out}/index.json is not a streaming index"),
        (
            "\ufeff{}",
            "{out}/index.json is not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig): line 1 "
            "column 1 (char 0)",
        ),
        ('{"version": 1, "shards": []}', "{out}/index.json has version 1; Streaming reads 2"),
    ],
)
def test_no_set(tmp_path: Path, verify: Verify, content: str | None, message: str) -> None:
    if content:
        (tmp_path / "index.json").write_text(content)
    assert verify(tmp_path) == (2, f"error: {message.format(out=tmp_path)}\n")


def test_what_is_there_instead(tmp_path: Path, verify: Verify) -> None:
    for name in ("inputs", "data/emojiz"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("sets/val", "sets/train", "data/emoji", "unfinished"):
        write_set(tmp_path / name, parts=1)
    (tmp_path / "unfinished/index.json").unlink()
    for name in ("00001.tar", "00000.tar", "00000.parquet"):
        (tmp_path / "inputs" / name).write_bytes(b"")
    inputs = "it holds inputs (00000.tar, …), which convert/cc12m.py makes a set of"
    for place, end in {
        "sets": "; there is one in train, val: --split train",
        "unfinished": f"; its conversion was not finished: {AGAIN}",
        "inputs": f"; {inputs}",
        "data/emojis": f"; did you mean '{tmp_path}/data/emoji'?",
    }.items():
        no_set = f"error: no MDS set at {tmp_path}/{place} (no index.json there)"
        assert verify(tmp_path / place) == (2, f"{no_set}{end}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3:/bucket/x"], "set=s3:/bucket/x has one slash; did you mean 's3://bucket/x'?"),
        (["x", "--decode", "2"], "--decode must lie in [0, 1], not 2.0"),
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
    out = write_set(tmp_path / "out", parts=6)
    flip(out / SHARD)
    result = python("convert/verify.py", out, "--processes", "2", cwd=REPOSITORY)
    assert problems((result.returncode, result.stdout)) == [f"  {SHARD}: hash xxh64 differs"]
    lines = result.stderr.replace("\r", "\n").split("\n")
    assert all("verifying" in line for line in lines if line.strip())


# a bucket


def test_a_bucket(s3: Any, out: Path, verify: Verify) -> None:
    bucket = s3.bucket()
    place = f"{bucket}/a/b"

    def put(path: Path) -> None:
        key = f"a/b/{path.relative_to(out)}"
        name = bucket.removeprefix("s3://")
        s3.client.put_object(Bucket=name, Key=key, Body=path.read_bytes())

    for path in filter(Path.is_file, out.rglob("*")):
        put(path)
    found = verify(f"{place}/")
    assert problems(found) == []
    assert f"set {place}\nshards 9\nsamples 18\n" in found[1]

    first, second, third = (f"0000{part}/shard.00001.mds" for part in range(PARTS))
    size = (out / second).stat().st_size
    for name, damage in ((first, flip), (second, cut)):
        damage(out / name)
        put(out / name)
    s3.client.delete_object(Bucket=bucket.removeprefix("s3://"), Key=f"a/b/{third}")
    assert problems(verify(place)) == [
        f"{third}: missing",
        f"{first}: hash xxh64 differs",
        f"{second}: {size - 5:,} bytes, the index says {size:,}",
    ]
    assert problems(verify(place, "--fast")) == [f"{third}: missing"]
    status, text = verify(f"{bucket}/nothing")
    assert (status, text.count("\n")) == (2, 1)
    why = f"cannot read {bucket}/nothing/index.json: not found"
    assert text.startswith(f"error: no MDS set at {bucket}/nothing ({why}")


def test_a_bucket_that_must_not_be_listed(refusing: Any, out: Path, verify: Verify) -> None:
    """An input without samples has no shard, so that only a listing would show its counts."""
    plan(out)
    update(out, "dataset.json", options={})
    for path in filter(Path.is_file, out.rglob("*")):
        refusing.objects["b", f"set/{path.relative_to(out)}"] = path.read_bytes()
    refusing.without_right("list")
    found = verify("s3://b/set")
    assert problems(found) == []
    assert "note: cannot reach s3://b/set: access denied" in found[1]


# the contact sheet


def test_contact_sheet(out: Path, tmp_path: Path, verify: Verify) -> None:
    path, sheet = tmp_path / "sheet.png", contact_sheet
    status, text = verify(out, "--fast", "--sample", 8, "--to", path)
    assert status == 0
    assert f"contact sheet {path} (8 samples)" in text
    # eight shards' samples, two at most of each, evenly: every second one
    with Image.open(path) as drawn:
        assert (drawn.format, drawn.size) == ("PNG", sheet.size(8))
        for i in range(8):
            x = sheet.GAP + i % 3 * (sheet.CELL[0] + sheet.GAP) + sheet.BOX // 2
            y = sheet.TITLE + i // 3 * (sheet.CELL[1] + sheet.GAP) + sheet.BOX // 2
            with Image.open(io.BytesIO(row_of(2 * i)["image"])) as image:
                colour = image.convert("RGB").getpixel((30, 20))
            np.testing.assert_allclose(drawn.getpixel((x, y)), colour, atol=2)
    for wanted, number in ((1, 1), (17, 17), (100, 18)):
        text = verify(out, "--fast", "--sample", wanted, "--to", path)[1]
        assert f"contact sheet {path} ({number} sample" in text
        with Image.open(path) as drawn:
            assert drawn.size == sheet.size(number)
