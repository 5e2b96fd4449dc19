"""Read all shards of an MDS set, and check every sample, alone and against the others."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from alignclip.data.image_files import is_whole
from alignclip.data.mds_index import ShardEntry, stored_file
from alignclip.data.mds_reader import DamagedShard, open_shard
from alignclip.errors import UserError, one_line
from alignclip.storage import describe_storage_error, is_full, open_store, patiently
from alignclip.storage.temporary import temporary_folder
from alignclip.verification.findings import LINES_A_KIND, Problems, SetSummary, folder_of

if TYPE_CHECKING:
    from alignclip.data.mds_reader import MDSReader

NO_KEY = 0  # instead of the hash of a key
SHARDS_A_PROCESS = 8  # at least: starting one takes as long as checking a few shards
UNUSUAL = 10.0  # times the median norm, or its inverse: no sentence encoder's norms differ so much
NO_NORMS = np.empty(0, np.float32)
NO_KEYS = np.empty(0, np.uint64)
TWICE = "key is there twice"
Position = tuple[int, int]  # of a sample: its shard, and its place there


@dataclass(frozen=True)
class SampleRules:
    """Rules that hold for every sample of a set.

    Attributes:
        place: of the set.
        decode: the fraction of images that are decoded, chosen by key and ``seed``.
        formats: that PIL may read.
        classes: number of classes; None where nobody says.
        dimension: of an embedding; None where nobody says.
    """

    place: str
    decode: float
    seed: int
    formats: tuple[str, ...]
    classes: int | None
    dimension: int | None


@dataclass
class ShardReport:
    """A shard's problems and numbers.

    Attributes:
        decoded: number of images that were decoded.
        dimension: of the embeddings; None where there are none.
        keys: 8-byte hashes of the samples' keys.
        norms: of all embeddings.
        norm_at: the sample that each norm belongs to.
    """

    problems: Problems = field(default_factory=Problems)
    samples: int = 0
    decoded: int = 0
    dimension: int | None = None
    keys: np.ndarray = field(default_factory=lambda: NO_KEYS)
    norms: np.ndarray = field(default_factory=lambda: NO_NORMS)
    norm_at: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))


def sound_norms(reports: Sequence[ShardReport]) -> np.ndarray:
    """Return the finite norms above 0; the other embeddings are problems of their samples."""
    norms = np.concatenate([NO_NORMS, *(report.norms for report in reports)])
    return norms[np.isfinite(norms) & (norms > 0)]


def check_shards(
    entries: Sequence[ShardEntry], rules: SampleRules, processes: int, progress: bool
) -> list[ShardReport]:
    """Check all shards, several side by side under one progress bar.

    Returns:
        the reports, in the order of the entries.

    Raises:
        UserError: a worker was killed.
    """
    sizes = [stored_file(entry)["bytes"] for entry in entries]
    bar = tqdm(
        desc="verifying",
        total=sum(sizes),
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.5 if sys.stderr.isatty() else 30.0,  # seconds; a log file wants fewer lines
        disable=not progress,
    )
    found: dict[int, ShardReport] = {}
    problems = 0
    with bar, _executor(min(processes, len(entries) // SHARDS_A_PROCESS)) as executor:
        running = {executor.submit(check_shard, entry, rules): i for i, entry in enumerate(entries)}
        try:
            for future in as_completed(running):
                i = running[future]
                found[i] = future.result()
                problems += found[i].problems.numbers.total()
                bar.set_postfix(problems=problems, refresh=False)
                bar.update(sizes[i])
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for its memory; run again with fewer "
                "--processes"
            ) from None
        finally:
            executor.shutdown(cancel_futures=True)
    return [found[i] for i in range(len(entries))]


def _executor(processes: int) -> Executor:
    if processes <= 1:
        return ThreadPoolExecutor(1)
    # spawn: the object stores' clients do not survive a fork
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))


def check_shard(entry: ShardEntry, rules: SampleRules) -> ShardReport:
    """Fetch a shard, compare its file with the index and read every sample."""
    report, file = ShardReport(), stored_file(entry)["basename"]
    with temporary_folder() as folder:
        reader = _open_fetched(entry, rules.place, folder, report.problems)
        if reader is None:
            return report
        report.samples = reader.samples
        keys, norms = np.full(reader.samples, NO_KEY, np.uint64), [NO_NORMS] * reader.samples
        for i in range(reader.samples):
            try:
                sample = reader.get_item(i)
            except Exception as error:  # whatever the bytes make NumPy, JSON and UTF-8 say
                text = f"sample {i} can't be read: {one_line(error)}"
                report.problems.add("can't be read", file, text)
                continue
            keys[i] = _hash(str(sample.get("key") or f"{file}/{i}"), rules.seed)
            norms[i] = _norms(sample)
            name = f"sample {i} (key {sample['key']})" if "key" in sample else f"sample {i}"
            is_chosen = int(keys[i]) < rules.decode * 2**64
            for problem in _problems_of(sample, norms[i], is_chosen, rules, report):
                report.problems.add(problem, file, f"{name}: {problem}")
    report.norms = np.concatenate([NO_NORMS, *norms])
    report.norm_at = np.repeat(np.arange(len(norms), dtype=np.uint32), [*map(len, norms)])
    if "key" in entry["column_names"]:
        report.keys = keys
    return report


def _open_fetched(
    entry: ShardEntry, place: str, folder: Path, problems: Problems
) -> MDSReader | None:
    """Open a shard, fetched into ``folder`` where the set is remote; add what is wrong to problems.

    Raises:
        UserError: there is no space for a copy.
    """
    file = stored_file(entry)["basename"]
    path = Path(place, file)
    try:
        if "://" in place:
            path = folder / "stored"
            patiently(lambda: open_store(place).download(file, path), place)
        return open_shard(entry, path, folder)
    except DamagedShard as error:
        problems.add(error.kind, file, str(error))
    except Exception as error:  # every provider has its own
        if is_full(error):
            what = "a shard's temporary copy (TMPDIR)"
            raise UserError(f"no space left on the device for {what}") from None
        problems.add("can't be fetched", file, f"can't be fetched: {describe_storage_error(error)}")
    return None


def _hash(text: str, seed: int) -> int:
    key = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(key.digest(), "little")


def _problems_of(
    sample: dict[str, Any],
    norms: np.ndarray,
    is_chosen: bool,
    rules: SampleRules,
    report: ShardReport,
) -> Iterator[str]:
    """Yield what is wrong with a sample; decode its image where it ``is_chosen``."""
    if "key" in sample and not str(sample["key"]).strip():
        yield "key is empty"
    if "caption" in sample:
        captions = sample["caption"] if isinstance(sample["caption"], list) else [sample["caption"]]
        if not captions or not all(isinstance(one, str) and one.strip() for one in captions):
            yield "caption is empty or no text"
    if "semantic" in sample:
        yield from _embedding_problems(sample, norms, rules, report)
    if "label" in sample:
        label = sample["label"]
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            yield "label is no integer"
        elif label < 0 or (rules.classes is not None and label >= rules.classes):
            yield "label is none of the classes"
    if "image" in sample:
        image = sample["image"]
        if not image or not isinstance(image, bytes):
            yield "image is empty or no file"
        elif is_chosen:
            report.decoded += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, and whole
                if not is_whole(image, rules.formats):
                    yield "image can't be decoded"


def _embedding_problems(
    sample: dict[str, Any], norms: np.ndarray, rules: SampleRules, report: ShardReport
) -> Iterator[str]:
    """Yield what is wrong with a sample's embedding, or with those of its captions."""
    rows, caption = np.asarray(sample["semantic"]), sample.get("caption")
    if not _are_embeddings(rows):
        yield "embedding is no array of floats"
        return
    if rows.ndim == 2 and isinstance(caption, list) and len(rows) != len(caption):
        yield "not one embedding for each caption"
    report.dimension = report.dimension or rules.dimension or rows.shape[-1]
    if rows.shape[-1] != report.dimension:
        yield f"embedding hasn't {report.dimension} dimensions"
    if not np.isfinite(norms).all():
        yield "embedding isn't finite"
    elif not norms.all():
        yield "embedding is zero"


