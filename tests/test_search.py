"""Images ranked by a text: the ranking, what can't be read, and the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import EVERYTHING, drawn, small_config, write_export, write_run
from PIL import Image

import alignclip
from alignclip.search import find, main
from alignclip.verification import contact_sheet
from alignclip.weights.locate import LATEST

TEXT = "a red bicycle"
SUFFIXES = (".jpg", ".png", ".webp", ".JPEG", ".gif", ".bmp", ".tif")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as open_clip exports it, with pixels of its own."""
    config = small_config(text={"vocab_size": 49408}, shared=EVERYTHING)
    folder = tmp_path_factory.mktemp("model") / "export"
    return write_export(folder, config, drawn(config).state_dict(), mean=[0.4] * 3, std=[0.2] * 3)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sheet is written into the working directory, and runs are looked for there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """23 pictures of several formats and modes, in folders."""
    rng = np.random.default_rng(0)
    for i in range(23):
        path = tmp_path / "images" / f"{i % 3}" / f"picture {i:02}{SUFFIXES[i % len(SUFFIXES)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        picture = small.resize((60 + i, 50), Image.Resampling.BICUBIC)
        (picture.convert("L") if i % 5 == 0 else picture).save(path)
    return tmp_path / "images"


def rows(text: str) -> list[tuple[int, float, str]]:
    header, *lines = text.splitlines()
    assert header == "rank\tsimilarity\tpath"
    return [
        (int(rank), float(similarity), path)
        for rank, similarity, path in (line.split("\t") for line in lines)
    ]


