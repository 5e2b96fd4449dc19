"""Decompression of shards up to the size that their index says: a small file can't fill the memory."""

from __future__ import annotations

import bz2
import gzip
import io
import zlib

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def decompress_to(size: int, algorithm: str, data: bytes) -> bytes:
    """Decompress what Streaming has compressed; no more than ``size`` bytes are ever allocated for the result.

    Args:
        size: bytes of the result.
        algorithm: Streaming's name, e.g. ``zstd`` or ``zstd:7``.
        data: the compressed file.

    Raises:
        ValueError: the result has another size, or the file can't be decompressed.
    """
    name = algorithm.partition(":")[0]
    try:
        result = _at_most(size, name, data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"can't be decompressed: {error}") from None
    except Exception as error:  # brotli, snappy and zstd have an error class each
        raise ValueError(f"can't be decompressed: {type(error).__name__}: {error}") from None
    if result is None or len(result) != size:
        raise ValueError(
            f"holds {'more' if result is None or len(result) > size else 'less'} than {size:,} bytes"
        )
    return result


def _at_most(size: int, name: str, data: bytes) -> bytes | None:
    """The decompressed data up to a little more than ``size`` bytes; None where the file itself says more."""
    if name == "gz":
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(size + 1)
    if name == "bz2":
        with bz2.BZ2File(io.BytesIO(data)) as file:
            return file.read(size + 1)
    if name == "br":
        return _brotli(size, data)
    announced = (
        _zstd_size(data) if name == "zstd" else _snappy_size(data)
    )  # both allocate that at once
    if announced is not None and announced > size:
        return None
    from streaming.base.compression import decompress

    return decompress(name, data)


def _brotli(size: int, data: bytes) -> bytes:
    import brotli  # type: ignore[import-untyped]

    decompressor = brotli.Decompressor()
    parts, length, given = [], 0, data
    while length <= size and not decompressor.is_finished():
        try:
            part = decompressor.process(given, output_buffer_limit=size + 1 - length)
        except TypeError:  # Brotli < 1.2 has no limit
            return bytes(brotli.decompress(data))
        if not part and not given:
            raise EOFError("the file is cut off")
        given = b""
        parts.append(part)
        length += len(part)
    return b"".join(parts)


def _zstd_size(data: bytes) -> int | None:
    """The size in the header of a Zstandard frame (RFC 8878, 3.1.1.1); None where there is none."""
    if data[:4] != ZSTD_MAGIC or len(data) < 5:
        return None
    descriptor = data[4]
    is_single, width = descriptor >> 5 & 1, (0, 2, 4, 8)[descriptor >> 6]
    if not width:
        width = is_single  # a byte where there is no window, and nothing otherwise
    start = 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
    if not width:
        return None
    return int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)


def _snappy_size(data: bytes) -> int:
    """The size at the beginning of a Snappy block: 7 bits a byte, the lowest first."""
    size = 0
    for position, byte in enumerate(data[:5]):
        size |= (byte & 0x7F) << 7 * position
        if not byte & 0x80:
            break
    return size
