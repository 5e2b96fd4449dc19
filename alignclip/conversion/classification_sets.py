"""The published classification sets: a table of their splits, sizes and readers.

How to add a set: write a reader, or use :func:`read_torchvision` for a set that torchvision reads;
add a line to :data:`CLASSIFICATION_SETS`, and a row to the table in ``convert/README.md``.
"""

from __future__ import annotations

import gzip
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from alignclip.conversion.published import PublishedSet
from alignclip.errors import UserError, one_line

LARGEST_IDX = 2**26  # bytes: 60,000 images of 28 × 28, and some more

# torchvision is imported where it is used: the import takes seconds, and a mistake in the command
# line should be told before.


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
    names: list[str] | None = None,
) -> ClassificationContent:
    """Read a set of files by torchvision's class, through private attributes.

    torchvision's ``loader=``, which would give the paths, came with 0.22 only.

    Args:
        root: the folder of ``--root``.
        split: its name.
        kind: the class in ``torchvision.datasets``.
        parts: place below torchvision's root -> the part of the set that belongs there.
        checked: see :func:`reading`.
        names: of the classes; None: torchvision's.
    """
    with laid_out(root, parts, README) as layout, reading(root, checked):
        from torchvision import datasets

        source = getattr(datasets, kind)(layout.root, split=split, download=False)
        if hasattr(source, "_samples"):
            labelled = source._samples
        else:
            files = source._images if kind == "OxfordIIITPet" else source._image_files
            labelled = zip(files, source._labels, strict=True)
        samples = [EvaluationSample(*layout.locate(file), int(label)) for file, label in labelled]
        return ClassificationContent(samples, names or source.classes)


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
    return read_torchvision(root, split, "Flowers102", parts, " and ".join(lists), names)


def read_food(root: Path, split: str) -> ClassificationContent:
    """https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/."""
    parts = {
        "food-101/images": folder_with("images", "apple_pie"),
        "food-101/meta": folder_named("meta", f"{split}.json"),
    }
    content = read_torchvision(root, split, "Food101", parts)
    # as clip_benchmark does
    return replace(content, classnames=[name.replace("_", " ") for name in content.classnames])


def read_pets(root: Path, split: str) -> ClassificationContent:
    """https://www.robots.ox.ac.uk/~vgg/data/pets/."""
    names = benchmark_lists("en_classnames.json")["pets"]
    parts = {
        "oxford-iiit-pet/images": folder_named("images", "*.jpg"),
        "oxford-iiit-pet/annotations": folder_named("annotations", f"{split}.txt"),
    }
    return read_torchvision(root, split, "OxfordIIITPet", parts, names=names)


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
    with reading(files[0].parent):
        from torchvision.datasets import FashionMNIST

        images, labels = _read_idx(files[0], axes=3), _read_idx(files[1], axes=1)
        classes = list(FashionMNIST.classes)
        _check_fashion_mnist(root, images, labels, len(classes))
        return ClassificationContent(_numbered(images, labels), classes)


def _read_idx(file: Path, axes: int) -> np.ndarray:
    """Read an IDX file: 0, 0, 8 for bytes, the number of axes; the length of each axis; the bytes.

    Raises:
        ValueError: the file is none, or has not so many axes.
    """
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
        data = opened.read(LARGEST_IDX + 1)
    if len(data) > LARGEST_IDX:
        raise ValueError(f"{file.name} is larger than any IDX file of the set")
    if data[:4] != bytes((0, 0, 8, axes)):
        raise ValueError(f"{file.name} is no IDX file of {axes} axes")
    lengths = np.frombuffer(data, ">u4", count=axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + lengths.nbytes).reshape(lengths)


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


ClassificationSet = PublishedSet[[Path, str], ClassificationContent]


def _cifar(folder: str, kind: str) -> ClassificationSet:
    read = partial(read_cifar, folder=folder, kind=kind)
    return PublishedSet(read, {"train": 50_000, "test": 10_000})


def _imagenet(synset_list: str | None, *folders: str, **sizes: int) -> ClassificationSet:
    read = partial(class_folders.read_imagenet, folders=folders, synset_list=synset_list)
    return PublishedSet(read, sizes)


CLASSIFICATION_SETS: dict[str, ClassificationSet] = {
    "cifar10": _cifar("cifar-10-batches-py", "CIFAR10"),
    "cifar100": _cifar("cifar-100-python", "CIFAR100"),
    "flowers": PublishedSet(read_flowers, {"train": 1_020, "val": 1_020, "test": 6_149}),
    "food101": PublishedSet(read_food, {"train": 75_750, "test": 25_250}),
    "pets": PublishedSet(read_pets, {"trainval": 3_680, "test": 3_669}),
    "cars": PublishedSet(read_cars, {"train": 8_144, "test": 8_041}),
    "fashion_mnist": PublishedSet(read_fashion_mnist, {"train": 60_000, "test": 10_000}),
    "imagenet1k": _imagenet("imagenet", train=1_281_167, val=50_000),
    "imagenetv2": PublishedSet(class_folders.read_imagenet_v2, {"test": 10_000}),
    "imagenet-a": _imagenet("imagenet_a", "imagenet-a", test=7_500),
    "imagenet-r": _imagenet("imagenet_r", "imagenet-r", test=30_000),
    "imagenet-o": _imagenet(None, "imagenet-o", test=2_000),
    "imagenet-sketch": _imagenet("imagenet", "sketch", "imagenet_sketch", test=50_889),
    "folder": PublishedSet(class_folders.read_folder),
}
