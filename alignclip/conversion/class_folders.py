"""Readers of sets that are a folder per class: ImageNet and its relatives, your own."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from alignclip.conversion.class_names import benchmark_lists, package_folder
from alignclip.conversion.evaluation_sets import README, EvaluationSample
from alignclip.conversion.layouts import Part, file_named, find_part, holds
from alignclip.errors import UserError

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}
# folders of ImageNet's splits: torchvision's, Kaggle's (below ILSVRC/Data/CLS-LOC), the archive's
IMAGENET_FOLDERS = {
    "val": ("val", "validation", "ILSVRC2012_img_val"),
    "train": ("train", "ILSVRC2012_img_train"),
}
SOLUTION = "LOC_val_solution.csv"  # Kaggle's labels of the flat folder of validation images
# torchvision's
IMAGE_ENDINGS = (*(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),)
MATCHED = "matched-frequency"  # the variant of ImageNetV2 that papers report


@dataclass(frozen=True)
class ClassificationContent:
    """The content of a classification set.

    Attributes:
        samples: the images of a split with their labels.
        classnames: in the order of the labels.
        notes: sentences for the summary, about what is not as published.
    """

    samples: list[EvaluationSample]
    classnames: list[str]
    notes: tuple[str, ...] = ()


def synsets(name: str) -> list[str]:
    """List the WordNet ids of ``imagenet`` (1,000), ``imagenet_a`` or ``imagenet_r`` (200), sorted.

    The lists are timm's.
    """
    timm = package_folder("timm")
    assert timm is not None
    path = timm / "data" / "_info" / f"{name}_synsets.txt"
    return sorted(path.read_text(encoding="utf-8").split())


def class_folders(root: Path) -> list[str]:
    """List the names of the folders in ``root``, sorted, without hidden ones."""
    return sorted(e.name for e in root.iterdir() if e.is_dir() and not e.name.startswith("."))


def images_in(
    root: Path, labels: dict[str, int], all_filled: bool = True
) -> list[EvaluationSample]:
    """List the images of these class folders, sorted by label and path.

    Raises:
        UserError: a folder has no images, where ``all_filled`` asks for some.
    """
    samples: list[EvaluationSample] = []
    folders = sorted(labels.items(), key=lambda item: item[1])
    for folder, label in tqdm(folders, "listing", unit=" classes", delay=2):
        found = _images_below(root / folder)
        if all_filled and not found:
            raise UserError(f"the class folder {root / folder} has no images; {README}")
        samples += [
            EvaluationSample(file.relative_to(root).as_posix(), file, label) for file in found
        ]
    return samples


def _images_below(folder: Path) -> list[Path]:
    """List the images of a folder and of the folders below, in order.

    A link to a folder is followed where that lies elsewhere. A link to a folder around it would
    bring the other classes' images, and itself again.
    """
    found, seen = list[Path](), {*folder.resolve().parents}
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = Path(parent)
        if (here := place.resolve()) in seen:
            folders.clear()
            continue
        seen.add(here)
        folders.sort()
        found += [place / name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    return sorted(found)


def read_imagenet(
    root: Path, split: str, folders: tuple[str, ...], synset_list: str | None
) -> ClassificationContent:
    """Read folders named by WordNet ids; labels are positions among the set's own ids, sorted.

    clip_benchmark counts labels the same way.

    Args:
        root: the folder of ``--root``.
        split: its name.
        folders: names that the folder of the classes has, as unpacked; empty for ImageNet itself.
        synset_list: name of timm's list; None for any 200 of the 1,000, as in ImageNet-O.
    """
    where = _image_folder(root, folders or IMAGENET_FOLDERS[split])
    thousand = synsets("imagenet")
    words = dict(zip(thousand, benchmark_lists("en_classnames.json")["imagenet1k"], strict=True))
    found = class_folders(where)
    if not folders and not found and (flat := sorted(where.glob("*.JPEG"))):
        return _read_flat_imagenet(root, where, flat, words)
    expected = synsets(synset_list) if synset_list else thousand
    number = len(expected) if synset_list else 200
    if strange := sorted(set(found) - set(expected)):
        raise UserError(
            f"{where} has {len(found):,} class folders, and '{strange[0]}' is none of the set's; "
            f"{README}"
        )
    if len(found) != number:
        first = (
            f"; the first one missing is {min(set(expected) - set(found))}" if synset_list else ""
        )
        raise UserError(
            f"{where} has {len(found):,} class folders instead of {number:,}{first}; {README}"
        )
    samples = images_in(where, {wnid: i for i, wnid in enumerate(found)})
    return ClassificationContent(samples, [words[wnid] for wnid in found])


def _image_folder(root: Path, names: tuple[str, ...]) -> Path:
    """Return the folder that holds images: ``root``, or the nearest one below with such a name.

    Kaggle's ``ILSVRC`` has two folders ``CLS-LOC/val``, one of them with annotations alone; its
    other sets nest a folder in one of its own name. Where none holds images, a folder of the name
    stands for the set's.
    """

    def fits(path: Path) -> bool:
        patterns = ("n[0-9]*/*.[jJ][pP]*[gG]", "ILSVRC2012_val_*.JPEG")
        is_named = path == root or path.name in names
        return is_named and any(holds(path, pattern) for pattern in patterns)

    named = next(filter(Path.is_dir, (root / name for name in names)), root)
    return find_part(root, Part(" or ".join(names), fits)) or named


def _read_flat_imagenet(
    root: Path, where: Path, files: list[Path], words: dict[str, str]
) -> ClassificationContent:
    """Read validation images without class folders, as the archive and Kaggle have them.

    ``words`` are the class names by WordNet id, in the order of the labels.

    Raises:
        UserError: the labels aren't there; says how to get class folders.
    """
    places = (find_part(folder, file_named(SOLUTION)) for folder in (root, where.parent))
    solution = next(filter(None, places), None)
    if solution is None:
        raise UserError(
            f"{where} has {len(files):,} images and no class folders: nothing says which class an "
            f"image is of; {README}, and what makes the folders. With Kaggle's archive, put its "
            f"{SOLUTION} into --root"
        )
    labels = {wnid: label for label, wnid in enumerate(words)}
    with solution.open(encoding="utf-8-sig", newline="") as lines:
        try:
            of_image = {
                row["ImageId"]: labels[row["PredictionString"].split()[0]]
                for row in csv.DictReader(lines)
            }
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            raise UserError(
                f"{solution} is not laid out as Kaggle's {SOLUTION} is: {error}"
            ) from None
    if missing := [file.name for file in files if file.stem not in of_image]:
        raise UserError(
            f"{solution} has no label of {len(missing):,} images, the first is {missing[0]}"
        )
    samples = [EvaluationSample(file.name, file, of_image[file.stem]) for file in files]
    return ClassificationContent(samples, list(words.values()))


def read_imagenet_v2(root: Path, split: str) -> ClassificationContent:
    """Read folders named by ImageNet's class index, 0 to 999: as strings, 10 would be the third."""
    # the tar's, clip_benchmark's
    known = (f"imagenetv2-{MATCHED}-format-val", f"ImageNetV2-{MATCHED}")
    where = next((root / name for name in known if (root / name).is_dir()), root)
    where = find_part(where, Part("folder 0", lambda path: (path / "0").is_dir())) or where
    labels = {str(i): i for i in range(1000)}
    found = set(class_folders(where))
    missing = [name for name in labels if name not in found]
    if missing or len(found) != len(labels):
        other = f"missing is {missing[0]}" if missing else f"too many is {min(found - set(labels))}"
        raise UserError(
            f"{where} has {len(found):,} class folders instead of 1,000; the first one {other}; "
            f"{README}"
        )
    name = where.name.lower()
    variant = "imagenetv2" in name and MATCHED not in name
    notes = (f"{where.name} is not the {MATCHED} variant, which papers report",) if variant else ()
    return ClassificationContent(
        images_in(where, labels), benchmark_lists("en_classnames.json")["imagenet1k"], notes
    )


def read_folder(root: Path, split: str) -> ClassificationContent:
    """Read any folder with a folder per class; the names, sorted, are the classes.

    A class may be empty.
    """
    found = class_folders(root)
    if not found:
        raise UserError(f"--root {root} has no sub-folders; a folder per class is expected")
    if {name.lower() for name in found} <= SPLIT_NAMES:
        raise UserError(
            f"the sub-folders of --root {root} are splits, not classes: give {root / found[0]}, say"
        )
    samples = images_in(root, {name: i for i, name in enumerate(found)}, all_filled=False)
    return ClassificationContent(samples, found)
