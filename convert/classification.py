"""Convert an image classification set to MDS shards for zero-shot evaluation and linear probes.

Columns: ``key`` (str: the path in the source, or the index), ``image`` (bytes: the file as it is; PNG where the source
has pixels), ``label`` (int). ``classes.json`` beside the index has the class names, in the order of the labels, and the
prompt templates. Sources are read as their publishers lay them out: see ``convert/README.md``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignclip.errors import UserError, nearest, one_line
from convert.evaluation_sets import (
    INSTALL,
    README,
    Sample,
    benchmark_lists,
    check_output,
    choose_classnames,
    choose_templates,
    find_complete,
    fingerprint,
    local_path,
    missing_files,
    run,
    spread,
    write_set,
)
from convert.storage import Store

# torchvision is imported where it is used: that takes seconds, and a mistake in the command line should not.

CLASSES = "classes.json"
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}

EXAMPLES = """examples:
  # CIFAR-10's test images from data/cifar-10-batches-py
  python convert/classification.py cifar10 --root data --out /data/eval/cifar10

  # ImageNet's validation images from imagenet/val/n01440764/… into a bucket
  python convert/classification.py imagenet1k --root imagenet --out s3://bucket/eval/imagenet1k

  # the training images, for a linear probe
  python convert/classification.py flowers --root data --split train --out /data/eval/flowers-train

  # your own: a folder per class
  python convert/classification.py folder --root birds/test --classnames birds.json --out /data/eval/birds

convert/README.md says where to download each set and which folders are expected.
"""


@dataclass
class Options:
    """What is converted, and where to.

    ``classnames`` and ``templates`` are JSON files that replace the set's own: a list each, or for ``classnames`` an
    object from the set's own names (the folders') to others. ``limit``: that many images, spread over the set.
    """

    dataset: str
    root: str | None
    out: str
    split: str = "test"
    limit: int | None = None
    classnames: str | None = None
    templates: str | None = None
    progress: bool = True


@dataclass(frozen=True)
class Source:
    """How a set is read: its splits, and ``read(root, split)`` -> samples, class names in the order of the labels."""

    splits: tuple[str, ...]
    read: Callable[[Path, str], tuple[list[Sample], list[str]]]


def convert(options: Options) -> str:
    """Convert a classification set and return a summary; a complete one that is there already stays as it is.

    Raises:
        UserError: no such set or split, files missing or not the published ones, class folders too few or too many, the
            output holds another set or cannot be written, clip_benchmark is needed and not installed.
    """
    check_output(options.out, options.limit)
    name = options.dataset.replace("_", "-")
    name = name if name in SOURCES else name.replace("-", "_")
    if name not in SOURCES:
        raise UserError(f"unknown dataset '{options.dataset}'; {nearest(options.dataset, SOURCES)}")
    splits = SOURCES[name].splits
    # ImageNet's own test set has no public labels: clip_benchmark and all papers say test and take val
    split = "val" if name == "imagenet1k" and options.split == "test" else options.split
    if splits and split not in splits:
        raise UserError(f"{name} has no split '{options.split}'; {nearest(options.split, splits)}")
    root = str(Path(options.root or "").expanduser().resolve())
    identity = {
        "dataset": name,
        "split": split,
        "limit": options.limit,
        "classnames": fingerprint("--classnames", options.classnames),
        "templates": fingerprint("--templates", options.templates),
        **({"source": root} if name == "folder" else {}),
    }
    store = Store(options.out)
    if there := find_complete(store, identity):
        return f"{store.out} holds {name} ({split}) already, {there['samples']:,} samples: nothing to do"
    templates = choose_templates(name, options.templates)
    samples, names = SOURCES[name].read(local_path("--root", options.root, folder=True), split)
    samples = spread(samples, options.limit)
    if missing := missing_files(samples):
        raise UserError(f"{len(missing):,} of {len(samples):,} images are missing, the first is {missing[0]}; {README}")
    classes = {
        "dataset": name,
        "classes": len(names),  # of the labels: whoever writes other names in here shall keep to it
        "classnames": choose_classnames(names, options.classnames),
        "templates": templates,
    }
    dataset, packages = {**identity, "source": root}, ("torchvision", "clip-benchmark")
    return write_set(store, samples, ("label", "int"), dataset, {CLASSES: classes}, packages, options.progress)


# sets that torchvision reads


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn what a reader raises into one line: torchvision's own messages advise to download."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {folder} needs {error.name}: {INSTALL}") from None
    except Exception as error:  # torchvision, pickle, scipy and struct raise nearly anything on broken files
        why = one_line(error)
        if "not found or corrupted" in why or "Dataset not found" in why:
            why = "files are missing, or not the published ones by their MD5"
        raise UserError(f"cannot read {folder}: {why}; {README}") from error


def _parent(root: Path, folder: str) -> Path:
    """torchvision's root, which has ``folder`` in it; the folder itself is understood as well."""
    parent = root.parent if root.name == folder and not (root / folder).is_dir() else root
    if not (parent / folder).is_dir():
        raise UserError(f"there is no folder '{folder}' in --root {root}; {README}")
    return parent


