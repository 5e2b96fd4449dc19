"""An input shard → a sub-folder of MDS shards, complete or not there.

See :mod:`alignclip.conversion.dataset` for the protocol.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alignclip.conversion import inputs
from alignclip.conversion.captions import SentenceEncoder, load_encoder, usable
from alignclip.conversion.formats.declaration import CAPTION_LISTS
from alignclip.conversion.images import Unusable, prepare_image, shorter_side
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts, InputRecord, to_json
from alignclip.conversion.samples import (
    BAD_CAPTIONS,
    BROKEN_INPUT,
    CUT_CAPTION,
    DUPLICATE_KEY,
    NO_EMBEDDING,
    Ignored,
    Item,
    Sample,
    Skipped,
)
from alignclip.conversion.wording import MAX_NAMES
from alignclip.errors import UserError
from alignclip.storage.staging import COUNTS, VAL, OutputFolder

if TYPE_CHECKING:
    from alignclip.conversion.mds_writer import JoinedShardWriter

SIDES = 20  # images of an input whose sizes are looked at, for the model that is proposed
SAMPLES_AT_ONCE = 1024  # held in memory, and embedded together
EMBEDDED_BYTES = 32 * 2**20  # of their images, at most
WRITTEN_BYTES = (
    2**20
)  # without an encoder: the fewer are held, the less memory is new to the processor
SEVERAL_CAPTIONS = 32  # of an image with a list of them, at most, where room is made

ShowProgress = Callable[[int, int], None]  # so many more written, so many skipped
Embedded = tuple[Sample, np.ndarray | None]


def convert_shard(
    source: str, name: str, columns: dict[str, str], options: ConvertOptions, show: ShowProgress
) -> Counts:
    """Convert an input shard to the sub-folder ``options.out/name``, which appears once complete.

    Its held-out samples are in ``val/name``, which is there before.

    Raises:
        UserError: the input cannot be fetched or ``out`` not be written.
    """
    try:
        return _convert_input(source, name, columns, options, show)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the device, for {name} or its temporary copy (TMPDIR)"
            ) from None
        raise UserError(f"{source}: {error}") from error


def _convert_input(
    source: str, name: str, columns: dict[str, str], options: ConvertOptions, show: ShowProgress
) -> Counts:
    from alignclip.conversion.mds_writer import JoinedShardWriter

    counts = Counts()
    store = OutputFolder(options.out)
    encoder = load_encoder(options.encoder) if options.semantic else None
    limit = _size_limit(source, columns, options, encoder)
    with ExitStack() as stack:
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
                rows = _embedded(batch, encoder, counts)
                counts.held_out += _write_rows(rows, writers, options.held_out)
                counts.written += len(rows)
                show(len(rows), len(batch) - len(rows))
        files = (file for folder in folders.values() for file in folder.glob("*.mds*"))
        counts.bytes = sum(file.stat().st_size for file in files)
        record = InputRecord.of(source, opened, counts)
        (folders[""] / COUNTS).write_text(to_json(record))
        if options.held_out:
            short = {"source": source, "written": counts.held_out, "skipped": {}}
            (folders[VAL] / COUNTS).write_text(json.dumps(short))
    return counts


def _write_rows(
    rows: Sequence[Embedded], writers: Mapping[str, JoinedShardWriter], share: float
) -> int:
    """Write samples into their splits; return how many were held out."""
    number = 0
    for sample, embedding in rows:
        row: dict[str, object] = {
            "key": sample.key,
            "image": sample.image,
            "caption": sample.caption,
        }
        if embedding is not None:
            row["semantic"] = embedding
        is_held_out = share > 0 and position(sample.key) < share
        writers[VAL if is_held_out else ""].write(row)
        number += is_held_out
    return number


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
            counts.ignore(item.what, item.name)
            continue
        if isinstance(item, Skipped):
            counts.texts = counts.texts or set(item.texts)
            if len(counts.endings) < MAX_NAMES:
                counts.endings.update(item.endings)
            counts.skip(item.reason, item.key, item.detail)
            show(0, 1)
            continue
        try:
            if item.key in seen:
                raise Unusable(DUPLICATE_KEY)
            image, notes = prepare_image(item.image, options.images)
        except Unusable as unusable:
            counts.skip(unusable.reason, item.key, unusable.detail)
            show(0, 1)
            continue
        seen.add(item.key)
        if len(counts.sides) < SIDES and (side := shorter_side(image)):
            counts.sides.append(side)
        for note in (*item.notes, *notes):
            counts.note(note, item.key)
        yield item if image is item.image else replace(item, image=image)


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


def _embedded(
    batch: Sequence[Sample], encoder: SentenceEncoder | None, counts: Counts
) -> list[Embedded]:
    """Embed captions: [dimension] of one caption, [captions, dimension] of several.

    A caption whose embedding is zero or not finite is left out, and so is a sample without another
    one.
    """
    if encoder is None:
        return [(sample, None) for sample in batch]
    texts = [[one] if isinstance(one := sample.caption, str) else one for sample in batch]
    every = [text for some in texts for text in some]
    ends = np.cumsum([len(some) for some in texts])[:-1]
    embeddings = encoder.encode(every)
    embedded = (embeddings, usable(embeddings), np.array(encoder.cut(every), bool))
    found: list[Embedded] = []
    for sample, captions, rows, good, cut in zip(
        batch, texts, *(np.split(values, ends) for values in embedded), strict=True
    ):
        if not good.any():
            counts.skip(NO_EMBEDDING, sample.key, captions[0])
            continue
        if cut.any():
            counts.note(CUT_CAPTION, sample.key)
        if isinstance(sample.caption, str):
            found.append((sample, rows[0]))
            continue
        if not good.all():
            counts.note(BAD_CAPTIONS, sample.key)
            sample = replace(sample, caption=list(compress(captions, good)))
        found.append((sample, rows[good]))
    return found


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
    is_broken = BROKEN_INPUT in record.skipped
    if not record.samples:
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
