"""Image files: the formats that PIL may open, and the check that a file is whole.

PIL knows more formats, and some of its decoders start programs. So every ``Image.open`` names its
formats.
"""

from __future__ import annotations

import io
import struct

from PIL import Image

TRAINING_FORMATS = ("JPEG", "PNG", "WEBP")
EVALUATION_FORMATS = (*TRAINING_FORMATS, "BMP", "GIF", "PPM", "TIFF")
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)  # at which PIL refuses a picture
_SIDES = struct.Struct(">2H")
SEARCH_FORMATS = (*EVALUATION_FORMATS, "AVIF")


def check_jpeg_pixels(data: bytes) -> None:
    """Refuse a JPEG whose header says that it has more pixels than PIL would take.

    A decoder makes room for all of them, however few bytes there are. What is no whole header is
    left to the decoder.

    Raises:
        OSError: with the numbers.
    """
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = _SIDES.unpack_from(data, at + 5)
            if height * width > MOST_PIXELS:
                raise OSError(f"{width} × {height} pixels, more than {MOST_PIXELS:,}")
            return
        # fill bytes before a marker are bytes of 0xFF
        at += 1 if kind == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def decode_fully(picture: Image.Image) -> None:
    """Decode all bytes of an opened file, and make no more pixels than the check needs.

    A JPEG's coefficients are all read at any scale. At an eighth, reading the coefficients is all
    the work.

    Raises:
        Exception: nearly any, because PIL's decoders raise what broken files lead them to.
    """
    picture.draft(None, (1, 1))
    picture.load()


def is_whole(data: bytes, formats: tuple[str, ...]) -> bool:
    """Return whether an image file can be decoded to its end as one of PIL's ``formats``."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            decode_fully(picture)
    except Exception:  # PIL's decoders raise nearly anything on broken files
        return False
    return True
