"""Convert an image–caption set to MDS shards for retrieval: each image once, with all its captions.

Columns: ``key`` (str: the image's name in the annotations), ``image`` (bytes: the file as it is), ``caption`` (json: a
list of strings, untouched). Sources are read as their publishers lay them out: see ``convert/README.md``. Nothing is
downloaded. Sets of ``convert/cc12m.py``, with one caption an image, need no conversion to be used for retrieval.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignclip.errors import UserError, nearest, one_line
from convert.evaluation_sets import (
    Sample,
    check_output,
    find_complete,
    fingerprint,
    local_path,
    missing_files,
    read_json,
    run,
    spread,
    write_set,
)
from convert.storage import Store

Captions = dict[str, list[str]]  # image name -> its captions, in the order of the annotations

NO_CAPTION = "no caption"
MISSING = "missing image"
# below --images: itself, or a folder as it is unpacked
IMAGE_FOLDERS = ("", "val2014", "train2014", "val2017", "train2017", "flickr30k-images", "flickr30k_images")
# a line of results_20130124.token, of Kaggle's results.csv (which lacks a bar once), or of clip_benchmark's .txt
LINE = re.compile(r"(?P<image>[^|,\t]+?\.jpg)\s*(?:#\d+\s*\t|\|\s*\d+\s*\|?|,)\s*(?P<caption>.*)")
# Kaggle has it with commas, too; only the header tells the numbers there from what captions begin with
NUMBERED = re.compile(r"(?P<image>[^,]+?\.jpg)\s*,\s*\d+\s*,\s*(?P<caption>.*)")
NUMBERED_HEADER = re.compile(r"\s*image_name\s*,\s*comment_number\s*,\s*comment\s*")
LARGEST_SPLIT = 29_000  # images of Flickr30k: Karpathy's training split

EXAMPLES = """examples:
  # COCO, Karpathy's test split: 5,000 images below coco/val2014
  python convert/retrieval.py coco --images coco --annotations dataset_coco.json --out s3://bucket/eval/coco

  # COCO 2017 validation
  python convert/retrieval.py coco2017 --images coco/val2017 --annotations annotations/captions_val2017.json \\
    --out /data/eval/coco2017

  # Flickr30k, Karpathy's test split; or the original annotations and a list of test images
  python convert/retrieval.py flickr30k --images flickr30k-images --annotations dataset_flickr30k.json --out out
  python convert/retrieval.py flickr30k --images flickr30k-images --annotations results_20130124.token \\
    --split-file test.txt --out out

  # your own: a CSV or TSV with the columns image and caption, a row per caption
  python convert/retrieval.py pairs --images photos --annotations captions.csv --out /data/eval/photos

