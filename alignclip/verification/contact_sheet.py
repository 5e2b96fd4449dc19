"""Draw many samples on one picture, to be looked at; with PIL alone."""

from __future__ import annotations

import importlib.util
import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from alignclip.errors import UserError, check_place
from alignclip.storage import StorageError, describe_storage_error, write_whole

# pixels
BOX = 208  # a picture's longest side
GAP = 20
TITLE = 44  # above the cells
LINE = 17
KEY_SIZE, TEXT_SIZE, TITLE_SIZE = 11, 13, 17
# lines of a cell's text, cells of a row
TEXT_LINES = 4
MOST_ACROSS = 8

# PIL's own font has not even umlauts and dashes; the first of these that is installed
FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf")

PAPER, MAT, INK, GREY = "#ffffff", "#f1f1ef", "#1b1b1b", "#757575"
LONGEST_TEXT = 500  # letters
NARROWEST = 3  # pixels of a letter, about
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
CELL = (BOX, BOX + 6 + LINE * (TEXT_LINES + 1))


@dataclass(frozen=True)
class Cell:
    """A sample: its key, the image file and the text below."""

    key: str
    image: bytes
    text: str


def check_path(to: str) -> Path:
    """Return where a sheet may be saved; ask before the work that the sheet shows.

    Raises:
        UserError: names the option ``--to``: not a local .png file, or in no folder.
    """
    check_place("--to", to)
    path = Path(to).expanduser()
    if "://" in to or path.suffix.lower() != ".png":
        raise UserError(f"--to {to} must be a local .png file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise UserError(f"--to {to} is a folder; name a .png file")
    return path


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the PNG, complete or not at all.

    Raises:
        UserError: the file can't be written.
    """
    try:
        with write_whole(path, durable=False) as partial:
            sheet.save(partial, "PNG")
    except (OSError, StorageError) as error:
        raise UserError(f"cannot write --to {path}: {describe_storage_error(error)}") from None


def columns(number: int) -> int:
    """Return how many of ``number`` cells stand side by side."""
    return min(MOST_ACROSS, math.ceil(math.sqrt(number)))


def size(number: int) -> tuple[int, int]:
    """Return width and height in pixels of a sheet of ``number`` cells."""
    across = columns(number)
    down = math.ceil(number / across)
    return GAP + across * (CELL[0] + GAP), TITLE + down * (CELL[1] + GAP)


def draw_sheet(cells: Sequence[Cell], title: str, formats: tuple[str, ...]) -> Image.Image:
    """Draw the sheet, row by row.

    An image that is broken or none of PIL's ``formats`` leaves its place grey.
    """
    sheet = Image.new("RGB", size(len(cells)), PAPER)
    pen = ImageDraw.Draw(sheet)
    large, plain, small = (load_font(pixels) for pixels in (TITLE_SIZE, TEXT_SIZE, KEY_SIZE))
    across = columns(len(cells))
    pen.text(
        (GAP, TITLE // 2), wrap(title, large, sheet.width - 2 * GAP, 1)[0], INK, large, anchor="lm"
    )
    half = BOX // 2
    for i, cell in enumerate(cells):
        left = GAP + i % across * (CELL[0] + GAP)
        top = TITLE + i // across * (CELL[1] + GAP)
        if (picture := tile(cell.image, formats)) is None:
            pen.rectangle((left, top, left + BOX - 1, top + BOX - 1), MAT)
            pen.text((left + half, top + half), "can't be decoded", GREY, plain, anchor="mm")
        else:
            sheet.paste(picture, (left, top))
        below = top + BOX + 6
        pen.text((left, below), "".join(wrap(cell.key, small, BOX, 1)), GREY, small)
        for number, line in enumerate(wrap(cell.text, plain, BOX, TEXT_LINES), 1):
            pen.text((left, below + number * LINE), line, INK, plain)
    return sheet


def load_font(pixels: int) -> Font:
    """Load a font with many letters: the system's, matplotlib's, or else PIL's own."""
    plots = importlib.util.find_spec("matplotlib")
    folders = plots.submodule_search_locations if plots else None
    shipped = [str(Path(folder, "mpl-data", "fonts", "ttf", FONTS[-1])) for folder in folders or ()]
    for name in (*FONTS, *shipped):
        with suppress(OSError, ImportError):  # not there, or PIL without FreeType
            return ImageFont.truetype(name, pixels)
    return ImageFont.load_default(pixels)


def tile(image: bytes, formats: tuple[str, ...]) -> Image.Image | None:
    """Scale an image into the box; return None where the image can't be decoded."""
    try:
        with Image.open(io.BytesIO(image), formats=formats) as picture:
            picture.draft("RGB", (BOX * 2, BOX * 2))
            scale = BOX / max(picture.size)
            shape = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
            # pixels of a tiny image stay squares
            how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
            small = picture.convert("RGBA").resize(shape, how)
    except Exception:  # PIL's decoders raise nearly anything on broken files
        return None
    box = Image.new("RGBA", (BOX, BOX), MAT)  # shows through where an image is transparent
    box.alpha_composite(small, ((BOX - shape[0]) // 2, (BOX - shape[1]) // 2))
    return box.convert("RGB")


def wrap(text: str, font: Font, width: int, limit: int) -> list[str]:
    """Break a text into at most ``limit`` lines of ``width`` pixels, at spaces where there are any.

    What is left over becomes an ellipsis.
    """
    if isinstance(font, ImageFont.ImageFont):  # the font of a PIL without FreeType: Latin-1 only
        text = text.encode("latin-1", "replace").decode("latin-1")
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST_TEXT])
    lines: list[str] = []
    for letters in range(1 + width // NARROWEST, 0, -1):
        lines = textwrap.wrap(" ".join(plain.split()), letters)
        if len(lines) > limit:
            last = lines[limit - 1][: letters - 1].rstrip()
            lines = [*lines[: limit - 1], f"{last}…"]
        if all(font.getlength(line) <= width for line in lines):
            break
    return lines
