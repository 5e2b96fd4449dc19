"""Streaming's writer of MDS shards and its options: all that conversion knows of Streaming."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.errors import UserError, nearest
from alignclip.runtime.stand_ins import stand_ins

with stand_ins():
    from streaming import MDSWriter
    from streaming.base.compression import get_compressions
    from streaming.base.hashing import get_hashes
    from streaming.base.util import bytes_to_int

PIECE = 2**17  # bytes written at once: of 1 MB, ext4 makes large pages, which cost twice the rest


class JoinedShardWriter(MDSWriter):
    """MDSWriter without its copies of whole shards, which take as long as reading the tar.

    Samples are laid one behind the other as they come, in memory that is used again for the next
    shard. The names that it overrides and reads are Streaming 0.13's: ``new_samples``,
    ``extra_bytes_per_shard``, ``config_data``, ``encode_joint_shard``, ``_process_file``,
    ``_hash``, ``_write_index``, ``executor``.

    Args:
        columns: name -> MDS encoding.
        folder: an empty local folder.
        hashes: algorithms.
        size_limit: bytes of a shard, or text such as ``32mb``.
        compression: algorithm, or None.

    Raises:
        ValueError: an argument is none that Streaming takes.
    """

    def __init__(
        self,
        columns: dict[str, str],
        folder: Path,
        hashes: Collection[str] = ("xxh64",),
        size_limit: int | str = 2**26,
        compression: str | None = None,
    ) -> None:
        super().__init__(
            columns=columns,
            out=str(folder),
            hashes=sorted(set(hashes)),  # as Streaming wants them
            size_limit=bytes_of(size_limit),
            compression=compression,
            progress_bar=False,
        )
        if not self.size_limit:
            raise ValueError("must be positive")
        self.folder = folder
        # 4 bytes an offset, with which a sample takes 16 bytes at least
        self.lengths: list[int] = []
        self.room = self.end = self.extra_bytes_per_shard + self.size_limit // 4
        self.laid = np.empty(self.room + self.size_limit, np.uint8)

    def write(self, sample: dict[str, Any]) -> None:
        """Encode a sample, and move it from MDSWriter's list into the memory of the shard."""
        super().write(sample)
        data, self.new_samples[-1] = self.new_samples[-1], b""
        if len(self.new_samples) == 1:
            self.lengths, self.end = [], self.room
        self.lengths.append(len(data))
        start, self.end = self.end, self.end + len(data)
        if self.end > len(self.laid):  # a sample that exceeds the limit has a shard of its own
            self.laid = np.empty(self.end, np.uint8)
        self.laid[start : self.end] = np.frombuffer(data, np.uint8)

    def encode_joint_shard(self) -> bytes:
        """Return the shard file: number of samples, their offsets, the columns, the samples."""
        ends = np.cumsum([0, *self.lengths])  # of the samples, before which lies the head
        start = 4 + 4 * len(ends) + len(self.config_data)
        number = np.uint32(len(self.lengths)).tobytes()
        head = number + (ends + start).astype(np.uint32).tobytes() + self.config_data
        first = self.room - start
        self.laid[first : self.room] = np.frombuffer(head, np.uint8)
        shard: Any = self.laid[first : self.room + ends[-1]].data
        # compressors want bytes; hashes and files take the memory itself
        return shard.tobytes() if self.compression else shard

    def _process_file(
        self, raw_data: bytes, raw_basename: str, zip_basename: str | None
    ) -> tuple[dict, dict | None]:
        """Write a shard in pieces: Linux can take several times as long for tens of MB at once."""
        if zip_basename:
            return super()._process_file(raw_data, raw_basename, zip_basename)
        with (self.folder / raw_basename).open("wb") as file:
            for start in range(0, len(raw_data), PIECE):
                file.write(raw_data[start : start + PIECE])
        return self._hash(raw_data, raw_basename), None

    def _write_index(self) -> None:
        """Wait until the threads have taken up every shard: Streaming looks once a second."""
        self.executor.submit(int).result()  # threads take up their tasks in turn
        super()._write_index()


def bytes_of(size: int | str) -> int:
    """Return a size in bytes: ``32mb`` are 33554432.

    Raises:
        ValueError: the text is no size.
    """
    try:
        number: int = bytes_to_int(size)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    return number


def check_hashes(names: Collection[str]) -> None:
    """Refuse a hash that Streaming doesn't know.

    Raises:
        UserError: names the nearest one.
    """
    for name in names:
        if name not in get_hashes():
            hint = nearest(name, get_hashes())
            raise UserError(f"--hashes {name} is not one of Streaming's; {hint}")


def check_compression(name: str | None) -> None:
    """Refuse a compression that Streaming doesn't know.

    Raises:
        UserError: names all, with their levels.
    """
    if name is None or name in get_compressions():
        return
    levels: dict[str, list[int]] = {}
    for algorithm, _, level in (valid.partition(":") for valid in sorted(get_compressions())):
        levels.setdefault(algorithm, []).extend([int(level)] if level else [])
    valid = [
        f"{key}[:{min(found)}-{max(found)}]" if found else key for key, found in levels.items()
    ]
    raise UserError(f"--compression {name} is not one of Streaming's; valid: {', '.join(valid)}")
