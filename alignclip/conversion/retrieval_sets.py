"""Readers of the annotations of image–caption sets: COCO, Flickr8k, Flickr30k, a table of one's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignclip.conversion import csv_tables, flickr_lines
from alignclip.conversion.csv_tables import Table
from alignclip.conversion.evaluation_sets import local_path, read_json
from alignclip.conversion.published import larger
from alignclip.errors import UserError, nearest, one_line

Captions = dict[str, list[str]]  # image name -> its captions, in the order of the annotations


@dataclass(frozen=True)
class Annotations:
    """What an annotation file says of a split.

    Attributes:
        captions: of the split's images.
        left_out: name of each other split in the file -> its number of images.
    """

    captions: Captions
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What is asked of an annotation file.

    Attributes:
        dataset: name of the set.
        file: the annotations.
        split: names of splits, joined by ``+`` where several are wanted.
        split_file: names the split's images, one a line, where the annotations don't.
        encoding: of a text file; None where the file shows it.
    """

    dataset: str
    file: Path
    split: str
    split_file: str | None = None
    encoding: str | None = None

    def look(self, *columns: str) -> Table:
        """Find the encoding, the separator and the header of a text file, which may have these columns.

        Raises:
            UserError: no text, or text in an encoding that nobody has named.
        """
        table = csv_tables.look(self.file, columns, self.encoding)
        csv_tables.check_encoding(table, self.encoding)
        return table

    @property
    def splits(self) -> set[str]:
        """The splits by their own names."""
        return set(self.split.split("+"))

    def check_splits(self, there: Counter[str]) -> dict[str, int]:
        """Return the numbers of images of the splits that are not wanted.

        Raises:
            UserError: a wanted split is not in the file.
        """
        if unknown := sorted(self.splits - there.keys()):
            hint = nearest(unknown[0], there)
            raise UserError(f"--annotations {self.file} has no split '{unknown[0]}'; {hint}")
        return {name: number for name, number in there.items() if name not in self.splits}


Reader = Callable[[Wanted], Annotations]


def read(wanted: Wanted) -> Annotations:
    """Read the annotations of a set.

    Raises:
        UserError: another layout than the set's, no such split, no captions, more images than
            the split can have.
    """
    try:
        annotations = SOURCES[wanted.dataset][1](wanted)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(
            f"--annotations {wanted.file} is not laid out as {wanted.dataset} is: {what}"
        ) from error
    if not annotations.captions:
        raise UserError(f"--annotations {wanted.file} has no captions")
    return annotations


def read_coco(wanted: Wanted) -> Annotations:
    """Karpathy's layout (images with a split and sentences), or the COCO API's."""
    content = read_json("--annotations", wanted.file)
    if "annotations" in content:
        captions = _read_coco_api(content)
        _check_whole_file(wanted, captions, "the file otherwise, with a --split of your own")
        return Annotations(captions)
    return _read_karpathy(content, wanted)


def _read_karpathy(content: dict[str, Any], wanted: Wanted) -> Annotations:
    """https://cs.stanford.edu/people/karpathy/deepimagesent: ``dataset_coco.json`` and others."""
    images = content["images"]
    left_out = wanted.check_splits(Counter(image["split"] for image in images))
    captions = {
        "/".join(filter(None, (image.get("filepath"), image["filename"]))): [
            text["raw"] for text in image["sentences"]
        ]
        for image in images
        if image["split"] in wanted.splits
    }
    return Annotations(captions, left_out)


