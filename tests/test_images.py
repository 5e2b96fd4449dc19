"""What becomes of one image file: stored as it is, mended, shrunk, or left out."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import peak_memory
from mutations import encode, pictures
from PIL import Image, ImageOps, PngImagePlugin
from tarballs import draw
from torchvision.transforms.v2.functional import pil_to_tensor

from alignclip.conversion.images import (
    CHECKS,
    IMAGE_TOO_SMALL,
    MAX_PIXELS,
    UNDECODABLE_IMAGE,
    UNKNOWN_FORMAT,
    ImageOptions,
    Unusable,
    prepare_image,
)
from alignclip.conversion.samples import IMAGE_TOO_LARGE
from alignclip.data.transforms import decode_image

ORIENTATION = 0x0112
PICTURES = pictures()


def scene(width: int = 400, height: int = 300) -> Image.Image:
    """Smooth, and nowhere the same when it is turned or mirrored."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / width, 255 * y / height
    return Image.fromarray(np.stack([red, green, (red + 2 * green) / 3], axis=-1).astype(np.uint8))


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def deep_png(*channels: int) -> tuple[np.ndarray, bytes]:
    """Values of 16 bits, and a PNG of them, which PIL does not write in colour."""
    values = np.random.default_rng(0).integers(0, 2**16, (30, 40, *channels)).astype(np.uint16)
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 40, 30, 16, 2 if channels else 0, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")):
        chunk = name + content
        found += struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return values, found


def claiming(width: int, height: int) -> bytes:
    """A small JPEG whose header says that it is larger."""
    data = draw(1)
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def opened(data: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def prepared(data: bytes, **options: Any) -> tuple[bytes, tuple[str, ...]]:
    return prepare_image(data, ImageOptions(**options))


def kept(data: bytes, **options: Any) -> bytes:
    return prepared(data, **options)[0]


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures' values."""
    return float(np.abs(np.asarray(one, np.int32) - np.asarray(other, np.int32)).mean())


def refused(data: bytes, **options: Any) -> str:
    with pytest.raises(Unusable) as caught:
        prepared(data, **options)
    assert caught.value.detail
    return caught.value.reason


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("resize", [None, 16, 30, 100])
@pytest.mark.parametrize("kind", PICTURES)
def test_training_reads_what_is_accepted(kind: str, resize: int | None, check: str) -> None:
    data = PICTURES[kind]
    stored, _ = prepared(data, check=check, resize=resize)
    tensor = decode_image(stored)
    short = min(resize or 30, 30)
    sides = {short, round(short * 40 / 30)}
    assert (tensor.shape[0], set(tensor.shape[1:])) == (3, sides)
    if resize is None and (kind != "grey-16" or check == "none"):
        assert stored is data
        with Image.open(
            io.BytesIO(data)
        ) as picture:  # its first picture, not upright, without its transparency
            expected = pil_to_tensor(picture.convert("RGB"))
        assert (tensor.int() - expected.int()).abs().max() <= 2  # another JPEG decoder
    if resize is not None and (short < 30 or data[:2] != b"\xff\xd8"):
        assert (opened(stored).format, opened(stored).mode) == ("JPEG", "RGB")
        assert tensor.shape[1] == (max(sides) if "rotated" in kind else short)  # upright


NOTES = {
    "cmyk": "CMYK",
    "palette": "palette",
    "rgba grey-alpha lossless-webp": "transparency",
    "grey-16": "16-bit grey, stored with 8",
    "mpo animated-png": "animated",
    "rotated-png rotated-jpeg": "EXIF-rotated",
    "animated-rotated-webp": "animated; EXIF-rotated",
    "jpeg grey-jpeg bilevel webp": "",
}


def test_what_is_unusual_is_noted() -> None:
    expected = {kind: words for kinds, words in NOTES.items() for kind in kinds.split()}
    for kind, data in PICTURES.items():
        notes = [f"image: {word}" for word in filter(None, expected[kind].split("; "))]
        assert list(prepared(data)[1]) == notes
        assert prepared(data, check="none")[1] == ()


def test_sixteen_bits_of_grey() -> None:
    """PIL, and so training, would make white of all above 255."""
    values, data = deep_png()
    assert decode_image(data).float().mean() > 250
    for check in ("decode", "header"):
        stored, _ = prepared(data, check=check)
        assert (opened(stored).format, opened(stored).mode) == ("PNG", "L")
        np.testing.assert_array_equal(np.asarray(opened(stored)), values >> 8)
        np.testing.assert_array_equal(decode_image(stored)[0].numpy(), values >> 8)
    smaller, _ = prepared(data, resize=16)
    assert abs(decode_image(smaller).float().mean() - (values >> 8).mean()) < 3
    assert kept(data, check="none") is data


def test_sixteen_bits_of_colour_are_read_as_eight() -> None:
    values, data = deep_png(3)
    assert prepared(data) == (data, ())
    np.testing.assert_array_equal(decode_image(data).permute(1, 2, 0).numpy(), values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_only_what_is_shrunk_is_turned_upright(image_format: str, orientation: int) -> None:
    data = encode(scene(), image_format, exif=rotated(orientation))
    stored, notes = prepared(data)
    assert stored is data
    assert notes == (() if orientation == 1 else ("image: EXIF-rotated",))

    small = opened(kept(data, resize=60))
    upright = ImageOps.exif_transpose(opened(data)).resize(small.size)
    assert small.size == ((80, 60) if orientation < 5 else (60, 80))
    assert difference(small, upright) < 2
    assert ORIENTATION not in small.getexif()


BROKEN_EXIF = {
    "nonsense": b"Exif\0\0nonsense!",
    "short": b"Exif\0\0",
    "no-such-orientation": (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0"
    ),
    "text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd\0\0\0\0",
}


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", BROKEN_EXIF.values(), ids=BROKEN_EXIF.keys())
def test_broken_exif_is_no_broken_image(exif: bytes, image_format: str) -> None:
    """Training does not look at it."""
    data = encode(scene(), image_format, exif=exif)
    assert prepared(data) == (data, ())
    assert opened(kept(data, resize=60)).size == (80, 60)


def test_a_long_comment_does_not_keep_an_image_from_being_shrunk() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 70_000)  # more than a JPEG's may have
    small, _ = prepared(encode(scene(), "PNG", pnginfo=text), resize=60)
    assert len(small) < 3_000


def half(image_format: str) -> bytes:
    data = encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)),
        image_format,
    )
    return data[: len(data) // 2]


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_half_a_file_has_a_whole_header(image_format: str) -> None:
    data = half(image_format)
    assert refused(data) == UNDECODABLE_IMAGE
    if image_format != "WEBP":  # PIL wants all of it for the header
        assert kept(data, check="header") is data
    assert kept(data, check="none") is data
    with pytest.raises(OSError):
        decode_image(data)
    for check in CHECKS:  # of which no smaller one can be made
        assert refused(data, check=check, resize=30) == UNDECODABLE_IMAGE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF\0\0\0\0WEBP",
        encode(scene(), "GIF"),
        encode(scene(), "BMP"),
        encode(scene(), "TIFF"),
        b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>',
        b"<!DOCTYPE html><title>404</title>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n",
        bytes(2_000),
    ],
    ids=["empty", "jpeg", "png", "webp", "gif", "bmp", "tiff", "svg", "html", "eps", "zeros"],
)
def test_what_is_no_image_that_training_reads(data: bytes) -> None:
    for check in ("decode", "header"):
        assert refused(data, check=check) in (UNKNOWN_FORMAT, UNDECODABLE_IMAGE)
    if len(data) > 20:
        assert refused(data) == UNKNOWN_FORMAT
    assert prepared(data, check="none") == (data, ())


