"""The loader beside the bare loop that decodes and crops, and beside open_clip's own loader.

Rows, each in a process of its own and in turn with the others:

- ``bare``: each image of a set is decoded and cropped, and nothing else is done. The functions are
  those of training.
- ``dataset[i]``: one sample after the other.
- ``batches``: what a worker does for a batch, without handing the batch over.
- ``workers=N``: an epoch of the loader, after a first one.
- ``workers=N, resized``: the same on the pictures as ``convert --resize PIXELS`` stores them.
- ``open_clip, workers=N``: an epoch of open_clip's webdataset loader on the same images and
  captions, after a first one. Needs webdataset 0.2: open_clip 3.3 doesn't read tars with 1.0.

CPU ms are those of the process that reads, or of all workers. Milliseconds by the clock depend on
how many cores are free. Then: where a worker's time goes, part by part.

The pictures are drawn, ``--width`` pixels wide and 3/4 as high, unless ``--tars`` names a folder of
tars as img2dataset writes them.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conversion import draw_tar
from measuring import Figures, Timing, in_a_process, in_turn, parser_of, this_machine

from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.data.transforms import decode_image, random_resized_crop
from alignclip.quickstart.scenes import add_sample

CHECKOUT = Path(__file__).resolve().parents[1]
CROP, CONTEXT_LENGTH = 224, 77
TARS = 8  # that open_clip's loader divides among its workers
TICKS = os.sysconf("SC_CLK_TCK")
BARE, ITEM, BATCHES = "bare", "dataset[i]", "batches"
LOADER_EXAMPLES = """examples:
  python benchmarks/loader.py
  python benchmarks/loader.py --tars FOLDER --workers 0 1 2
  python benchmarks/loader.py --width 800 --resize 256
  pip install --target wds --no-deps webdataset==0.2.86 "pandas<3" pytz tzdata python-dateutil six
  python benchmarks/loader.py --webdataset wds"""


def main() -> None:
    """Measure and print the tables."""
    numbers = {
        "repeats": (3, "of each row"),
        "samples": (2000, "drawn"),
        "batch": (64, "samples"),
        "width": (480, "pixels of a drawn picture"),
    }
    quick = {"repeats": 2, "samples": 600, "workers": [1]}
    parser = parser_of("loader.py", str(__doc__), LOADER_EXAMPLES, numbers, quick)
    text = "of the loader (default: %(default)s)"
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", default=[0, 1, 2], help=text)
    text = "load the pictures as convert's --resize PIXELS stores them, too"
    parser.add_argument("--resize", type=int, metavar="PIXELS", help=text)
    text = "folder of tars to read instead of drawn pictures"
    parser.add_argument("--tars", type=Path, metavar="FOLDER", help=text)
    text = "folder where pip has installed webdataset 0.2"
    parser.add_argument("--webdataset", type=Path, metavar="FOLDER", help=text)
    options = parser.parse_args()
    figures = Figures("loader", options)
    print(f"{this_machine()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        sources = make_sets(Path(folder), options)
        print_rows(sources, options, figures)
        print_parts(sources.stored, options, figures)
    figures.write()


class Sources(NamedTuple):
    """Folders of the same samples: an MDS set, tars, and an MDS set of smaller pictures."""

    stored: Path
    tars: Path
    resized: Path | None


def make_sets(folder: Path, options: Namespace) -> Sources:
    """Convert the pictures, and write tars of the images that the set has."""
    drawn = options.tars or folder / "drawn"
    if options.tars is None:
        drawn.mkdir()
        size = options.width, options.width * 3 // 4
        draw_tar(drawn / "00000.tar", options.samples, size, different=200)
    stored = converted(drawn, folder / "mds")
    resized = None
    if options.resize:
        resized = converted(drawn, folder / "resized", "--resize", str(options.resize))
    dataset = open_set(stored, options.batch, 0)
    (folder / "tars").mkdir()
    for number in range(TARS):
        with tarfile.open(folder / "tars" / f"{number:05}.tar", "w") as tar:
            for at in range(number, dataset.size, TARS):
                row = dataset.get_item(at)
                content = {"jpg": row["image"], "txt": row["caption"].encode()}
                add_sample(tar, f"{at:09}", content)
    return Sources(stored, folder / "tars", resized)


def converted(tars: Path, out: Path, *flags: str) -> Path:
    """Convert a folder's tars, and return the set's folder."""
    command = [sys.executable, str(CHECKOUT / "convert" / "cc12m.py"), "--inputs"]
    command += [*sorted(map(str, tars.glob("*.tar"))), "--out", str(out)]
    command += ["--no-semantic", "--no-next", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def config_of(folder: Path, workers: int) -> DataConfig:
    """Return the settings of a run on one machine."""
    return DataConfig(
        {"set": StreamConfig(local=str(folder))}, num_canonical_nodes=1, num_workers=workers
    )


def open_set(folder: Path, batch: int, workers: int) -> ImageTextDataset:
    """Open a set as a run does."""
    sizes = {"image_size": CROP, "context_length": CONTEXT_LENGTH}
    return ImageTextDataset(config_of(folder, workers), batch_size=batch, semantic=False, **sizes)


# rows


class LoaderRow(NamedTuple):
    """A row of the table: how many processes read, and how an epoch of them is measured."""

    processes: int
    measure: Callable[[], Timing]


def loader_rows(sources: Sources, options: Namespace) -> dict[str, LoaderRow]:
    """Return the rows by name, in the table's order."""
    batch = options.batch
    rows = {
        name: LoaderRow(1, partial(in_a_process, loop, sources.stored, batch, name))
        for name in (BARE, ITEM, BATCHES)
    }
    for count in options.workers:
        measure = partial(in_a_process, our_epoch, sources.stored, batch, count)
        rows[f"workers={count}"] = LoaderRow(max(1, count), measure)
    for count in options.workers if sources.resized else ():
        measure = partial(in_a_process, our_epoch, sources.resized, batch, count)
        rows[f"workers={count}, resized"] = LoaderRow(max(1, count), measure)
    for count in options.workers if options.webdataset else ():
        if count:
            arguments = sources.tars, batch, count, options.webdataset
            measure = partial(in_a_process, their_epoch, *arguments)
            rows[f"open_clip, workers={count}"] = LoaderRow(count, measure)
    return rows


