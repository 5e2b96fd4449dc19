"""Tars of image–caption pairs, as img2dataset and webdataset write them."""

from __future__ import annotations

import errno
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from alignclip.errors import one_line
from convert.samples import (
    BROKEN_INPUT,
    IMAGE_EXTENSIONS,
    IMAGE_TOO_LARGE,
    LONG_CAPTION,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Sample,
    Skipped,
    caption_of,
    pair,
    parse_json,
)

# What tarfile raises where a header, its numbers or the compression are damaged
BROKEN: tuple[type[Exception], ...] = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError)
BROKEN += (OverflowError, RecursionError, MemoryError, OSError)
BUFFER = 2**20  # bytes read at once: several samples, and all their headers

# webdataset's: the key is the path up to the first dot of the file name
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES) | {"txt": MAX_TEXT_BYTES, "json": MAX_TEXT_BYTES}


def read_tar(path: Path, caption_key: str | None = None) -> Iterator[Sample | Skipped]:
    """Stream through a tar (plain or gzipped) and yield its samples in order, one in memory at a time.

    Consecutive members with one key belong together, until one comes again. The caption is the ``txt`` member, or else
    ``caption`` in the ``json`` member; with a ``caption_key`` it is that entry of the ``json`` member. Invalid UTF-8
    becomes U+FFFD. A broken tar yields what is whole before the break.
    """
    key: str | None = None
    members: dict[str, bytes] = {}
    too_large: dict[str, int] = {}  # extension -> bytes, of members that are not read
    offset = -1
    try:
        with path.open("rb", buffering=BUFFER) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers every header
                if tar.offset <= offset:
                    raise tarfile.ReadError("its headers go round in a circle")
                offset = tar.offset
                name = member.name
                if not name.isascii():  # bytes that are no UTF-8 come as halves of characters, which can't be stored
                    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                match = NAME.fullmatch(name)
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                if match is None or not member.isfile():
                    continue
                extension = match[2].lower()
                if match[1] != key or extension in members or extension in too_large:
                    if key is not None:
                        yield _sample(key, members, too_large, caption_key)
                    key, members, too_large = match[1], {}, {}
                if member.size > LIMITS.get(extension, 0):
                    if extension in LIMITS:
                        too_large[extension] = member.size
                    continue
                members[extension] = _content(tar, member)
            whole = _ends_properly(tar)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's trouble, not the tar's
        yield Skipped(key or "", BROKEN_INPUT, one_line(error))  # together with the sample in which it breaks
        return
    if key is not None:
        yield _sample(key, members, too_large, caption_key)
    if not whole:
        yield Skipped(key or "", BROKEN_INPUT, "it ends without an end mark, or goes on after it")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A member's bytes; a plain one is read straight from the file, at a third of what ``extractfile`` takes."""
    if member.issparse():
        content = tar.extractfile(member)
        assert content is not None
        return content.read()
    assert tar.fileobj is not None
    tar.fileobj.seek(member.offset_data)
    data = tar.fileobj.read(member.size)
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data


def _ends_properly(tar: tarfile.TarFile) -> bool:
    """Whether iteration stopped at the zero block that ends a tar; tarfile also stops, silently, at a bad header."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        return False
    while end and not end.strip(b"\0"):
        end = tar.fileobj.read(BUFFER)
    return not end  # what comes behind zeros is lost: a hole in a download, or tars joined into one


def _sample(
    key: str, members: dict[str, bytes], too_large: dict[str, int], caption_key: str | None
) -> Sample | Skipped:
    image = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if image is None and (large := next((ending for ending in IMAGE_EXTENSIONS if ending in too_large), None)):
        return Skipped(key, IMAGE_TOO_LARGE, f"{large} member of {too_large[large]:,} bytes")
    has_text = caption_key is None and ("txt" in members or "txt" in too_large)
    if (used := "txt" if has_text else "json") in too_large:
        return Skipped(key, LONG_CAPTION, f"{used} member of {too_large[used]:,} bytes")
    if has_text:
        return pair(key, image, members["txt"].decode("utf-8", errors="replace"))
    entries = parse_json(members.get("json"))
    return pair(key, image, caption_of(entries, caption_key or "caption"), entries)
