"""The rate that the converter's summary ends with: what is said of which sets. No test looks at the
number.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import python
from tarballs import draw, pairs, quick, write_tar

from alignclip.conversion import loading_rate as measured
from alignclip.conversion.loading_rate import loading_rate
from alignclip.conversion.options import ConvertOptions

RATE = r"about [\d,]+ samples/s a core"


def rows_of(folder: Path, size: tuple[int, int] = (40, 30), **options: object) -> dict[str, str]:
    """The rows for a set of drawn pictures of a size."""
    members = [
        member
        for i in range(6)
        for member in ((f"{i}.jpg", draw(i, size=size)), (f"{i}.txt", f"picture {i}".encode()))
    ]
    tar, out = write_tar(folder / "a.tar", members), folder / "mds"
    counts = quick(tar, out, **options)
    return dict(loading_rate(ConvertOptions([str(tar)], str(out), **options), counts))


@pytest.fixture
def any_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate with --resize is named however much it gains: no test asserts a time."""
    monkeypatch.setattr(measured, "WORTHWHILE", 0.0)


@pytest.mark.usefixtures("any_gain")
def test_small_pictures(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    assert [*rows] == ["loads at", "  samples of"]
    assert re.fullmatch(rf"{RATE}, of which this machine has \d+", rows["loads at"])
    assert re.fullmatch(r"[\d.]+ KiB, 40 × 30 px, cropped to 32 px", rows["  samples of"])


@pytest.mark.usefixtures("any_gain")
def test_large_pictures_are_measured_smaller_too(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, size=(640, 480))
    assert re.fullmatch(r"[\d.]+ KiB, 640 × 480 px, cropped to 224 px", rows["  samples of"])
    assert re.fullmatch(RATE, rows["  with --resize 256"])


@pytest.mark.usefixtures("any_gain")
def test_a_set_of_resized_pictures_is_not_told_to_resize(tmp_path: Path) -> None:
    from alignclip.conversion.images import ImageOptions

    rows = rows_of(tmp_path, size=(640, 480), images=ImageOptions(resize=256))
    assert [*rows] == ["loads at", "  samples of"]
    assert "341 × 256 px" in rows["  samples of"]


def test_a_small_gain_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "WORTHWHILE", float("inf"))
    assert [*rows_of(tmp_path, size=(640, 480))] == ["loads at", "  samples of"]


def test_a_compressed_set(tmp_path: Path) -> None:
    assert "loads at" in rows_of(tmp_path, compression="zstd:7")


def test_what_cannot_be_measured_is_not_said(tmp_path: Path) -> None:
    from alignclip.conversion.images import ImageOptions

    members = [("a.jpg", b"no picture"), ("a.txt", b"text")]
    tar, out = write_tar(tmp_path / "a.tar", members), tmp_path / "mds"
    options = {"images": ImageOptions(check="none")}
    counts = quick(tar, out, **options)
    assert loading_rate(ConvertOptions([str(tar)], str(out), **options), counts) == []
    (shard,) = out.glob("*/*.mds")
    shard.unlink()
    assert loading_rate(ConvertOptions([str(tar)], str(out), **options), counts) == []


@pytest.mark.slow
def test_the_command_says_it_before_the_next_step(tmp_path: Path) -> None:
    tar, out = write_tar(tmp_path / "a.tar", pairs(0, 5)), tmp_path / "mds"
    command = ["convert/cc12m.py", "--inputs", tar, "--out", out, "--no-semantic"]
    said = python(*command).stdout
    assert re.search(rf"\nwhere +{out}\nloads at +{RATE}, .*\n  samples of .*\nthis run ", said)
    assert "loads at" not in python(*command, "--no-next").stdout
