"""From tars to sub-folders of MDS shards, several side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from alignclip.errors import UserError
from convert import tars
from convert.captions import DEFAULT_ENCODER, load_encoder
from convert.storage import COUNTS, INDEX, Store
from convert.tars import Sample, Skipped

if TYPE_CHECKING:
    from streaming import MDSWriter

HASHES = ["xxh64"]  # what training validates
SAMPLES_AT_ONCE = 1024  # held in memory, and embedded together


@dataclass
class ConvertOptions:
    """What is converted, where to, and how.

    ``tars`` are patterns (see :func:`convert.tars.expand`). ``caption_key``: take captions from that entry of the
    ``json`` members; None: from the ``txt`` members, or else the ``caption`` entry. ``size_limit`` and ``compression``
    are :class:`streaming.MDSWriter`'s. ``next_step``: the summary ends with the command that trains on the set.
    """

    tars: Sequence[str]
    out: str
    encoder: str = DEFAULT_ENCODER
    semantic: bool = True
    caption_key: str | None = None
    decode_check: bool = True
    size_limit: str = "64mb"
    compression: str | None = None
    processes: int = 1
    progress: bool = True
    next_step: bool = True

    def __post_init__(self) -> None:
        """Make a local encoder's path absolute, so that it is the same one however it is written."""
        if (folder := Path(self.encoder).expanduser()).is_dir():
            self.encoder = str(folder.resolve())

    def fixed(self) -> dict[str, Any]:
        """The options that every part of one set has to share."""
        return {
            "encoder": self.encoder if self.semantic else None,
            "caption_key": self.caption_key,
            "decode_check": self.decode_check,
            "size_limit": self.size_limit,
            "compression": self.compression,
        }


@dataclass
class Counts:
    """Samples written (``resumed`` of them by earlier runs), left out by reason, and the bytes of the stored shards.

    ``texts``: see :class:`convert.tars.Skipped`, of the first such sample of each tar. Of a whole run: ``tars`` it was
    given, ``converted`` of them by itself in ``seconds``; ``truncated``: the sub-folders of broken tars in the set.
    """

    written: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    resumed: int = 0
    texts: set[str] = field(default_factory=set)
    tars: int = 0
    converted: int = 0
    truncated: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def skip(self, reason: str, number: int = 1) -> None:
        """Count ``number`` samples as left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + number

    def add(self, other: Counts) -> None:
        """Count what ``other``, of one tar, has counted."""
        self.written += other.written
        self.bytes += other.bytes
        self.resumed += other.resumed
        self.texts |= other.texts
        for reason, number in other.skipped.items():
            self.skip(reason, number)


def mds_writer(columns: dict[str, str], folder: Path, options: ConvertOptions) -> MDSWriter:
    """A writer of hashed MDS shards into the empty local ``folder``; ValueError where size or compression is none."""
    from streaming import MDSWriter

    return MDSWriter(
        columns=columns,
        out=str(folder),
        hashes=HASHES,
        size_limit=options.size_limit,
        compression=options.compression,
    )


class _Progress:
    """Two numbers that workers count up and the parent shows."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.written: Synchronized[int] = spawn.Value("q", 0)
        self.skipped: Synchronized[int] = spawn.Value("q", 0)

    def add(self, written: int = 0, skipped: int = 0) -> None:
        for number, counter in ((written, self.written), (skipped, self.skipped)):
            if number:
                with counter.get_lock():
                    counter.value += number


_progress: _Progress | None = None  # a worker's handle, set as it starts


def _start_worker(progress: _Progress, threads: int | None) -> None:
    global _progress
    _progress = progress
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _executor(options: ConvertOptions, number: int, progress: _Progress) -> Executor:
    processes = min(options.processes, number)
    if processes == 1:
        return ThreadPoolExecutor(1, initializer=_start_worker, initargs=(progress, None))
    threads = max(1, (os.cpu_count() or 1) // processes)
    # spawn: CUDA and the object stores' clients do not survive a fork
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, spawn, initializer=_start_worker, initargs=(progress, threads))


