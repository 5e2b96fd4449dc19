"""What the converter's options do to a whole set.

Odd captions and keys, and what the report says of them.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import tracemalloc
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tarballs import (
    draw,
    items_of,
    load_json,
    pairs,
    quick,
    read_back,
    refused,
    three_tars,
    write_tar,
)

from alignclip.conversion import cc12m, samples
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.shards import position
from alignclip.verification import command
from alignclip.verification.command import VerifyOptions

HELD_OUT = 0.3
TEXT_ONLY = b"a caption without an image"


def with_captions(captions: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return [
        part
        for key, text in captions.items()
        for part in ((f"{key}.jpg", draw(1)), (f"{key}.txt", text))
    ]


# the held-out split


def test_where_keys_fall_never_changes() -> None:
    """Sets that were converted by other versions share their split."""
    places = {"00000": 0.9309, "000012345": 0.8681, "a/b": 0.0544}
    assert {key: round(position(key), 4) for key in places} == places
    found = np.array([position(f"{i:09}") for i in range(5_000)])
    assert 0 <= found.min() < 0.001 < 0.999 < found.max() < 1
    assert np.abs(np.histogram(found, 10, (0, 1))[0] / 500 - 1).max() < 0.15


@pytest.mark.slow
def test_a_split_is_held_out_by_key(tmp_path: Path) -> None:
    many, one = tmp_path / "many", write_tar(tmp_path / "one" / "all.tar", pairs(0, 60))
    for first, end in pairwise([*range(12), *range(12, 61, 4)]):
        write_tar(many / f"{first:05}.tar", pairs(first, end - first))
    expected = {f"{i:05}" for i in range(60) if position(f"{i:05}") < HELD_OUT}
    assert 10 < len(expected) < 26
    assert min(expected) < "00012"  # an input is held out as a whole
    for source, out in ((many, tmp_path / "from-many"), (one, tmp_path / "from-one")):
        counts = quick(source, out, held_out=HELD_OUT, size_limit="4kb")
        assert (counts.written, counts.held_out) == (60, len(expected))
        dataset = load_json(out / "dataset.json")
        assert (dataset["samples"], dataset["held_out"]) == (60 - len(expected), len(expected))
        train, val = read_back(None, out), read_back(None, out, split="val")
        assert set(val) == expected
        assert set(train) == {f"{i:05}" for i in range(60)} - expected
        assert all(row["image"] == draw(int(key)) for key, row in {**train, **val}.items())
        remote = read_back(str(out), tmp_path / f"cache-{out.name}", split="val")
        assert set(remote) == expected
        again = quick(source, out, held_out=HELD_OUT, size_limit="4kb")
        assert (again.resumed, again.held_out, again.converted) == (60, len(expected), 0)


def test_no_input_may_have_the_name_of_the_split(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "val.tar", pairs(0, 5))
    message = r"val\.tar would become 'val', which is the held-out split's name; rename it$"
    refused(message, path, tmp_path / "out", held_out=HELD_OUT)
    assert quick(path, tmp_path / "out").written == 5


# resizing, hashes, and the share of bad samples


def test_smaller_images(tmp_path: Path) -> None:
    members = []
    for i in range(6):
        members += [(f"{i}.png", draw(i, "PNG", (400, 300))), (f"{i}.txt", b"a caption")]
    source = write_tar(tmp_path / "a.tar", [*members, *pairs(10, 2)])
    out, whole = tmp_path / "out", tmp_path / "whole"
    quick(source, whole)
    smaller = ImageOptions(resize=64, quality=80)
    quick(source, out, images=smaller)
    rows = read_back(None, out)
    assert [Image.open(io.BytesIO(rows[f"{i}"]["image"])).size for i in range(6)] == [(85, 64)] * 6
    assert rows["00010"]["image"] == draw(10)
    small, large = (load_json(folder / "dataset.json")["bytes"] for folder in (out, whole))
    assert small < large / 20
    recorded = load_json(out / "dataset.json")["options"]
    assert (recorded["check"], recorded["resize"], recorded["quality"]) == ("decode", 64, 80)
    assert load_json(whole / "dataset.json")["options"]["quality"] is None
    for changed, message in (
        (ImageOptions(resize=128, quality=80), "--resize 64, this run has --resize 128"),
        (ImageOptions(resize=64), "--quality 80, this run has --quality 90"),
        (ImageOptions(), "--resize 64, this run has no --resize"),
    ):
        message = f"begun with {message}: finish it with the same options"
        refused(message, source, out, images=changed)
    assert quick(source, out, images=smaller).resumed == 8
    # the quality says nothing without a size
    assert quick(source, whole, images=ImageOptions(quality=50)).resumed == 8


def test_hashes(tmp_path: Path) -> None:
    source = three_tars(tmp_path / "in")
    for hashes in (["xxh64", "sha1", "xxh64"], []):
        out = tmp_path / f"out-{len(hashes)}"
        quick(source, out, hashes=hashes)
        for shard in load_json(out / "index.json")["shards"]:
            assert shard["hashes"] == sorted(set(hashes))
            assert sorted(shard["raw_data"]["hashes"]) == sorted(set(hashes))


def test_too_many_bad_samples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tar(tmp_path / "in" / "00000.tar", pairs(0, 6))
    write_tar(tmp_path / "in" / "00001.tar", [(f"{i}.txt", TEXT_ONLY) for i in range(4)])
    bad = r"^4 of 10 samples are bad, more than --max-bad 0\.3 \(missing image 4\)"
    message = rf"{bad}; report\.md in .*/out has examples$"
    refused(message, tmp_path / "in", out, max_bad=0.3)
    assert not (out / "index.json").exists()
    assert not (out / "dataset.json").exists()
    assert "| missing image | 4 | 40.00% |" in (out / "report.md").read_text()
    kept = (out / "00000" / "shard.00000.mds").stat().st_mtime_ns
    again = quick(tmp_path / "in", out, max_bad=0.4)
    assert (again.written, again.resumed, again.skipped) == (6, 6, {samples.MISSING_IMAGE: 4})
    assert (out / "00000" / "shard.00000.mds").stat().st_mtime_ns == kept
    assert len(read_back(None, out)) == 6
    refused(r"^4 of 10 samples are bad", tmp_path / "in", tmp_path / "other", max_bad=0)
    assert quick(tmp_path / "in" / "00000.tar", tmp_path / "none", max_bad=0).written == 6


def test_a_run_of_bad_samples_stops_early(tmp_path: Path) -> None:
    for i in range(60):
        bad = [(f"{n}.txt", TEXT_ONLY) for n in range(700 if i < 2 else 0)]
        write_tar(tmp_path / "in" / f"{i:05}.tar", [*pairs(20 * i, 20), *bad])
    refused(r"^1,400 of [12],\d+ samples are bad", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / "00001" / "index.json").exists()
    assert not (tmp_path / "out" / "00059" / "index.json").exists()


# odd samples


def test_captions_are_mended_or_left_out(tmp_path: Path) -> None:
    longest, out = "x" * samples.MAX_CAPTION, tmp_path / "out"
    captions = {  # key -> text, and what is stored
        "entities": (
            b"Fish &amp;amp; chips &lt;hot&gt; &#127839; &nosuch; &#xD800;",
            "Fish & chips <hot> 🍟 &nosuch; \ufffd",
        ),
        "latin": ("Käse".encode("latin-1"), "K\ufffdse"),
        "mark": ("\ufeffKäse".encode(), "Käse"),
        "controls": (b"a\0b\x1b[31m\nc", "a\0b\x1b[31m\nc"),
        "longest": (longest.encode(), longest),
        "longer": (b"x" * 100_000, None),
        "a-file": (b"x" * (samples.MAX_TEXT_BYTES + 1), None),
        "spaces": ("\u3000\n".encode(), None),
        "only-entities": (b"&nbsp;&#32;", None),
    }
    members = with_captions({key: text for key, (text, _) in captions.items()})
    counts = quick(write_tar(tmp_path / "a.tar", members), out)
    stored = {key: row["caption"] for key, row in read_back(None, out).items()}
    assert stored == {key: text for key, (_, text) in captions.items() if text}
    assert counts.skipped == {samples.LONG_CAPTION: 2, samples.EMPTY_CAPTION: 2}
    assert counts.noted == {samples.HTML_ENTITIES: 1, samples.INVALID_UTF8: 1}


def test_a_key_that_comes_again(tmp_path: Path) -> None:
    """MDS takes it, but Streaming's keys and the report's would then name two samples."""
    again = [("00001.jpg", draw(9)), ("00001.txt", b"another")]
    members = [*pairs(0, 2), *again, *pairs(2, 1), *again, ("00002.jpg", draw(2))]
    counts = quick([write_tar(tmp_path / "a.tar", members)], tmp_path / "out", max_bad=0.6)
    assert counts.skipped == {samples.DUPLICATE_KEY: 2, samples.MISSING_CAPTION: 1}
    rows = read_back(None, tmp_path / "out")
    assert list(rows) == ["00000", "00001", "00002"]
    assert rows["00001"]["image"] == draw(1)


@pytest.mark.parametrize("extension", ["jpg", "json"])
def test_a_huge_member_is_not_read(tmp_path: Path, extension: str) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(0, 1))
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    huge = tarfile.TarInfo(f"huge.{extension}")
    huge.size = 70 * 2**20
    rest = write_tar(tmp_path / "rest.tar", [("huge.txt", b"a caption"), *pairs(1, 1)]).read_bytes()
    with path.open("r+b") as file:
        file.seek(end)
        file.write(huge.tobuf())
        file.seek(huge.size, io.SEEK_CUR)  # a hole in the file
        file.write(rest)
    tracemalloc.start()
    found = items_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # the txt is caption enough
    reason = samples.IMAGE_TOO_LARGE if extension == "jpg" else samples.MISSING_IMAGE
    # half a pair waits for its other half till the end
    assert sorted(getattr(sample, "reason", "") for sample in found) == ["", "", reason]
    assert peak < 10 * 2**20


# the report


def test_report_of_hostile_keys(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    plain = ("a|b", " ", "<img src=x onerror=alert(1)>", "](http://x)", "# heading", "x/y z")
    shown = {  # key -> what the report says
        "back`tick": "back·tick",
        "``": "··",
        "line\nbreak": "line·break",
        "\x1b[2Jscreen": "·[2Jscreen",
        "k" * 5_000: "k" * 200,
        "la\udcfftin": "la\ufffdtin",
        "right\u202eleft": "right·left",
        **{key: key for key in plain},
    }
    for i, key in enumerate(shown):
        write_tar(source / f"{i:02}`.tar", [(f"{key}.txt", TEXT_ONLY)])
    members = [("markup.jpg", b"<h1>`404`</h1>\n"), ("markup.txt", b"a caption")]
    members += with_captions({f"entity-{i}": b"&amp;" for i in range(30)})
    write_tar(source / "others.tar", members)
    quick(source, out)

    lines = (out / "report.md").read_text(encoding="utf-8").split("\n")
    assert all(line.isprintable() and len(line) < 1_000 for line in lines)
    examples = [line for line in lines if line.startswith("- `")]
    assert all(re.fullmatch(r"- `[^`]+` in `[^`]+`(: `[^`]+`)?", line) for line in examples)
    others = [line for line in lines if line.startswith(("#", "| ")) and "samples" not in line]
    assert "44 samples read from 14 inputs, 30 written, 14 skipped." in lines
    assert others == [
        "# Conversion report",
        "## Skipped",
        "| missing image | 13 | 29.55% |",
        "| not JPEG, PNG or WebP | 1 | 2.27% |",
        "### missing image",
        "### not JPEG, PNG or WebP",
        "## Written, but mended or unusual",
        "| caption: HTML entities | 30 | 68.18% |",
        "### caption: HTML entities",
    ]
    assert "- … 30 in all" in lines
    keys = [line.split("`")[1] for line in examples if "others.tar" not in line]
    assert keys == list(shown.values())
    assert any("it begins with b'<h1>·404·</h'" in line for line in examples)


def test_report_has_examples_of_every_input(tmp_path: Path) -> None:
    for i in range(6):
        write_tar(
            tmp_path / "in" / f"{i:05}.tar",
            [(f"{i}-{n}.txt", TEXT_ONLY) for n in range(40)] + pairs(i, 1),
        )
    quick(tmp_path / "in", tmp_path / "out", max_bad=1.0)
    text = (tmp_path / "out" / "report.md").read_text()
    found = [set(re.findall(rf"`{i}-\d+` in `{tmp_path}/in/{i:05}\.tar`", text)) for i in range(6)]
    assert [len(examples) for examples in found] == [3] * 6


def test_keys_are_stored_as_they_are(tmp_path: Path) -> None:
    keys = ["../up", "a/b", "ключ", "emoji 🪲", "new\nline", "q`u\"o'te", "y" * 200]
    members = with_captions(dict.fromkeys(keys, b"a caption"))
    members += [("n\udcffx.jpg", draw(2)), ("n\udcffx.txt", b"a caption")]
    assert len(list(islice(items_of(write_tar(tmp_path / "a.tar", members)), 20))) == 8
    quick(tmp_path / "a.tar", tmp_path / "out")
    assert list(read_back(None, tmp_path / "out")) == [*keys, "n\ufffdx"]


def test_python_callers_have_one_process_and_commands_the_cores() -> None:
    """Other processes would import a caller's script, and convert once more without its guard."""
    cores = os.cpu_count() or 1
    assert ConvertOptions(["a.tar"], "out").processes == VerifyOptions("set").processes == 1
    assert cc12m.parse(["--inputs", "a.tar", "--out", "out"]).processes == cores
    assert command.parse(["set"]).processes == cores
