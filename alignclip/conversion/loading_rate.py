"""The rate at which a set of pairs loads on this machine, measured on samples of the set."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alignclip.config.schema import DataConfig
from alignclip.conversion.images import ImageOptions, Unusable, prepare_image
from alignclip.conversion.next_step import recipe_side
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts
from alignclip.data.mds_index import INDEX, parse_index, stored_file
from alignclip.data.mds_reader import open_shard
from alignclip.runtime.stand_ins import stand_ins
from alignclip.runtime.threads import available_cores
from alignclip.storage.staging import OutputFolder
from alignclip.storage.temporary import temporary_folder

MEASURED_SAMPLES = 200
SECONDS = 0.6  # of each measurement
MOST_FETCHED = 64_000_000  # bytes of a shard that is read again from a bucket
RESIZED = 256  # pixels of the shorter side: enough for crops of 224
WORTHWHILE = 1.25  # times the rate, from which on --resize is named

SummaryRows = Sequence[tuple[str, str]]  # name, value


@dataclass(frozen=True)
class Decoded:
    """The outcome of decoding and cropping images on one core, as a loader worker does.

    Attributes:
        rate: images a CPU second.
        width: median, pixels.
        height: median, pixels.
    """

    rate: float
    width: int
    height: int


def loading_rate(options: ConvertOptions, counts: Counts) -> SummaryRows:
    """Measure how many samples a second a core of this machine decodes and crops.

    The functions are those of training.

    Returns:
        rows for the summary; none where the rate can't be measured.
    """
    try:
        images = _some_images(options.out)
        return rate_of(images, recipe_side(counts), may_resize=options.images.resize is None)
    except Exception:  # the set is complete, and this is only a hint
        return []


def rate_of(images: Sequence[bytes], side: int, may_resize: bool) -> SummaryRows:
    """Measure the rate of these images; no rows where none of them can be decoded.

    Args:
        images: files.
        side: of the crops, pixels.
        may_resize: whether the rate with ``--resize`` is measured, too, where images are large.
    """
    if (found := decode_all(images, side)) is None:
        return []
    is_large = min(found.width, found.height) > RESIZED >= side
    gain = _gain(images, side) if may_resize and is_large else None
    size = statistics.mean(map(len, images)) / 1024
    pixels = f"{found.width} × {found.height} px"
    rows = [
        (
            "loads at",
            f"{_rate_in_words(found.rate)}, of which this machine has {available_cores()}",
        ),
        ("  samples of", f"{size:,.1f} KiB, {pixels}, cropped to {side} px"),
    ]
    if gain is not None and gain >= WORTHWHILE:
        rows += [(f"  with --resize {RESIZED}", _rate_in_words(gain * found.rate))]
    return rows


def _some_images(out: str) -> list[bytes]:
    """Read images of a shard in the middle of the set; none of a large shard in a bucket."""
    store = OutputFolder(out)
    entries = parse_index(store.files.read_bytes(INDEX))
    entry = entries[len(entries) // 2]
    file = stored_file(entry)
    with temporary_folder() as folder:
        path = Path(store.out, file["basename"])
        if store.is_remote:
            if file["bytes"] > MOST_FETCHED:
                return []
            path = Path(folder, "fetched.mds")
            store.files.download(file["basename"], path)
        rows = itertools.islice(open_shard(entry, path, Path(folder)), MEASURED_SAMPLES)
        return [row["image"] for row in rows]


def _gain(images: Sequence[bytes], side: int) -> float | None:
    """Return how many times as fast images load that ``--resize`` has made small.

    None where they can't be made small.
    """
    options, small, end = ImageOptions(resize=RESIZED), [], time.monotonic() + SECONDS
    for image in images:
        try:
            small.append(prepare_image(image, options)[0])
        except Unusable:
            continue
        if time.monotonic() > end:
            break
    large, resized = decode_all(images[: len(small)], side), decode_all(small, side)
    return resized.rate / large.rate if large and resized else None


def decode_all(images: Sequence[bytes], side: int) -> Decoded | None:
    """Decode and crop images as a loader worker does, in one thread, and measure it.

    Returns:
        None where none of the images can be decoded.
    """
    with stand_ins():  # takes seconds
        from alignclip.data.transforms import decode_image, random_resized_crop

    crop, sizes, spent = DataConfig(), [], 0.0
    with _one_thread():
        for number, data in enumerate([*images[:1], *images]):  # the first one twice: it warms up
            start = time.thread_time()
            try:
                image = decode_image(data)
            except OSError:
                continue
            random_resized_crop(image, side, crop.scale, crop.ratio, seed=number)
            if number:
                spent += time.thread_time() - start
                sizes.append(image.shape[1:])
            if spent > SECONDS:
                break
    if not sizes:
        return None
    heights, widths = zip(*sizes, strict=True)
    rate = len(sizes) / spent
    return Decoded(rate, int(statistics.median(widths)), int(statistics.median(heights)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have PyTorch use one thread, as in a loader worker."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate_in_words(rate: float) -> str:
    """Write a rate with two digits: 1,234 as 1,200."""
    return f"about {float(f'{rate:.2g}'):,.0f} samples/s a core"