def test_too_small() -> None:
    for size in ((1, 1), (15, 400), (400, 15)):
        data = draw(0, size=size)
        assert refused(data) == refused(data, check="header", resize=8) == IMAGE_TOO_SMALL
        assert kept(data, min_side=1) is data
    assert kept(draw(0, size=(16, 16))) == draw(0, size=(16, 16))


@pytest.mark.parametrize("check", ["decode", "header"])
def test_too_large_to_decode(check: str) -> None:
    """Known from the header: none of these is decoded."""
    bombs = [
        encode(Image.new("1", (10_000, 10_000)), "PNG"),
        claiming(60_000, 60_000),
        claiming(10_000, 5_001),
    ]
    for data in bombs:
        assert len(data) < 20_000
        assert refused(data, check=check) == IMAGE_TOO_LARGE
        assert refused(data, check=check, resize=64) == IMAGE_TOO_LARGE
    wide = encode(Image.new("L", (MAX_PIXELS // 1_000, 1_000)), "PNG")
    assert kept(wide, check=check) is wide


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((400, 300), 64, (85, 64)),
        ((300, 400), 64, (64, 85)),
        ((300, 300), 64, (64, 64)),
        ((1000, 20), 10, (500, 10)),
        ((65, 640), 64, (64, 630)),
        ((2048, 1536), 100, (133, 100)),
    ],
)
def test_the_shorter_side(
    size: tuple[int, int], side: int, expected: tuple[int, int], image_format: str
) -> None:
    large = scene(*size)
    small = opened(kept(encode(large, image_format), resize=side))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", expected)
    exact = large.resize(expected, Image.Resampling.BICUBIC)
    assert difference(small, exact) < 2


def test_small_jpegs_stay_and_other_formats_become_jpegs() -> None:
    for size in ((40, 30), (64, 64), (64, 500)):
        data = draw(0, size=size)
        assert kept(data, resize=64) is data
        for image_format in ("PNG", "WEBP"):
            stored, _ = prepared(draw(0, image_format, size), resize=64)
            assert (opened(stored).format, opened(stored).size) == ("JPEG", size)


def test_quality_makes_the_size() -> None:
    data = draw(0, "PNG", (200, 200))
    sizes = [len(kept(data, resize=100, quality=quality)) for quality in (10, 50, 90, 100)]
    assert all(larger > 1.3 * smaller for smaller, larger in pairwise(sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "size"),
    [("PNG", "RGBA", (7000, 7000)), ("PNG", "P", (7000, 7000)), ("WEBP", "RGB", (2800, 7000))],
)
def test_memory_of_the_largest(tmp_path: Path, kind: str, mode: str, size: tuple[int, int]) -> None:
    """What a worker may take in all is 400 MB."""
    path = tmp_path / "large"
    Image.new(mode, size).save(path, kind, exif=rotated(6))
    imports = "from alignclip.conversion.images import ImageOptions, prepare_image"
    number, peak = peak_memory(
        imports,
        f"len(prepare_image(Path({str(path)!r}).read_bytes(), ImageOptions(resize=256))[0])",
    )
    assert number > 100
    assert peak < 330e6
