"""Image–caption sets: a table of their splits, sizes and readers of annotations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from alignclip.checked_json import parse_json
from alignclip.conversion import flickr_lines, text_tables
from alignclip.conversion.evaluation_sets import local_path, read_option_file
from alignclip.conversion.published import PublishedSet
from alignclip.conversion.samples import as_utf8
from alignclip.conversion.text_tables import Table
from alignclip.conversion.wording import listing
from alignclip.errors import UserError, nearest, one_line

T = TypeVar("T")
Captions = dict[str, list[str]]  # image name -> its captions, in the order of the annotations
FLICKR_TABLE = {"raw", "split", "filename"}  # columns of Hugging Face's table of Flickr30k


@dataclass(frozen=True)
class Annotations:
    """The content of an annotation file for a split.

    Attributes:
        captions: of the split's images.
        left_out: name of each other split in the file -> its number of images.
    """

    captions: Captions
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A request to an annotation file.

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

    def __str__(self) -> str:
        return f"--annotations {self.file}"

    def look(self, *columns: str) -> Table:
        """Find encoding, separator and header of a text file, which may have these columns.

        Raises:
            UserError: no text, or text in an encoding that nobody has named.
        """
        table = text_tables.look_at_table(self.file, columns, self.encoding)
        text_tables.check_encoding(table, self.encoding)
        return table

    def take(
        self, every: Iterable[tuple[str, T]], read: Callable[[T], tuple[str, list[str]]]
    ) -> Annotations:
        """Take the images of the wanted splits.

        Args:
            every: split and entry of each image in the file.
            read: from an entry to the image and its captions; other splits' entries may be odd.

        Raises:
            UserError: a wanted split is not in the file.
        """
        splits = set(self.split.split("+"))
        there, wanted = Counter[str](), list[T]()
        for split, entry in every:
            there[split] += 1
            if split in splits:
                wanted.append(entry)
        if unknown := sorted(splits - there.keys()):
            raise UserError(f"{self} has no split '{unknown[0]}'; {nearest(unknown[0], there)}")
        captions = dict(map(read, wanted))
        return Annotations(captions, {name: n for name, n in there.items() if name not in splits})

    def check_whole_file(self, captions: Captions, advice: str) -> Captions:
        """Refuse a file without splits that has more images than the split: it is the whole set.

        Raises:
            UserError: with the two numbers.
        """
        published = RETRIEVAL_SETS[self.dataset]
        if wrong := published.why_too_many(self.dataset, self.split, len(captions)):
            raise UserError(
                f"{self} holds all splits ({len(captions):,} images); name {advice} ({wrong})"
            )
        return captions


def read_annotations(wanted: Wanted) -> Annotations:
    """Read the annotations of a set.

    Raises:
        UserError: another layout than the set's, no such split, no captions, more images than
            the split can have.
    """
    try:
        annotations = RETRIEVAL_SETS[wanted.dataset].read(wanted)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{wanted} is not laid out as {wanted.dataset} is: {what}") from error
    if not annotations.captions:
        raise UserError(f"{wanted} has no captions")
    return annotations


def read_coco(wanted: Wanted) -> Annotations:
    """Read Karpathy's layout (images with a split and sentences), or the COCO API's.

    https://cs.stanford.edu/people/karpathy/deepimagesent: ``dataset_coco.json`` and others.
    """
    content = read_option_file("--annotations", wanted.file)
    if "annotations" in content:
        advice = "the file otherwise, with a --split of your own"
        return Annotations(wanted.check_whole_file(_read_coco_api(content), advice))

    def read(image: dict[str, Any]) -> tuple[str, list[str]]:
        name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        return _as_text(name), [_as_text(text["raw"]) for text in image["sentences"]]

    return wanted.take(((image["split"], image) for image in content["images"]), read)


def _read_coco_api(content: dict[str, Any]) -> Captions:
    """Read ``captions_val2017.json``, or clip_benchmark's ``coco_test_karpathy.json``, by ids."""
    names = {image["id"]: _as_text(image["file_name"]) for image in content["images"]}
    captions: Captions = {names[number]: [] for number in sorted(names)}
    for annotation in content["annotations"]:
        captions[names[annotation["image_id"]]].append(_as_text(annotation["caption"]))
    return captions


