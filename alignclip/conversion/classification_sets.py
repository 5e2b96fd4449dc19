"""Readers of classification sets that torchvision reads: CIFAR, Flowers-102, Food-101, Cars, Fashion-MNIST."""

from __future__ import annotations

import gzip
import importlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.conversion.evaluation_sets import INSTALL, README, Sample, benchmark_lists
from alignclip.conversion.layouts import (
    Layout,
    file_named,
    find,
    folder_named,
    folder_with,
    laid_out,
)
from alignclip.errors import UserError, one_line

# torchvision is imported where it is used: the import takes seconds, and a mistake in the command
# line should be told before.


@dataclass(frozen=True)
class Content:
    """What a set holds.

    Attributes:
        samples: the images of a split with their labels.
        classnames: in the order of the labels.
        notes: sentences for the summary, about what is not as published.
    """

    samples: list[Sample]
    classnames: list[str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """How a set is read.

    Attributes:
        splits: their names; empty where any name will do.
        read: from the folder of ``--root`` and a split to the content.
    """

    splits: tuple[str, ...]
    read: Callable[[Path, str], Content]


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


def _samples(layout: Layout, files: Sequence[str | Path], labels: Sequence[Any]) -> list[Sample]:
    located = zip(map(layout.locate, files), labels, strict=True)
    return [Sample(place, file, int(label)) for (place, file), label in located]


def read_cifar(root: Path, split: str, folder: str, kind: str) -> Content:
    """https://www.cs.toronto.edu/~kriz/cifar.html, the archives for Python."""
    members = ("meta", "train", "test") if kind == "CIFAR100" else ("batches.meta", "test_batch")
    with laid_out(root, {folder: folder_with(folder, *members)}, README) as layout:
        checked = f"{folder}'s files"
        with reading(layout.links[folder], checked):
            from torchvision import datasets

            train = split == "train"
            source = getattr(datasets, kind)(layout.root, train=train, download=False)
            pairs = enumerate(zip(source.data, source.targets, strict=True))
            samples = [Sample(f"{i:05}", pixels, int(label)) for i, (pixels, label) in pairs]
            return Content(samples, source.classes)


# The next three are read through private attributes of torchvision's classes: `loader=`, which
# would give the paths, came with 0.22 only.


def read_flowers(root: Path, split: str) -> Content:
    """https://www.robots.ox.ac.uk/~vgg/data/flowers/102/."""
    names = benchmark_lists("en_classnames.json")["flowers"]
    parts = {
        "flowers-102/jpg": folder_with("jpg", "image_00001.jpg"),
        "flowers-102/imagelabels.mat": file_named("imagelabels.mat"),
        "flowers-102/setid.mat": file_named("setid.mat"),
    }
    checked = "imagelabels.mat and setid.mat"
    with laid_out(root, parts, README) as layout, reading(root, checked):
        from torchvision.datasets import Flowers102

        source = Flowers102(layout.root, split=split, download=False)
        return Content(_samples(layout, source._image_files, source._labels), names)


def read_food(root: Path, split: str) -> Content:
    """https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/."""
    parts = {
        "food-101/images": folder_with("images", "apple_pie"),
        "food-101/meta": folder_named("meta", f"{split}.json"),
    }
    with laid_out(root, parts, README) as layout, reading(root):
        from torchvision.datasets import Food101

        source = Food101(layout.root, split=split, download=False)
        names = [name.replace("_", " ") for name in source.classes]  # as clip_benchmark does
        return Content(_samples(layout, source._image_files, source._labels), names)


def read_cars(root: Path, split: str) -> Content:
    """Stanford Cars, as the publisher had them: ``cars_train`` and ``cars_test``, or ``car_ims``.

    The publisher's page is gone; https://github.com/pytorch/vision/issues/7545 lists mirrors.
    """
    with reading(root):
        importlib.import_module("scipy.io")  # torchvision's own error doesn't say who needs it
    if find(root, folder_named("car_ims", "*.jpg")) is not None:
        return _read_cars_as_one(root, split)
    if split == "train":
        place, part = "devkit/cars_train_annos.mat", file_named("cars_train_annos.mat")
    else:
        place, part = (
            "cars_test_annos_withlabels.mat",
            file_named("cars_test_annos_withlabels*.mat"),
        )
        if find(root, part) is None and (other := find(root, file_named("cars_test_annos.mat"))):
            raise UserError(
                f"{other} has no labels (it is the devkit's, of the challenge): put "
                f"cars_test_annos_withlabels.mat below --root {root} as well; {README}"
            )
    parts = {
        f"stanford_cars/cars_{split}": folder_named(f"cars_{split}", "*.jpg"),
        f"stanford_cars/{place}": part,
        "stanford_cars/devkit/cars_meta.mat": file_named("cars_meta.mat"),
    }
    with laid_out(root, parts, README) as layout, reading(root):
        from torchvision.datasets import StanfordCars

        source = StanfordCars(layout.root, split=split, download=False)
        files, labels = zip(*source._samples, strict=True)
        return Content(_samples(layout, files, labels), source.classes)


def _read_cars_as_one(root: Path, split: str) -> Content:
    """All images in ``car_ims``; ``cars_annos.mat`` says which are for testing."""
    parts = {
        "car_ims": folder_named("car_ims", "*.jpg"),
        "cars_annos.mat": file_named("cars_annos.mat"),
    }
    with laid_out(root, parts, README) as layout, reading(root):
        from scipy.io import loadmat

        content = loadmat(layout.root / "cars_annos.mat", squeeze_me=True)
        rows = [row for row in content["annotations"] if bool(row["test"]) == (split == "test")]
        files = [layout.root / str(row["relative_im_path"]) for row in rows]
        samples = _samples(layout, files, [int(row["class"]) - 1 for row in rows])
        return Content(samples, [str(name) for name in content["class_names"]])


def read_fashion_mnist(root: Path, split: str) -> Content:
    """https://github.com/zalandoresearch/fashion-mnist: two IDX files a split, gzipped or not."""
    prefix = "train" if split == "train" else "t10k"
    files = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = (f"{prefix}-{kind}", f"{prefix}-{kind.replace('-idx', '.idx')}")  # a mirror's dot
        part = file_named(*(name + end for name in names for end in ("", ".gz")))
        found = find(root, part)
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
        samples = [
            Sample(f"{i:05}", image, int(label))
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        return Content(samples, classes)


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
            f"the files in {root} are no Fashion-MNIST, which has {len(labels) // classes:,} images "
            f"of each class; here are {counts.min():,} to {counts.max():,}, as in MNIST, whose files "
            "have the same names"
        )
