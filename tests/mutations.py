"""Damage for the fuzz tests: to images, captions, names, tars and tables, all of it drawn from a
seeded generator.
"""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import random
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tarballs import draw

BLOCK = tarfile.BLOCKSIZE
HOSTILE_BYTES = (0, 1, 0x7F, 0x80, 0xFF)
# tar header fields: first byte, length
LENGTHS = {0: 100, 100: 8, 108: 8, 116: 8, 124: 12, 136: 12, 148: 8, 156: 1, 157: 100, 257: 8}
FIELDS = list(LENGTHS.items())
SIZE, SPARSE = (124, 12), (386, 96)


def encode(picture: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def pictures() -> dict[str, bytes]:
    """A small image file of every kind that is met."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    see_through = rgb.copy()
    see_through.putalpha(rgb.getchannel(0))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    two = {"save_all": True, "append_images": [rgb.rotate(90)]}
    return {
        "jpeg": encode(rgb, "JPEG"),
        "rotated-jpeg": encode(rgb, "JPEG", progressive=True, exif=rotated),
        "grey-jpeg": encode(rgb.convert("L"), "JPEG"),
        "cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "mpo": encode(rgb, "MPO", **two),
        "rotated-png": encode(rgb, "PNG", transparency=(1, 2, 3), exif=rotated),
        "animated-png": encode(rgb, "PNG", **two),
        "palette": encode(rgb.convert("P"), "PNG", transparency=3),
        "rgba": encode(see_through, "PNG"),
        "grey-alpha": encode(see_through.convert("LA"), "PNG"),
        "bilevel": encode(rgb.convert("1"), "PNG"),
        "grey-16": encode(grey16, "PNG"),
        "webp": encode(rgb, "WEBP"),
        "lossless-webp": encode(see_through, "WEBP", lossless=True),
        "animated-rotated-webp": encode(rgb, "WEBP", exif=rotated, **two),
    }


def damage(data: bytes, rng: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Flip, overwrite, cut, insert, leave out or splice."""
    if not data:
        return rng.randbytes(20)
    found, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randint(1, 8)):
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        case 1:  # header fields are at the front
            for _ in range(rng.randint(1, 4)):
                found[rng.randrange(min(64, len(found)))] = rng.choice(HOSTILE_BYTES)
        case 2:
            del found[at:]
        case 3:
            found[at:at] = rng.randbytes(rng.randint(1, 40))
        case 4:
            del found[at : at + rng.randint(1, 60)]
        case 5:
            found[at : at + rng.randint(1, 200)] = bytes(rng.randint(1, 200))
        case 6:
            other = rng.choice(others or [data])
            found[at:] = other[rng.randrange(len(other)) :]
    return bytes(found)


def caption(rng: random.Random) -> tuple[str, bytes]:
    """Extension and content of a member that should hold a caption."""
    text = "Ein Käfer — 一只甲虫 &amp;amp; &#xD800;&#0; &lt;b&gt; 🪲".encode()
    odd = b'3 1.5 NaN -Infinity true null [] {"a":"b"} "\\ud83d"'
    entry = rng.choice(odd.split())
    odd_texts = (b"", b" \n\t", "\u3000".encode(), b"\0", b"\xef\xbb\xbf", b"a\0b\x1b[31m")
    texts = [
        damage(text, rng),
        rng.randbytes(rng.randint(0, 300)),
        "überall".encode(rng.choice(["utf-16", "latin-1", "utf-8-sig"])),
        rng.choice(odd_texts),
        "ö".encode() * rng.choice([9_999, 10_000, 10_001, 600_000]),
    ]
    entries = [
        b'{"caption": ' + entry + b"}",
        rng.choice([b"[", b'{"caption":', b'{"a":[']) * 10_000,
        b'{"caption": ' + b"1" * 5_000 + b"}",
        entry,
        damage(b'{"caption": "' + text + b'", "key": "000", "exif": "{}"}', rng),
    ]
    return rng.choice([("txt", text) for text in texts] + [("json", entry) for entry in entries])


def name(rng: random.Random, number: int) -> str:
    """A member's name without its extension; no other number has the same key."""
    folders = ("", "", "./", "../../", "/", "a.b/", "..../", "x/" * 60, "déjà/")
    folder = rng.choice([*folders, "\udcff\udc80/", "`#?*[]/"])
    bases = ("", "ключ", "🪲", " ", "`|<b>", "\n\r", "\x1b[2J", "\udcfe", "k" * 250, "\\..")
    base = rng.choice([*bases, "\u202e", "%00", "~"])
    return f"{folder}{base.split('.')[0]}{number}{rng.choice(['', '', '.seg', '.', '..'])}"


