"""Files of ``torch.save`` read without executing anything of them.

``torch.load`` with ``weights_only=False`` runs whatever a file names. With ``weights_only=True``,
torch up to 2.9.1 has a hole (GHSA-63cw-57p8-fm3p): a crafted file can corrupt memory. So this
module takes the file apart by itself: the pickle goes through
:class:`alignclip.weights.safe_pickle.Machine` with the types of
:mod:`alignclip.weights.safe_types`, and each storage is as long as what the file holds of it. torch
writes a checksum with each part, which is compared.
"""

from __future__ import annotations

import io
import mmap
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from alignclip.errors import UserError, one_line
from alignclip.weights.checkpoint_file import LOCAL_HEADER
from alignclip.weights.safe_pickle import Machine, Refused, Unknown
from alignclip.weights.safe_types import CheckpointTypes

ALIGNED = 16  # bytes; numbers that lie otherwise are copied to where they may lie
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch/serialization.py, its format before 1.6
BYTE_ORDER = (
    "was written by a machine of another byte order; save it again on one of this machine's"
)
SAVE_PLAIN_DATA = (
    "if you trust it, save what you need of it as plain data: "
    "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW)"
)


class WrongFile(Exception):
    """A file is damaged, or of another kind; the message goes on after the file's name."""


def read_pickled(
    path: str | Path,
    *,
    what: str = "",
    way_out: str = SAVE_PLAIN_DATA,
    mapped: bool = False,
    passed_over: tuple[str, ...] = (),
) -> Any:
    """Return what a file of ``torch.save`` holds, on the CPU, as ``torch.load`` would.

    Tensors that share a storage share it again. Nothing that the file names is imported or called.

    Args:
        path: a file of this machine, in torch's zip format or the one before torch 1.6.
        what: what the person calls the file, for errors; its path by default.
        way_out: what a person may do about a file that holds other types, for errors.
        mapped: tensors lie in the file, mapped into memory, as long as they live. The file must not
            change then.
        passed_over: beginnings of the names of types whose objects are left out, as
            :class:`alignclip.weights.safe_pickle.Unread`; so are special tensors then.

    Raises:
        UserError: the file holds other types than plain data, is damaged, or is of another kind.
    """
    place = what or str(path)
    try:
        return _read_checkpoint(Path(path), mapped, passed_over)
    except Unknown as error:
        raise UserError(
            f"{place} is refused: beside weights it holds '{error}', "
            f"which could run code; {way_out}"
        ) from None
    except Refused as error:
        raise UserError(f"{place} is refused: it holds {error}") from None
    except WrongFile as error:
        raise UserError(f"{place} {error}") from None
    except OSError as error:
        raise UserError(f"{place} can't be read: {error.strerror or one_line(error)}") from None
    except Exception as error:  # broken files raise nearly anything
        raise UserError(
            f"{place} is not a PyTorch checkpoint, or only a part of one ({type(error).__name__})"
        ) from None


def _read_checkpoint(path: Path, mapped: bool, passed_over: tuple[str, ...]) -> Any:
    if not path.stat().st_size:
        raise EOFError
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive, mapped, passed_over).read()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _read_old(content, passed_over)  # type: ignore[arg-type]  # reads as a file


