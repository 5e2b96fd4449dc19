"""The published classification sets: a table of their splits, sizes and readers.

How to add a set: write a reader, or use :func:`read_torchvision` for a set that torchvision reads;
add a line to :data:`CLASSIFICATION_SETS`, and a row to the table in ``convert/README.md``.
"""

from __future__ import annotations

import gzip
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.conversion import class_folders
from alignclip.conversion.class_folders import ClassificationContent
from alignclip.conversion.class_names import benchmark_lists
from alignclip.conversion.evaluation_sets import INSTALL, README, EvaluationSample
from alignclip.conversion.layouts import (
    Part,
    file_named,
    find_part,
    folder_named,
    folder_with,
    laid_out,
)
from alignclip.errors import UserError, one_line

# torchvision is imported where it is used: the import takes seconds, and a mistake in the command
# line should be told before.


@dataclass(frozen=True)
class ClassificationSource:
    """The reader of a classification set.

    Attributes:
        read: from the folder of ``--root`` and a split to the content.
        sizes: split -> images, as the publishers count them; empty where any split's name will do.
    """

    read: Callable[[Path, str], ClassificationContent]
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@contextmanager
def reading(root: Path, checked: str = "") -> Iterator[None]:
    """Turn what a reader raises into one line: torchvision's own messages advise to download.

    Args:
        root: the folder that is read, for the message.
        checked: the files whose MD5 torchvision checks; it says the same where a file is missing.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"reading {root} needs {error.name}: {INSTALL}") from None
    except Exception as error:  # torchvision, pickle, scipy and struct raise nearly anything
        why = one_line(error)
        if "not found or corrupted" in why or "Dataset not found" in why:
            why = "files are missing"
            why += f", or {checked} are not the published ones by their MD5" if checked else ""
        raise UserError(f"cannot read {root}: {why}; {README}") from error


def read_torchvision(
    root: Path,
    split: str,
    kind: str,
    parts: Mapping[str, Part],
    checked: str = "",
    names: Callable[[Any], list[str]] = lambda source: source.classes,
) -> ClassificationContent:
    """Read a set of files by torchvision's class, through private attributes.

    torchvision's ``loader=``, which would give the paths, came with 0.22 only.

    Args:
        root: the folder of ``--root``.
        split: its name.
        kind: the class in ``torchvision.datasets``.
        parts: place below torchvision's root -> the part of the set that belongs there.
        checked: see :func:`reading`.
        names: from torchvision's set to the class names.
    """
    with laid_out(root, parts, README) as layout, reading(root, checked):
        from torchvision import datasets

        source = getattr(datasets, kind)(layout.root, split=split, download=False)
        if hasattr(source, "_samples"):
            labelled = source._samples
        else:
            labelled = zip(source._image_files, source._labels, strict=True)
        samples = [EvaluationSample(*layout.locate(file), int(label)) for file, label in labelled]
        return ClassificationContent(samples, names(source))


def read_cifar(root: Path, split: str, folder: str, kind: str) -> ClassificationContent:
    """https://www.cs.toronto.edu/~kriz/cifar.html, the archives for Python."""
    members = ("meta", "train", "test") if kind == "CIFAR100" else ("batches.meta", "test_batch")
    with (
        laid_out(root, {folder: folder_with(folder, *members)}, README) as layout,
        reading(layout.links[folder], f"{folder}'s files"),
    ):
        from torchvision import datasets

        source = getattr(datasets, kind)(layout.root, train=split == "train", download=False)
        return ClassificationContent(_numbered(source.data, source.targets), source.classes)


def read_flowers(root: Path, split: str) -> ClassificationContent:
    """https://www.robots.ox.ac.uk/~vgg/data/flowers/102/."""
    names = benchmark_lists("en_classnames.json")["flowers"]
    lists = ("imagelabels.mat", "setid.mat")
    parts = {
        "flowers-102/jpg": folder_with("jpg", "image_00001.jpg"),
        **{f"flowers-102/{name}": file_named(name) for name in lists},
    }
    checked = " and ".join(lists)
    return read_torchvision(root, split, "Flowers102", parts, checked, lambda _: names)