convert/README.md says where to download each set.
"""


@dataclass
class Options:
    """What is converted, and where to.

    ``split``: None for the set's default. ``split_file``: names the images of the split, one a line, where the
    annotations don't. ``limit``: that many images, spread over the set.
    """

    dataset: str
    images: str | None
    annotations: str | None
    out: str
    split: str | None = None
    split_file: str | None = None
    limit: int | None = None
    skip_missing: bool = False
    progress: bool = True


def convert(options: Options) -> str:
    """Convert a retrieval set and return a summary; a complete one that is there already stays as it is.

    Raises:
        UserError: no such set or split, annotations of another layout, images missing, or the output holds another set
            or cannot be written.
    """
    check_output(options.out, options.limit)
    name = options.dataset
    if name not in SOURCES:
        raise UserError(f"unknown dataset '{name}'; {nearest(name, SOURCES)}")
    default_split, read = SOURCES[name]
    split = options.split or default_split
    annotations = str(Path(options.annotations or "").expanduser().resolve())
    identity = {
        "dataset": name,
        "split": split,
        "limit": options.limit,
        "split_file": fingerprint("--split-file", options.split_file),
        "skip_missing": options.skip_missing,  # with holes, that is
        **({"annotations": annotations} if name == "pairs" else {}),
    }
    store = Store(options.out)
    if there := find_complete(store, identity):
        return f"{store.out} holds {name} ({split}) already, {there['samples']:,} samples: nothing to do"
    file, folder = local_path("--annotations", options.annotations), local_path("--images", options.images, folder=True)
    if options.split_file and name != "flickr30k":
        raise UserError(f"--split-file is for flickr30k's annotations without splits, not for {name}")
    captions = _read(read, file, split, options)
    full = {image: kept for image, texts in captions.items() if (kept := [text for text in texts if text.strip()])}
    samples = spread([Sample(image, _find(folder, image), texts) for image, texts in full.items()], options.limit)
    missing = set(missing_files(samples))
    if missing and (not options.skip_missing or len(missing) == len(samples)):
        first = next(sample.image for sample in samples if sample.image in missing)
        advice = "is --images right?" if len(missing) == len(samples) else "--skip-missing leaves them out"
        raise UserError(f"{len(missing):,} of {len(samples):,} images are missing, the first is {first}; {advice}")
    samples = [sample for sample in samples if sample.image not in missing]
    dataset = {
        **identity,
        "source": str(folder),
        "annotations": annotations,
        "skipped": {MISSING: len(missing), NO_CAPTION: len(captions) - len(full)},
    }
    return write_set(store, samples, ("caption", "json"), dataset, {}, [], options.progress)


def _find(folder: Path, image: str) -> Path:
    """The image's file below ``--images``, which may be the folder that the name begins with, or one above."""
    candidates = [folder / sub / image for sub in IMAGE_FOLDERS]
    if image.startswith(f"{folder.name}/"):
        candidates.append(folder.parent / image)
    return next((path for path in candidates if path.is_file()), candidates[0])


Reader = Callable[[Path, str, Options], Captions]


def _read(read: Reader, file: Path, split: str, options: Options) -> Captions:
    """What ``read`` makes of the annotations; its failures in one line."""
    try:
        captions = read(file, split, options)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"--annotations {file} is not laid out as {options.dataset} is: {what}") from error
    if not captions:
        raise UserError(f"--annotations {file} has no captions")
    return captions


def _json(file: Path, split: str, options: Options) -> Captions:
    """Karpathy's layout (images with a split and sentences), or the COCO API's (images and annotations)."""
    content = read_json("--annotations", file)
    return _coco_api(content) if "annotations" in content else _karpathy(content, split, file)


def _karpathy(content: dict[str, Any], split: str, file: Path) -> Captions:
    """https://cs.stanford.edu/people/karpathy/deepimagesent: ``dataset_coco.json``, ``dataset_flickr30k.json``."""
    splits = {image["split"] for image in content["images"]}
    if split not in splits:
        raise UserError(f"--annotations {file} has no split '{split}'; {nearest(split, splits)}")
    return {
        "/".join(filter(None, (image.get("filepath"), image["filename"]))): [text["raw"] for text in image["sentences"]]
        for image in content["images"]
        if image["split"] == split
    }


def _coco_api(content: dict[str, Any]) -> Captions:
    """``captions_val2017.json``, or clip_benchmark's ``coco_test_karpathy.json``: the whole file, by image id."""
    names = {image["id"]: image["file_name"] for image in content["images"]}
    captions: Captions = {names[number]: [] for number in sorted(names)}
    for annotation in content["annotations"]:
        captions[names[annotation["image_id"]]].append(annotation["caption"])
    return captions


def _flickr(file: Path, split: str, options: Options) -> Captions:
    """Karpathy's JSON, Hugging Face's table of it, or lines of an image and a caption.

    Such are ``.token``, Kaggle's ``.csv`` and ``.txt``, and clip_benchmark's ``.txt``, which alone has one split.
    """
    if file.suffix == ".json":
        captions = _json(file, split, options)
    else:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not at what Unicode counts as line breaks
        if {"raw", "split", "filename"} <= set(lines[0].strip().split(",")):
            captions = _flickr_table(file, split)
        else:
            return _of_split(_flickr_lines(file, lines), file, split, options.split_file)
    if options.split_file:
        raise UserError(f"--annotations {file} has splits of its own: give --split instead of --split-file")
    return captions


