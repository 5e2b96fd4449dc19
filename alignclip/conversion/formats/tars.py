"""Tars of image–caption pairs, as img2dataset and webdataset write them.

Every member of a tar is a part of a pair, which is written or left out, or is counted as what it
is.
"""

from __future__ import annotations

import errno
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from alignclip.conversion.formats.declaration import InputFormat
from alignclip.conversion.formats.pairing import Pairing, kind_of_name, name_in_utf8
from alignclip.conversion.samples import (
    BROKEN_INPUT,
    DEFAULT_READING,
    Ignored,
    Item,
    Reading,
    Skipped,
)
from alignclip.errors import one_line

if TYPE_CHECKING:
    from typing_extensions import Self

# What tarfile raises where a header, the numbers in a header or the compression are damaged.
DAMAGE: tuple[type[Exception], ...] = (
    *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError),
    *(OverflowError, RecursionError, MemoryError, OSError),
)
BUFFER = 2**20  # bytes read at once: several samples, and all their headers


LONGEST_HEADER = 2**20  # bytes of a member that describes the next one: its name, its attributes
DESCRIBING = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE),
    tarfile.SOLARIS_XHDTYPE,
)


class _Member(tarfile.TarInfo):
    """A member whose description is short: tarfile reads it at once, and a packed one is small."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type in DESCRIBING and found.size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a name or attributes of {found.size:,} bytes")
        return found


class Tars(InputFormat):
    """Tars, plain or gzipped: consecutive members of one key are a pair."""

    words = "tars (img2dataset, webdataset)"
    described = (
        "tars of img2dataset, webdataset, Hugging Face's `*-wds`; gzipped, too",
        "`key.jpg` (`jpeg`, `png`, `webp`) with `key.txt`, or `caption` in `key.json`; "
        "`--caption-key` names another entry or ending, `--image-key input.jpg` the images' "
        "ending. As in webdataset, a key ends at the first dot of the file name (`--last-dot`: at "
        "the last), and the files of a key lie side by side (`--unsorted` joins those that don't)",
    )
    flags = ("--caption-key", "--image-key", "--encoding", "--last-dot", "--unsorted")
    endings = (".tar", ".tar.gz", ".tgz")

    def begins(self, head: bytes) -> bool:
        """See the base class."""
        return head[257:262] == b"ustar"

    def read(self, path: Path, part: str, reading: Reading) -> Iterator[Item]:
        """See :func:`read_tar`."""
        return read_tar(path, reading)


def read_tar(path: Path, reading: Reading = DEFAULT_READING) -> Iterator[Item]:
    """Stream through a tar and yield its samples in order, one in memory at a time.

    Consecutive members with one key belong together, until one comes again; see :class:`Pairing`. A
    broken tar yields what is whole before the break. A half that has no other half beside it is
    yielded at the end, or with its other half.

    Raises:
        UserError: ``reading.unsorted``, and halves lie apart in a compressed tar.
    """
    pairing = Pairing(reading, str(path))
    try:
        with path.open("rb", buffering=BUFFER) as file, _opened_tar(file) as tar:
            pairing.source = file if tar.fileobj is file else None
            yield from _members(tar, pairing)
            whole, broken_key = _ends_properly(tar), pairing.key
            yield from pairing.finish()
        why = "it ends without an end mark, or goes on after it"
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's trouble, not the tar's
        whole, why = False, one_line(error)
        broken_key = pairing.drop()  # the sample in which the tar breaks is lost with the rest
    yield from pairing.halves()
    if not whole:
        yield Skipped(broken_key, BROKEN_INPUT, why)


def _opened_tar(file: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, tarinfo=_Member)


def _members(tar: tarfile.TarFile, pairing: Pairing) -> Iterator[Item]:
    offset = -1
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # or it remembers every header
        if tar.offset <= offset:
            raise tarfile.ReadError("its headers go round in a circle")
        offset = tar.offset
        name = member.name if member.name.isascii() else name_in_utf8(member.name)
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        split = pairing.split(name)
        if split is None or not member.isfile():
            yield Ignored(name, _kind(member, name))
            continue
        place = (member.offset_data, -1 if member.issparse() else member.size)
        if pairing.is_complete(*split):
            yield from pairing.finish()
        pairing.add(*split, member.size, partial(_member_content, tar, member), place)


def _kind(member: tarfile.TarInfo, name: str) -> str:
    """Say what a member is that can't be a part of a pair."""
    if member.isdir():
        return "folder"
    if member.issym() or member.islnk():
        return "link"
    return kind_of_name(name) if member.isfile() else "special file"


def _member_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a member; a plain one straight from the file, in a third of ``extractfile``'s time."""
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
    """Say whether iteration stopped at the end mark; tarfile also stops, silently, at a bad header.

    The end mark is a block of zeros. Bytes behind the zeros are lost samples: a hole in a download,
    or tars joined into one.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        return False
    while end and not end.strip(b"\0"):
        end = tar.fileobj.read(BUFFER)
    return not end