def read_food(root: Path, split: str) -> ClassificationContent:
    """https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/."""
    parts = {
        "food-101/images": folder_with("images", "apple_pie"),
        "food-101/meta": folder_named("meta", f"{split}.json"),
    }

    def names(source: Any) -> list[str]:  # as clip_benchmark does
        return [name.replace("_", " ") for name in source.classes]

    return read_torchvision(root, split, "Food101", parts, names=names)


def read_pets(root: Path, split: str) -> ClassificationContent:
    """https://www.robots.ox.ac.uk/~vgg/data/pets/.

    A line of the lists is an image's name, its class from 1, the species, the breed.
    """
    lists = f"oxford-iiit-pet/annotations/{split}.txt"
    parts = {
        "oxford-iiit-pet/images": folder_named("images", "*.jpg"),
        lists: file_named(f"annotations/{split}.txt"),
    }
    with laid_out(root, parts, README) as layout, reading(root):
        lines = (layout.root / lists).read_text(encoding="utf-8").splitlines()
        rows = [line.split()[:2] for line in lines]
        samples = [
            EvaluationSample(
                *layout.locate(layout.root / f"oxford-iiit-pet/images/{name}.jpg"), int(label) - 1
            )
            for name, label in rows
        ]
        return ClassificationContent(samples, benchmark_lists("en_classnames.json")["pets"])


def read_cars(root: Path, split: str) -> ClassificationContent:
    """Read Stanford Cars as published: ``cars_train`` and ``cars_test``, or ``car_ims``.

    The publisher's page is gone; https://github.com/pytorch/vision/issues/7545 lists mirrors.
    """
    with reading(root):
        importlib.import_module("scipy.io")  # torchvision's own error doesn't say who needs it
    if find_part(root, folder_named("car_ims", "*.jpg")) is not None:
        return _read_cars_as_one(root, split)
    place, pattern = "devkit/cars_train_annos.mat", "cars_train_annos.mat"
    if split == "test":
        place, pattern = "cars_test_annos_withlabels.mat", "cars_test_annos_withlabels*.mat"
        unlabelled = find_part(root, file_named("cars_test_annos.mat"))
        if unlabelled and find_part(root, file_named(pattern)) is None:
            raise UserError(
                f"{unlabelled} has no labels (it is the devkit's, of the challenge): put {place} "
                f"below --root {root} as well; {README}"
            )
    parts = {
        f"stanford_cars/cars_{split}": folder_named(f"cars_{split}", "*.jpg"),
        f"stanford_cars/{place}": file_named(pattern),
        "stanford_cars/devkit/cars_meta.mat": file_named("cars_meta.mat"),
    }
    return read_torchvision(root, split, "StanfordCars", parts)


def _read_cars_as_one(root: Path, split: str) -> ClassificationContent:
    """Read ``car_ims``, where ``cars_annos.mat`` says which images are for testing."""
    parts = {
        "car_ims": folder_named("car_ims", "*.jpg"),
        "cars_annos.mat": file_named("cars_annos.mat"),
    }
    with laid_out(root, parts, README) as layout, reading(root):
        from scipy.io import loadmat

        content = loadmat(layout.root / "cars_annos.mat", squeeze_me=True)
        samples = [
            EvaluationSample(
                *layout.locate(layout.root / str(row["relative_im_path"])), int(row["class"]) - 1
            )
            for row in content["annotations"]
            if bool(row["test"]) == (split == "test")
        ]
        return ClassificationContent(samples, [str(name) for name in content["class_names"]])


