"""Every member of a tar is a part of a pair, or counted as what it is.

Odd names and orders are told.
"""

from __future__ import annotations

import gzip
import json
import random
import tarfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tarballs import captions_of, draw, items_of, pairs, quick, read_back, refused, write_tar

from alignclip.conversion.cc12m import summary
from alignclip.conversion.formats import pairing
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.samples import (
    FIRST_DOT,
    LIE_APART,
    MISSING_CAPTION,
    MISSING_IMAGE,
    Ignored,
    Sample,
    Skipped,
)

Members = list[tuple[str, bytes]]


def named(form: str, number: int, ending: str = "jpg", text: str = "txt") -> Members:
    """Pairs with keys of that form."""
    return [
        member
        for i in range(number)
        for member in (
            (f"{form.format(i)}.{ending}", draw(i)),
            (f"{form.format(i)}.{text}", f"picture {i}".encode()),
        )
    ]


def halves(members: Members) -> Members:
    """First all images, then all texts."""
    return [*members[::2], *members[1::2]]


@pytest.fixture
def tar(tmp_path: Path) -> Any:
    """Writes the members of ``a.tar``."""
    return partial(write_tar, tmp_path / "a.tar")


def reasons_of(path: Path, **reading: Any) -> list[tuple[str, str]]:
    """Key and reason of each pair that is left out, sorted."""
    found = items_of(path, **reading)
    return sorted((item.key, item.reason) for item in found if isinstance(item, Skipped))


# endings


def test_compound_endings_are_named_with_the_way_out(tmp_path: Path, tar: Any) -> None:
    path, out = tar(named("sample{:08}", 20, "input.jpg", "outputs.txt")), tmp_path / "out"
    message = (
        r"^no sample was written from 1 input; skipped: missing image 20\. The files end in "
        r"input\.jpg, "
        r"outputs\.txt: name those of images and captions with --image-key, --caption-key$"
    )
    refused(message, [path], out)
    assert not (out / "index.json").exists()
    counts = quick([path], out, image_key="input.jpg", caption_key="outputs.txt")
    assert (counts.written, counts.bad) == (20, 0)
    key = "sample00000003"
    assert read_back(None, out)[key] == {"key": key, "image": draw(3), "caption": "picture 3"}


@pytest.mark.parametrize("key", ["CAP", ".cap", "cap"])
def test_a_caption_key_names_a_member_or_an_entry(tar: Any, key: str) -> None:
    members = named("{:03}", 2, text="cap")
    members += [("002.jpg", draw(2)), ("002.json", json.dumps({key: "an entry"}).encode())]
    captions = captions_of(tar(members), caption_key=key)
    assert captions == ["picture 0", "picture 1", "an entry"]


@pytest.mark.parametrize(
    ("ending", "text", "message"),
    [
        ("gif", "txt", r"missing image 3\. The files end in gif, txt: name those"),
        (
            "jpg",
            "cls",
            r"missing caption 3\. The files end in cls, jpg: --caption-key names the ending",
        ),
    ],
)
def test_endings_that_are_not_read(
    tmp_path: Path, tar: Any, ending: str, text: str, message: str
) -> None:
    path, out = tar(named("{:03}", 3, ending, text)), tmp_path / "out"
    refused(message, [path], out)
    assert not out.exists()
    quick([path, write_tar(tmp_path / "b.tar", named("{:03}", 3))], out)
    ends = ", ".join(sorted([ending, text], key=["jpg", "txt", "gif", "cls"].index))
    assert f"`its files: {ends}`" in (out / "report.md").read_text(encoding="utf-8")


def test_texts_of_another_encoding(tar: Any) -> None:
    members = [("0.jpg", draw(0)), ("0.txt", "Käse".encode("cp1252"))]
    assert captions_of(tar(members), encoding="cp1252") == ["Käse"]


# keys with a dot


def test_pairs_that_become_one_at_the_first_dot(tmp_path: Path, tar: Any) -> None:
    path, out = tar(named("22.05-{:03}", 20)), tmp_path / "out"
    message = r"skipped: key cut at its first dot 20\. A key ends at the first dot .*--last-dot"
    refused(message, [path], out)
    assert quick([path], out, last_dot=True).written == 20
    assert next(iter(read_back(None, out))) == "22.05-000"