def call(*arguments: object) -> None:
    main(["--device=cpu", "--num-workers=0", *map(str, arguments)])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object, is_read: bool = False) -> str:
    """What is said of bad input, in one line, before PyTorch is imported where nothing
    ``is_read``.
    """
    with pytest.raises(SystemExit, match="2"):
        call(*arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, said = captured.err.replace("\r", "\n").splitlines()
    assert is_read or not before
    assert said.startswith("error: ")
    return said.removeprefix("error: ")


@pytest.mark.parametrize("batch_size", [4, 64])
def test_the_ranking_is_that_of_the_models_own_features(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    encoders, preprocess, tokenizer = alignclip.load(model)
    expected = {}
    with torch.no_grad():
        text = encoders.encode_text(tokenizer([TEXT]), normalize=True)[0]
        for path in images.rglob("*.*"):
            image = encoders.encode_image(preprocess(Image.open(path))[None], normalize=True)[0]
            expected[str(path)] = float(image @ text)
    assert len(expected) == 23
    call(images, TEXT, "--model", model, "--top", 20, "--batch-size", batch_size)
    captured = capsys.readouterr()
    found = rows(captured.out)
    assert [rank for rank, _, _ in found] == list(range(1, 21))
    assert [path for _, _, path in found] == sorted(expected, key=lambda path: -expected[path])[:20]
    assert [similarity for _, similarity, _ in found] == pytest.approx(
        [expected[p] for _, _, p in found], abs=6e-5
    )
    assert "images: 100%" in captured.err
    assert captured.err.endswith("drawn: search.png\n")
    with Image.open(tmp_path / "search.png") as drawn:
        assert drawn.size == contact_sheet.size(20)
    (tmp_path / "search.png").unlink()
    call(images, TEXT, "--model", model, "--no-sheet")
    assert "drawn" not in capsys.readouterr().err
    assert not (tmp_path / "search.png").exists()


@pytest.mark.slow
def test_the_newest_run_is_the_model(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in ``search images/ "a red bicycle"``, with nothing but the two."""
    said = failure(capsys, "images", TEXT)
    assert said.startswith(
        "no run in runs/* or quickstart-run/checkpoints here; name a model: --mo"
    )
    config = small_config(text={"vocab_size": 49408})
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    found = []
    for i, name in enumerate(("runs/second", "quickstart-run/checkpoints", "runs/first")):
        folder = write_run(tmp_path / name, config, drawn(config, seed=i))
        path = (folder / LATEST).rename(folder / "ep1-ba1-rank0.pt")
        (folder / LATEST).symlink_to(path.name)
        os.utime(path, (1000 + i, 1000 + i))
        call("images", TEXT, "--no-sheet")
        captured = capsys.readouterr()
        assert f"model: {name}, the newest run here" in captured.err
        found.append(captured.out)
        call("images", TEXT, "--model", path, "--no-sheet")
        assert capsys.readouterr().out == captured.out
    assert len(set(found)) == 3


def test_equal_images_come_by_path(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{folder}/{name}.png" for folder in "ba" for name in ("z", "y", "x")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    call(tmp_path, TEXT, "--model", model, "--batch-size", 4, "--no-sheet")
    assert [path for _, _, path in rows(capsys.readouterr().out)] == [
        str(tmp_path / name) for name in sorted(names)
    ]


def test_what_is_an_image(tmp_path: Path) -> None:
    for name in ("a.jpg", ".hidden.jpg", ".git/b.jpg", "notes.txt", "x.eps", "c/d.WEBP", "c/jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert find(tmp_path) == [tmp_path / "a.jpg", tmp_path / "c" / "d.WEBP"]


def test_broken_images_are_left_out(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(images.rglob("*.*"))
    whole = next(path for path in good if path.suffix == ".jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").touch()
    (images / "page.jpg").write_text("<html>not found</html>")
    (images / "gone.jpg").symlink_to(images / "nowhere.jpg")
    (images / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    call(images, TEXT, "--model", model, "--top", 100)
    captured = capsys.readouterr()
    assert sorted(path for _, _, path in rows(captured.out)) == [str(path) for path in good]
    told = f"^5 of 28 images can't be read and are left out: {images / 'cut.jpg'} \\(.* and 2 more$"
    assert re.search(told, captured.err, re.MULTILINE)
    for path in good:
        path.unlink()
    said = failure(capsys, images, TEXT, "--model", model, is_read=True)
    assert said.startswith("none of the 5 images can be read: ")


def test_a_text_that_is_too_long_is_cut(
    model: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This model reads 12 tokens, two of which are the start and the end."""
    printed = []
    for words in (10, 11, 500):
        call(images, "red " * words, "--model", model)
        captured = capsys.readouterr()
        assert (f"the text has {words + 2} tokens, and is cut to 12" in captured.err) == (
            words > 10
        )
        printed.append(captured.out)
    assert printed[0] == printed[1] == printed[2]


def test_bad_input_is_one_line(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    nowhere, notes = tmp_path / "nowhere", tmp_path / "empty" / "notes.txt"
    for arguments, words in (
        ([notes.parent, TEXT], f"{notes.parent}: no images there; they end in .*webp"),
        ([nowhere, TEXT], f"{nowhere}: no such folder"),
        ([notes, TEXT], f"{notes}: is a file, not a folder"),
        ([images, TEXT, "--model", nowhere], f"--model: no such file: {nowhere}"),
        ([images, TEXT, "--top=0"], "--top must be at least 1, not 0"),
        ([images, TEXT, "--batch-size=0"], "--batch-size must be at least 1, not 0"),
        ([images, TEXT, "--num-workers=-1"], "--num-workers must not be negative, but is -1"),
        ([images, TEXT, "--to=sheet.jpg"], "--to sheet.jpg must be a local .png file"),
        ([images, TEXT, "--top=5000"], "--to draws 1000 images at most, not --top 5000"),
        ([images, " "], "the text is empty; write what to look for"),
    ):
        assert re.match(words, failure(capsys, "--model", model, *arguments))
    said = failure(capsys, images, TEXT, "--model", model, "--device=nonsense", is_read=True)
    assert said.startswith("device=nonsense can't be used on this machine")


def test_the_sheet_shows_the_matches_in_their_order(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    call(images, TEXT, "--model", model, "--top", 5, "--to", sheet)
    found = rows(capsys.readouterr().out)
    assert not list(tmp_path.glob(".*"))
    with Image.open(sheet) as drawn:
        assert drawn.size == contact_sheet.size(5)
        for i, (_, _, path) in enumerate(found):
            left = contact_sheet.GAP + i % 3 * (contact_sheet.CELL[0] + contact_sheet.GAP)
            top = contact_sheet.TITLE + i // 3 * (contact_sheet.CELL[1] + contact_sheet.GAP)
            box = drawn.crop((left, top, left + contact_sheet.BOX, top + contact_sheet.BOX)).resize(
                (1, 1)
            )
            with Image.open(path) as picture:
                square = Image.new("RGB", (max(picture.size),) * 2, "#f1f1ef")
                square.paste(picture.convert("RGB"), (0, (square.height - picture.height) // 2))
            np.testing.assert_allclose(
                box.getpixel((0, 0)), square.resize((1, 1)).getpixel((0, 0)), atol=3
            )


@pytest.mark.slow
def test_the_command(model: Path, images: Path, tmp_path: Path) -> None:
    """With workers; from another folder; with a name that is no UTF-8.

    Nothing of the training is imported.
    """
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (40, 40), "red").save(images / name)
    command = [sys.executable, *["-X", "importtime", "-m", "alignclip.search", "images"], TEXT]
    command += ["--model", str(model), *["--top", "24", "--num-workers", "2", "--batch-size", "5"]]
    command += ["--to", "sheet.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 25
    assert any(line.endswith(b"\timages/caf\xe9.png") for line in lines)
    assert (tmp_path / "sheet.png").is_file()
    assert not re.search(rb"\| +(composer|streaming)$", done.stderr, re.MULTILINE)
    help_text = subprocess.run([*command[:5], "--help"], capture_output=True, text=True, timeout=60)
    assert "examples:" in help_text.stdout
    assert not re.search(r"\| +torch$", help_text.stderr, re.MULTILINE)
