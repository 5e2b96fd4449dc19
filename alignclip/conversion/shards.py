"""An input shard → a sub-folder of MDS shards, complete or not there.

See :mod:`alignclip.conversion.dataset` for the protocol.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.conversion import inputs
from alignclip.conversion.captions import SentenceEncoder, load_encoder, usable
from alignclip.conversion.formats.declaration import CAPTION_LISTS, PAIR_COLUMNS
from alignclip.conversion.images import Unusable, prepare_image, shorter_side
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts, InputRecord
from alignclip.conversion.samples import (
    BAD_CAPTIONS,
    CUT_CAPTION,
    DUPLICATE_KEY,
    NO_EMBEDDING,
    Ignored,
    Item,
    Sample,
    Skipped,
)
from alignclip.errors import UserError, without_secrets
from alignclip.storage.staging import COUNTS, VAL, OutputFolder

SIDES = 20  # images of an input whose sizes are looked at, for the model that is proposed
SAMPLES_AT_ONCE = 1024  # held in memory, and embedded together
EMBEDDED_BYTES = 32 * 2**20  # of their images, at most
# without an encoder: the fewer are held, the less memory is new to the processor
WRITTEN_BYTES = 2**20
SEVERAL_CAPTIONS = 32  # of an image with a list of them, at most, where room is made

ShowProgress = Callable[[int, int], None]  # so many more written, so many skipped
PairRow = dict[str, Any]  # column -> value


def convert_shard(
    source: str,
    name: str,
    columns: dict[str, str],
    options: ConvertOptions,
    show: ShowProgress,
    store: OutputFolder,
) -> Counts:
    """Convert an input shard to the sub-folder ``name`` of ``store``, which appears once complete.

    Its held-out samples are in ``val/name``, which is there before.

    Raises:
        UserError: the input cannot be fetched or ``out`` not be written.
    """
    from alignclip.conversion.mds_writer import JoinedShardWriter

    counts = Counts()
    with _errors_in_words(source, name), ExitStack() as stack:
        encoder = load_encoder(options.encoder) if options.semantic else None
        limit = _size_limit(source, columns, options, encoder)
        folders = {"": stack.enter_context(store.staged(name))}
        if options.held_out:
            folders[VAL] = stack.enter_context(store.staged(f"{VAL}/{name}"))
        opened = stack.enter_context(inputs.opened(source, options.reading))
        with ExitStack() as closing:
            writers = {
                split: closing.enter_context(
                    JoinedShardWriter(columns, folder, options.hashes, limit, options.compression)
                )
                for split, folder in folders.items()
            }
            size = EMBEDDED_BYTES if encoder else WRITTEN_BYTES
            for batch in _sample_batches(_good_samples(opened.items, counts, options, show), size):
                rows = _rows(batch, encoder, counts)
                for row in rows:
                    is_held_out = position(row["key"]) < options.held_out
                    writers[VAL if is_held_out else ""].write(row)
                    counts.held_out += is_held_out
                counts.written += len(rows)
                show(len(rows), len(batch) - len(rows))
        files = (file for folder in folders.values() for file in folder.glob("*.mds*"))
        counts.bytes = sum(file.stat().st_size for file in files)
        said = without_secrets(source)
        record = InputRecord(said, opened.size, opened.modified, counts)
        (folders[""] / COUNTS).write_text(record.text())
        if options.held_out:
            short = {"source": said, "written": counts.held_out, "skipped": {}}
            (folders[VAL] / COUNTS).write_text(json.dumps(short))
    return counts


@contextmanager
def _errors_in_words(source: str, name: str) -> Iterator[None]:
    """Say in one line what the system refuses.

    Raises:
        UserError: instead of OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the device, for {name} or its temporary copy (TMPDIR)"
            ) from None
        raise UserError(f"{source}: {error}") from error


