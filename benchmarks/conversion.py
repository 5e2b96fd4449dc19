"""What conversion costs beside the bare loop that does the same work, and beside the naive way.

For each kind of work, in images a CPU second (what a core does in a second if it does nothing
else):

- ``bare``: ``tarfile`` and PIL, and nothing else: read the tar, do that work on each image, write
the same bytes to one
  file. No MDS, no hashes, no index, no counting, no captions put together with their images.
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

import argparse
import io
import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import highest_resident, machine
from PIL import Image

from alignclip.conversion.images import ImageOptions
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.shards import convert_shard

COLUMNS = {"key": "str", "image": "bytes", "caption": "str"}
SIDE, QUALITY = 256, 90  # of re-encoding
# kind of work -> what ours is told, and the share of the bare loop's speed that we hold ourselves
# to
KINDS = {
    "no check": (ImageOptions(check="none"), 0.7),
    "header": (ImageOptions(check="header"), 0.5),
    "decode (default)": (ImageOptions(check="decode"), 0.85),
    f"resize {SIDE}": (ImageOptions(resize=SIDE, quality=QUALITY), 0.85),
}
MEMORY = 400  # MB

EXAMPLES = """examples:
  python benchmarks/conversion.py
  python benchmarks/conversion.py --only speed --samples 500 --repeats 1      # does it run?
  python benchmarks/conversion.py --only processes"""


@dataclass(frozen=True)
class Run:
    """One timed run: ``seconds`` by the clock, ``cpu`` of the process, ``peak`` in bytes."""

    seconds: float
    cpu: float
    peak: int


# what is converted


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG as noisy as a photograph: some 0.35 bytes a pixel."""
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    ).astype(np.int16)
    noisy = (
        (smooth + rng.integers(-12, 13, (height, width, 1), dtype=np.int16))
        .clip(0, 255)
        .astype(np.uint8)
    )
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def draw_tar(path: Path, samples: int, width: int, height: int, different: int = 50) -> Path:
    """Samples as img2dataset writes them, of so many different pictures."""
    rng = np.random.default_rng(0)
    pictures = [picture(rng, width, height) for _ in range(different)]
    with tarfile.open(path, "w") as tar:
        for i in range(samples):
            key = f"{path.stem}{i:06}"
            url = f"https://example.org/{key}"
            meta = json.dumps({"caption": "a picture", "url": url, "sha256": "0" * 64})
            caption = f"picture {i} of something that takes a few words to say"
            members = {
                "jpg": pictures[i % different],
                "json": meta.encode(),
                "txt": caption.encode(),
            }
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


# the three ways


def bare(tar_path: Path, folder: Path, kind: str) -> None:
    with tarfile.open(tar_path) as tar, (folder / "bytes").open("wb") as out:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name.endswith(".jpg"):
                data = WORK[kind](data)
            out.write(data)


def open_header(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)):
        return data