def print_rows(sources: Sources, options: Namespace, figures: Figures) -> None:
    """Measure the rows and print a table."""
    rows = loader_rows(sources, options)
    found = in_turn(rows, options.repeats, lambda name: rows[name].measure())
    print(f"\n{'a sample':22}{'CPU ms':>9}{'÷ bare':>9}{'ms':>9}{'samples/s':>11}{'of bare':>9}")
    for name, runs in found.items():
        cpu = figures.add(f"{name}/cpu", [one.cpu for one in runs], "ms", "lower")
        clock = figures.add(f"{name}/time", [one.seconds for one in runs], "ms", "lower", False)
        line = f"{name:22}{cpu:9.3f}"
        line += f"{figures.add_ratio(f'{name}/cpu', f'{BARE}/cpu') if name != BARE else 1:9.2f}"
        share = figures.figures[f"{BARE}/time"].median / clock / rows[name].processes
        print(f"{line}{clock:9.3f}{1000 / clock:11,.0f}{share:9.2f}")


def loop(place: Path, batch: int, row: str) -> Timing:
    """Measure all samples in one process, in milliseconds a sample."""
    torch.set_num_threads(1)
    dataset = open_set(place, batch, 0)
    ids = torch.randperm(dataset.size, generator=torch.Generator().manual_seed(0)).tolist()
    images = [dataset.get_item(at)["image"] for at in ids] if row == BARE else []
    works: dict[str, Callable[[range], object]] = {
        BARE: lambda part: [crop_of(dataset, decode_image(images[i]), i) for i in part],
        ITEM: lambda part: [dataset[ids[i]] for i in part],
        BATCHES: lambda part: dataset.batch_of(ids[part.start : part.stop]),
    }
    parts = [range(i, min(i + batch, len(ids))) for i in range(0, len(ids), batch)]
    works[row](parts[0])
    return a_sample(lambda: [works[row](part) for part in parts], len(ids), time.process_time)


def crop_of(dataset: ImageTextDataset, image: torch.Tensor, seed: int) -> torch.Tensor:
    """Crop an image as in training."""
    return random_resized_crop(image, CROP, dataset.scale, dataset.ratio, seed)


