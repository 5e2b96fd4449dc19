"""Read a shard of an MDS set: compare its file with the index, decompress it, decode its samples.

Streaming's own reader checks none of this, and decompresses whatever a file announces.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from alignclip.data.mds_index import IndexedFile, ShardEntry, stored_file
from alignclip.runtime.stand_ins import stand_ins

if TYPE_CHECKING:
    from streaming.base.format.mds import MDSReader as MDSReader


class DamagedShard(ValueError):
    """A shard's file is not what the index says.

    Args:
        kind: words that group damages of a sort.
        text: what is wrong; the message.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def open_shard(entry: ShardEntry, path: Path, folder: Path) -> MDSReader:
    """Check a shard's file and return a reader of its samples.

    Args:
        entry: of the shard.
        path: the stored file; a compressed shard is decompressed into ``folder``.
        folder: where a copy may be written.

    Raises:
        DamagedShard: the file is not what the index says.
        OSError: a file can't be read or written.
    """
    with stand_ins():
        from streaming.base.format.mds import MDSReader

    data = _uncompressed(entry, path.read_bytes())
    held, samples = int.from_bytes(data[:4], "little"), entry["samples"]
    if held != samples:
        text = f"holds {held:,} samples, the index says {samples:,}"
        raise DamagedShard("samples differ", text)
    if entry["zip_data"]:
        path = folder / "shard.mds"
        path.write_bytes(data)
    raw = {**entry["raw_data"], "basename": path.name}
    plain = {**entry, "raw_data": raw, "zip_data": None, "compression": None}
    return MDSReader.from_json(str(path.parent), None, plain)


def _uncompressed(entry: ShardEntry, data: bytes) -> bytes | bytearray:
    """Check the content of a stored file, decompress it, and check the result."""
    check_content(data, stored_file(entry))
    if not entry["zip_data"]:
        return data
    raw = entry["raw_data"]
    try:
        content = decompress_to(raw["bytes"], str(entry["compression"]), data)
        check_content(content, raw)
    except DamagedShard as error:
        raise DamagedShard(error.kind, f"decompressed: {error}") from None
    except ValueError as error:
        raise DamagedShard("can't be decompressed", str(error)) from None
    return content


def check_content(data: bytes | bytearray, file: IndexedFile) -> None:
    """Compare a file's content with the size and the hashes in the index.

    Raises:
        DamagedShard: one of them differs.
    """
    with stand_ins():
        from streaming.base.hashing import get_hash, is_hash

    if len(data) != file["bytes"]:
        text = f"{len(data):,} bytes, the index says {file['bytes']:,}"
        raise DamagedShard("size differs", text)
    known = {name: value for name, value in file["hashes"].items() if is_hash(name)}
    if different := [
        name for name, value in known.items() if get_hash(name, cast("bytes", data)) != value
    ]:
        raise DamagedShard("hash differs", f"hash {', '.join(different)} differs")


def decompress_to(size: int, algorithm: str, data: bytes) -> bytes | bytearray:
    """Decompress what Streaming has compressed into a buffer of ``size`` bytes and no more.

    So a small file can't fill the memory.

    Args:
        size: bytes of the result.
        algorithm: Streaming's name, e.g. ``zstd`` or ``zstd:7``.
        data: the compressed file.

    Raises:
        ValueError: the result has another size, or the file can't be decompressed.
    """
    import cramjam

    decompress_into = {
        "br": cramjam.brotli.decompress_into,
        "bz2": cramjam.bzip2.decompress_into,
        "gz": cramjam.gzip.decompress_into,
        "snappy": cramjam.snappy.decompress_raw_into,
        "zstd": cramjam.zstd.decompress_into,
    }[algorithm.partition(":")[0]]
    result = bytearray(size)
    try:
        written = decompress_into(data, result)
    except cramjam.DecompressionError as error:
        if "buffer" in str(error):  # the only sign that the buffer was too small
            raise ValueError(f"holds more than {size:,} bytes") from None
        raise ValueError(f"can't be decompressed: {error}") from None
    if written < size:
        raise ValueError(f"holds less than {size:,} bytes")
    return result
