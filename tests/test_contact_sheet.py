"""Many samples on one picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from tarballs import draw

from alignclip.errors import UserError
from alignclip.verification import contact_sheet


def test_a_sheet_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    sheet = contact_sheet.draw_sheet([contact_sheet.Cell("k", draw(0), "t")], "title", ("JPEG",))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"--to .*folder\.png is a folder"):
        contact_sheet.check_path(str(tmp_path / "folder.png"))
    with pytest.raises(UserError, match=r"cannot write --to .*folder\.png: Is a directory"):
        contact_sheet.save_sheet(sheet, tmp_path / "folder.png")
    contact_sheet.save_sheet(sheet, contact_sheet.check_path(str(tmp_path / "sheet.png")))
    with Image.open(tmp_path / "sheet.png") as read:
        assert read.size == contact_sheet.size(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "sheet.png"]


def test_a_sheet_of_anything() -> None:
    texts = [
        "",
        "a" * 2000,
        "日本語のとても長い説明文" * 20,
        "emoji 🐈 and \x00\n\t control",
        "עברית العربية हिन्दी",
        "w " * 400,
    ]
    images = [
        draw(0),
        draw(1, size=(1, 900)),
        draw(2, "PNG", (3, 2)),
        b"",
        draw(4)[:-9],
        draw(5, size=(900, 1)),
    ]
    transparent = io.BytesIO()
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(transparent, "PNG")
    cells = [
        contact_sheet.Cell(text, image, text) for text, image in zip(texts, images, strict=True)
    ]
    cells += [contact_sheet.Cell("key", transparent.getvalue(), "seen through")]
    sheet = contact_sheet.draw_sheet(cells, texts[1], ("JPEG", "PNG"))
    assert sheet.size == contact_sheet.size(7)
    box = contact_sheet.BOX
    left, top = (
        contact_sheet.GAP,
        contact_sheet.TITLE + 2 * (contact_sheet.CELL[1] + contact_sheet.GAP),
    )
    assert sheet.getpixel((left + box // 2, top + box // 2)) == (0xF1, 0xF1, 0xEF)


def test_wrap() -> None:
    font = contact_sheet.load_font(13)
    for text in (
        "one two three four five six seven eight nine ten eleven twelve",
        "日本語" * 40,
        "x" * 90,
    ):
        lines = contact_sheet.wrap(text, font, 100, 3)
        assert len(lines) == 3
        assert all(font.getlength(line) <= 100 for line in lines)
        assert lines[-1].endswith("…")
        assert text.startswith(lines[0])
    assert contact_sheet.wrap("short\n text", font, 100, 3) == ["short text"]
    assert contact_sheet.wrap(" ", font, 100, 3) == []