def position(key: str) -> float:
    """Return where a key falls in [0, 1): the same everywhere, whatever else is in the set."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _good_samples(
    items: Iterator[Item], counts: Counts, options: ConvertOptions, show: ShowProgress
) -> Iterator[Sample]:
    """Yield the samples that are to be written, and count the others."""
    seen: set[str] = set()
    for item in items:
        if isinstance(item, Ignored):
            counts.ignore(item)
            continue
        if isinstance(item, Sample):
            item = _prepared(item, seen, options)
        if isinstance(item, Skipped):
            counts.skip(item)
            show(0, 1)
            continue
        seen.add(item.key)
        if len(counts.sides) < SIDES and (side := shorter_side(item.image)):
            counts.sides.append(side)
        for note in item.notes:
            counts.note(note, item.key)
        yield item


def _prepared(sample: Sample, seen: Set[str], options: ConvertOptions) -> Sample | Skipped:
    """Check a sample's key and image, and shrink the image where that is wanted."""
    if sample.key in seen:
        return Skipped(sample.key, DUPLICATE_KEY)
    try:
        image, notes = prepare_image(sample.image, options.images)
    except Unusable as unusable:
        return Skipped(sample.key, unusable.reason, unusable.detail)
    return replace(sample, image=image, notes=(*sample.notes, *notes))


def _sample_batches(samples: Iterator[Sample], enough: int) -> Iterator[list[Sample]]:
    """Yield as many samples at a time as have ``enough`` bytes of images, or are many."""
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


def _rows(
    batch: Sequence[Sample], encoder: SentenceEncoder | None, counts: Counts
) -> list[PairRow]:
    """Return a row for each sample, with the embeddings of its captions.

    ``semantic`` is [dimension] of one caption, [captions, dimension] of several. A caption whose
    embedding is zero or not finite is left out, and so is a sample without another one.
    """
    rows = [{name: getattr(sample, name) for name in PAIR_COLUMNS} for sample in batch]
    if encoder is None:
        return rows
    texts = [[one] if isinstance(one := sample.caption, str) else one for sample in batch]
    every = [text for some in texts for text in some]
    ends = np.cumsum([len(some) for some in texts])[:-1]
    embeddings = encoder.encode(every)
    embedded = (embeddings, usable(embeddings), np.array(encoder.cut(every), bool))
    kept = []
    for row, captions, semantic, good, cut in zip(
        rows, texts, *(np.split(values, ends) for values in embedded), strict=True
    ):
        if not good.any():
            counts.skip(Skipped(row["key"], NO_EMBEDDING, captions[0]))
            continue
        if cut.any():
            counts.note(CUT_CAPTION, row["key"])
        if not good.all():
            counts.note(BAD_CAPTIONS, row["key"])
            row["caption"] = list(compress(captions, good))
        row["semantic"] = semantic[0] if isinstance(row["caption"], str) else semantic[good]
        kept.append(row)
    return kept


def _size_limit(
    source: str, columns: dict[str, str], options: ConvertOptions, encoder: SentenceEncoder | None
) -> int:
    """Return the bytes of an output shard.

    A shard of an MDS set stays one where its embeddings alone would make it two.
    """
    from alignclip.conversion.mds_writer import bytes_of

    limit = bytes_of(options.size_limit)
    found, place, part = inputs.split(source)
    shard = found.shard_size(place, part)
    if shard is None or shard[0] > limit:
        return limit
    size, samples = shard
    captions = SEVERAL_CAPTIONS if columns["caption"] == CAPTION_LISTS else 1
    each = captions * 2 * encoder.dimension + 16 if encoder else 0  # 16: their shape
    return max(limit, size + samples * each + 2**12)  # the head has the columns' names


def is_current(record: InputRecord, source: str) -> bool:
    """Say whether the complete sub-folder of an input can stay as it is.

    It can't where nothing was written; where a local file has another size now, or was truncated
    and has changed since; and where a remote file was truncated: only fetching it tells.
    """
    is_broken = record.counts.is_broken
    if not record.counts.written:
        return False
    found, place, part = inputs.split(source)
    file = found.file_of(place, part)
    if "://" in file:
        return not is_broken
    try:
        size, modified = found.stamp(Path(file))
    except FileNotFoundError:  # an MDS set's shard, whose index is there
        return not is_broken
    return size == record.source_bytes and not (is_broken and modified != record.source_modified)