def _files(parent: Path, files: Sequence[str | Path], labels: Sequence[Any]) -> list[Sample]:
    pairs = zip(map(Path, files), labels, strict=True)
    return [Sample(file.relative_to(parent).as_posix(), file, int(label)) for file, label in pairs]


def _cifar(root: Path, split: str, folder: str, kind: str) -> tuple[list[Sample], list[str]]:
    parent = _parent(root, folder)
    with _reading(parent / folder):
        from torchvision import datasets

        source = getattr(datasets, kind)(parent, train=split == "train", download=False)
        pairs = enumerate(zip(source.data, source.targets, strict=True))
        return [Sample(f"{i:05}", pixels, int(label)) for i, (pixels, label) in pairs], source.classes


# The three below are read through private attributes: `loader=`, which would give the paths, came with 0.22 only.


def _flowers(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    parent = _parent(root, "flowers-102")
    names = benchmark_lists("en_classnames.json")["flowers"]
    with _reading(parent / "flowers-102"):
        from torchvision.datasets import Flowers102

        source = Flowers102(parent, split=split, download=False)
        return _files(parent, source._image_files, source._labels), names


def _food(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    parent = _parent(root, "food-101")
    with _reading(parent / "food-101"):
        from torchvision.datasets import Food101

        source = Food101(parent, split=split, download=False)
        names = [name.replace("_", " ") for name in source.classes]  # as clip_benchmark does
        return _files(parent, source._image_files, source._labels), names


def _cars(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    parent = _parent(root, "stanford_cars")
    with _reading(parent / "stanford_cars"):
        importlib.import_module("scipy.io")  # torchvision's own error doesn't say who needs it
        from torchvision.datasets import StanfordCars

        source = StanfordCars(parent, split=split, download=False)
        files, labels = zip(*source._samples, strict=True)
        return _files(parent, files, labels), source.classes


def _fashion_mnist(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """IDX files, gzipped or not, in the root (as Debian installs them) or in torchvision's ``FashionMNIST/raw``."""
    prefix = "train" if split == "train" else "t10k"
    files = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        folders = (root, root / "fashion-mnist", root / "FashionMNIST" / "raw")
        found = [path for folder in folders for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not found:
            raise UserError(f"there is no {name}[.gz] in --root {root}; {README}")
        files.append(found[0])
    with tempfile.TemporaryDirectory(prefix="alignclip-") as temporary, _reading(files[0].parent):
        from torchvision.datasets import FashionMNIST
        from torchvision.datasets.mnist import read_image_file, read_label_file

        for i, file in enumerate(files):
            if file.suffix == ".gz":
                files[i] = Path(temporary) / file.stem
                with gzip.open(file) as packed, files[i].open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
        images, labels = read_image_file(str(files[0])).numpy(), read_label_file(str(files[1])).tolist()
        if len(images) != len(labels) or max(labels) >= len(FashionMNIST.classes):
            numbers = f"{len(images):,} images, {len(labels):,} labels up to {max(labels)}"
            raise UserError(f"the files in {root} are no Fashion-MNIST: {numbers}")
        samples = [Sample(f"{i:05}", image, label) for i, (image, label) in enumerate(zip(images, labels, strict=True))]
        return samples, list(FashionMNIST.classes)


# sets with a folder per class


def _synsets(name: str) -> list[str]:
    """The WordNet ids of ``imagenet`` (1,000), ``imagenet_a`` or ``imagenet_r`` (200 of them), sorted: timm's lists."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "_info" / f"{name}_synsets.txt"
    return sorted(path.read_text(encoding="utf-8").split())


def _class_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images_in(root: Path, labels: dict[str, int], all_filled: bool = True) -> list[Sample]:
    """The images of these class folders, sorted by label and path."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    samples: list[Sample] = []
    for folder, label in tqdm(sorted(labels.items(), key=lambda item: item[1]), "listing", unit=" classes", delay=2):
        found = make_dataset(root, {folder: label}, extensions=IMG_EXTENSIONS, allow_empty=True)
        if all_filled and not found:
            raise UserError(f"the class folder {root / folder} has no images; {README}")
        samples += _files(root, *zip(*found, strict=True)) if found else []
    return samples


def _imagenet(root: Path, split: str, folders: tuple[str, ...], synsets: str | None) -> tuple[list[Sample], list[str]]:
    """Folders named by WordNet ids; labels are positions among the set's own ids, sorted, as in clip_benchmark.

    ``folders``: names below the root (none: the split's), the first that is there; else the root itself. ``synsets``:
    timm's list; None: any 200 of the 1,000, ImageNet-O's.
    """
    where = next((root / name for name in folders or (split,) if (root / name).is_dir()), root)
    thousand = _synsets("imagenet")
    names = dict(zip(thousand, benchmark_lists("en_classnames.json")["imagenet1k"], strict=True))
    found = _class_folders(where)
    expected = _synsets(synsets) if synsets else thousand
    number = len(expected) if synsets else 200
    if strange := sorted(set(found) - set(expected)):
        raise UserError(f"{where} has {len(found):,} class folders, and '{strange[0]}' is none of the set's; {README}")
    if len(found) != number:
        first = f"; the first one missing is {min(set(expected) - set(found))}" if synsets else ""
        raise UserError(f"{where} has {len(found):,} class folders instead of {number:,}{first}; {README}")
    return _images_in(where, {wnid: i for i, wnid in enumerate(found)}), [names[wnid] for wnid in found]


def _imagenet_v2(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """Folders named 0 to 999, by ImageNet's class index: sorted as strings, 10 would be the third."""
    known = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")  # the tar's, clip_benchmark's
    where = next((root / name for name in known if (root / name).is_dir()), root)
    labels = {str(i): i for i in range(1000)}
    found = set(_class_folders(where))
    missing = [name for name in labels if name not in found]
    if missing or len(found) != len(labels):
        other = f"missing is {missing[0]}" if missing else f"too many is {min(found - set(labels))}"
        raise UserError(f"{where} has {len(found):,} class folders instead of 1,000; the first one {other}; {README}")
    return _images_in(where, labels), benchmark_lists("en_classnames.json")["imagenet1k"]


def _folder(root: Path, split: str) -> tuple[list[Sample], list[str]]:
    """Any folder with a folder per class, whose names sorted are the classes; an empty one is a class as well."""
    found = _class_folders(root)
    if not found:
        raise UserError(f"--root {root} has no sub-folders; a folder per class is expected")
    if {name.lower() for name in found} <= SPLIT_NAMES:
        raise UserError(f"the sub-folders of --root {root} are splits, not classes: give {root / found[0]}, say")
    return _images_in(root, {name: i for i, name in enumerate(found)}, all_filled=False), found


TRAIN_TEST = ("train", "test")
SOURCES = {
    "cifar10": Source(TRAIN_TEST, partial(_cifar, folder="cifar-10-batches-py", kind="CIFAR10")),
    "cifar100": Source(TRAIN_TEST, partial(_cifar, folder="cifar-100-python", kind="CIFAR100")),
    "flowers": Source(("train", "val", "test"), _flowers),
    "food101": Source(TRAIN_TEST, _food),
    "cars": Source(TRAIN_TEST, _cars),
    "fashion_mnist": Source(TRAIN_TEST, _fashion_mnist),
    "imagenet1k": Source(("train", "val"), partial(_imagenet, folders=(), synsets="imagenet")),
    "imagenetv2": Source(("test",), _imagenet_v2),
    "imagenet-a": Source(("test",), partial(_imagenet, folders=("imagenet-a",), synsets="imagenet_a")),
    "imagenet-r": Source(("test",), partial(_imagenet, folders=("imagenet-r",), synsets="imagenet_r")),
    "imagenet-o": Source(("test",), partial(_imagenet, folders=("imagenet-o",), synsets=None)),
    "imagenet-sketch": Source(("test",), partial(_imagenet, folders=("sketch", "imagenet_sketch"), synsets="imagenet")),
    "folder": Source((), _folder),
}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="convert/classification.py",
        description="Convert an image classification set to MDS shards for evaluation.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=", ".join(SOURCES))
    add("--root", metavar="FOLDER", help="where the set's files lie")
    add("--out", required=True, metavar="FOLDER", help="local folder, or s3://, gs://, oci://, azure:// …")
    add("--split", default="test", help="train, val, test, as far as the set has them (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only N images, spread evenly over the set (default: all)")
    add("--classnames", metavar="FILE", help="JSON list of names, or object from classes to names (default: the set's)")
    add("--templates", metavar="FILE", help='JSON list of prompts such as "a photo of a {c}." (default: the set\'s)')
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary."""
    options = parse(arguments)
    run(lambda: convert(options))


if __name__ == "__main__":
    main()