def _flickr_table(file: Path, split: str) -> Captions:
    """https://huggingface.co/datasets/nlphuji/flickr30k: ``flickr_annotations_30k.csv``, captions as a JSON list."""
    captions: Captions = {}
    splits = set()
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for row in csv.DictReader(lines, strict=True):
            splits.add(row["split"])
            if row["split"] == split:
                captions[row["filename"]] = list(map(str, json.loads(row["raw"])))
    if split not in splits:
        raise UserError(f"--annotations {file} has no split '{split}'; {nearest(split, splits)}")
    return captions


def _flickr_lines(file: Path, lines: Sequence[str]) -> Captions:
    captions: Captions = {}
    pattern = NUMBERED if NUMBERED_HEADER.fullmatch(lines[0].rstrip("\r")) else LINE
    for number, line in enumerate((line.rstrip("\r") for line in lines), 1):
        if match := pattern.fullmatch(line):
            captions.setdefault(match["image"], []).append(match["caption"])
        elif line.strip() and number > 1:  # the first may be a header
            raise UserError(f"--annotations {file} line {number} is no image and caption: {line[:60]}")
    return captions


def _of_split(captions: Captions, file: Path, split: str, split_file: str | None) -> Captions:
    """Those of the images that the split file names; all of them without one, where that can be a split."""
    if split_file is None:
        if file.suffix != ".txt" or len(captions) > LARGEST_SPLIT:
            raise UserError(
                f"--annotations {file} holds all splits ({len(captions):,} images); "
                f"name the images of '{split}' with --split-file"
            )
        return captions
    listed = local_path("--split-file", split_file).read_text(encoding="utf-8").split()
    images = [f"{name.removesuffix('.jpg')}.jpg" for name in listed]
    if unknown := [image for image in images if image not in captions]:
        raise UserError(f"{len(unknown):,} of {len(images):,} images of --split-file are not in {file}: {unknown[0]}")
    return {image: captions[image] for image in images}


def _pairs(file: Path, split: str, options: Options) -> Captions:
    """A CSV or TSV with the columns image and caption; an image's captions may stand in several rows."""
    captions: Captions = {}
    with file.open(encoding="utf-8-sig", newline="") as lines:
        # strict: an unquoted caption that begins with a quotation mark must not swallow the lines that follow
        rows = csv.DictReader(lines, delimiter="\t" if file.suffix in (".tsv", ".tab") else ",", strict=True)
        columns = list(rows.fieldnames or [])
        for column in ("image", "caption"):
            if column not in columns:
                raise UserError(f"--annotations {file} has no column '{column}'; it has {', '.join(columns) or 'none'}")
        whole = rows.line_num  # lines up to here are
        try:
            for row in rows:
                if not row["image"] or row["caption"] is None or None in row:
                    raise csv.Error(f"{'more' if None in row else 'less'} than {len(columns)} columns, or no image")
                captions.setdefault(row["image"], []).append(row["caption"])
                whole = rows.line_num
        except csv.Error as error:
            hint = "captions with separators or quotation marks are quoted, and the marks doubled"
            raise UserError(f"--annotations {file} line {whole + 1}: {error} ({hint})") from None
    return captions


SOURCES: dict[str, tuple[str, Reader]] = {  # name -> the split by default, the reader
    "coco": ("test", _json),
    "coco2017": ("val", _json),
    "flickr30k": ("test", _flickr),
    "pairs": ("test", _pairs),
}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="convert/retrieval.py",
        description="Convert an image–caption set to MDS shards for retrieval.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=", ".join(SOURCES))
    add("--images", metavar="FOLDER", help="where the images lie")
    add("--annotations", metavar="FILE", help="the captions")
    add("--out", required=True, metavar="FOLDER", help="local folder, or s3://, gs://, oci://, azure:// …")
    add("--split", help="of Karpathy's files: train, restval, val or test (default: test); else just a name")
    add("--split-file", metavar="FILE", help="flickr30k without Karpathy's file: the split's images, one a line")
    add("--limit", type=int, metavar="N", help="only N images, spread evenly over the set (default: all)")
    add("--skip-missing", action="store_true", help="leave out images that are not there (default: an error)")
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary."""
    options = parse(arguments)
    run(lambda: convert(options))


if __name__ == "__main__":
    main()
