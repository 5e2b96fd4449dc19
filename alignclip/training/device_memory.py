"""What a person can change where a device has too little memory for a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alignclip.config.schema import RunConfig
from alignclip.errors import UserError
from alignclip.ranks import world_size

SMALLEST_CHUNK = 8  # samples; chunks below leave a GPU idle, and save next to nothing


@contextmanager
def out_of_memory_explained(config: RunConfig) -> Iterator[None]:
    """Tell in one line what makes a batch smaller, where memory ends while a batch is trained.

    Raises:
        UserError: instead of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"{said(config)}; {advice(config)}") from error


def said(config: RunConfig) -> str:
    """Say what didn't fit, and how large the device's memory is."""
    size = pairs_of_a_rank(config)
    encoded = f", encoded {config.model.encode_chunk_size} at a time" if in_chunks(config) else ""
    memory = ""
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        held = torch.cuda.max_memory_allocated() / 2**30
        memory = f" of {whole:.0f} GiB, {held:.0f} GiB of them taken"
    return f"out of the device's memory{memory}: {size:,} pairs a device{encoded}"


def advice(config: RunConfig) -> str:
    """Name the settings that need less memory, the ones that change no number first."""
    size = pairs_of_a_rank(config)
    chunk = (config.model.encode_chunk_size if in_chunks(config) else size) // 2
    settings = []
    if chunk >= SMALLEST_CHUNK:
        settings.append(f"model.encode_chunk_size={chunk} (the same numbers, and slower)")
    if config.precision == "fp32":
        settings.append("precision=amp_bf16")
    settings.append("more devices (composer -n N)")
    if smaller := size // 2 * world_size():
        settings.append(f"global_train_batch_size={smaller} (another recipe)")
    return "try " + ", or ".join(settings)


def in_chunks(config: RunConfig) -> bool:
    """Say whether a rank's batch is encoded in several chunks."""
    return 0 < config.model.encode_chunk_size < pairs_of_a_rank(config)


def pairs_of_a_rank(config: RunConfig) -> int:
    """Return a rank's share of the global batch."""
    return config.global_train_batch_size // world_size()
