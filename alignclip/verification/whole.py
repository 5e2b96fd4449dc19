"""What shows only once all shards of an MDS set have been read: keys that come again, embeddings unlike the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignclip.data.mds_index import ShardEntry, stored_file
from alignclip.verification.findings import SHOWN, Overview, folder_of
from alignclip.verification.shards import UNREADABLE, Read, samples_at

TIMES = 10.0  # the median norm, or its inverse: no sentence encoder's norms differ by as much


def add_outliers(reads: Sequence[Read], entries: Sequence[ShardEntry], found: Overview) -> None:
    """Name the embeddings whose norm is far from the median."""
    everything = np.concatenate([read.norm_of for read in reads] or [np.empty(0, np.float32)])
    sound = everything[np.isfinite(everything) & (everything > 0)]  # the others have been named
    if not len(sound):
        return
    median = float(np.median(sound))
    for read, entry in zip(reads, entries, strict=True):
        norms = read.norm_of
        with np.errstate(invalid="ignore"):
            far = (
                np.isfinite(norms)
                & (norms > 0)
                & ((norms > TIMES * median) | (norms < median / TIMES))
            )
        for i in np.flatnonzero(far):
            text = f"sample {read.norm_at[i]}: embedding has the norm {norms[i]:.3g}, where {median:.3g} is usual"
            found.problems.add("embedding's norm is unusual", stored_file(entry)["basename"], text)


def add_duplicates(
    reads: Sequence[Read], entries: Sequence[ShardEntry], place: str, found: Overview
) -> None:
    """Count the samples whose key an earlier one has already.

    The converter looks for them within an input, so that they are a problem there; between inputs, whose keys may well
    be numbered alike, they are a note.
    """
    hashes = np.concatenate([read.keys for read in reads] or [np.empty(0, np.uint64)])
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = (ordered[1:] == ordered[:-1]) & (ordered[1:] != UNREADABLE)
    pairs = np.stack([order[1:][same], order[:-1][same]], axis=1)
    pairs = pairs[np.argsort(pairs[:, 0])]
    starts = np.cumsum([0, *(len(read.keys) for read in reads)])
    shards = np.searchsorted(starts, pairs, side="right") - 1
    files = [stored_file(entry)["basename"] for entry in entries]
    numbers = {folder: i for i, folder in enumerate({folder_of(file) for file in files})}
    folders = np.array([numbers[folder_of(file)] for file in files], np.int64)
    within = folders[shards[:, 0]] == folders[shards[:, 1]] if len(pairs) else np.empty(0, bool)

    def lines(chosen: np.ndarray, most: int) -> list[tuple[str, str]]:
        """Of the first of these pairs: the file, and which of its samples repeats which."""
        positions = [
            (int(shards[i, 0]), int(pairs[i, 0] - starts[shards[i, 0]])) for i in chosen[:most]
        ]
        there = dict(samples_at(positions, entries, place))
        some = []
        for i, later in zip(chosen, positions, strict=False):
            earlier = shards[i, 1]
            text = f"sample {later[1]} has the key of sample {pairs[i, 1] - starts[earlier]} in {files[earlier]}"
            if later in there:  # or the shard could not be fetched again
                text += f" ({there[later]['key']})"
            some.append((files[later[0]], text))
        return some

    again, elsewhere = np.flatnonzero(within), np.flatnonzero(~within)
    for file, text in lines(again, SHOWN):
        found.problems.add("key is there twice", file, text, mend=False)
    found.problems.numbers["key is there twice"] += max(len(again) - SHOWN, 0)
    for file, text in lines(elsewhere, 1):
        found.notes.append(
            f"keys that come in several inputs: {len(elsewhere):,} (the first: {file}, {text})"
        )