# tars


def hostile_number(rng: random.Random, length: int) -> bytes:
    """What a numeric field of a tar header may hold: octal, base 256 (also negative), or
    nonsense.
    """
    value = rng.choice(
        [-(2**90), -(2**40), -1536, -512, -1, 0, 1, 511, 513, 2**20, 2**33, 2**62, 2**64, 2**90]
    )
    if rng.random() < 0.2:
        return rng.randbytes(length)
    if length < 12 or (rng.random() < 0.4 and 0 <= value < 2**33):
        return (b"%o" % (abs(value) % 8 ** (length - 1))).rjust(length - 1, b"0") + rng.choice(
            [b"\0", b" ", b"9"]
        )
    return ((value if value < 0 else value + (128 << 88)) % 256**12).to_bytes(12, "big")


def set_field(header: bytes, field: tuple[int, int], value: bytes) -> bytes:
    """A tar header with another value of a field, and the check sum that goes with it."""
    first, length = field
    header = header[:first] + value[:length].ljust(length, b"\0") + header[first + length :]
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def odd_member(rng: random.Random) -> bytes:
    """A header that is no ordinary file's, with what follows it."""
    kind = rng.choice(b"0123457DKLMNSVXgxZ\0\xff").to_bytes(1, "big")
    content = rng.randbytes(rng.choice([0, 1, 511, 512, 700]))
    if kind in b"xgX":
        key = rng.choice(
            ["path", "size", "linkpath", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size", "mtime"]
        )
        sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        value = rng.choice(
            ["a,b", "0,1", "-512", "9" * 30, "", "1e3", "BINARY", "ü\udcff/x.jpg", "../../x.txt"]
        )
        info = tarfile.TarInfo("x.jpg")
        info.pax_headers = {key: value} if rng.random() < 0.7 else sparse
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    if rng.random() < 0.02:
        content = bytes(100)
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = b"L", len(content)
        return (info.tobuf() + content.ljust(BLOCK, b"\0")) * 2_000
    info = tarfile.TarInfo(
        rng.choice(["00001.jpg", "00009.jpg", "00001.txt", "folder", "a/b/", ".jpg", "..jpg", "9"])
    )
    info.type, info.size, info.linkname = kind, len(content), "00000.jpg"
    header = info.tobuf(tarfile.GNU_FORMAT)
    if rng.random() < 0.5:
        header = set_field(header, rng.choice([SIZE, SPARSE]), hostile_number(rng, 12))
    return header + content + bytes(-len(content) % BLOCK)


def damage_tar(data: bytes, rng: random.Random) -> bytes:
    """Change the structure of a plain tar."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    headers = [i for i, block in enumerate(blocks) if block[257:262] == b"ustar"]
    at, header = rng.randrange(len(blocks)), rng.choice(headers)
    match rng.randrange(9):
        case 0:
            return data[: rng.choice([header, at]) * BLOCK + rng.choice([0, 0, 1, 100, 511])]
        case 1:  # noticed by its check sum
            blocks[header] = damage(blocks[header], rng)[:BLOCK].ljust(BLOCK, b"\0")
        case 2:
            field = rng.choice(FIELDS)
            value = (
                hostile_number(rng, field[1]) if field[1] in (8, 12) else rng.randbytes(field[1])
            )
            blocks[header] = set_field(blocks[header], field, value)
        case 3:
            blocks[at : at + rng.randint(0, 3)] = [bytes(BLOCK)] * rng.randint(1, 4)
        case 4:
            return data + rng.choice(
                [rng.randbytes(rng.randint(1, 2_000)), data, b"\0", bytes(BLOCK) + data]
            )
        case 5:
            blocks.insert(header, odd_member(rng))
        case 6:  # members that come again, or in another order
            first, last = sorted(rng.choices(headers, k=2))
            blocks[header:header] = blocks[first:last]
        case 7:
            blocks.insert(at, rng.randbytes(rng.choice([1, 300, BLOCK])))
        case 8:
            return damage(damage(data, rng), rng)
    return b"".join(blocks)


def compressed(data: bytes, rng: random.Random) -> bytes:
    """A compressed tar, mostly damaged after that."""
    packed = rng.choice([gzip.compress, bz2.compress, lzma.compress])(data)
    return (
        damage(packed, rng)
        if rng.random() < 0.9
        else packed + rng.choice([packed, b"\0" * 600, b"garbage"])
    )


# tables


def parquet_files() -> list[bytes]:
    """Small parquet files of every compression, in img2dataset's layout and Hugging Face's."""
    import pyarrow
    from pyarrow import parquet

    texts = [f"picture {i}" for i in range(6)]
    images = [draw(i) for i in range(6)]
    flat = pyarrow.table({"key": [f"{i:05}" for i in range(6)], "jpg": images, "caption": texts})
    struct = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    nested = pyarrow.table({"image": struct, "text": pyarrow.array(texts).dictionary_encode()})
    choices: list[dict[str, object]] = [
        {"compression": name} for name in ("none", "snappy", "gzip", "zstd", "lz4")
    ]
    choices += [{"use_dictionary": False, "data_page_version": "2.0"}]
    files = []
    for table in (flat, nested):
        for options in choices:
            file = io.BytesIO()
            parquet.write_table(table, file, row_group_size=4, **options)
            files.append(file.getvalue())
    return files


def damage_parquet(data: bytes, rng: random.Random) -> bytes:
    """Mostly the footer, which describes the rest.

    Anywhere else it is most likely an image that is hit.
    """
    if rng.random() < 0.4:
        return damage(data, rng)
    footer = int.from_bytes(data[-8:-4], "little") + 8
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        changed[len(data) - 1 - rng.randrange(footer)] = rng.choice(
            [*HOSTILE_BYTES, rng.randrange(256)]
        )
    return bytes(changed)


def csv_file(rng: random.Random, folder: str, delimiter: str) -> bytes:
    """A table of the images 0.jpg to 2.jpg in a folder, with odd fields and damage."""
    odd = ["", "\0", '"', '""', "a\nb", "\r", "../../x.jpg", "x" * 300, "x/" * 3_000, "y" * 200_000]
    odd += ["&amp;", "ü,;\t", folder]
    headers = ("image caption", "title filepath", "caption key image", "a", "")
    lines = [rng.choice(headers).split() if rng.random() < 0.1 else ["image", "caption"]]
    for i in range(rng.randint(0, 8)):
        path = rng.choice([f"{i % 3}.jpg", f"{folder}/{i % 3}.jpg"])
        line = [path, rng.choice([f"picture {i}", rng.choice(odd)])]
        if rng.random() < 0.3:
            line[rng.randrange(2)] = rng.choice(odd)
        lines.append((line + odd)[: rng.choice([0, 1, 2, 2, 2, 2, 3])])
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows(lines)
    data = file.getvalue().encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "latin-1"]))
    return data if rng.random() < 0.5 else damage(data, rng)


# JSON and YAML

ODD_NUMBERS = (-1, 0, 1, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, float("inf"), float("nan"))
ODD_TEXTS = (
    *("", " ", "x", "0", "../../x", "/etc/passwd", "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 300),
    *("${oc.env:HOME}", "${x}", "{c:>99}", "{0.__class__}", "{}", "%s", "null", "\u202e", "[", "~"),
)
ODD_VALUES = (None, True, False, [], {}, [None], {"": None}, [[]], *ODD_NUMBERS, *ODD_TEXTS)


def damage_value(value: Any, rng: random.Random) -> Any:
    """A copy of plain data in which some entries are other ones, gone, doubled or elsewhere."""
    changed = [copy.deepcopy(value)]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = list(places_in(changed))
        parent, key = rng.choice(places)
        other_parent, other_key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                if parent is not changed:
                    del parent[key]
            case 1 | 2 | 3:
                parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
            case 4:
                parent[key] = copy.deepcopy(other_parent[other_key])
            case 5:
                parent[key] = rng.choice([[parent[key]], {"x": parent[key]}, str(parent[key])])
            case 6:
                if isinstance(parent, dict):
                    parent[rng.choice(ODD_TEXTS)] = parent.pop(key)
            case 7:
                if isinstance(parent, list) and parent is not changed:
                    parent.insert(key, copy.deepcopy(parent[key]))
    return changed[0]


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """The container and the key of every value inside of a value."""
    for key, inner in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places_in(inner)


def damage_json(data: bytes, rng: random.Random) -> bytes:
    """Damage a JSON text's values, or else its bytes; or nest it deeply."""
    kind = rng.random()
    if kind < 0.75:
        return json.dumps(damage_value(json.loads(data), rng)).encode()
    return rng.choice([b"[", b'{"a":']) * 100_000 if kind < 0.77 else damage(data, rng)
