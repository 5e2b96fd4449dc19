"""The settings of a conversion of image–caption pairs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignclip.config.setting import setting
from alignclip.conversion.captions import DEFAULT_ENCODER
from alignclip.conversion.formats import in_words
from alignclip.conversion.images import ImageOptions
from alignclip.conversion.samples import DEFAULT_READING, Reading
from alignclip.conversion.text_tables import is_utf8
from alignclip.storage.staging import VAL


def output_folder(**rule: Any) -> Any:
    """Make a field of the converters' options: ``--out``, the place of the set."""
    text = "local folder, or s3://, gs://, oci://, azure:// …"
    return setting(place=True, metavar="FOLDER", help=text, **rule)


@dataclass
class ConvertOptions:
    """The settings of a conversion.

    Attributes:
        inputs: patterns (see :func:`alignclip.conversion.inputs.expand_inputs`).
        reading: how inputs are read.
        held_out: the share of the samples, chosen by a hash of their keys, that becomes the split
            ``val``.
        size_limit: with ``compression`` and ``hashes`` an argument of :class:`streaming.MDSWriter`.
        max_bad: the share of bad samples above which the conversion fails.
        scheduler: a Dask scheduler's address; None: ``processes`` on this machine.
        next_step: the summary ends with the command that trains on the set.
    """

    inputs: Sequence[str] = setting(
        group="input",
        flags=("--inputs", "--tars"),
        place=True,
        metavar="PATH",
        help=f"{in_words()}, folders of them; paths or URLs; {{0..9}}, {{a,b}}, * and ? expand",
    )
    reading: Reading = field(default=DEFAULT_READING, kw_only=True)
    out: str = output_folder(group="output")
    held_out: float = setting(
        0.0,
        at_least=0,
        at_most=0.5,
        metavar="SHARE",
        help=f"share of the samples for the split {VAL}, chosen by a hash of the key",
    )
    # larger shards cost a third of the speed: the C library gives their memory back each time
    size_limit: str | int = setting(
        "32mb", metavar="SIZE", help="of a shard (default: %(default)s)"
    )
    compression: str | None = setting(
        None, metavar="ALGO", help="Streaming's, as zstd:7; JPEGs hardly shrink (default: none)"
    )
    hashes: Sequence[str] = setting(
        ("xxh64",),
        metavar="ALGO",
        help="of the shards (default: xxh64, which is checked)",  # by training
    )
    encoder: str = setting(
        DEFAULT_ENCODER,
        group="caption embeddings",
        place=True,
        metavar="NAME",
        help="hub name or local folder (default: %(default)s); all-MiniLM-L6-v2 needs no hub",
    )
    semantic: bool = setting(True, flags=("--no-semantic",), help="write no caption embeddings")
    images: ImageOptions = setting(factory=ImageOptions, group="images")
    max_bad: float = setting(
        0.5,
        at_least=0,
        at_most=1,
        metavar="SHARE",
        help="end with an error above this share of bad samples (default: %(default)s)",
    )
    # one for Python callers: other processes would import a script that has no __main__ guard
    processes: int = setting(
        1,
        unless_typed=os.cpu_count() or 1,
        group="workers",
        at_least=1,
        metavar="N",
        help="inputs side by side (default: the cores, here %(default)s)",
    )
    scheduler: str | None = setting(
        None,
        metavar="ADDRESS",
        help="a Dask cluster's, instead of processes: tcp://host:8786",
    )
    progress: bool = True
    # the quickstart's own
    next_step: bool = setting(True, flags=("--no-next",), help=argparse.SUPPRESS)

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