def read_fashion_mnist(root: Path, split: str) -> ClassificationContent:
    """https://github.com/zalandoresearch/fashion-mnist: two IDX files a split, gzipped or not."""
    prefix = "train" if split == "train" else "t10k"
    files = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = (f"{prefix}-{kind}", f"{prefix}-{kind.replace('-idx', '.idx')}")  # a mirror's dot
        found = find_part(root, file_named(*(name + end for name in names for end in ("", ".gz"))))
        if found is None:
            raise UserError(f"there is no {names[0]}[.gz] in --root {root}; {README}")
        files.append(found)
    with tempfile.TemporaryDirectory(prefix="alignclip-") as temporary, reading(files[0].parent):
        from torchvision.datasets import FashionMNIST
        from torchvision.datasets.mnist import read_image_file, read_label_file

        for i, file in enumerate(files):
            if file.suffix == ".gz":
                files[i] = Path(temporary) / file.stem
                with gzip.open(file) as packed, files[i].open("wb") as plain:
                    shutil.copyfileobj(packed, plain)
        images = read_image_file(str(files[0])).numpy()
        labels = read_label_file(str(files[1])).numpy()
        classes = list(FashionMNIST.classes)
        _check_fashion_mnist(root, images, labels, len(classes))
        return ClassificationContent(_numbered(images, labels), classes)


def _check_fashion_mnist(root: Path, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """Refuse files that don't belong together, and MNIST, whose files have the same names.

    Raises:
        UserError: says what the files hold.
    """
    if len(images) != len(labels) or labels.max() >= classes:
        numbers = f"{len(images):,} images, {len(labels):,} labels up to {labels.max()}"
        raise UserError(f"the files in {root} are no Fashion-MNIST: {numbers}")
    counts = np.bincount(labels, minlength=classes)
    if len(labels) in (10_000, 60_000) and counts.min() != counts.max():
        raise UserError(
            f"the files in {root} are no Fashion-MNIST, which has {len(labels) // classes:,} "
            f"images of each class; here are {counts.min():,} to {counts.max():,}, as in MNIST, "
            "whose files have the same names"
        )


def _numbered(images: Any, labels: Any) -> list[EvaluationSample]:
    """Return samples of a set without files: the index is the key."""
    pairs = enumerate(zip(images, labels, strict=True))
    return [EvaluationSample(f"{i:05}", image, int(label)) for i, (image, label) in pairs]


def _cifar(folder: str, kind: str) -> ClassificationSource:
    sizes = {"train": (50_000,), "test": (10_000,)}
    return ClassificationSource(partial(read_cifar, folder=folder, kind=kind), sizes)


def _imagenet(synset_list: str | None, *folders: str, **sizes: int) -> ClassificationSource:
    read = partial(class_folders.read_imagenet, folders=folders, synset_list=synset_list)
    return ClassificationSource(read, {split: (size,) for split, size in sizes.items()})


CLASSIFICATION_SETS = {
    "cifar10": _cifar("cifar-10-batches-py", "CIFAR10"),
    "cifar100": _cifar("cifar-100-python", "CIFAR100"),
    "flowers": ClassificationSource(
        read_flowers, {"train": (1_020,), "val": (1_020,), "test": (6_149,)}
    ),
    "food101": ClassificationSource(read_food, {"train": (75_750,), "test": (25_250,)}),
    "pets": ClassificationSource(read_pets, {"trainval": (3_680,), "test": (3_669,)}),
    "cars": ClassificationSource(read_cars, {"train": (8_144,), "test": (8_041,)}),
    "fashion_mnist": ClassificationSource(
        read_fashion_mnist, {"train": (60_000,), "test": (10_000,)}
    ),
    "imagenet1k": _imagenet("imagenet", train=1_281_167, val=50_000),
    "imagenetv2": ClassificationSource(class_folders.read_imagenet_v2, {"test": (10_000,)}),
    "imagenet-a": _imagenet("imagenet_a", "imagenet-a", test=7_500),
    "imagenet-r": _imagenet("imagenet_r", "imagenet-r", test=30_000),
    "imagenet-o": _imagenet(None, "imagenet-o", test=2_000),
    "imagenet-sketch": _imagenet("imagenet", "sketch", "imagenet_sketch", test=50_889),
    "folder": ClassificationSource(class_folders.read_folder),
}
