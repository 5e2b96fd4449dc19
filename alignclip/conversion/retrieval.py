"""Convert an image–caption set to MDS shards for retrieval: each image once, with all its captions.

Columns: ``key`` (str: the image's name in the annotations), ``image`` (bytes: the file as it is),
``caption`` (json: a list of strings, untouched). Sources are read as their publishers lay them out:
see ``convert/README.md``. Nothing is downloaded. Sets of ``convert/cc12m.py``, with one caption an
image, need no conversion to be used for retrieval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignclip.config.command_line import read_options
from alignclip.config.setting import check_settings, setting
from alignclip.conversion.evaluation_sets import (
    EvaluationSample,
    SetToWrite,
    convert_set,
    fingerprint,
    image_limit,
    local_path,
    spread,
    with_images,
)
from alignclip.conversion.image_finder import ImageFinder
from alignclip.conversion.options import output_folder
from alignclip.conversion.published import find_set
from alignclip.conversion.retrieval_sets import (
    RETRIEVAL_SETS,
    Annotations,
    Wanted,
    read_annotations,
)
from alignclip.conversion.samples import MISSING_IMAGE
from alignclip.errors import UserError, one_line_errors
from alignclip.runtime import console

NO_CAPTION = "no caption"

RETRIEVAL_EXAMPLES = """examples:
  # COCO, Karpathy's test split: 5,000 images below coco/val2014
  python convert/retrieval.py coco --images coco --annotations dataset_coco.json \\
    --out s3://bucket/eval/coco

  # COCO 2017 validation
  python convert/retrieval.py coco2017 --images coco/val2017 \\
    --annotations annotations/captions_val2017.json \\
    --out /data/eval/coco2017

  # Flickr30k, Karpathy's test split; or the original annotations and a list of test images
  python convert/retrieval.py flickr30k --images flickr30k-images \\
    --annotations dataset_flickr30k.json --out out
  python convert/retrieval.py flickr30k --images flickr30k-images \\
    --annotations results_20130124.token \\
    --split-file test.txt --out out

  # your own: a CSV or TSV with the columns image and caption, a row per caption
  python convert/retrieval.py pairs --images photos --annotations captions.csv \\
    --out /data/eval/photos

convert/README.md says where to download each set.
"""


@dataclass(kw_only=True)
class RetrievalOptions:
    """The settings of a conversion.

    ``split``: None for the set's default. ``split_file``: names the images of the split, one a
    line, where the annotations don't. ``encoding``: of the annotations, where they don't show it.
    ``limit``: that many images, spread over the set.
    """

    dataset: str = setting(flags=("dataset",), metavar="DATASET", help=", ".join(RETRIEVAL_SETS))
    images: str | None = setting(None, place=True, metavar="FOLDER", help="where the images lie")
    annotations: str | None = setting(None, place=True, metavar="FILE", help="the captions")
    out: str = output_folder()
    split: str | None = setting(
        None,
        help="of Karpathy's files: train, restval, val, test, or train+restval (default: test); "
        "else just a name",
    )
    split_file: str | None = setting(
        None,
        place=True,
        metavar="FILE",
        help="flickr30k without Karpathy's file: the split's images, one a line",
    )
    encoding: str | None = setting(
        None,
        metavar="NAME",
        help="of the annotations, e.g. cp1252 (default: UTF-8, or by the file's mark)",
    )
    limit: int | None = image_limit()
    skip_missing: bool = setting(
        False, help="leave out images that are not there (default: an error)"
    )
    progress: bool = True


def convert_retrieval(options: RetrievalOptions) -> str:
    """Convert a retrieval set and return a summary; a complete set stays as it is.

    Raises:
        UserError: no such set or split, annotations of another layout, images missing, or the
            output holds another set or cannot be written.
    """
    check_settings(options)
    name = options.dataset
    published = find_set(RETRIEVAL_SETS, name)
    split = options.split or published.split
    source = str(Path(options.annotations or "").expanduser().resolve())
    identity = {
        "dataset": name,
        "split": split,
        "limit": options.limit,
        "split_file": fingerprint("--split-file", options.split_file),
        "skip_missing": options.skip_missing,  # with holes, that is
        **({"annotations": source} if name == "pairs" else {}),
    }

    def read_set() -> SetToWrite:
        file = local_path("--annotations", options.annotations)
        folder = local_path("--images", options.images, folder=True)
        if options.split_file and name not in ("flickr30k", "flickr8k"):
            raise UserError(
                f"--split-file is for flickr30k's annotations without splits, not for {name}"
            )
        annotations = read_annotations(
            Wanted(name, file, split, options.split_file, options.encoding)
        )
        captions = {
            image: kept
            for image, texts in annotations.captions.items()
            if (kept := [text for text in texts if text.strip()])
        }
        find = ImageFinder(folder, published=name != "pairs").find
        every = [EvaluationSample(image, find(image), texts) for image, texts in captions.items()]
        samples, missing = with_images(
            spread(every, options.limit),
            "--skip-missing leaves them out",
            "is --images right?",
            options.skip_missing,
        )
        number = len(annotations.captions)
        return SetToWrite(
            samples,
            ("caption", "json"),
            about={"source": str(folder), "annotations": source},
            notes=[*_left_out(split, annotations), *published.size_notes(name, split, number)],
            skipped={MISSING_IMAGE: missing, NO_CAPTION: number - len(captions)},
        )

    return convert_set(options.out, identity, read_set, options.progress)


def _left_out(split: str, annotations: Annotations) -> list[str]:
    """Say what of the file was left out."""
    if not annotations.left_out:
        return []
    others = ", ".join(f"{other} {number:,}" for other, number in annotations.left_out.items())
    note = f"{split} has {len(annotations.captions):,} images; left out: {others}"
    if split == "train" and "restval" in annotations.left_out:
        note += "; --split train+restval takes both"
    return [note]


def parse(arguments: Sequence[str] | None = None) -> RetrievalOptions:
    """Read the command line."""
    return read_options(
        RetrievalOptions,
        arguments,
        "convert/retrieval.py",
        "Convert an image–caption set to MDS shards for retrieval.",
        RETRIEVAL_EXAMPLES,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert and print a summary."""
    console.prepare_output()
    options = parse(arguments)
    with one_line_errors(interrupted="interrupted; nothing was written"):
        print(convert_retrieval(options))