def test_pairs_with_a_dot_beside_others_are_counted_in_pairs(tmp_path: Path, tar: Any) -> None:
    path, out = (
        tar([*named("{:06}", 30), *named("22.05-{:03}", 30), *named("v1.{}", 5)]),
        tmp_path / "out",
    )
    counts = quick([path], out, max_bad=0.6)
    assert (counts.written, counts.skipped) == (30, {FIRST_DOT: 35})
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "65 samples read from 1 input, 30 written, 35 skipped." in report
    assert "A key ends at the first dot of the file name" in report
    assert "--last-dot" in summary(counts, ConvertOptions([str(path)], str(out), semantic=False))
    message = "was begun with no --last-dot, this run has --last-dot: "
    refused(message, [path], out, last_dot=True)


@pytest.mark.parametrize("unsorted", [False, True])
def test_halves_with_a_dot_that_lie_apart(tar: Any, unsorted: bool) -> None:
    path, keys = tar(halves(named("22.05-{:03}", 10))), [f"22.05-{i:03}" for i in range(10)]
    assert items_of(path) == [Skipped(key, FIRST_DOT) for key in keys]
    found = items_of(path, last_dot=True, unsorted=unsorted)
    joined = [Sample(key, draw(i), f"picture {i}") for i, key in enumerate(keys)]
    assert found == (joined if unsorted else [Skipped(key, LIE_APART) for key in keys])


def test_what_a_pair_has_besides_stays_a_part_of_it(tar: Any) -> None:
    besides = [(f"0.{ending}", b"x") for ending in ("seg.png", "crop.jpg", "crop.txt")]
    found = items_of(tar([("0.jpg", draw(0)), ("0.txt", b"a"), *besides]))
    assert found == [Ignored("0.crop", pairing.FURTHER_PAIR), Sample("0", draw(0), "a")]


# halves that lie apart


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_halves_that_lie_apart_are_pairs_that_can_be_joined(
    tmp_path: Path, tar: Any, order: str
) -> None:
    members = halves(named("{:06}", 60))
    if order == "mixed":
        random.Random(1).shuffle(members)
    path = tar(members)
    if order == "first":
        message = "skipped: image and caption lie apart 60. .*: sort .*, or give --unsorted$"
        refused(message, [path], tmp_path / "out")
    assert reasons_of(path) == [(f"{i:06}", LIE_APART) for i in range(60)]
    counts = quick([path], tmp_path / "joined", unsorted=True)
    assert (counts.written, counts.bad) == (60, 0)
    rows = read_back(None, tmp_path / "joined")
    assert sorted(rows) == [f"{i:06}" for i in range(60)]
    for key, row in rows.items():
        assert (row["image"], row["caption"]) == (draw(int(key)), f"picture {int(key)}")


def test_some_halves_that_lie_apart(tmp_path: Path, tar: Any) -> None:
    members = named("{:06}", 60)
    counts = quick([tar([*members[:84], *halves(members[84:])])], tmp_path / "out")
    assert (counts.written, counts.skipped) == (42, {LIE_APART: 18})
    assert "60 samples read" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_three_parts_that_lie_apart(tar: Any) -> None:
    """As ``tar`` packs a folder by its table of files: a json beside the image, the txt
    elsewhere.
    """
    members = sorted(pairs(0, 5), key=lambda member: member[0].endswith("txt"))
    assert captions_of(tar(members)) == [f"not picture {i}" for i in range(5)]
    path = tar([(name, b"{}" if name.endswith("json") else data) for name, data in members])
    assert reasons_of(path) == [(f"{i:05}", LIE_APART) for i in range(5)]
    joined = [Sample(f"{i:05}", draw(i), f"picture {i}") for i in range(5)]
    assert items_of(path, unsorted=True) == joined


def test_halves_without_another_half_say_which_is_missing(tar: Any) -> None:
    members = [("0.jpg", draw(0)), ("1.txt", b"a"), *[("2.jpg", draw(2))] * 2, *pairs(5, 1)]
    two = ("2", MISSING_CAPTION)
    assert reasons_of(tar(members)) == [("0", MISSING_CAPTION), ("1", MISSING_IMAGE), two, two]