def _read_coco_api(content: dict[str, Any]) -> Captions:
    """``captions_val2017.json``, or clip_benchmark's ``coco_test_karpathy.json``, by image id."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: Captions = {names[number]: [] for number in sorted(names)}
    for annotation in content["annotations"]:
        captions[names[annotation["image_id"]]].append(annotation["caption"])
    return captions


def read_flickr(wanted: Wanted) -> Annotations:
    """Karpathy's JSON, Hugging Face's table of it, or lines of an image and a caption.

    Such lines are ``.token``, Kaggle's ``.csv`` and ``.txt``, and clip_benchmark's ``.txt``.
    """
    if wanted.file.suffix == ".json":
        annotations = read_coco(wanted)
    else:
        table = wanted.look("raw", "split", "filename")
        if not {"raw", "split", "filename"} <= set(table.columns):
            with table.open() as file:
                text = file.read()
            captions = flickr_lines.read(text, f"--annotations {wanted.file}")
            return Annotations(*_take_listed(captions, wanted))
        annotations = _read_flickr_table(table, wanted)
    if wanted.split_file:
        raise UserError(
            f"--annotations {wanted.file} has splits of its own: give --split instead of --split-file"
        )
    return annotations


def _read_flickr_table(table: Table, wanted: Wanted) -> Annotations:
    """https://huggingface.co/datasets/nlphuji/flickr30k: a table whose captions are JSON lists."""
    captions: Captions = {}
    there: Counter[str] = Counter()
    for values in csv_tables.rows_of(table, f"--annotations {wanted.file}"):
        row = dict(zip(table.columns, values, strict=True))
        there[row["split"]] += 1
        if row["split"] in wanted.splits:
            captions[row["filename"]] = list(map(str, json.loads(row["raw"])))
    return Annotations(captions, wanted.check_splits(there))


def _take_listed(captions: Captions, wanted: Wanted) -> tuple[Captions, dict[str, int]]:
    """Take the images that the split file names; without one all, where they can be a split."""
    if wanted.split_file is None:
        advice = f"the images of '{wanted.split}' with --split-file"
        if wanted.file.suffix != ".txt":
            raise UserError(
                f"--annotations {wanted.file} holds all splits ({len(captions):,} images); name {advice}"
            )
        _check_whole_file(wanted, captions, advice)
        return captions, {}
    listed = local_path("--split-file", wanted.split_file).read_text(encoding="utf-8-sig").split()
    images = [f"{name.removesuffix('.jpg')}.jpg" for name in listed]
    if unknown := [image for image in images if image not in captions]:
        raise UserError(
            f"{len(unknown):,} of {len(images):,} images of --split-file are not in {wanted.file}: {unknown[0]}"
        )
    kept = {image: captions[image] for image in images}
    others = len(captions) - len(kept)
    return kept, {"not in the split file": others} if others else {}


def _check_whole_file(wanted: Wanted, captions: Captions, advice: str) -> None:
    """Refuse a file without splits that has more images than the split: it is the whole set.

    Raises:
        UserError: with the two numbers.
    """
    if wrong := larger(wanted.dataset, wanted.split, len(captions)):
        raise UserError(
            f"--annotations {wanted.file} holds all splits ({len(captions):,} images); name {advice} ({wrong})"
        )


def read_pairs(wanted: Wanted) -> Annotations:
    """A table with the columns image and caption; an image's captions may be several rows."""
    table = wanted.look("image", "caption")
    places = []
    for column in ("image", "caption"):
        if column not in table.columns:
            has = csv_tables.listing(table.columns)
            raise UserError(f"--annotations {wanted.file} has no column '{column}'; it has {has}")
        places.append(table.columns.index(column))
    captions: Captions = {}
    for row in csv_tables.rows_of(table, f"--annotations {wanted.file}"):
        image, caption = (row[place] for place in places)
        if not image:
            raise UserError(
                f"--annotations {wanted.file}: a row has no image (its caption: '{caption[:60]}')"
            )
        captions.setdefault(image, []).append(caption)
    return Annotations(captions)


SOURCES: dict[str, tuple[str, Reader]] = {  # name -> the split by default, the reader
    "coco": ("test", read_coco),
    "coco2017": ("val", read_coco),
    "flickr8k": ("test", read_flickr),
    "flickr30k": ("test", read_flickr),
    "pairs": ("test", read_pairs),
}
