"""Image files: the formats that PIL may open, and the check that a file is whole.

PIL knows more formats, and some of its decoders start programs. So every ``Image.open`` names its
formats.
"""

from __future__ import annotations

import io

from PIL import Image

TRAINING_FORMATS = ("JPEG", "PNG", "WEBP")
EVALUATION_FORMATS = (*TRAINING_FORMATS, "BMP", "GIF", "PPM", "TIFF")
SEARCH_FORMATS = (*EVALUATION_FORMATS, "AVIF")


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
