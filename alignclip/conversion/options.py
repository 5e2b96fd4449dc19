"""The settings of a conversion of image–caption pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignclip.conversion.captions import DEFAULT_ENCODER
from alignclip.conversion.images import CHECKS, ImageOptions
from alignclip.conversion.samples import DEFAULT_READING, Reading
from alignclip.conversion.text_tables import is_utf8
from alignclip.errors import UserError, nearest


@dataclass
class ConvertOptions:
    """The settings of a conversion.

    Attributes:
        inputs: patterns (see :func:`alignclip.conversion.inputs.expand`).
        reading: how inputs are read.
        held_out: the share of the samples, chosen by a hash of their keys, that becomes the split
            ``val``.
        size_limit: with ``compression`` and ``hashes`` an argument of :class:`streaming.MDSWriter`.
        max_bad: the share of bad samples above which the conversion fails.
        scheduler: a Dask scheduler's address; None: ``processes`` on this machine.
        next_step: the summary ends with the command that trains on the set.
    """

    inputs: Sequence[str]
    out: str
    encoder: str = DEFAULT_ENCODER
    semantic: bool = True
    reading: Reading = DEFAULT_READING
    images: ImageOptions = field(default_factory=ImageOptions)
    held_out: float = 0.0
    # larger shards cost a third of the speed: the C library gives their memory back each time
    size_limit: str | int = "32mb"
    compression: str | None = None
    hashes: Sequence[str] = ("xxh64",)  # what training validates
    max_bad: float = 0.5
    processes: int = 1
    scheduler: str | None = None
    progress: bool = True
    next_step: bool = True

    def __post_init__(self) -> None:
        """Make local paths absolute: the same however they are written, wherever a worker runs."""
        if ":/" not in self.out:  # with one slash it is a mistake, which is told later
            self.out = str(Path(self.out).expanduser().resolve())
        if (folder := Path(self.encoder).expanduser()).is_dir():
            self.encoder = str(folder.resolve())

    def fixed(self) -> dict[str, Any]:
        """Return the options that every part of one set has to share."""
        return {
            "encoder": self.encoder if self.semantic else None,
            **self._fixed_reading(),
            "check": self.images.check,
            "min_side": self.images.min_side,
            "resize": self.images.resize,
            "quality": self.images.quality if self.images.resize else None,
            "held_out": self.held_out,
            "size_limit": self.size_limit,
            "compression": self.compression,
            "hashes": sorted(set(self.hashes)),
        }

    def _fixed_reading(self) -> dict[str, Any]:
        """Return how inputs are read; None for what early versions did."""
        how = {key: value or None for key, value in asdict(self.reading).items()}
        return how | {"encoding": None if is_utf8(self.reading.encoding) else self.reading.encoding}


def check_numbers(options: ConvertOptions) -> None:
    """Refuse numbers and choices that no conversion can have.

    Raises:
        UserError: names the option and its range.
    """
    images = options.images
    for flag, value, low, high in (
        ("--processes", options.processes, 1, None),
        ("--held-out", options.held_out, 0, 0.5),
        ("--max-bad", options.max_bad, 0, 1),
        ("--quality", images.quality, 1, 100),
        ("--min-side", images.min_side, 0, None),
        ("--resize", 1 if images.resize is None else images.resize, 1, None),
    ):
        if not value >= low or (high is not None and not value <= high):  # NaN is neither
            most = "" if high is None else f" and at most {high}"
            raise UserError(f"{flag} must be at least {low}{most}, not {value}")
    if images.check not in CHECKS:
        raise UserError(f"--check {images.check} does not exist; {nearest(images.check, CHECKS)}")
