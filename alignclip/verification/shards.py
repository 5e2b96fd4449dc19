"""Reading the shards of an MDS set: hashes first, then every sample through Streaming's own reader."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from alignclip.data.image_files import is_whole
from alignclip.data.mds_index import ShardEntry, stored_file
from alignclip.data.mds_reader import DamagedShard, open_shard
from alignclip.errors import UserError, one_line
from alignclip.storage import Store, describe_storage_error, is_full, open_store, patiently
from alignclip.storage.copies import TEMPORARY
from alignclip.verification.findings import Problems

if TYPE_CHECKING:
    from alignclip.data.mds_reader import MDSReader

UNREADABLE = 0  # instead of the hash of a key
SHARDS_A_PROCESS = 8  # at least: starting one takes as long as checking a few shards


@dataclass(frozen=True)
class Rules:
    """What holds for every shard of a set: where it lies, what is decoded, how many classes and dimensions there are.

    ``classes`` and ``dimension`` are None where nothing says.
    """

    place: str
    decode: float
    seed: int
    formats: tuple[str, ...]
    classes: int | None
    dimension: int | None


@dataclass
class Read:
    """What reading one or all shards has shown.

    ``norms``: number of the embeddings, of whose norms ``least``, ``most`` and ``sum`` are. Of one shard also ``keys``:
    8-byte hashes, and of each embedding ``norm_of`` and the sample that it belongs to, ``norm_at``.
    """

    problems: Problems = field(default_factory=Problems)
    samples: int = 0
    decoded: int = 0
    dimension: int | None = None
    norms: int = 0
    least: float = float("inf")
    most: float = 0.0
    sum: float = 0.0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    norm_of: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    norm_at: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))

    def add(self, other: Read) -> None:
        """Count what another shard has shown, but for what is of each of its samples."""
        self.problems.merge(other.problems)
        for name in ("samples", "decoded", "norms", "sum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.dimension = self.dimension or other.dimension


def check_shard(entry: ShardEntry, rules: Rules) -> Read:
    """Fetch the shard of an index entry, compare its hashes and read every sample."""
    read = Read()
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
        reader = open_fetched(entry, rules.place, Path(folder), read.problems)
        if reader is not None:
            file, keys = stored_file(entry)["basename"], np.empty(reader.samples, np.uint64)
            norms: list[np.ndarray] = []  # of each sample's embeddings
            for i in range(reader.samples):
                name, keys[i] = f"sample {i}", UNREADABLE
                norms.append(np.empty(0, np.float32))
                try:
                    sample = reader.get_item(i)
                except Exception as error:  # whatever the bytes make NumPy, JSON and UTF-8 say
                    read.problems.add(
                        "can't be read", file, f"{name} can't be read: {one_line(error)}"
                    )
                    continue
                name += f" (key {sample['key']})" if "key" in sample else ""
                keys[i] = _hash(str(sample.get("key") or f"{file}/{i}"), rules.seed)
                norms[i] = _norms(sample)
                chosen = int(keys[i]) < rules.decode * 2**64
                for problem in _sample_problems(sample, rules, read, chosen):
                    read.problems.add(problem, file, f"{name}: {problem}")
            read.samples = reader.samples
            read.norm_of = np.concatenate([read.norm_of, *norms])
            read.norm_at = np.repeat(
                np.arange(len(norms), dtype=np.uint32), [len(rows) for rows in norms]
            )
            read.keys = keys if "key" in entry["column_names"] else read.keys
    return read


def open_fetched(
    entry: ShardEntry, place: str, folder: Path, problems: Problems
) -> MDSReader | None:
    """A reader of a shard that is what the index says, fetched and decompressed into ``folder`` where need be.

    Raises:
        UserError: there is no space for the copy.
    """
    file = stored_file(entry)["basename"]
    path = Path(place, file)
    try:
        if "://" in place:
            path = folder / "stored"
            patiently(lambda: _bucket(place).download(file, path), place)
        return open_shard(entry, path, folder)
    except DamagedShard as error:
        problems.add(error.kind, file, str(error))
    except Exception as error:  # every provider has its own
        _check_space(error)
        problems.add("can't be fetched", file, f"can't be fetched: {describe_storage_error(error)}")
    return None


def _check_space(error: BaseException) -> None:
    if is_full(error):
        raise UserError(
            "no space left on the device for a shard's temporary copy (TMPDIR)"
        ) from None


@lru_cache(1)  # a new connection for every shard would take a quarter of a second
def _bucket(place: str) -> Store:
    return open_store(place)


def _hash(text: str, seed: int) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "little"
    )


def _sample_problems(
    sample: dict[str, Any], rules: Rules, read: Read, chosen: bool
) -> Iterator[str]:
    """What is wrong with a sample; its image is decoded where it is ``chosen``."""
    if "key" in sample and not str(sample["key"]).strip():
        yield "key is empty"
    if "caption" in sample:
        captions = sample["caption"] if isinstance(sample["caption"], list) else [sample["caption"]]
        if not captions or not all(
            isinstance(caption, str) and caption.strip() for caption in captions
        ):
            yield "caption is empty or no text"
    if "semantic" in sample:
        yield from _embedding_problems(sample, rules, read)
    if "label" in sample:
        label = sample["label"]
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            yield "label is no integer"
        elif label < 0 or (rules.classes is not None and label >= rules.classes):
            yield "label is none of the classes"
    if "image" in sample:
        if not sample["image"] or not isinstance(sample["image"], bytes):
            yield "image is empty or no file"
        elif chosen:
            read.decoded += 1
            if not _can_be_decoded(sample["image"], rules.formats):
                yield "image can't be decoded"


def _embedding_problems(sample: dict[str, Any], rules: Rules, read: Read) -> Iterator[str]:
    """One embedding, or one of each caption."""
    rows = np.asarray(sample["semantic"])
    if not np.issubdtype(rows.dtype, np.floating) or rows.ndim not in (1, 2):
        yield "embedding is no array of floats"
        return
    if (
        rows.ndim == 2
        and isinstance(sample.get("caption"), list)
        and len(rows) != len(sample["caption"])
    ):
        yield "not one embedding for each caption"
    read.dimension = read.dimension or rules.dimension or rows.shape[-1]
    if rows.shape[-1] != read.dimension:
        yield f"embedding hasn't {read.dimension} dimensions"
    if not np.isfinite(rows).all():
        yield "embedding isn't finite"
        return
    norms = _norms(sample)
    if not norms.all():
        yield "embedding is zero"
        return
    read.norms += len(norms)
    read.sum += float(norms.sum(dtype=np.float64))
    read.least, read.most = min(read.least, float(norms.min())), max(read.most, float(norms.max()))


def _norms(sample: dict[str, Any]) -> np.ndarray:
    """Of a sample's embeddings, which may be none."""
    rows = np.asarray(sample.get("semantic", ()))
    if not rows.size or not np.issubdtype(rows.dtype, np.floating) or rows.ndim not in (1, 2):
        return np.empty(0, np.float32)
    return np.atleast_1d(np.linalg.norm(rows.astype(np.float64), axis=-1)).astype(np.float32)