def our_epoch(place: Path, batch: int, workers: int) -> Timing:
    """Measure an epoch of the loader, after a first one."""
    torch.set_num_threads(1)
    loader = build_dataloader(open_set(place, batch, workers), config_of(place, workers), False)
    return epoch_of(loader, len(loader) * batch)


def their_epoch(tars: Path, batch: int, workers: int, webdataset: Path) -> Timing:
    """Measure an epoch of open_clip's loader, after a first one."""
    sys.path.insert(0, str(webdataset))
    import open_clip
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    # as in a training script; a process that is spawned would spawn its workers, too
    multiprocessing.set_start_method("fork", force=True)
    names = sorted(tars.glob("*.tar"))
    samples = 0
    for name in names:
        with tarfile.open(name) as tar:
            samples += len(tar.getnames()) // 2
    arguments = Namespace(
        train_data="::".join(map(str, names)),
        train_num_samples=samples // (batch * workers) * batch * workers,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=batch,
        workers=workers,
        world_size=1,
    )
    preprocess = open_clip.image_transform(CROP, is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    loader = get_wds_dataset(arguments, preprocess, is_train=True, tokenizer=tokenizer).dataloader
    return epoch_of(loader, loader.num_samples)


def epoch_of(loader: Iterable[Any], samples: int) -> Timing:
    """Measure an epoch, after a first one."""
    for _ in loader:
        pass

    def cpu() -> float:
        children = multiprocessing.active_children()
        return sum(map(cpu_seconds, children)) if children else time.process_time()

    def epoch() -> None:
        for _ in loader:
            pass

    return a_sample(epoch, samples, cpu)


def cpu_seconds(process: multiprocessing.process.BaseProcess) -> float:
    """Return the CPU seconds that another process has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    user, system = fields.split()[11:13]
    return (int(user) + int(system)) / TICKS


def a_sample(work: Callable[[], object], samples: int, cpu: Callable[[], float]) -> Timing:
    """Measure a piece of work, in milliseconds a sample."""
    start, before = time.perf_counter(), cpu()
    work()
    seconds, used = time.perf_counter() - start, cpu() - before
    return Timing(1000 * seconds / samples, 1000 * used / samples, 0)


# parts


def print_parts(place: Path, options: Namespace, figures: Figures) -> None:
    """Measure what a batch is made of, and print the parts."""
    found = [
        in_a_process(parts_of_batches, place, options.batch).result for _ in range(options.repeats)
    ]
    print(f"\n{'a part of a batch':22}{'CPU ms':>9}")
    for name in found[0]:
        cpu = figures.add(f"part {name}/cpu", [one[name] for one in found], "ms", "lower", False)
        print(f"{name:22}{cpu:9.3f}")


def parts_of_batches(place: Path, batch: int) -> Timing:
    """Measure each part of all whole batches, in CPU milliseconds a sample."""
    torch.set_num_threads(1)
    dataset = open_set(place, batch, 0)
    ids = torch.randperm(dataset.size, generator=torch.Generator().manual_seed(0)).tolist()
    used: dict[str, float] = {}
    samples = 0

    def part(name: str, work: Callable[[Any], Any], argument: Any) -> Any:
        start = time.process_time()
        found = work(argument)
        used[name] = used.get(name, 0.0) + 1000 * (time.process_time() - start)
        return found

    def crops(images: list[torch.Tensor]) -> list[torch.Tensor]:
        return [crop_of(dataset, image, i) for i, image in enumerate(images)]

    for begin in range(0, len(ids) - batch + 1, batch):
        some = ids[begin : begin + batch]
        rows = part("rows are read", lambda ids: [dataset.get_item(at) for at in ids], some)
        stored, captions = [row["image"] for row in rows], [row["caption"] for row in rows]
        images = part("images are decoded", lambda files: [*map(decode_image, files)], stored)
        part("crops", crops, images)
        part("captions", dataset.tokenizer, captions)
        part("the whole batch", dataset.batch_of, some)
        samples += batch
    return Timing(0.0, 0.0, 0, {name: one / samples for name, one in used.items()})


if __name__ == "__main__":
    main()
