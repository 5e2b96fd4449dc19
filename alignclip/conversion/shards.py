"""One input shard → one sub-folder of MDS shards, complete or not there."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignclip.conversion import inputs
from alignclip.conversion.captions import SentenceEncoder, load_encoder, usable
from alignclip.conversion.images import Unusable, prepare, shorter_side
from alignclip.conversion.mds import LIST
from alignclip.conversion.options import ConvertOptions, Counts
from alignclip.conversion.samples import (
    BAD_CAPTIONS,
    BROKEN_INPUT,
    CUT_CAPTION,
    DUPLICATE_KEY,
    MAX_NAMES,
    NO_EMBEDDING,
    Ignored,
    Item,
    Sample,
    Skipped,
)
from alignclip.errors import UserError
from alignclip.storage.staging import COUNTS, VAL, OutputFolder

if TYPE_CHECKING:
    from streaming import MDSWriter

SIDES = 20  # images of an input whose sizes are looked at, for the model that is proposed
SAMPLES_AT_ONCE = 1024  # held in memory, and embedded together
BYTES_AT_ONCE = 32 * 2**20  # of their images, at most
SEVERAL_CAPTIONS = 32  # of an image with a list of them, at most, where room is made
PIECE = (
    2**17
)  # bytes written at once: of 1 MB, ext4 makes large pages, which cost twice as much as all the rest
Report = Callable[
    [int, int], None
]  # so many more written, so many skipped: what the progress bar shows


def mds_writer(columns: dict[str, str], folder: Path, options: ConvertOptions) -> MDSWriter:
    """A writer of hashed MDS shards into the empty local ``folder``; ValueError where an option of it is none."""
    from streaming import MDSWriter

    class InPlace(MDSWriter):
        """MDSWriter without its copies of whole shards, which take as long as reading the tar.

        Samples are laid one behind the other as they come, in memory that is used again for the next shard.
        """

        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            if not self.size_limit:
                raise ValueError("must be positive")
            # 4 bytes an offset, of which there are few: with its own offset a sample takes 16 bytes at least
            self.lengths: list[int] = []
            self.room = self.end = self.extra_bytes_per_shard + self.size_limit // 4
            self.laid = np.empty(self.room + self.size_limit, np.uint8)

        def write(self, sample: dict[str, Any]) -> None:
            """As MDSWriter, but the encoded sample goes from its list into the memory of the shard."""
            super().write(sample)
            data, self.new_samples[-1] = self.new_samples[-1], b""
            if len(self.new_samples) == 1:
                self.lengths, self.end = [], self.room
            self.lengths.append(len(data))
            start, self.end = self.end, self.end + len(data)
            if self.end > len(self.laid):  # one that exceeds the limit has a shard of its own
                self.laid = np.empty(self.end, np.uint8)
            self.laid[start : self.end] = np.frombuffer(data, np.uint8)

        def encode_joint_shard(self) -> bytes:
            """The shard file: number of samples, their offsets, the columns, the samples."""
            ends = np.cumsum([0, *self.lengths])  # of the samples, before which lies the head
            start = 4 + 4 * len(ends) + len(self.config_data)
            head = (
                np.uint32(len(self.lengths)).tobytes() + (ends + start).astype(np.uint32).tobytes()
            )
            first = self.room - start
            self.laid[first : self.room] = np.frombuffer(head + self.config_data, np.uint8)
            shard: Any = self.laid[first : self.room + ends[-1]].data
            return (
                shard.tobytes() if self.compression else shard
            )  # compressors want bytes; hashes and files don't mind

        def _process_file(
            self, raw_data: bytes, raw_basename: str, zip_basename: str | None
        ) -> tuple[dict, dict | None]:
            """Written in pieces: Linux can take several times as long for a page cache of tens of MB at once."""
            if zip_basename:
                return super()._process_file(raw_data, raw_basename, zip_basename)
            with (folder / raw_basename).open("wb") as file:
                for start in range(0, len(raw_data), PIECE):
                    file.write(raw_data[start : start + PIECE])
            return self._hash(raw_data, raw_basename), None

    return InPlace(
        columns=columns,
        out=str(folder),
        hashes=sorted(set(options.hashes)),  # as Streaming wants them
        size_limit=options.size_limit,
        compression=options.compression,
    )


def convert_shard(
    source: str, name: str, columns: dict[str, str], options: ConvertOptions, report: Report
) -> Counts:
    """Convert an input shard to the MDS sub-folder ``options.out/name``, which appears only once it is complete.

    Its held-out samples are in ``val/name``, which is there before.

    Raises:
        UserError: the input cannot be fetched or ``out`` not be written.
    """
    try:
        return _convert(source, name, columns, options, report)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the device, for {name} or its temporary copy (TMPDIR)"
            ) from None
        raise UserError(f"{source}: {error}") from error


def _convert(
    source: str, name: str, columns: dict[str, str], options: ConvertOptions, report: Report
) -> Counts:
    counts = Counts()
    store = OutputFolder(options.out)
    encoder = load_encoder(options.encoder) if options.semantic else None
    with ExitStack() as stack:
        folders = {"": stack.enter_context(store.staged(name))}
        if options.held_out:
            folders[VAL] = stack.enter_context(store.staged(f"{VAL}/{name}"))
        path, samples = stack.enter_context(
            inputs.opened(source, options.caption_key, options.reading)
        )
        stat = path.stat()  # before it is read: a file that still grows will be another one
        with ExitStack() as open_writers:
            sized = replace(options, size_limit=_size_limit(source, columns, options, encoder))
            writers = {
                split: open_writers.enter_context(mds_writer(columns, folder, sized))
                for split, folder in folders.items()
            }
            # what is embedded together is held; the fewer there are held, the less memory is new to the processor
            size = BYTES_AT_ONCE if encoder else 2**20
            for batch in _batches(_good(samples, counts, options, report), size):
                rows = (
                    _embedded(batch, encoder, counts)
                    if encoder
                    else [(sample, None) for sample in batch]
                )
                for sample, embedding in rows:
                    row: dict[str, Any] = {
                        "key": sample.key,
                        "image": sample.image,
                        "caption": sample.caption,
                    }
                    if embedding is not None:
                        row["semantic"] = embedding
                    held_out = options.held_out > 0 and position(sample.key) < options.held_out
                    writers[VAL if held_out else ""].write(row)
                    counts.held_out += held_out
                counts.written += len(rows)
                report(len(rows), len(batch) - len(rows))
        counts.bytes = sum(
            file.stat().st_size for folder in folders.values() for file in folder.glob("*.mds*")
        )
        kept = {
            "source": source,
            "source_bytes": stat.st_size,
            "source_modified": stat.st_mtime_ns,
            "written": counts.written - counts.held_out,
            "held_out": counts.held_out,
            "skipped": counts.skipped,
            "noted": counts.noted,
            "ignored": counts.ignored,
            "sides": counts.sides,
            "bytes": counts.bytes,
            "examples": counts.examples,
        }
        (folders[""] / COUNTS).write_text(json.dumps(kept, indent=2))
        if options.held_out:
            (folders[VAL] / COUNTS).write_text(
                json.dumps({"source": source, "written": counts.held_out, "skipped": {}})
            )
    return counts


def _embedded(
    batch: Sequence[Sample], encoder: SentenceEncoder, counts: Counts
) -> list[tuple[Sample, np.ndarray | None]]:
    """The samples with the embedding [dimension] of the caption, or those [captions, dimension] of several.

    A caption whose embedding is zero or not finite is left out, and so is a sample without another one.
    """
    texts = [
        [sample.caption] if isinstance(sample.caption, str) else sample.caption for sample in batch
    ]
    every = [text for some in texts for text in some]
    ends = np.cumsum([len(some) for some in texts])[:-1]
    embeddings = encoder.encode(every)
    good, cut = (
        np.split(usable(embeddings), ends),
        np.split(np.array(encoder.cut(every), bool), ends),
    )
    found: list[tuple[Sample, np.ndarray | None]] = []
    for i, (sample, rows) in enumerate(zip(batch, np.split(embeddings, ends), strict=True)):
        if not good[i].any():
            counts.skip(NO_EMBEDDING, sample.key, texts[i][0])
            continue
        if cut[i].any():
            counts.note(CUT_CAPTION, sample.key)
        if isinstance(sample.caption, str):
            found.append((sample, rows[0]))
            continue
        if not good[i].all():
            counts.note(BAD_CAPTIONS, sample.key)
            sample = replace(
                sample,
                caption=[text for text, is_good in zip(texts[i], good[i], strict=True) if is_good],
            )
        found.append((sample, rows[good[i]]))
    return found


def _size_limit(
    source: str, columns: dict[str, str], options: ConvertOptions, encoder: SentenceEncoder | None
) -> int:
    """Bytes of an output shard: a shard of an MDS set stays one where its embeddings alone would make it two."""
    from streaming.base.util import bytes_to_int

    limit: int = bytes_to_int(options.size_limit)
    shard = inputs.mds_shard(source)
    if shard is None or shard.size > limit:
        return limit
    captions = SEVERAL_CAPTIONS if columns["caption"] == LIST else 1
    each = captions * 2 * encoder.dimension + 16 if encoder else 0  # 16: their shape
    return max(
        limit, shard.size + shard.entry["samples"] * each + 2**12
    )  # the head has the columns' names


def counts_of(kept: dict[str, Any]) -> Counts:
    """The counts of a sub-folder that an earlier run has written, ``kept`` being its ``counts.json``."""
    counts = Counts(
        held_out=kept["held_out"], skipped=kept["skipped"], noted=kept["noted"], bytes=kept["bytes"]
    )
    counts.written = counts.resumed = kept["written"] + kept["held_out"]
    counts.examples = kept["examples"]
    counts.ignored = kept.get(
        "ignored", {}
    )  # earlier versions didn't count them, nor looked at sizes
    counts.sides = kept.get("sides", [])
    return counts


def is_current(source: str, kept: dict[str, Any]) -> bool:
    """Whether the complete sub-folder of an input, its ``counts.json`` being ``kept``, can stay as it is.

    It can't where nothing was written; where a local file has another size now, or was truncated and has changed since;
    and where a remote file was truncated: Streaming lists no sizes, so that only fetching it tells.
    """
    broken = BROKEN_INPUT in kept["skipped"]
    if not kept["written"] + kept["held_out"]:
        return False
    file = inputs.file_of(source)
    if "://" in file:
        return not broken
    try:
        stat = Path(file).stat()
    except FileNotFoundError:  # an MDS set's shard, whose index is there
        return not broken
    if stat.st_size != kept["source_bytes"]:
        return False
    return not broken or stat.st_mtime_ns == kept["source_modified"]


def position(key: str) -> float:
    """Where a key falls in [0, 1): the same on every machine, whatever else is in the set."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _batches(samples: Iterator[Sample], enough: int) -> Iterator[list[Sample]]:
    """As many samples at a time as have ``enough`` bytes of images, or are many."""
    batch: list[Sample] = []
    size = 0
    for sample in samples:
        batch.append(sample)
        size += len(sample.image)
        if len(batch) == SAMPLES_AT_ONCE or size >= enough:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _good(
    samples: Iterator[Item], counts: Counts, options: ConvertOptions, report: Report
) -> Iterator[Sample]:
    """The samples that are to be written; the others are counted."""
    seen: set[str] = set()
    for item in samples:
        if isinstance(item, Ignored):
            counts.ignore(item.what, item.name)
            continue
        if isinstance(item, Skipped):
            counts.texts = counts.texts or set(item.texts)
            if len(counts.endings) < MAX_NAMES:
                counts.endings.update(item.endings)
            counts.skip(item.reason, item.key, item.detail)
            report(0, 1)
            continue
        try:
            if item.key in seen:
                raise Unusable(DUPLICATE_KEY)
            image, notes = prepare(item.image, options.images)
        except Unusable as unusable:
            counts.skip(unusable.reason, item.key, unusable.detail)
            report(0, 1)
            continue
        seen.add(item.key)
        if len(counts.sides) < SIDES and (side := shorter_side(image)):
            counts.sides.append(side)
        for note in (*item.notes, *notes):
            counts.note(note, item.key)
        yield item if image is item.image else replace(item, image=image)
