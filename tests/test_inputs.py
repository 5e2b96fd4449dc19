"""Naming inputs, and reading those that are no tars."""

from __future__ import annotations

from pathlib import Path

import pytest
from tarballs import quick, refused, three_tars

from alignclip.conversion.inputs import expand_inputs
from alignclip.errors import UserError


def test_expand(tmp_path: Path) -> None:
    three_tars(tmp_path / "in")
    every = [str(tmp_path / "in" / f"{i:05}.tar") for i in range(3)]
    (tmp_path / "in" / "sizes.json").write_text("{}")
    for pattern in ("in", "in/{00000..00002}.tar", "in/*.tar", "in/0000?.tar", "**/*.tar"):
        assert expand_inputs([str(tmp_path / pattern)]) == every
    assert expand_inputs([every[2], str(tmp_path / "in")]) == [every[2], *every[:2]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in/{00001..00004}.tar", r"2 of 4 inputs do not exist, the first is .*/in/00003\.tar"),
        ("in/x*.tar", r"no file matches '.*/in/x\*\.tar'"),
        ("empty", r"no \*\.tar, .*, \*\.csv, \*\.tsv, .* in the folder .*/empty"),
        ("in/{00001..", r"unbalanced braces in"),
        ("loose", r"beside them: tar --sort=name -cf pairs\.tar -C .*/loose \.$"),
    ],
)
def test_expand_says_what_is_missing(tmp_path: Path, pattern: str, message: str) -> None:
    three_tars(tmp_path / "in")
    for name in ("empty", "loose"):
        (tmp_path / name).mkdir()
    (tmp_path / "loose" / "0.JPG").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        expand_inputs([str(tmp_path / pattern)])


def test_one_slash_in_a_url_of_tars(tmp_path: Path) -> None:
    message = r"^--inputs=s3:/raw/a\.tar has one slash; did you mean 's3://raw/a\.tar'\?"
    refused(message, [tmp_path / "b.tar", "s3:/raw/a.tar"], tmp_path / "out")


def test_what_a_folder_holds_besides_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = three_tars(tmp_path / "in")
    for name in ("00000.parquet", "00001.csv", "more.csv", "other.parquet", "._x.csv", "notes.txt"):
        (source / name).write_bytes(b"")
    assert len(expand_inputs([str(source)])) == 3
    message = f"not taken from {source}: more.csv, other.parquet; name them\n"
    assert capsys.readouterr().err == message


def test_a_folder_of_mds_is_read_by_its_index(tmp_path: Path) -> None:
    out = tmp_path / "sets" / "mine"
    quick([three_tars(tmp_path / "in")], out)
    for folder in (out, out.parent):
        message = rf"^{folder} holds MDS, which is read by its index: name {out}/index\.json$"
        refused(message, [folder], tmp_path / "again")
    assert quick([out / "index.json"], tmp_path / "again").written == 15
