"""The cost of conversion beside the bare loop that does the same work, and beside the naive way.

For each kind of work, in images a CPU second (what a core does in a second if it does nothing
else):

- ``bare``: ``tarfile`` and PIL, and nothing else: read the tar, do that work on each image, write
  the same bytes to one file. No MDS, no hashes, no index, no counting, no captions put together
  with their images.
- ``ours``: ``convert/cc12m.py``'s worker, from the tar to hashed MDS shards in a folder of their
  own.
- ``naive``: a loop of a screenful: PIL opens each image, ``MDSWriter`` with a ``jpeg`` column
  encodes it again.

Then: how two processes compare with one, and how much memory a worker takes for a tar of large
images.

Every run is a process of its own, warmed up on a small tar, in turn with those it is compared with;
what is shown are medians, and of the shares the median of the pairs. CPU seconds count, not the
clock: other programs may run at the same time. Peak memory is the highest resident memory during a
run that nothing has warmed up, above what is resident once everything is imported.

    python benchmarks/conversion.py                       # some minutes on 2 cores
    python benchmarks/conversion.py --only memory --large-tar 4000
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, Timing, in_a_process, in_turn, parser_of, this_machine, timed
from PIL import Image

from alignclip.conversion.images import ImageOptions, prepare_image
from alignclip.conversion.loading_rate import decode_all
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.shards import convert_shard
from alignclip.quickstart.scenes import add_sample
from alignclip.storage.staging import OutputFolder

MDS_COLUMNS = {"key": "str", "image": "bytes", "caption": "str"}
SIDE, QUALITY = 256, 90  # of re-encoding
LOADED, CROP = 200, 224  # pictures that are loaded again, and the side that they are cropped to
UNIT = "images/CPU s"
MOST_MEMORY = 400  # MB
CONVERSION_FLAGS = {
    "repeats": (5, "of each run"),
    "samples": (4000, "in a tar"),
    "large-tar": (4096, "of the memory's part, MiB"),
}
CONVERSION_QUICK = {"repeats": 2, "samples": 500, "only": "speed"}
CONVERSION_EXAMPLES = """examples:
  python benchmarks/conversion.py
  python benchmarks/conversion.py --only speed --samples 500 --repeats 1      # does it run?
  python benchmarks/conversion.py --only processes"""


# what is converted


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Draw a JPEG as noisy as a photograph: some 0.35 bytes a pixel."""
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    noisy = (np.asarray(smooth).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(noisy), 90)


def encoded(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def draw_tar(path: Path, samples: int, size: tuple[int, int], different: int = 50) -> Path:
    """Write samples as img2dataset does, of so many different pictures."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng, *size) for _ in range(different)]
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            key = f"{path.stem}{i:06}"
            url = f"https://example.org/{key}"
            meta = json.dumps({"caption": "a picture", "url": url, "sha256": "0" * 64})
            caption = f"picture {i} of something that takes a few words to say"
            texts = {"json": meta.encode(), "txt": caption.encode()}
            add_sample(tar, key, {"jpg": pictures[i % different], **texts})
    return path


def members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield key, extension and bytes of what a tar holds."""
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            key, _, extension = member.name.partition(".")
            yield key, extension, content.read()


# the work on an image


def open_header(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)):
        return data


def decode(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    return data


def made_small(image: Image.Image) -> Image.Image:
    scale = SIDE / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BICUBIC)


