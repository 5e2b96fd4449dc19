"""Every member of a tar is a part of a pair, or counted as what it is; odd names and orders are told."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from pathlib import Path

import pytest
from tarballs import draw, items_of, pairs, quick, read_back, write_tar

from alignclip.conversion import samples
from alignclip.conversion.cc12m import summary
from alignclip.conversion.formats import pairing
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.samples import (
    FIRST_DOT,
    LIE_APART,
    MISSING_CAPTION,
    MISSING_IMAGE,
    Ignored,
    Reading,
    Sample,
    Skipped,
)
from alignclip.errors import UserError

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


# endings


def test_compound_endings_are_named_with_the_way_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named("sample{:08}", 20, "input.jpg", "outputs.txt"))
    message = (
        r"^no sample was written from 1 input; skipped: missing image 20\. The files end in input\.jpg, outputs\.txt: "
        r"name those of images and captions with --image-key, --caption-key$"
    )
    with pytest.raises(UserError, match=message):
        quick([path], tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    counts = quick(
        [path], tmp_path / "out", reading=Reading(image_key="input.jpg"), caption_key="outputs.txt"
    )
    assert (counts.written, counts.bad) == (20, 0)
    assert read_back(None, tmp_path / "out")["sample00000003"] == {
        "key": "sample00000003",
        "image": draw(3),
        "caption": "picture 3",
    }


@pytest.mark.parametrize("key", ["CAP", ".cap", "cap"])
def test_a_caption_key_names_a_member_or_an_entry(tmp_path: Path, key: str) -> None:
    members = named("{:03}", 2, text="cap")
    members += [("002.jpg", draw(2)), ("002.json", json.dumps({key: "an entry"}).encode())]
    found = items_of(write_tar(tmp_path / "a.tar", members), key)
    assert [sample.caption for sample in found if isinstance(sample, Sample)] == [
        "picture 0",
        "picture 1",
        "an entry",
    ]


def test_images_of_an_ending_that_is_not_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named("{:03}", 3, "gif"))
    with pytest.raises(UserError, match=r"missing image 3\. The files end in gif, txt: name those"):
        quick([path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quick([path, write_tar(tmp_path / "b.tar", named("{:03}", 3))], tmp_path / "out")
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "`its files: txt, gif`" in report


def test_labels_instead_of_captions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named("{:03}", 3, text="cls"))
    with pytest.raises(
        UserError,
        match=r"missing caption 3\. The files end in cls, jpg: --caption-key names the ending",
    ):
        quick([path], tmp_path / "out")


def test_texts_of_another_encoding(tmp_path: Path) -> None:
    members = [("0.jpg", draw(0)), ("0.txt", "Käse".encode("cp1252"))]
    (found,) = items_of(write_tar(tmp_path / "a.tar", members), encoding="cp1252")
    assert isinstance(found, Sample)
    assert found.caption == "Käse"


# keys with a dot


def test_pairs_that_become_one_at_the_first_dot(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", named("22.05-{:03}", 20))
    with pytest.raises(
        UserError,
        match=r"skipped: key cut at its first dot 20\. A key ends at the first dot .*--last-dot",
    ):
        quick([path], tmp_path / "out")
    assert quick([path], tmp_path / "out", reading=Reading(last_dot=True)).written == 20
    assert next(iter(read_back(None, tmp_path / "out"))) == "22.05-000"


def test_pairs_with_a_dot_beside_others_are_counted_in_pairs(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [*named("{:06}", 30), *named("22.05-{:03}", 30), *named("v1.{}", 5)]
    )
    counts = quick([path], tmp_path / "out", max_bad=0.6)
    assert (counts.written, counts.skipped) == (30, {FIRST_DOT: 35})
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "65 samples read from 1 input, 30 written, 35 skipped." in report
    assert "A key ends at the first dot of the file name" in report
    assert "--last-dot" in summary(
        counts, ConvertOptions([str(path)], str(tmp_path / "out"), semantic=False)
    )
    with pytest.raises(UserError, match=r"was begun with no --last-dot, this run has --last-dot: "):
        quick([path], tmp_path / "out", reading=Reading(last_dot=True))


@pytest.mark.parametrize("unsorted", [False, True])
def test_halves_with_a_dot_that_lie_apart(tmp_path: Path, unsorted: bool) -> None:
    path = write_tar(tmp_path / "a.tar", halves(named("22.05-{:03}", 10)))
    assert items_of(path) == [Skipped(f"22.05-{i:03}", FIRST_DOT) for i in range(10)]
    found = items_of(path, last_dot=True, unsorted=unsorted)
    keys = [f"22.05-{i:03}" for i in range(10)]
    assert found == (
        [Sample(key, draw(i), f"picture {i}") for i, key in enumerate(keys)]
        if unsorted
        else [Skipped(key, LIE_APART) for key in keys]
    )


def test_what_a_pair_has_besides_stays_a_part_of_it(tmp_path: Path) -> None:
    members = [
        ("0.jpg", draw(0)),
        ("0.txt", b"a"),
        ("0.seg.png", b"x"),
        ("0.crop.jpg", b"x"),
        ("0.crop.txt", b"x"),
    ]
    found = items_of(write_tar(tmp_path / "a.tar", members))
    assert found == [Ignored("0.crop", pairing.FURTHER_PAIR), Sample("0", draw(0), "a")]


# halves that lie apart


@pytest.mark.parametrize("order", ["first", "mixed"])
def test_halves_that_lie_apart_are_pairs_that_can_be_joined(tmp_path: Path, order: str) -> None:
    members = halves(named("{:06}", 60))
    if order == "mixed":
        random.Random(1).shuffle(members)
    path = write_tar(tmp_path / "a.tar", members)
    if order == "first":
        message = r"skipped: image and caption lie apart 60\. Image and caption lie apart: sort .*, or give --unsorted$"
        with pytest.raises(UserError, match=message):
            quick([path], tmp_path / "out")
    found = items_of(path)
    assert len(found) == 60
    assert {item.reason for item in found if isinstance(item, Skipped)} == {LIE_APART}
    counts = quick([path], tmp_path / "joined", reading=Reading(unsorted=True))
    assert (counts.written, counts.bad) == (60, 0)
    rows = read_back(None, tmp_path / "joined")
    assert {key: row["caption"] for key, row in rows.items()} == {
        f"{i:06}": f"picture {i}" for i in range(60)
    }
    assert all(row["image"] == draw(int(key)) for key, row in rows.items())


def test_some_halves_that_lie_apart(tmp_path: Path) -> None:
    members = named("{:06}", 60)
    path = write_tar(tmp_path / "a.tar", [*members[:84], *halves(members[84:])])
    counts = quick([path], tmp_path / "out")
    assert (counts.written, counts.skipped) == (42, {LIE_APART: 18})
    assert "60 samples read" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_three_parts_that_lie_apart(tmp_path: Path) -> None:
    """As ``tar`` packs a folder by its table of files: a json beside the image, the txt elsewhere."""
    whole = pairs(0, 5)
    members = [
        *(m for m in whole if not m[0].endswith("txt")),
        *(m for m in whole if m[0].endswith("txt")),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert [sample.caption for sample in items_of(path) if isinstance(sample, Sample)] == [
        f"not picture {i}" for i in range(5)
    ]
    members = [(name, b"{}" if name.endswith("json") else data) for name, data in members]
    write_tar(path, members)
    assert {item.reason for item in items_of(path) if isinstance(item, Skipped)} == {LIE_APART}
    joined = items_of(path, unsorted=True)
    assert joined == [Sample(f"{i:05}", draw(i), f"picture {i}") for i in range(5)]


def test_halves_without_another_half_say_which_is_missing(tmp_path: Path) -> None:
    members = [
        ("0.jpg", draw(0)),
        ("1.txt", b"a"),
        ("2.jpg", draw(2)),
        ("2.jpg", draw(2)),
        *pairs(5, 1),
    ]
    found = items_of(write_tar(tmp_path / "a.tar", members))
    reasons = [(item.key, item.reason) for item in found if isinstance(item, Skipped)]
    assert sorted(reasons) == [
        ("0", MISSING_CAPTION),
        ("1", MISSING_IMAGE),
        ("2", MISSING_CAPTION),
        ("2", MISSING_CAPTION),
    ]


def test_not_more_than_so_many_halves_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "MOST_HALVES", 2)
    found = items_of(write_tar(tmp_path / "a.tar", halves(named("{}", 4))))
    reasons = [item.reason for item in found if isinstance(item, Skipped)]
    assert sorted(reasons) == sorted([LIE_APART, LIE_APART, *[MISSING_CAPTION, MISSING_IMAGE] * 2])


def test_a_compressed_tar_is_not_read_back_and_forth(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", halves(named("{}", 4)))
    path = path.rename(tmp_path / "a.tar.gz")
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert items_of(path) == [Skipped(str(i), LIE_APART) for i in range(4)]
    with pytest.raises(
        UserError, match=r"a\.tar\.gz is compressed, and --unsorted reads plain tars only"
    ):
        quick([path], tmp_path / "out", reading=Reading(unsorted=True))
    write_tar(tmp_path / "b.tar", named("{}", 4))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "b.tar").read_bytes()))
    assert (
        quick([tmp_path / "b.tar.gz"], tmp_path / "out2", reading=Reading(unsorted=True)).written
        == 4
    )


# what is no part of a pair


def test_every_member_is_counted(tmp_path: Path) -> None:
    """Of any tar: members of pairs, and files by what they are, add up to all members."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in pairs(0, 4):
            info = tarfile.TarInfo(f"data/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (
            ("data", tarfile.DIRTYPE),
            ("x.jpg", tarfile.SYMTYPE),
            ("y.jpg", tarfile.LNKTYPE),
            ("z.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "data/00000.jpg"
            tar.addfile(info)
        plain = (
            "data/._00001.jpg",
            "__MACOSX/data/._00001.txt",
            ".DS_Store",
            "README",
            "notes.md",
            "00000_stats.json",
            "b.flac",
            "b.npy",
        )
        for name in plain:
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
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


def test_a_tar_without_one_pair_says_what_it_holds(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.flac", b"x"), ("b.flac", b"x"), ("README", b"x")])
    message = (
        r"skipped: nothing; no part of a pair: file of another ending 2, file without an ending 1$"
    )
    with pytest.raises(UserError, match=message):
        quick([path], tmp_path / "out")


@pytest.mark.parametrize("seed", range(30))
def test_read_is_written_and_skipped_in_pairs(tmp_path: Path, seed: int) -> None:
    """In any order, with any of the ways in which pairs are lost: as many as went in."""
    rng = random.Random(seed)
    good, apart, dotted = (
        named("a/{:04}", 20),
        named("b/{:04}", 10),
        named(f"c/{rng.randint(0, 9)}.{{:04}}", 10),
    )
    lone = [(f"d/{i}.{rng.choice(['jpg', 'txt'])}", b"x") for i in range(5)]
    rest = halves(apart) + lone
    rng.shuffle(rest)
    apart_now = sum(
        abs(
            [n for n, _ in rest].index(f"b/{i:04}.jpg")
            - [n for n, _ in rest].index(f"b/{i:04}.txt")
        )
        > 1
        for i in range(10)
    )
    found = items_of(write_tar(tmp_path / "a.tar", [*good, *dotted, *rest]))
    reasons = [item.reason if isinstance(item, Skipped) else "" for item in found]
    assert len(found) == 45
    assert reasons.count("") == 20 + 10 - apart_now
    assert (reasons.count(FIRST_DOT), reasons.count(LIE_APART)) == (10, apart_now)
    assert reasons.count(samples.MISSING_CAPTION) + reasons.count(MISSING_IMAGE) == 5
