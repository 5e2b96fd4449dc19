"""Convert an image classification set to MDS shards for zero-shot evaluation and linear probes.

Columns: ``key`` (str: the path in the source, or the index), ``image`` (bytes: the file as it is;
PNG where the source has pixels), ``label`` (int). ``classes.json`` beside the index has the class
names, in the order of the labels, and the prompt templates. Sources are read as their publishers
lay them out: see ``convert/README.md``. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from alignclip.config.command_line import read_options
from alignclip.config.setting import check_settings, setting
from alignclip.conversion.class_names import (
    benchmark_folder,
    choose_classnames,
    choose_templates,
)
from alignclip.conversion.classification_sets import CLASSIFICATION_SETS
from alignclip.conversion.evaluation_sets import (
    README,
    SetToWrite,
    convert_set,
    fingerprint,
    image_limit,
    local_path,
    spread,
    with_images,
)
from alignclip.conversion.options import output_folder
from alignclip.conversion.published import find_set
from alignclip.data.mds_index import CLASSES
from alignclip.errors import UserError, nearest, one_line_errors
from alignclip.runtime import console

CLASSIFICATION_EXAMPLES = """examples:
  # CIFAR-10's test images from data/cifar-10-batches-py
  python convert/classification.py cifar10 --root data --out /data/eval/cifar10

  # ImageNet's validation images from imagenet/val/n01440764/… into a bucket
  python convert/classification.py imagenet1k --root imagenet --out s3://bucket/eval/imagenet1k

  # the training images, for a linear probe
  python convert/classification.py flowers --root data --split train --out /data/eval/flowers-train

  # your own: a folder per class
  python convert/classification.py folder --root birds/test --classnames birds.json \\
    --out /data/eval/birds

convert/README.md says where to download each set and which folders are expected.
"""


@dataclass(kw_only=True)
class ClassificationOptions:
    """The settings of a conversion.

    ``classnames`` and ``templates`` are JSON files that replace the set's own: a list each, or for
    ``classnames`` an object from the set's own names (the folders') to others. ``limit``: that many
    images, spread over the set.
    """

    dataset: str = setting(
        flags=("dataset",), metavar="DATASET", help=", ".join(CLASSIFICATION_SETS)
    )
    root: str | None = setting(None, place=True, metavar="FOLDER", help="where the set's files lie")
    out: str = output_folder()
    split: str = setting(
        "test",
        help="train, trainval, val, test, as far as the set has them (default: %(default)s)",
    )
    limit: int | None = image_limit()
    classnames: str | None = setting(
        None,
        place=True,
        metavar="FILE",
        help="JSON list of names, or object from classes to names (default: the set's)",
    )
    templates: str | None = setting(
        None,
        place=True,
        metavar="FILE",
        help='JSON list of prompts such as "a photo of a {c}." (default: the set\'s)',
    )
    progress: bool = True


def convert_classification(options: ClassificationOptions) -> str:
    """Convert a classification set and return a summary; a complete set stays as it is.

    Raises:
        UserError: no such set or split, files missing or not the published ones, class folders too
            few or too many, the output holds another set or cannot be written, clip_benchmark is
            needed and not installed.
    """
    check_settings(options)
    name, split = _name_and_split(options)
    root = str(Path(options.root or "").expanduser().resolve())
    identity = {
        "dataset": name,
        "split": split,
        "limit": options.limit,
        "classnames": fingerprint("--classnames", options.classnames),
        "templates": fingerprint("--templates", options.templates),
        **({"source": root} if name == "folder" else {}),
    }
    read = partial(_read_set, options, name, split, root)
    return convert_set(options.out, identity, read, options.progress)


def _name_and_split(options: ClassificationOptions) -> tuple[str, str]:
    """Return the set's name in the table, and its split.

    Raises:
        UserError: there is no such set or split.
    """
    dashed = options.dataset.replace("_", "-")
    names = (dashed, dashed.replace("-", "_"))
    name = next((name for name in names if name in CLASSIFICATION_SETS), options.dataset)
    sizes = find_set(CLASSIFICATION_SETS, name).sizes
    # ImageNet's own test set has no public labels: clip_benchmark and papers mean val by test
    split = "val" if name == "imagenet1k" and options.split == "test" else options.split
    if sizes and split not in sizes:
        hint = nearest(options.split, sizes)
        raise UserError(f"{name} has no split '{options.split}'; {hint}")
    return name, split


def _read_set(options: ClassificationOptions, name: str, split: str, root: str) -> SetToWrite:
    templates = choose_templates(name, options.templates)
    source = CLASSIFICATION_SETS[name]
    content = source.read(local_path("--root", options.root, folder=True), split)
    samples, _ = with_images(spread(content.samples, options.limit), README, README)
    classes = {
        "dataset": name,
        # of the labels: whoever writes other names into the file shall keep to the number
        "classes": len(content.classnames),
        "classnames": choose_classnames(content.classnames, options.classnames),
        "templates": templates,
    }
    return SetToWrite(
        samples,
        ("label", "int"),
        about={"source": root},
        notes=[*content.notes, *source.size_notes(name, split, len(content.samples))],
        files={CLASSES: classes},
        # own lists need no clip_benchmark
        packages=("torchvision", *(["clip-benchmark"] if benchmark_folder() else [])),
    )


def parse(arguments: Sequence[str] | None = None) -> ClassificationOptions:
    """Read the command line."""
    return read_options(
        ClassificationOptions,
        arguments,
        "convert/classification.py",
        "Convert an image classification set to MDS shards for evaluation.",
        CLASSIFICATION_EXAMPLES,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary."""
    console.prepare_output()
    options = parse(arguments)
    with one_line_errors(interrupted="interrupted; nothing was written"):
        print(convert_classification(options))