def resize(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return encoded(made_small(image.convert("RGB")), QUALITY)


DECODE, RESIZE = "decode (default)", f"resize {SIDE}"
# kind of work -> what ours is told, what the bare loop does, the least share of the bare loop's
# speed that we hold ourselves to
KINDS: dict[str, tuple[ImageOptions, Callable[[bytes], bytes], float]] = {
    "no check": (ImageOptions(check="none"), bytes, 0.7),
    "header": (ImageOptions(check="header"), open_header, 0.5),
    DECODE: (ImageOptions(check="decode"), decode, 0.85),
    RESIZE: (ImageOptions(resize=SIDE, quality=QUALITY), resize, 0.85),
}


# the three ways


def bare(tar_path: Path, folder: Path, kind: str) -> None:
    work = KINDS[kind][1]
    with (folder / "bytes").open("wb") as out:
        for _, extension, data in members(tar_path):
            out.write(work(data) if extension == "jpg" else data)


def naive(tar_path: Path, folder: Path, kind: str) -> None:
    from streaming import MDSWriter

    columns = {**MDS_COLUMNS, "image": "jpeg"}
    with MDSWriter(columns=columns, out=str(folder / "mds"), hashes=["xxh64"]) as writer:
        sample: dict[str, Any] = {}
        for key, extension, data in members(tar_path):
            if extension == "jpg":
                image = Image.open(io.BytesIO(data)).convert("RGB")
                sample = {"key": key, "image": made_small(image) if kind == RESIZE else image}
            elif extension == "txt":
                writer.write({**sample, "caption": data.decode()})


def ours(tar_path: Path, folder: Path, kind: str = DECODE) -> None:
    options = ConvertOptions(
        [str(tar_path)], str(folder), semantic=False, images=KINDS[kind][0], progress=False
    )
    show, store = (lambda written, skipped: None), OutputFolder(options.out)
    convert_shard(str(tar_path), tar_path.stem, MDS_COLUMNS, options, show, store)


CONVERTERS = {"bare": bare, "ours": ours, "naive": naive}


# the measurement


def measure_conversion(way: str, tar_path: Path, small: Path | None, kind: str) -> Timing:
    """Measure a way in this process, warmed up on the tar ``small`` where there is one."""
    import streaming  # noqa: F401  # before what is resident then is looked at, as PIL's formats

    Image.init()
    with tempfile.TemporaryDirectory() as folder:
        warm, out = Path(folder, "warm"), Path(folder, "timed")
        warm.mkdir()
        out.mkdir()
        if small:
            CONVERTERS[way](small, warm, kind)
        return timed(lambda: CONVERTERS[way](tar_path, out, kind))


def measure_loading(tar_path: Path, kind: str) -> Timing:
    """Measure how fast a loader worker decodes and crops what ``ours`` stores of a tar."""
    pictures = (data for _, extension, data in members(tar_path) if extension == "jpg")
    stored = [prepare_image(one, KINDS[kind][0])[0] for one in islice(pictures, LOADED)]
    return timed(lambda: decode_all(stored, CROP))


def load_again(tar_path: Path, kind: str, repeats: int, figures: Figures) -> float:
    """Return the median rate of :func:`measure_loading`, a process each time."""
    runs = [in_a_process(measure_loading, tar_path, kind) for _ in range(repeats)]
    rates = [run.result.rate for run in runs]
    return figures.add(f"{kind}, loaded/rate", rates, UNIT, "higher")


def speed(options: Namespace, folder: Path, figures: Figures) -> bool:
    tar_path = draw_tar(folder / "tar.tar", options.samples, options.size)
    small = draw_tar(folder / "small.tar", 20, options.size, 5)
    width, height = options.size
    each = f"{tar_path.stat().st_size / options.samples / 1024:.0f} KiB each"
    what = f"{options.samples:,} images of {width} × {height} pixels, {each}"
    print(f"\nspeed: {what}, images a CPU second")
    heads = "".join(f"{way:>10}" for way in CONVERTERS)
    print(f"{'':<18}{heads}{'ours/bare':>12}{'at least':>10}{'ours/naive':>12}{'loads at':>10}")
    good = True
    for kind, (_, _, least) in KINDS.items():

        def measure(way: str, kind: str = kind) -> float:
            return in_a_process(measure_conversion, way, tar_path, small, kind).cpu

        seconds = in_turn(CONVERTERS, options.repeats, measure)
        names = {way: f"{kind}, {way}/rate" for way in CONVERTERS}
        rates = ""
        for way, done in seconds.items():
            found = [options.samples / one for one in done]
            rates += f"{figures.add(names[way], found, UNIT, 'higher'):>10,.0f}"
        of_bare = figures.add_ratio(names["ours"], names["bare"])
        of_naive = figures.add_ratio(names["ours"], names["naive"])
        loads = ""
        if kind in (DECODE, RESIZE):  # the files of the first three are the same
            loads = f"{load_again(tar_path, kind, options.repeats, figures):,.0f}"
        shares = f"{of_bare:>12.2f}{least:>10.2f}{of_naive:>11.1f}×{loads:>10}"
        good &= of_bare >= least
        print(f"{kind:<18}{rates}{shares}", flush=True)
    return good


def processes(options: Namespace, folder: Path, figures: Figures) -> bool:
    """Two workers and one on the same tars, both pools started and warmed up before."""
    tars = [draw_tar(folder / f"{i}.tar", options.samples, options.size) for i in range(4)]
    small = draw_tar(folder / "small.tar", 20, options.size, 5)

    def measure(number: int) -> float:
        with (
            ProcessPoolExecutor(number, get_context("spawn")) as pool,
            tempfile.TemporaryDirectory() as out,
        ):
            list(pool.map(ours, [small] * 2, [Path(out, str(j)) for j in range(2)]))
            start = time.perf_counter()
            list(pool.map(ours, tars, [Path(out)] * len(tars)))
            return time.perf_counter() - start

    seconds = in_turn((1, 2), options.repeats, measure)
    images, load = len(tars) * options.samples, f"load {os.getloadavg()[0]:.1f} at the end"
    print(f"\nprocesses: {images:,} images in {len(tars)} tars, by the clock, {load}")
    for number, done in seconds.items():
        rates = [images / one for one in done]
        rate = figures.add(f"{number} at a time/rate", rates, "images/s", "higher")
        print(f"{number} at a time{rate:>10,.0f} images/s")
    ratio = figures.add_ratio("2 at a time/rate", "1 at a time/rate")
    print(f"ratio {ratio:.2f}×, at least 1.8×")
    return ratio >= 1.8


def memory(options: Namespace, folder: Path, figures: Figures) -> bool:
    size = width, height = 4000, 3000
    one = len(picture(np.random.default_rng(0), *size))
    samples = max(1, options.large_tar * 2**20 // one)
    tar_path = draw_tar(folder / "large.tar", samples, size, 3)
    what = f"{samples:,} images of {width} × {height} pixels"
    print(f"\nmemory above imports: a tar of {tar_path.stat().st_size / 2**20:,.0f} MiB, {what}")
    good = True
    for kind in KINDS:
        run = in_a_process(measure_conversion, "ours", tar_path, None, kind)
        good &= run.peak <= MOST_MEMORY * 1e6
        peak = figures.add(f"{kind}/memory", [run.peak / 1e6], "MB", "lower")
        rate = f"({samples / run.cpu:,.1f} images a CPU second)"
        print(f"{kind:<18}{peak:>8,.0f} MB, at most {MOST_MEMORY} MB {rate}", flush=True)
    return good


MEASUREMENTS = {"speed": speed, "processes": processes, "memory": memory}


def main() -> int:
    """Print the tables.

    Returns:
        0, or 1 where a number is not what we hold ourselves to.
    """
    description = "Speed and memory of conversion beside the bare loop and the naive way."
    parser = parser_of(
        "conversion.py", description, CONVERSION_EXAMPLES, CONVERSION_FLAGS, CONVERSION_QUICK
    )
    parser.add_argument("--only", choices=list(MEASUREMENTS), help="one of them (default: all)")
    text = "of the images, pixels (default: 480 360)"
    parser.add_argument("--size", type=int, nargs=2, metavar="N", default=[480, 360], help=text)
    options = parser.parse_args()
    figures = Figures("conversion", options)
    print(f"pillow {Image.__version__} on {this_machine()}", flush=True)
    good = True
    for name in [options.only] if options.only else MEASUREMENTS:
        with tempfile.TemporaryDirectory() as folder:
            good &= MEASUREMENTS[name](options, Path(folder), figures)
    figures.write()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
