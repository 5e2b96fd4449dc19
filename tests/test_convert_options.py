"""What the converter's options do to a whole set.

Odd captions and keys, and what the report says of them.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tarballs import draw, items_of, pairs, quick, read_back, three_tars, write_tar

from alignclip.conversion import samples
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.shards import position
from alignclip.errors import UserError

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


def test_a_split_is_held_out_by_key(tmp_path: Path) -> None:
    many, one = tmp_path / "many", write_tar(tmp_path / "one" / "all.tar", pairs(0, 60))
    for i in range(0, 60, 4):
        write_tar(many / f"{i:05}.tar", pairs(i, 4))
    expected = {f"{i:05}" for i in range(60) if position(f"{i:05}") < HELD_OUT}
    assert 10 < len(expected) < 26
    for source, out in ((many, tmp_path / "from-many"), (one, tmp_path / "from-one")):
        counts = quick([source], out, held_out=HELD_OUT, size_limit="4kb")
        assert (counts.written, counts.held_out) == (60, len(expected))
        dataset = json.loads((out / "dataset.json").read_text())
        assert (dataset["samples"], dataset["held_out"]) == (60 - len(expected), len(expected))
        train, val = read_back(None, out), read_back(None, out, split="val")
        assert set(val) == expected
        assert set(train) == {f"{i:05}" for i in range(60)} - expected
        assert all(row["image"] == draw(int(key)) for key, row in {**train, **val}.items())
        remote = read_back(str(out), tmp_path / f"cache-{out.name}", split="val")
        assert set(remote) == expected
        again = quick([source], out, held_out=HELD_OUT, size_limit="4kb")
        assert (again.resumed, again.held_out, again.converted) == (60, len(expected), 0)


def test_a_replaced_input_replaces_its_held_out_samples(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_tar(source / "a.tar", pairs(0, 40))
    quick([source], out, held_out=HELD_OUT, size_limit="4kb")
    write_tar(source / "a.tar", pairs(40, 20))
    counts = quick([source], out, held_out=HELD_OUT, size_limit="4kb")
    expected = {f"{i:05}" for i in range(40, 60) if position(f"{i:05}") < HELD_OUT}
    assert (counts.written, counts.held_out) == (20, len(expected))
    assert len(read_back(None, out)) == 20 - len(expected)
    assert set(read_back(None, out, split="val")) == expected
    index = json.loads((out / "val" / "index.json").read_text())
    named = {shard["raw_data"]["basename"] for shard in index["shards"]}
    assert named == {str(path.relative_to(out / "val")) for path in out.glob("val/*/*.mds")}


def test_an_input_that_is_held_out_as_a_whole(tmp_path: Path) -> None:
    for i in range(20):
        write_tar(tmp_path / "in" / f"{i:05}.tar", pairs(i, 1))
    counts = quick([tmp_path / "in"], tmp_path / "out", held_out=HELD_OUT)
    assert 0 < counts.held_out < counts.written == 20
    assert len(read_back(None, tmp_path / "out")) == 20 - counts.held_out
    assert len(read_back(None, tmp_path / "out", split="val")) == counts.held_out
    assert quick([tmp_path / "in"], tmp_path / "out", held_out=HELD_OUT).converted == 0


def test_no_input_may_have_the_name_of_the_split(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "val.tar", pairs(0, 5))
    with pytest.raises(
        UserError,
        match=r"val\.tar would become 'val', which is the held-out split's name; rename it$",
    ):
        quick([path], tmp_path / "out", held_out=HELD_OUT)
    assert quick([path], tmp_path / "out").written == 5


# resizing, hashes, and the share of bad samples


def test_smaller_images(tmp_path: Path) -> None:
    members = []
    for i in range(6):
        members += [(f"{i}.png", draw(i, "PNG", (400, 300))), (f"{i}.txt", b"a caption")]
    source, out = write_tar(tmp_path / "a.tar", [*members, *pairs(10, 2)]), tmp_path / "out"
    quick([source], tmp_path / "whole")
    smaller = ImageOptions(resize=64, quality=80)
    quick([source], out, images=smaller)
    rows = read_back(None, out)
    assert [Image.open(io.BytesIO(rows[f"{i}"]["image"])).size for i in range(6)] == [(85, 64)] * 6
    assert rows["00010"]["image"] == draw(10)
    sizes = [
        (folder / "a" / "shard.00000.mds").stat().st_size for folder in (tmp_path / "whole", out)
    ]
    assert sizes[1] < sizes[0] / 20
    recorded = json.loads((out / "dataset.json").read_text())["options"]
    assert (recorded["check"], recorded["resize"], recorded["quality"]) == ("decode", 64, 80)
    assert (
        json.loads((tmp_path / "whole" / "dataset.json").read_text())["options"]["quality"] is None
    )
    for changed, message in (
        (ImageOptions(resize=128, quality=80), "--resize 64, this run has --resize 128"),
        (ImageOptions(resize=64), "--quality 80, this run has --quality 90"),
        (ImageOptions(), "--resize 64, this run has no --resize"),
    ):
        with pytest.raises(
            UserError, match=f"begun with {message}: finish it with the same options"
        ):
            quick([source], out, images=changed)
    assert quick([source], out, images=smaller).resumed == 8
    assert (
        quick([source], tmp_path / "whole", images=ImageOptions(quality=50)).resumed == 8
    )  # says nothing without


def test_hashes(tmp_path: Path) -> None:
    source = three_tars(tmp_path / "in")
    for hashes in (["xxh64", "sha1", "xxh64"], []):
        out = tmp_path / f"out-{len(hashes)}"
        quick([source], out, hashes=hashes)
        for shard in json.loads((out / "index.json").read_text())["shards"]:
            assert shard["hashes"] == sorted(set(hashes))
            assert sorted(shard["raw_data"]["hashes"]) == sorted(set(hashes))
    with pytest.raises(
        UserError, match=r"^--hashes xxh46 is not one of Streaming's; did you mean 'xxh64'\?$"
    ):
        quick([source], tmp_path / "out", hashes=["xxh46"])


def test_too_many_bad_samples(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_tar(tmp_path / "in" / "00000.tar", pairs(0, 6))
    write_tar(tmp_path / "in" / "00001.tar", [(f"{i}.txt", TEXT_ONLY) for i in range(4)])
    bad = r"^4 of 10 samples are bad, more than --max-bad 0\.3 \(missing image 4\)"
    message = rf"{bad}; report\.md in .*/out has examples$"
    with pytest.raises(UserError, match=message):
        quick([tmp_path / "in"], out, max_bad=0.3)
    assert not (out / "index.json").exists()
    assert not (out / "dataset.json").exists()
    assert "| missing image | 4 | 40.00% |" in (out / "report.md").read_text()
    kept = (out / "00000" / "shard.00000.mds").stat().st_mtime_ns
    again = quick([tmp_path / "in"], out, max_bad=0.4)
    assert (again.written, again.resumed, again.skipped) == (6, 6, {samples.MISSING_IMAGE: 4})
    assert (out / "00000" / "shard.00000.mds").stat().st_mtime_ns == kept
    assert len(read_back(None, out)) == 6
    with pytest.raises(UserError, match=r"^4 of 10 samples are bad"):
        quick([tmp_path / "in"], tmp_path / "other", max_bad=0)
    assert quick([tmp_path / "in" / "00000.tar"], tmp_path / "none", max_bad=0).written == 6
    assert (
        (tmp_path / "none" / "report.md")
        .read_text()
        .endswith("6 samples read from 1 input, 6 written, 0 skipped.\n")
    )


def test_a_run_of_bad_samples_stops_early(tmp_path: Path) -> None:
    for i in range(60):
        bad = [(f"{n}.txt", TEXT_ONLY) for n in range(700 if i < 2 else 0)]
        write_tar(tmp_path / "in" / f"{i:05}.tar", [*pairs(20 * i, 20), *bad])
    with pytest.raises(UserError, match=r"^1,400 of [12],\d+ samples are bad"):
        quick([tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out" / "00001" / "index.json").exists()
    assert not (tmp_path / "out" / "00059" / "index.json").exists()


# odd samples


def test_captions_are_mended_or_left_out(tmp_path: Path) -> None:
    captions = {
        "entities": b"Fish &amp;amp; chips &lt;hot&gt; &#127839; &nosuch; &#xD800;",
        "latin": "Käse".encode("latin-1"),
        "mark": "\ufeffKäse".encode(),
        "controls": b"a\0b\x1b[31m\nc",
        "longest": b"x" * samples.MAX_CAPTION,
        "longer": b"x" * 100_000,
        "a-file": b"x" * (samples.MAX_TEXT_BYTES + 1),
        "spaces": "\u3000\n".encode(),
        "only-entities": b"&nbsp;&#32;",
    }
    counts = quick([write_tar(tmp_path / "a.tar", with_captions(captions))], tmp_path / "out")
    assert {key: row["caption"] for key, row in read_back(None, tmp_path / "out").items()} == {
        "entities": "Fish & chips <hot> 🍟 &nosuch; \ufffd",
        "latin": "K\ufffdse",
        "mark": "Käse",
        "controls": "a\0b\x1b[31m\nc",
        "longest": "x" * samples.MAX_CAPTION,
    }
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
    reason = (
        samples.IMAGE_TOO_LARGE if extension == "jpg" else samples.MISSING_IMAGE
    )  # the txt is caption enough
    # half a pair waits for its other half till the end
    assert sorted(getattr(sample, "reason", "") for sample in found) == ["", "", reason]
    assert peak < 10 * 2**20


# the report


def test_report_of_hostile_keys(tmp_path: Path) -> None:
    bad = [
        "back`tick",
        "``",
        "line\nbreak",
        "\x1b[2Jscreen",
        "k" * 5_000,
        "la\udcfftin",
        "right\u202eleft",
        "a|b",
        " ",
    ]
    bad += ["<img src=x onerror=alert(1)>", "](http://x)", "# heading", "x/y z"]
    for i, key in enumerate(bad):
        write_tar(tmp_path / "in" / f"{i:02}`.tar", [(f"{key}.txt", TEXT_ONLY)])
    members = [("markup.jpg", b"<h1>`404`</h1>\n"), ("markup.txt", b"a caption")]
    members += with_captions({f"entity-{i}": b"&amp;" for i in range(30)})
    write_tar(tmp_path / "in" / "others.tar", members)
    quick([tmp_path / "in"], tmp_path / "out")

    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n"))
    lines = text.splitlines()
    examples = [line for line in lines if line.startswith("- `")]
    assert all(re.fullmatch(r"- `[^`]+` in `[^`]+`(: `[^`]+`)?", line) for line in examples)
    assert all(len(line) < 1_000 for line in lines)
    others = [line for line in lines if line and line not in examples]
    assert others[:2] == [
        "# Conversion report",
        "44 samples read from 14 inputs, 30 written, 14 skipped.",
    ]
    tables = [line for line in others if line.startswith("| ") and "samples" not in line]
    assert tables == [
        "| missing image | 13 | 29.55% |",
        "| not JPEG, PNG or WebP | 1 | 2.27% |",
        "| caption: HTML entities | 30 | 68.18% |",
    ]
    sections = [line for line in others if line.startswith("##")]
    assert sections == [
        *("## Skipped", "### missing image", "### not JPEG, PNG or WebP"),
        *("## Written, but mended or unusual", "### caption: HTML entities"),
    ]
    assert "- … 30 in all" in others
    keys = [line.split("`")[1] for line in examples if "others.tar" not in line]
    assert keys == [
        "back·tick",
        "··",
        "line·break",
        "·[2Jscreen",
        "k" * 200,
        "la\ufffdtin",
        "right·left",
        *bad[7:],
    ]
    assert any("it begins with b'<h1>·404·</h'" in line for line in examples)


def test_report_has_examples_of_every_input(tmp_path: Path) -> None:
    for i in range(6):
        write_tar(
            tmp_path / "in" / f"{i:05}.tar",
            [(f"{i}-{n}.txt", TEXT_ONLY) for n in range(40)] + pairs(i, 1),
        )
    quick([tmp_path / "in"], tmp_path / "out", max_bad=1.0)
    text = (tmp_path / "out" / "report.md").read_text()
    found = [set(re.findall(rf"`{i}-\d+` in `{tmp_path}/in/{i:05}\.tar`", text)) for i in range(6)]
    assert [len(examples) for examples in found] == [3] * 6


def test_keys_are_stored_as_they_are(tmp_path: Path) -> None:
    keys = ["../up", "a/b", "ключ", "emoji 🪲", "new\nline", "q`u\"o'te", "y" * 200]
    members = with_captions(dict.fromkeys(keys, b"a caption"))
    members += [("n\udcffx.jpg", draw(2)), ("n\udcffx.txt", b"a caption")]
    assert len(list(islice(items_of(write_tar(tmp_path / "a.tar", members)), 20))) == 8
    quick([tmp_path / "a.tar"], tmp_path / "out")
    assert list(read_back(None, tmp_path / "out")) == [*keys, "n\ufffdx"]
