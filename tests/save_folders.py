"""A save folder on the disk or in a bucket, with small checkpoints that tests damage."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
from runs import write_config

from alignclip.config.reading import load
from alignclip.config.schema import RunConfig
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file

Damage = Callable[[bytes], bytes | None]
LATEST = "latest-rank0.pt"


def config_for(folder: Path, save_folder: str, *overrides: str) -> RunConfig:
    own = folder / str(os.getpid())  # ranks call this at the same time
    yaml = write_config(own, str(folder / "set"), save_folder)
    return load(yaml, ["run_name=first", *overrides])


def content(batch: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(batch)
    model = {"encoders.a": torch.randn(40, 30, generator=generator)}
    return {"state": {"model": model, "batch": batch}, "rng": [1, 2.5]}


def flipped(data: bytes, position: int) -> bytes:
    """The data with another bit."""
    changed = bytearray(data)
    changed[position] ^= 1 << random.Random(position).randrange(8)
    return bytes(changed)


def name_of(batch: int) -> str:
    return f"ep0-ba{batch}-rank0.pt"


class Place:
    """A save folder and the checkpoints of some batches, the last of which is ``latest``.

    Args:
        tmp_path: for files that are made on their way.
        uri: of the save folder.
        batches: of the checkpoints.
    """

    def __init__(self, tmp_path: Path, uri: str, batches: tuple[int, ...] = (2, 4, 6)) -> None:
        self.made, self.uri, self.remote = tmp_path / "made.pt", uri, "://" in uri
        self.config = config_for(tmp_path, uri)
        self.files = self.folder().files
        for batch in batches:
            self.save(batch)
        if batches:
            self.point(name_of(batches[-1]))

    def folder(self) -> SaveFolder:
        """The folder as a new process sees it."""
        return SaveFolder(self.config)

    def save(self, batch: int) -> None:
        checkpoint_file.write_checkpoint(content(batch), self.made)
        self.files.put(self.made, name_of(batch))

    def damage(self, batch: int, how: Damage) -> None:
        self.put(name_of(batch), how(self.files.read_bytes(name_of(batch))))

    def put(self, name: str, data: bytes | None) -> None:
        """Write a file, or remove it."""
        if data is None:
            self.files.delete(name)
        else:
            self.made.write_bytes(data)
            self.files.put(self.made, name)

    def point(self, name: str | None) -> None:
        if name:
            self.folder().point_latest(name)
        else:
            self.files.delete(f"{LATEST}.symlink" if self.remote else LATEST)

    def latest(self) -> str:
        return self.folder().latest_target()

    def names(self) -> list[str]:
        return sorted(self.folder().checkpoints())
