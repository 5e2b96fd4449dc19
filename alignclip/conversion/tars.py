"""Tars of image–caption pairs, as img2dataset and webdataset write them.

Every member of a tar is a part of a pair, which is written or left out, or is counted as what it is.
"""

from __future__ import annotations

import errno
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from alignclip.conversion.samples import (
    BROKEN_INPUT,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    PLAIN,
    Ignored,
    Item,
    Reading,
    Skipped,
)
from alignclip.conversion.tar_pairs import Group, Pairing
from alignclip.errors import one_line

# The exceptions that tarfile raises where a header, its numbers or the compression are damaged
BROKEN: tuple[type[Exception], ...] = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
)
BROKEN += (OverflowError, RecursionError, MemoryError, OSError)
BUFFER = 2**20  # bytes read at once: several samples, and all their headers

# webdataset's: the key is the path up to the first dot of the file name
FIRST = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
LAST = re.compile(r"((?:.*/)?[^./][^/]*)\.([^./]*)", re.DOTALL)


def read_tar(path: Path, caption_key: str | None = None, how: Reading = PLAIN) -> Iterator[Item]:
    """Stream through a tar (plain or gzipped) and yield its samples in order, one in memory at a time.

    Consecutive members with one key belong together, until one comes again. The caption is the ``txt`` member, or else
    ``caption`` in the ``json`` member; with a ``caption_key`` it is the member of that ending, or else that entry of
    the ``json`` member. Invalid UTF-8 becomes U+FFFD. A broken tar yields what is whole before the break. A half that
    has no other half beside it is yielded at the end, or with its other half.

    Raises:
        UserError: ``how.unsorted``, and halves lie apart in a compressed tar.
    """
    pattern = LAST if how.last_dot else FIRST
    pairing = Pairing(path, caption_key, how)
    limits = dict.fromkeys(pairing.images, MAX_IMAGE_BYTES) | dict.fromkeys(
        pairing.texts, MAX_TEXT_BYTES
    )
    group = Group("")
    offset = -1
    try:
        with path.open("rb", buffering=BUFFER) as file, tarfile.open(fileobj=file) as tar:
            pairing.source = file if tar.fileobj is file else None
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # or it remembers every header
                if tar.offset <= offset:
                    raise tarfile.ReadError("its headers go round in a circle")
                offset = tar.offset
                name = member.name
                if (
                    not name.isascii()
                ):  # bytes that are no UTF-8 come as halves of characters, which can't be stored
                    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                match = pattern.fullmatch(name)
                if member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                if match is None or not member.isfile():
                    yield Ignored(name, _kind(member, name))
                    continue
                extension = match[2].lower()
                if (
                    match[1] != group.key
                    or extension in group.members
                    or extension in group.too_large
                ):
                    if group.key:
                        yield from pairing.items(group)
                    group = Group(match[1])
                limit = limits.get(extension)
                if limit is None:
                    group.others.append(match[2])
                elif member.size > limit:
                    group.too_large[extension] = member.size
                else:
                    group.members[extension] = _content(tar, member)
                    group.places[extension] = (
                        member.offset_data,
                        -1 if member.issparse() else member.size,
                    )
            whole = _ends_properly(tar)
            if whole:
                if group.key:
                    yield from pairing.items(group)
                yield from pairing.rest()
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's trouble, not the tar's
        yield from pairing.rest()
        yield Skipped(
            group.key, BROKEN_INPUT, one_line(error)
        )  # together with the sample in which it breaks
        return
    if not whole:
        if group.key:
            yield from pairing.items(group)
        yield from pairing.rest()
        yield Skipped(group.key, BROKEN_INPUT, "it ends without an end mark, or goes on after it")


def _kind(member: tarfile.TarInfo, name: str) -> str:
    """Say what a member is that can't be a part of a pair."""
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "link"
    if not member.isfile():
        return "special file"
    base = name.rpartition("/")[2]
    if base.startswith("._"):
        return "macOS's ._ file"
    return "hidden file" if base.startswith(".") else "file without an ending"


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
