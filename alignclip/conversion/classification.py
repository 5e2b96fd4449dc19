"""Convert an image classification set to MDS shards for zero-shot evaluation and linear probes.

Columns: ``key`` (str: the path in the source, or the index), ``image`` (bytes: the file as it is; PNG where the source
has pixels), ``label`` (int). ``classes.json`` beside the index has the class names, in the order of the labels, and the
prompt templates. Sources are read as their publishers lay them out: see ``convert/README.md``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alignclip.conversion import class_folders, classification_sets
from alignclip.conversion.classification_sets import Source
from alignclip.conversion.evaluation_sets import (
    README,
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
from alignclip.conversion.published import difference
from alignclip.errors import UserError, nearest
from alignclip.paths import option
from alignclip.runtime import console
from alignclip.storage.staging import OutputFolder

CLASSES = "classes.json"

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


TRAIN_TEST = ("train", "test")
TEST = ("test",)


def _cifar(folder: str, kind: str) -> Source:
    return Source(TRAIN_TEST, partial(classification_sets.read_cifar, folder=folder, kind=kind))


def _imagenet(splits: tuple[str, ...], synset_list: str | None, *folders: str) -> Source:
    read = partial(class_folders.read_imagenet, folders=folders, synset_list=synset_list)
    return Source(splits, read)


SOURCES = {
    "cifar10": _cifar("cifar-10-batches-py", "CIFAR10"),
    "cifar100": _cifar("cifar-100-python", "CIFAR100"),
    "flowers": Source(("train", "val", "test"), classification_sets.read_flowers),
    "food101": Source(TRAIN_TEST, classification_sets.read_food),
    "cars": Source(TRAIN_TEST, classification_sets.read_cars),
    "fashion_mnist": Source(TRAIN_TEST, classification_sets.read_fashion_mnist),
    "imagenet1k": _imagenet(("train", "val"), "imagenet"),
    "imagenetv2": Source(TEST, class_folders.read_imagenet_v2),
    "imagenet-a": _imagenet(TEST, "imagenet_a", "imagenet-a"),
    "imagenet-r": _imagenet(TEST, "imagenet_r", "imagenet-r"),
    "imagenet-o": _imagenet(TEST, None, "imagenet-o"),
    "imagenet-sketch": _imagenet(TEST, "imagenet", "sketch", "imagenet_sketch"),
    "folder": Source((), class_folders.read_folder),
}


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
    store = OutputFolder(options.out)
    if there := find_complete(store, identity):
        return f"{store.out} holds {name} ({split}) already, {there['samples']:,} samples: nothing to do"
    templates = choose_templates(name, options.templates)
    content = SOURCES[name].read(local_path("--root", options.root, folder=True), split)
    names, samples = content.classnames, spread(content.samples, options.limit)
    differs = difference(name, split, len(content.samples))
    notes = [*content.notes, *([differs] if differs else [])]
    if missing := missing_files(samples):
        raise UserError(
            f"{len(missing):,} of {len(samples):,} images are missing, the first is {missing[0]}; {README}"
        )
    classes = {
        "dataset": name,
        "classes": len(names),  # of the labels: whoever writes other names in here shall keep to it
        "classnames": choose_classnames(names, options.classnames),
        "templates": templates,
    }
    dataset = {**identity, "source": root, "notes": notes}
    packages = ("torchvision", "clip-benchmark")
    return write_set(
        store, samples, ("label", "int"), dataset, {CLASSES: classes}, packages, options.progress
    )


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
    add("--root", type=option, metavar="FOLDER", help="where the set's files lie")
    add(
        "--out",
        type=option,
        required=True,
        metavar="FOLDER",
        help="local folder, or s3://, gs://, oci://, azure:// …",
    )
    add(
        "--split",
        default="test",
        help="train, val, test, as far as the set has them (default: %(default)s)",
    )
    add(
        "--limit",
        type=int,
        metavar="N",
        help="only N images, spread evenly over the set (default: all)",
    )
    add(
        "--classnames",
        type=option,
        metavar="FILE",
        help="JSON list of names, or object from classes to names (default: the set's)",
    )
    add(
        "--templates",
        type=option,
        metavar="FILE",
        help='JSON list of prompts such as "a photo of a {c}." (default: the set\'s)',
    )
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary."""
    console.prepare()
    options = parse(arguments)
    run(lambda: convert(options))
