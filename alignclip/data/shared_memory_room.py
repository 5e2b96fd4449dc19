"""Compare what loaders will put into ``/dev/shm`` with what is free there, before the first batch.

PyTorch's loader workers hand batches over in shared memory. Where shared memory is full, a bus
error
kills a worker or the run itself: Docker gives a container 64 MB, and a batch of 256 images has 39.
"""

from __future__ import annotations

import mmap
import os
import sys

from alignclip.data.shared_memory import SHM
from alignclip.errors import UserError

MB = 1_000_000
# batches beside those that wait: the one that is trained on, and the one that is handed over
IN_USE = 2
# batches that a worker prepares ahead unless a loader says otherwise: PyTorch's default
PREFETCH = 2
STREAMING = 2 * MB  # Streaming's own small segments, of some datasets
NO_WORKERS = "data.num_workers (0 needs none) or data.prefetch_factor"
WAY_OUT = "give the container more (docker run --shm-size=8g, or --ipc=host), or lower {settings}"


def batch_bytes(
    batch_size: int, image_size: int, context_length: int = 0, dimension: int = 0
) -> int:
    """Return the bytes of a batch: uint8 images, int64 tokens and ids, float16 embeddings."""
    tensors = [3 * image_size**2, 8 * context_length, 8, 2 * dimension]
    return sum(-(-batch_size * size // mmap.PAGESIZE) * mmap.PAGESIZE for size in tensors if size)


def loader_bytes(batch: int, num_workers: int, prefetch_factor: int) -> int:
    """Return the bytes of a rank's batches that can be there at one time; none without workers."""
    return (num_workers * prefetch_factor + IN_USE) * batch if num_workers else 0


def free_bytes() -> int | None:
    """Return the bytes that are free in shared memory; None where it is not a folder (macOS)."""
    if not SHM.is_dir():
        return None
    there = os.statvfs(SHM)
    return there.f_bavail * there.f_frsize


def check_room(training: int, ranks: int, samples: int, num_workers: int) -> None:
    """Check that the training loaders' batches and Streaming's order of an epoch fit.

    Args:
        training: bytes of a rank's training loader.
        ranks: on this machine.
        samples: of an epoch, on all machines: each machine holds their order, 8 bytes a sample.
        num_workers: of the training loader.

    Raises:
        UserError: they don't; with both numbers and the way out.
    """
    free = free_bytes()
    needed = ranks * training + 8 * samples + STREAMING
    if free is None or free >= needed:
        return
    way_out = WAY_OUT.format(settings=NO_WORKERS if num_workers else "data.epoch_size")
    raise UserError(
        f"{SHM} has {free / MB:,.0f} MB free on this machine, and the loaders of its {ranks} "
        f"process{'es' if ranks > 1 else ''} need {needed / MB:,.0f} MB of shared memory; {way_out}"
    )


def affordable_workers(num_workers: int, batch: int, batches: int) -> int:
    """Return the workers that an evaluation's loader has room for: as many as asked for, or none.

    Where there is no room, a line says so.

    Args:
        num_workers: of this rank.
        batch: bytes of a batch.
        batches: of the whole set, on this rank.
    """
    free, ranks = free_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = ranks * min(loader_bytes(batch, num_workers, PREFETCH), batches * batch)
    if not num_workers or free is None or free >= needed:
        return num_workers
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{SHM} has {free / MB:,.0f} MB free, and {num_workers} workers of this evaluation "
            f"need {needed / MB:,.0f} MB: it goes on without workers; "
            "docker run --shm-size=8g gives more",
            file=sys.stderr,
        )
    return 0


def bus_error_in_words(said: str) -> str | None:
    """Explain a loader's death for want of shared memory, by what PyTorch has said; else None."""
    wanting = (
        "Bus error" in said
        or "shared memory" in said
        or ("/torch_" in said and "No space left" in said)
    )
    free = free_bytes()
    if not wanting or free is None:
        return None
    return (
        f"a loader worker ran out of shared memory; {SHM} has {free / MB:,.0f} MB free now; "
        + WAY_OUT.format(settings=NO_WORKERS)
    )