def _are_embeddings(rows: np.ndarray) -> bool:
    return np.issubdtype(rows.dtype, np.floating) and rows.ndim in (1, 2)


def _norms(sample: dict[str, Any]) -> np.ndarray:
    """Return the norm of each of a sample's embeddings."""
    rows = np.asarray(sample.get("semantic", ()))
    if not rows.size or not _are_embeddings(rows):
        return NO_NORMS
    return np.linalg.norm(np.atleast_2d(rows).astype(np.float64), axis=-1).astype(np.float32)


def samples_at(
    positions: Iterable[Position], found: SetSummary
) -> Iterator[tuple[Position, dict[str, Any]]]:
    """Yield the samples at these positions, in order, without those that can't be read.

    Each shard is fetched once.
    """
    for shard, group in groupby(sorted(positions), key=itemgetter(0)):
        with temporary_folder() as folder:
            entry = found.entries[shard]
            reader = _open_fetched(entry, found.store.place, folder, Problems())
            if reader is not None:
                for position in group:
                    with suppress(Exception):  # check_shard says so
                        yield position, reader.get_item(position[1])


def add_outliers(reports: Sequence[ShardReport], found: SetSummary) -> None:
    """Name the embeddings whose norm is far from the median."""
    sound = sound_norms(reports)
    median = float(np.median(sound)) if len(sound) else 0.0
    for report, entry in zip(reports, found.entries, strict=True):
        norms = report.norms
        far = (norms > UNUSUAL * median) | (norms < median / UNUSUAL)
        for i in np.flatnonzero(far & np.isfinite(norms) & (norms > 0)):
            found.problems.add(
                "embedding's norm is unusual",
                stored_file(entry)["basename"],
                f"sample {report.norm_at[i]}: embedding has the norm {norms[i]:.3g}, "
                f"where {median:.3g} is usual",
            )