def convert_all(todo: dict[str, str], columns: dict[str, str], options: ConvertOptions) -> dict[str, Counts]:
    """Convert these tars side by side under one progress bar; the first failure ends the run."""
    done: dict[str, Counts] = {}
    if not todo:
        return done
    progress = _Progress()
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants fewer lines
    bar = tqdm(unit=" samples", smoothing=0.05, mininterval=interval, disable=not options.progress, desc="converting")
    executor = _executor(options, len(todo), progress)
    try:
        running: dict[Future[Counts], str] = {
            executor.submit(convert_tar, tar, name, columns, options): name for name, tar in todo.items()
        }
        while running:
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                done[running.pop(future)] = future.result()
            bar.set_postfix(skipped=progress.skipped.value, tars=f"{len(done)}/{len(todo)}", refresh=False)
            bar.update(progress.written.value - bar.n)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for its memory; run again with fewer --processes"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()
    return done


def convert_tar(tar: str, name: str, columns: dict[str, str], options: ConvertOptions) -> Counts:
    """Convert one tar to the MDS sub-folder ``options.out/name``, which appears only once it is complete.

    Raises:
        UserError: the tar cannot be fetched or ``out`` not be written.
    """
    counts = Counts()
    encoder = load_encoder(options.encoder) if options.semantic else None
    with Store(options.out).staged(name) as folder, tars.local_copy(tar) as path:
        stat = path.stat()  # before it is read: a tar that still grows will be another one
        with mds_writer(columns, folder, options) as writer:
            samples = _good_samples(path, counts, options)
            while batch := list(islice(samples, SAMPLES_AT_ONCE)):
                embeddings = encoder.encode([sample.caption for sample in batch]) if encoder else None
                for i, sample in enumerate(batch):
                    row: dict[str, Any] = {"key": sample.key, "image": sample.image, "caption": sample.caption}
                    if embeddings is not None:
                        row["semantic"] = embeddings[i]
                    writer.write(row)
                counts.written += len(batch)
                if _progress:
                    _progress.add(written=len(batch))
        counts.bytes = sum(file.stat().st_size for file in folder.iterdir() if file.name != INDEX)
        kept = {
            "source": tar,
            "source_bytes": stat.st_size,
            "source_modified": stat.st_mtime_ns,
            "written": counts.written,
            "skipped": counts.skipped,
            "bytes": counts.bytes,
        }
        (folder / COUNTS).write_text(json.dumps(kept, indent=2))
    return counts


def is_current(tar: str, kept: dict[str, Any]) -> bool:
    """Whether the complete sub-folder of a tar, its ``counts.json`` being ``kept``, can stay as it is.

    It can't where nothing was written; where a local tar has another size now, or was truncated and has changed since;
    and where a remote tar was truncated: Streaming lists no sizes, so that only fetching it tells.
    """
    truncated = tars.TRUNCATED_TAR in kept["skipped"]
    if not kept["written"]:
        return False
    if "://" in tar:
        return not truncated
    stat = Path(tar).stat()
    if stat.st_size != kept.get("source_bytes", stat.st_size):
        return False
    return not truncated or stat.st_mtime_ns == kept.get("source_modified")


def _good_samples(path: Path, counts: Counts, options: ConvertOptions) -> Iterator[Sample]:
    """The samples of a tar that are to be written; the others are counted."""
    for item in tars.read_samples(path, options.caption_key):
        if isinstance(item, Skipped):
            reason: str | None = item.reason
            counts.texts = counts.texts or set(item.texts)
        else:
            reason = tars.check_image(item.image) if options.decode_check else None
            if reason is None:
                yield item
                continue
        assert reason is not None
        counts.skip(reason)
        if _progress:
            _progress.add(skipped=1)