class _Archive:
    """torch's zip format: a pickle, and a record for each storage.

    Args:
        path: the file.
        archive: the same, open.
        mapped: see :func:`read_pickled`.
        passed_over: see :func:`read_pickled`.
    """

    def __init__(
        self, path: Path, archive: zipfile.ZipFile, mapped: bool, passed_over: tuple[str, ...]
    ) -> None:
        self.archive, self.mapped, self.passed_over = archive, mapped, passed_over
        self.size = self.left = path.stat().st_size
        self.whole = torch.UntypedStorage.from_file(str(path), False, self.size)
        self.records = {entry.filename: entry for entry in archive.infolist()}
        self.storages: dict[str, torch.UntypedStorage] = {}
        found = [
            name for name in self.records if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(found) != 1:
            raise ValueError("no data.pkl")
        self.folder = found[0].removesuffix("data.pkl")

    def read(self) -> Any:
        """Return what the pickle makes."""
        order = self.records.get(f"{self.folder}byteorder")
        if order is not None and self._bytes(order) != sys.byteorder.encode():
            raise WrongFile(BYTE_ORDER)
        types = CheckpointTypes(self._storage, self.passed_over)
        content = Machine(types).run(
            io.BytesIO(self._bytes(self.records[f"{self.folder}data.pkl"]))
        )
        types.check_truths()
        return content

    def _check_length(self, record: zipfile.ZipInfo) -> None:
        """Refuse parts that take more memory than the file: packed ones, or ones read twice."""
        if record.compress_type != zipfile.ZIP_STORED:
            raise WrongFile("is refused: it is a compressed archive, which PyTorch doesn't write")
        self.left -= record.file_size
        if self.left < 0:
            raise WrongFile("is damaged: its parts are longer than the file")

    def _bytes(self, record: zipfile.ZipInfo) -> bytes:
        self._check_length(record)
        try:
            return self.archive.read(record)
        except zipfile.BadZipFile:
            raise WrongFile(
                f"is damaged: the checksum of its part {record.filename} doesn't match"
            ) from None

    def _storage(self, key: str, length: int) -> torch.UntypedStorage:
        """Return the bytes of a storage, which the file has to hold, all of them."""
        record = self.records.get(f"{self.folder}data/{key}")
        if record is None:
            raise WrongFile(f"is damaged: its storage {key[:20]} isn't there")
        if record.file_size != length:
            raise Refused(f"a storage of {length} bytes with {record.file_size} in the file")
        if key not in self.storages:
            self.storages[key] = self._load(record)
        return self.storages[key]

    def _load(self, record: zipfile.ZipInfo) -> torch.UntypedStorage:
        self._check_length(record)
        if not record.file_size:
            return torch.UntypedStorage(0)
        header = bytes(
            self.whole[record.header_offset : record.header_offset + LOCAL_HEADER.size].tolist()
        )
        signature, name, extra = LOCAL_HEADER.unpack(header)
        start = record.header_offset + LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + record.file_size > self.size:
            raise WrongFile(f"is damaged: its part {record.filename} isn't where it should be")
        found: torch.UntypedStorage = self.whole[start : start + record.file_size]
        if not self.mapped or start % ALIGNED:
            found = found.clone()
        numbers = torch.empty(0, dtype=torch.uint8).set_(found)
        if zlib.crc32(numbers.numpy().data) != record.CRC:
            raise WrongFile(f"is damaged: the checksum of its part {record.filename} doesn't match")
        return found


def _read_old(file: BinaryIO, passed_over: tuple[str, ...]) -> Any:
    """Read torch's format before 1.6: pickles, then the storages in the last pickle's order."""
    storages: dict[str, torch.UntypedStorage] = {}
    left = len(file)  # type: ignore[arg-type]

    def storage(key: str, length: int) -> torch.UntypedStorage:
        """Return a storage that is filled later."""
        nonlocal left
        if key not in storages:
            left -= length
            if left < 0:
                raise WrongFile("is damaged: its storages are longer than the file")
            storages[key] = torch.UntypedStorage(length)
        if storages[key].nbytes() != length:
            raise Refused("a storage of two lengths")
        return storages[key]

    types = CheckpointTypes(storage, passed_over)
    magic, protocol, system, content, keys = (Machine(types).run(file) for _ in range(5))
    if (magic, protocol) != (MAGIC, PROTOCOL):
        raise ValueError("another format")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise WrongFile(BYTE_ORDER)
    if type(keys) is not list or sorted(keys) != sorted(storages):
        raise WrongFile("is damaged: its storages are others than its tensors'")
    for key in keys:
        found = storages[key]
        count = int.from_bytes(file.read(8), "little")
        held = file.read(found.nbytes())
        if len(held) != found.nbytes() or found.nbytes() not in [
            count * n for n in (1, 2, 4, 8, 16)
        ]:
            raise WrongFile("is damaged: it ends in the middle of its tensors")
        if held:
            numbers = torch.empty(0, dtype=torch.uint8).set_(found)
            numbers.copy_(torch.frombuffer(bytearray(held), dtype=torch.uint8))
    types.check_truths()
    return content