def _as_text(value: Any) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is no text")
    return as_utf8(value)


def read_flickr(wanted: Wanted) -> Annotations:
    """Read Karpathy's JSON, Hugging Face's table of it, or lines of an image and a caption.

    Such lines are ``.token``, Kaggle's ``.csv`` and ``.txt``, and clip_benchmark's ``.txt``. The
    table is https://huggingface.co/datasets/nlphuji/flickr30k, whose captions are JSON lists.
    """
    if wanted.file.suffix == ".json":
        annotations = read_coco(wanted)
    else:
        table = wanted.look(*FLICKR_TABLE)
        if not set(table.columns) >= FLICKR_TABLE:
            with table.open() as file:
                return _take_listed(flickr_lines.read_lines(file.read(), str(wanted)), wanted)
        values = text_tables.rows_of(table, str(wanted))
        rows = (dict(zip(table.columns, row, strict=True)) for row in values)
        annotations = wanted.take(
            ((row["split"], row) for row in rows),
            lambda row: (row["filename"], [*map(str, parse_json(row["raw"]))]),
        )
    if wanted.split_file:
        raise UserError(f"{wanted} has splits of its own: give --split instead of --split-file")
    return annotations


def _take_listed(captions: Captions, wanted: Wanted) -> Annotations:
    """Take the images that the split file names; without one all, where they can be a split."""
    if wanted.split_file is None:
        advice = f"the images of '{wanted.split}' with --split-file"
        if wanted.file.suffix == ".txt":
            return Annotations(wanted.check_whole_file(captions, advice))
        raise UserError(f"{wanted} holds all splits ({len(captions):,} images); name {advice}")
    listed = local_path("--split-file", wanted.split_file).read_text(encoding="utf-8-sig").split()
    images = [f"{name.removesuffix('.jpg')}.jpg" for name in listed]
    if unknown := [image for image in images if image not in captions]:
        raise UserError(
            f"{len(unknown):,} of {len(images):,} images of --split-file are not in {wanted.file}: "
            f"{unknown[0]}"
        )
    kept = {image: captions[image] for image in images}
    others = len(captions) - len(kept)
    return Annotations(kept, {"not in the split file": others} if others else {})


def read_pairs(wanted: Wanted) -> Annotations:
    """Read a table with the columns image and caption; an image's captions may be several rows."""
    table = wanted.look("image", "caption")
    for column in ("image", "caption"):
        if column not in table.columns:
            has = listing(table.columns)
            raise UserError(f"{wanted} has no column '{column}'; it has {has}")
    image_at, caption_at = map(table.columns.index, ("image", "caption"))
    captions: Captions = {}
    for row in text_tables.rows_of(table, str(wanted)):
        image, caption = row[image_at], row[caption_at]
        if not image:
            raise UserError(f"{wanted}: a row has no image (its caption: '{caption[:60]}')")
        captions.setdefault(image, []).append(caption)
    return Annotations(captions)


# COCO, Flickr8k and Flickr30k: Karpathy's splits
# (https://cs.stanford.edu/people/karpathy/deepimagesent); Flickr30k also by Flickr30k Entities'
# lists, Flickr8k also by the publisher's.
RETRIEVAL_SETS = {
    "coco": PublishedSet(
        read_coco,
        {
            "train": 82_783,
            "restval": 30_504,
            "train+restval": 113_287,
            "val": 5_000,
            "test": 5_000,
        },
    ),
    "coco2017": PublishedSet(read_coco, {"train": 118_287, "val": 5_000}, split="val"),
    "flickr8k": PublishedSet(read_flickr, {"train": 6_000, "val": 1_000, "test": 1_000}),
    "flickr30k": PublishedSet(
        read_flickr, {"train": (29_000, 29_783), "val": (1_014, 1_000), "test": 1_000}
    ),
    "pairs": PublishedSet(read_pairs),
}
