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
NUMPY_ARCHIVE = "is NumPy's (.npz), which isn't read; save its arrays with torch.save as tensors"
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
    if not zipfile.is_zipfile(path):
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return _read_old(content, passed_over)  # type: ignore[arg-type]  # reads as a file
    archive = _Archive(path, mapped)
    if archive.read("byteorder") not in (b"", sys.byteorder.encode()):
        raise WrongFile(BYTE_ORDER)
    types = CheckpointTypes(archive.storage, passed_over)
    found = Machine(types).run(io.BytesIO(archive.read("data.pkl")))
    types.check_truths()
    return found


class _Archive:
    """torch's zip format: a folder with a pickle, and a part for each storage.

    Args:
        path: the file.
        mapped: see :func:`read_pickled`.
    """

    def __init__(self, path: Path, mapped: bool) -> None:
        self.mapped = mapped
        self.size = self.left = path.stat().st_size
        self.whole = torch.UntypedStorage.from_file(str(path), False, self.size)
        with zipfile.ZipFile(path) as archive:
            self.parts = {entry.filename: entry for entry in archive.infolist()}
        found = [name for name in self.parts if name.count("/") == 1 and name.endswith("/data.pkl")]
        if any(name.endswith(".npy") for name in self.parts):
            raise WrongFile(NUMPY_ARCHIVE)
        if not any(name.endswith("data.pkl") for name in self.parts):
            raise WrongFile("is a zip archive; unpack it, and name the file of weights in it")
        if len(found) != 1:
            raise ValueError("no data.pkl")
        self.folder = found[0].removesuffix("data.pkl")
        self.storages: dict[str, torch.UntypedStorage] = {}

    def read(self, name: str) -> bytes:
        """Return the bytes of a small part; none of a part that isn't there."""
        part = self.parts.get(f"{self.folder}{name}")
        return _numbers(self._load(part)).numpy().tobytes() if part else b""

    def storage(self, key: str, length: int) -> torch.UntypedStorage:
        """Return the bytes of a storage, which the file has to hold, all of them."""
        part = self.parts.get(f"{self.folder}data/{key}")
        if part is None:
            raise WrongFile(f"is damaged: its storage {key[:20]} isn't there")
        if part.file_size != length:
            raise Refused(f"a storage of {length} bytes with {part.file_size} in the file")
        if key not in self.storages:
            self.storages[key] = self._load(part)
        return self.storages[key]

    def _load(self, part: zipfile.ZipInfo) -> torch.UntypedStorage:
        """Return the bytes of a part; refuse parts that take more memory than the file."""
        if part.compress_type != zipfile.ZIP_STORED:
            raise WrongFile("is refused: it is a compressed archive, which PyTorch doesn't write")
        self.left -= part.file_size
        if self.left < 0:
            raise WrongFile("is damaged: its parts are longer than the file")
        if not part.file_size:
            return torch.UntypedStorage(0)
        start = part.header_offset + LOCAL_HEADER.size
        header = bytes(self.whole[part.header_offset : start].tolist())
        signature, *lengths = LOCAL_HEADER.unpack(header)
        start += sum(lengths)
        if signature != b"PK\x03\x04" or start + part.file_size > self.size:
            raise WrongFile(f"is damaged: its part {part.filename} isn't where it should be")
        found: torch.UntypedStorage = self.whole[start : start + part.file_size]
        if not self.mapped or start % ALIGNED:
            found = found.clone()
        if zlib.crc32(_numbers(found).numpy().data) != part.CRC:
            raise WrongFile(f"is damaged: the checksum of its part {part.filename} doesn't match")
        return found


def _numbers(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return the bytes of a storage as a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(storage)


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
            _numbers(found).copy_(torch.frombuffer(bytearray(held), dtype=torch.uint8))
    types.check_truths()
    return content
