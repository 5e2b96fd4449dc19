"""Check that an image is whole and usable; shrink it where that is wanted."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from alignclip.config.setting import setting
from alignclip.conversion.samples import IMAGE_TOO_LARGE
from alignclip.data.image_files import TRAINING_FORMATS, decode_fully

CHECKS = ("decode", "header", "none")
MAX_PIXELS = 50_000_000  # 200 MB in memory; a page of a scanned newspaper has 40 million
MAX_WEBP_PIXELS = 20_000_000  # 300 MB in memory, of which its decoder has most
warnings.filterwarnings(
    "ignore", module="PIL"
)  # of many pixels, which are checked here, and of odd EXIF

UNKNOWN_FORMAT = "not JPEG, PNG or WebP"
UNDECODABLE_IMAGE = "undecodable image"
IMAGE_TOO_SMALL = "image too small"

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHANNELS = {"RGBA": "RGB", "RGBX": "RGB", "LA": "LLL"}  # that are kept of a picture with others
UNUSUAL_MODES = {
    "CMYK": "CMYK",
    "P": "palette",
    "PA": "palette",
    "RGBA": "transparency",
    "LA": "transparency",
}


class Unusable(Exception):
    """An image that is left out: reason, and detail for the report."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ImageOptions:
    """Settings of what is done to images.

    ``check``: ``decode`` everything, read the ``header``, or ``none``. ``min_side``: pixels of the
    shorter side, of what is checked. ``resize``: the shorter side of what is stored, where that is
    smaller; None: the file as it is.
    ``quality``: of the JPEGs that ``resize`` writes, 1–100.
    """

    check: str = setting(
        "decode",
        choices=CHECKS,
        metavar="HOW",
        help=f"how bad images are found: {', '.join(CHECKS)} (default: %(default)s)",
    )
    min_side: int = setting(
        16,
        at_least=0,
        metavar="PIXELS",
        help="shorter sides below this are bad (default: %(default)s)",
    )
    resize: int | None = setting(
        None,
        at_least=1,
        metavar="PIXELS",
        help="shorter side of larger ones (default: untouched)",
    )
    quality: int = setting(
        90, at_least=1, at_most=100, metavar="N", help="of resized JPEGs (default: %(default)s)"
    )


def prepare_image(data: bytes, options: ImageOptions) -> tuple[bytes, tuple[str, ...]]:
    """Check an image file, and shrink it where that is wanted.

    Files are stored as they are: training reads CMYK, palettes and the first picture of an
    animation as open_clip does, transparency dropped, EXIF's rotation ignored. Only one that is
    shrunk becomes an RGB JPEG, upright, and one with
    16-bit greys a PNG with 8.

    Returns:
        the bytes to store, and what is unusual about the image.

    Raises:
        Unusable: broken, of another format, too small or too large.
    """
    if options.check == "none" and not options.resize:
        return data, ()
    try:
        with Image.open(io.BytesIO(data), formats=TRAINING_FORMATS) as picture:
            width, height = picture.size
            if min(width, height) < options.min_side:
                raise Unusable(IMAGE_TOO_SMALL, f"{width} × {height} pixels")
            if width * height > (MAX_WEBP_PIXELS if picture.format == "WEBP" else MAX_PIXELS):
                raise Unusable(IMAGE_TOO_LARGE, f"{width} × {height} pixels")
            notes = _image_notes(picture)
            if picture.mode.startswith("I"):
                picture, data = _eight_bits(picture)
            if options.resize and (
                min(width, height) > options.resize or picture.format not in ("JPEG", "MPO")
            ):
                return shrink(picture, options.resize, options.quality), notes
            if options.check == "decode":
                decode_fully(picture)
            return data, notes
    except Unusable:
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(IMAGE_TOO_LARGE, str(error)) from None
    except UnidentifiedImageError:
        raise Unusable(UNKNOWN_FORMAT, f"it begins with {data[:12]!r}") from None
    except Exception as error:  # PIL's decoders raise nearly anything on broken files
        raise Unusable(UNDECODABLE_IMAGE, f"{type(error).__name__}: {error}") from None


def shorter_side(data: bytes) -> int | None:
    """Return the shorter side of an image file in pixels; None where it can't be read."""
    try:
        with Image.open(io.BytesIO(data), formats=TRAINING_FORMATS) as picture:
            return min(picture.size)
    except Exception:  # PIL's decoders raise nearly anything on broken files
        return None


def shrink(picture: Image.Image, side: int, quality: int) -> bytes:
    """Make a JPEG whose shorter side is at most ``side`` pixels, upright, in RGB."""
    scale = min(1.0, side / min(picture.size))
    # JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where twice the result's is left: faster,
    # no visible difference
    picture.draft("RGB", (round(2 * scale * picture.width), round(2 * scale * picture.height)))
    turn = _turn(picture)
    scale = min(1.0, side / min(picture.size))
    width, height = (
        max(side, round(scale * length)) if scale < 1 else length for length in picture.size
    )
    small = _resized(picture, (width, height))
    if turn is not None:
        small = small.transpose(turn)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality, comment=b"")  # a PNG's may be too long for a JPEG
    return file.getvalue()


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to RGB, where possible without a second picture of full size in memory."""
    if picture.mode == "RGB":
        return picture.resize(size, Image.Resampling.BICUBIC)
    if picture.mode in CHANNELS:
        channels = [
            picture.getchannel(name).resize(size, Image.Resampling.BICUBIC)
            for name in CHANNELS[picture.mode]
        ]
        return Image.merge("RGB", channels)
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _eight_bits(picture: Image.Image) -> tuple[Image.Image, bytes]:
    """Return the upper half of 16-bit greys, of which PIL makes all above 255 white."""
    grey = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    grey.save(file, "PNG")
    return grey, file.getvalue()


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Return what makes a picture upright by its EXIF; None where it is, or the EXIF is broken."""
    try:
        return UPRIGHT.get(picture.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # PIL raises nearly anything on broken files
        return None


def _image_notes(picture: Image.Image) -> tuple[str, ...]:
    """Say what is unusual, for the report: what training sees of it may surprise."""
    notes = [UNUSUAL_MODES[picture.mode]] if picture.mode in UNUSUAL_MODES else []
    if picture.mode.startswith("I"):
        notes += ["16-bit grey, stored with 8"]
    if getattr(picture, "is_animated", False):
        notes += ["animated"]
    if "exif" in picture.info and _turn(picture) is not None:
        notes += ["EXIF-rotated"]
    return tuple(f"image: {note}" for note in notes)