def test_not_more_than_so_many_halves_wait(tar: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MOST_HALVES", 2)
    found = Counter(reason for _, reason in reasons_of(tar(halves(named("{}", 4)))))
    assert found == Counter([LIE_APART, MISSING_CAPTION, MISSING_IMAGE] * 2)


def test_a_compressed_tar_is_not_read_back_and_forth(tmp_path: Path, tar: Any) -> None:
    def packed(members: Members) -> Path:
        path = tmp_path / "a.tar.gz"
        path.write_bytes(gzip.compress(tar(members).read_bytes()))
        return path

    path, out = packed(halves(named("{}", 4))), tmp_path / "out"
    assert items_of(path) == [Skipped(str(i), LIE_APART) for i in range(4)]
    message = r"a\.tar\.gz is compressed, and --unsorted reads plain tars only"
    refused(message, [path], out, unsorted=True)
    assert quick([packed(named("{}", 4))], out, unsorted=True).written == 4


# what is no part of a pair


def test_every_member_is_counted(tmp_path: Path) -> None:
    """Of any tar: members of pairs, and files by what they are, add up to all members."""
    plain = "data/._00001.jpg __MACOSX/data/._00001.txt .DS_Store README notes.md 00000_stats.json"
    files = [(name, b"{}") for name in f"{plain} b.flac b.npy".split()]
    whole = [(f"data/{name}", data) for name, data in pairs(0, 4)]
    path = write_tar(tmp_path / "a.tar", [*whole, *files])
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("data", tarfile.DIRTYPE),
            ("x.jpg", tarfile.SYMTYPE),
            ("y.jpg", tarfile.LNKTYPE),
            ("z.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "data/00000.jpg"
            tar.addfile(info)
    counts = quick([path], tmp_path / "out")
    assert (counts.written, counts.bad) == (4, 0)
    assert counts.ignored == {
        "folder": 1,
        "link": 2,
        "special file": 1,
        "macOS's ._ file": 2,
        "hidden file": 1,
        "file without an ending": 1,
        pairing.OTHER_FILE: 3,
        pairing.NO_PAIR: 1,
    }
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "4 samples read from 1 input, 4 written, 0 skipped." in report
    assert "| file of another ending | 3 |" in report
    assert "- `00000_stats.json` in" in report
    said = summary(counts, ConvertOptions([str(path)], str(tmp_path / "out"), semantic=False))
    assert "no part of a pair                   12 files\n" in said
    assert quick([path], tmp_path / "out").ignored == counts.ignored


def test_counts_of_earlier_versions_have_no_such_files(tmp_path: Path) -> None:
    path, kept = write_tar(tmp_path / "a.tar", pairs(0, 4)), tmp_path / "out" / "a" / "counts.json"
    quick([path], tmp_path / "out")
    counts = json.loads(kept.read_text(encoding="utf-8"))
    del counts["ignored"]
    kept.write_text(json.dumps(counts), encoding="utf-8")
    assert quick([path], tmp_path / "out").converted == 0


def test_a_tar_without_one_pair_says_what_it_holds(tmp_path: Path, tar: Any) -> None:
    path = tar([(name, b"x") for name in ("a.flac", "b.flac", "README")])
    message = "nothing; no part of a pair: file of another ending 2, file without an ending 1$"
    refused(f"skipped: {message}", [path], tmp_path / "out")


@pytest.mark.parametrize("seed", range(30))
def test_read_is_written_and_skipped_in_pairs(tar: Any, seed: int) -> None:
    """In any order, with any of the ways in which pairs are lost: as many as went in."""
    rng = random.Random(seed)
    dotted = named(f"c/{rng.randint(0, 9)}.{{:04}}", 10)
    rest = named("b/{:04}", 10) + [(f"d/{i}.{rng.choice(['jpg', 'txt'])}", b"x") for i in range(5)]
    rng.shuffle(rest)
    at = {name: i for i, (name, _) in enumerate(rest)}
    apart = sum(abs(at[f"b/{i:04}.jpg"] - at[f"b/{i:04}.txt"]) > 1 for i in range(10))
    found = items_of(tar([*named("a/{:04}", 20), *dotted, *rest]))
    reasons = Counter(item.reason if isinstance(item, Skipped) else "" for item in found)
    lone = reasons.pop(MISSING_CAPTION, 0) + reasons.pop(MISSING_IMAGE, 0)
    expected = Counter({"": 30 - apart, FIRST_DOT: 10, LIE_APART: apart})
    assert (lone, reasons) == (5, expected)