def _can_be_decoded(image: bytes, formats: tuple[str, ...]) -> bool:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, and whole
        return is_whole(image, formats)


def _executor(processes: int) -> Executor:
    if processes <= 1:
        return ThreadPoolExecutor(1)
    # spawn: the object stores' clients do not survive a fork
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def read_shards(
    entries: Sequence[ShardEntry], rules: Rules, processes: int, progress: bool
) -> list[Read]:
    """Check all shards, several side by side under one progress bar; the results are in the same order.

    Raises:
        UserError: a worker was killed.
    """
    bar = tqdm(
        desc="verifying",
        total=sum(stored_file(entry)["bytes"] for entry in entries),
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,  # seconds; a log file wants fewer lines
        disable=not progress,
    )
    executor = _executor(min(processes, len(entries) // SHARDS_A_PROCESS))
    found: dict[int, Read] = {}
    problems = 0
    try:
        running = {executor.submit(check_shard, entry, rules): i for i, entry in enumerate(entries)}
        for future in as_completed(running):
            i = running[future]
            found[i] = future.result()
            problems += found[i].problems.number
            bar.set_postfix(problems=problems, refresh=False)
            bar.update(stored_file(entries[i])["bytes"])
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for its memory; run again with fewer --processes"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
        bar.close()
    return [found[i] for i in range(len(entries))]


def samples_at(
    positions: Iterable[tuple[int, int]], entries: Sequence[ShardEntry], place: str
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """The samples at these (shard, sample) positions, sorted; each shard is fetched once, broken ones are left out."""
    for shard, group in groupby(sorted(positions), key=itemgetter(0)):
        with tempfile.TemporaryDirectory(prefix=TEMPORARY) as folder:
            reader = open_fetched(entries[shard], place, Path(folder), Problems())
            if reader is not None:
                for position in group:
                    with suppress(Exception):  # see check_shard, which says so
                        yield position, reader.get_item(position[1])