def decode(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    return data


def resize(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        scale = SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


WORK: dict[str, Callable[[bytes], bytes]] = dict(
    zip(KINDS, (lambda data: data, open_header, decode, resize), strict=True)
)


def naive(tar_path: Path, folder: Path, kind: str) -> None:
    from streaming import MDSWriter

    columns = {"key": "str", "image": "jpeg", "caption": "str"}
    with (
        MDSWriter(columns=columns, out=str(folder / "mds"), hashes=["xxh64"]) as writer,
        tarfile.open(tar_path) as tar,
    ):
        sample: dict[str, Any] = {}
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            key, _, extension = member.name.partition(".")
            if extension == "jpg":
                sample = {"key": key, "image": Image.open(content).convert("RGB")}
                if kind.startswith("resize"):
                    scale = SIDE / min(sample["image"].size)
                    size = tuple(round(length * scale) for length in sample["image"].size)
                    sample["image"] = sample["image"].resize(size, Image.Resampling.BICUBIC)
            elif extension == "txt":
                writer.write({**sample, "caption": content.read().decode()})


def ours(tar_path: Path, folder: Path, kind: str) -> None:
    options = ConvertOptions(
        [str(tar_path)], str(folder), semantic=False, images=KINDS[kind][0], progress=False
    )
    convert_shard(str(tar_path), tar_path.stem, COLUMNS, options, lambda written, skipped: None)


WAYS = {"bare": bare, "ours": ours, "naive": naive}


# the measurement


def measure(way: str, tar_path: Path, small: Path | None, kind: str) -> Run:
    """In a process of its own, warmed up on the tar ``small`` where there is one."""
    import streaming  # noqa: F401  # before what is resident then is looked at, as PIL's formats

    Image.init()
    with tempfile.TemporaryDirectory() as folder:
        warm, timed = Path(folder, "warm"), Path(folder, "timed")
        for one in (warm, timed):
            one.mkdir()
        if small:
            WAYS[way](small, warm, kind)
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # the highest so far is now what is resident
        before = highest_resident()
        start, cpu = time.perf_counter(), time.process_time()
        WAYS[way](tar_path, timed, kind)
        return Run(
            time.perf_counter() - start, time.process_time() - cpu, highest_resident() - before
        )


def in_a_process(way: str, tar_path: Path, small: Path | None, kind: str) -> Run:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, way, tar_path, small, kind).result()


def speed(options: argparse.Namespace, folder: Path) -> bool:
    width, height = options.size
    tar_path = draw_tar(folder / "tar.tar", options.samples, width, height)
    small = draw_tar(folder / "small.tar", 20, width, height, 5)
    each = tar_path.stat().st_size / options.samples / 1024
    print(
        f"\nspeed: {options.samples:,} images of {width} × {height} pixels, {each:.0f} KiB each, "
        "images a CPU second"
    )
    print(
        f"{'':<18}{'bare':>10}{'ours':>10}{'naive':>10}"
        f"{'ours/bare':>12}{'at least':>10}{'ours/naive':>12}"
    )
    good = True
    for kind, (_, least) in KINDS.items():
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        for i in range(options.repeats):
            for way, done in runs.items():
                done.append(in_a_process(way, tar_path, small, kind))
            print(f"{kind} {i + 1}/{options.repeats}", file=sys.stderr, flush=True)
        rates = {
            way: statistics.median(options.samples / run.cpu for run in done)
            for way, done in runs.items()
        }
        of_bare, of_naive = (
            statistics.median(
                other.cpu / mine.cpu for other, mine in zip(runs[way], runs["ours"], strict=True)
            )
            for way in ("bare", "naive")
        )
        good &= of_bare >= least
        numbers = "".join(f"{rates[way]:>10,.0f}" for way in WAYS)
        print(
            f"{kind:<18}{numbers}"
            f"{f'{of_bare:.2f}':>12}{f'{least:.2f}':>10}{f'{of_naive:.1f}×':>12}",
            flush=True,
        )
    return good


def work(tar_path: Path, out: Path) -> None:
    ours(tar_path, out, "decode (default)")


def processes(options: argparse.Namespace, folder: Path) -> bool:
    """Two workers and one on the same tars, both pools started and warmed up before."""
    width, height = options.size
    tars = [draw_tar(folder / f"{i}.tar", options.samples, width, height) for i in range(4)]
    small = draw_tar(folder / "small.tar", 20, width, height, 5)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for i in range(options.repeats):
        for number, done in seconds.items():
            with (
                ProcessPoolExecutor(number, get_context("spawn")) as pool,
                tempfile.TemporaryDirectory() as out,
            ):
                list(pool.map(work, [small] * 2, [Path(out, str(j)) for j in range(2)]))
                start = time.perf_counter()
                list(pool.map(work, tars, [Path(out)] * len(tars)))
                done.append(time.perf_counter() - start)
        print(f"processes {i + 1}/{options.repeats}", file=sys.stderr, flush=True)
    pairs = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
    images = len(tars) * options.samples
    print(
        f"\nprocesses: {images:,} images in {len(tars)} tars, by the clock, load "
        f"{os.getloadavg()[0]:.1f} at the end"
    )
    for number, done in seconds.items():
        print(f"{number} at a time{images / statistics.median(done):>10,.0f} images/s")
    each = ", ".join(f"{pair:.2f}" for pair in pairs)
    print(f"ratio {statistics.median(pairs):.2f}× (of each pair: {each}), at least 1.8×")
    return statistics.median(pairs) >= 1.8


def memory(options: argparse.Namespace, folder: Path) -> bool:
    width, height = 4000, 3000
    one = len(picture(np.random.default_rng(0), width, height))
    samples = max(1, options.large_tar * 2**20 // one)
    tar_path = draw_tar(folder / "large.tar", samples, width, height, 3)
    size = tar_path.stat().st_size / 2**20
    print(
        f"\nmemory above imports: a tar of {size:,.0f} MiB, {samples:,} images of {width} × "
        f"{height} pixels"
    )
    good = True
    for kind in KINDS:
        run = in_a_process("ours", tar_path, None, kind)
        good &= run.peak <= MEMORY * 1e6
        print(
            f"{kind:<18}{run.peak / 1e6:>8,.0f} MB, at most {MEMORY} MB ({samples / run.cpu:,.1f} "
            "images a CPU second)",
            flush=True,
        )
    return good


PARTS = {"speed": speed, "processes": processes, "memory": memory}


def main() -> int:
    """Print the tables.

    Returns:
        0, or 1 where a number is not what we hold ourselves to.
    """
    parser = argparse.ArgumentParser(
        description="Speed and memory of conversion beside the bare loop and the naive way.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--only", choices=list(PARTS), help="one of them (default: all)")
    parser.add_argument("--repeats", default=5, help="of each run (default: %(default)s)", **number)
    parser.add_argument("--samples", default=4000, help="in a tar (default: %(default)s)", **number)
    parser.add_argument(
        "--size",
        default=(480, 360),
        nargs=2,
        help="of the images, pixels (default: 480 360)",
        **number,
    )
    parser.add_argument(
        "--large-tar",
        default=4096,
        help="of the memory's part, MiB (default: %(default)s)",
        **number,
    )
    options = parser.parse_args()
    print(f"pillow {Image.__version__} on {machine('cpu')}", flush=True)
    good = True
    for name in [options.only] if options.only else PARTS:
        with tempfile.TemporaryDirectory() as folder:
            good &= PARTS[name](options, Path(folder))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