def add_duplicates(reports: Sequence[ShardReport], found: SetSummary) -> None:
    """Count the samples whose key an earlier sample has already.

    The converter looks for them within an input, so that they are a problem there. Between inputs,
    whose keys may well be numbered alike, they are a note.
    """
    begins = np.cumsum([0, *(len(report.keys) for report in reports)])
    hashes = np.concatenate([NO_KEYS, *(report.keys for report in reports)])
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]

    def position(number: int) -> Position:
        shard = int(np.searchsorted(begins, number, "right")) - 1
        return shard, number - int(begins[shard])

    again = np.flatnonzero((hashes[1:] == hashes[:-1]) & (hashes[1:] != NO_KEY))
    pairs = sorted(zip(order[again + 1].tolist(), order[again].tolist(), strict=True))
    files = [stored_file(entry)["basename"] for entry in found.entries]
    within: list[tuple[Position, Position]] = []
    elsewhere: list[tuple[Position, Position]] = []
    for new, old in ((position(later), position(earlier)) for later, earlier in pairs):
        is_within = folder_of(files[new[0]]) == folder_of(files[old[0]])
        (within if is_within else elsewhere).append((new, old))

    def lines(pairs: list[tuple[Position, Position]]) -> Iterator[tuple[str, str]]:
        """Yield of each pair the file, and which of its samples repeats which."""
        there = dict(samples_at([new for new, _ in pairs], found))
        for new, old in pairs:
            key = f" ({there[new]['key']})" if new in there else ""
            text = f"sample {new[1]} has the key of sample {old[1]} in {files[old[0]]}{key}"
            yield files[new[0]], text

    for file, text in lines(within[:LINES_A_KIND]):
        found.problems.add(TWICE, file, text, mend=False)
    found.problems.numbers[TWICE] += max(len(within) - LINES_A_KIND, 0)
    for file, text in lines(elsewhere[:1]):
        number = f"{len(elsewhere):,} (the first: {file}, {text})"
        found.notes.append(f"keys that come in several inputs: {number}")
