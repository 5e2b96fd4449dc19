"""What the converters of evaluation sets are made of: paths and JSON in, class names and templates, one MDS set out."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from alignclip.data.image_files import EVALUATION_FORMATS, is_whole
from alignclip.errors import UserError, check_place, nearest, one_line_errors
from alignclip.near import did_you_mean
from alignclip.storage.staging import INDEX, OutputFolder

DATASET = "dataset.json"
README = "convert/README.md says what to download"
INSTALL = "pip install 'alignclip[evaluate]'"
GENERIC = "imagenet1k"  # whose templates clip_benchmark takes for sets that have none
UNREADABLE = "unreadable image"
IN_MEMORY = 256  # images read at a time
NAMED = 5  # unreadable images named in the summary

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One image and what belongs to it.

    Attributes:
        key: the path in the source, or the index where the source has no files.
        image: the file, or uint8 pixels [height, width] (grey) or [height, width, 3] (RGB).
        target: the class index, or the captions.
    """

    key: str
    image: Path | np.ndarray
    target: int | list[str]


def check_output(out: str, limit: int | None) -> None:
    """Refuse what can be seen to be wrong before a set is read.

    Raises:
        UserError: ``out`` is a URL with one slash, or the limit below 1.
    """
    check_place("--out", out)
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")


def local_path(flag: str, place: str | None, folder: bool = False) -> Path:
    """``place`` as an absolute local path.

    Raises:
        UserError: it is not given, a URL, not there, or no ``folder`` where one is wanted; names the option.
    """
    if place is None:
        raise UserError(f"{flag} is missing: {README}")
    check_place(flag, place)
    if "://" in place:
        raise UserError(f"{flag} {place}: sources are read from local folders; copy it here first")
    path = Path(place).expanduser().absolute()
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist{did_you_mean(path) or f'; {README}'}")
    if folder and not path.is_dir():
        raise UserError(f"{flag} {path} is a file, not a folder; {README}")
    return path


def read_json(flag: str, path: Path) -> Any:
    """The contents of a JSON file that an option names.

    Raises:
        UserError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(
            path.read_text(encoding="utf-8-sig")
        )  # a spreadsheet's or an editor's mark
    except OSError as error:
        raise UserError(f"cannot read {flag} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{flag} {path} is not JSON: {error}") from None


def fingerprint(flag: str, path: str | None) -> str | None:
    """The file's name and a hash of its contents, for comparing what a set was made with; None without a file."""
    if path is None:
        return None
    digest = hashlib.sha256(local_path(flag, path).read_bytes()).hexdigest()[:12]
    return f"{Path(path).name} ({digest})"


def benchmark_folder() -> Path | None:
    """Where clip_benchmark keeps its lists, None if not installed; importing it would import models and loaders."""
    spec = importlib.util.find_spec("clip_benchmark")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "datasets" if places else None


def benchmark_lists(file: str) -> dict[str, list[str]]:
    """One of clip_benchmark's JSON files: dataset -> class names or templates.

    Raises:
        UserError: clip_benchmark is not installed.
    """
    folder = benchmark_folder()
    if folder is None:
        raise UserError(
            f"class names and templates are clip_benchmark's, which is not installed: {INSTALL}"
        )
    lists: dict[str, list[str]] = json.loads((folder / file).read_text(encoding="utf-8"))
    return lists


def choose_templates(name: str, path: str | None) -> list[str]:
    """Prompt templates: the file's, or else clip_benchmark's, which takes ImageNet's for a set that has none.

    Raises:
        UserError: the file is no list of templates, or clip_benchmark is needed and not installed.
    """
    if path is None:
        lists = benchmark_lists("en_zeroshot_classification_templates.json")
        return lists.get(name, lists[GENERIC])
    templates = read_json("--templates", Path(path))
    if (
        not isinstance(templates, list)
        or not templates
        or not all(isinstance(text, str) for text in templates)
    ):
        raise UserError(
            f'--templates {path} must be a JSON list of strings such as "a photo of a {{c}}."'
        )
    for text in templates:
        if "{c}" not in text and "{}" not in text:
            raise UserError(
                f"--templates {path}: '{text}' has no place for the class name: write {{c}}"
            )
    return templates


def choose_classnames(names: list[str], path: str | None) -> list[str]:
    """The set's own ``names``, or the file's: a list in the same order, or an object from these names to others.

    Raises:
        UserError: the file is neither, or has names for fewer or more classes.
    """
    if path is None:
        return names
    given = read_json("--classnames", Path(path))
    if isinstance(given, dict):
        if missing := [name for name in names if name not in given]:
            hint = nearest(missing[0], given)
            hint = f"; {hint}" if hint.startswith("did you") else ""
            lacks = f"lacks {len(missing):,} of {len(names):,} classes"
            raise UserError(f"--classnames {path} {lacks}, the first is '{missing[0]}'{hint}")
        given = [given[name] for name in names]
    if not isinstance(given, list) or not all(
        isinstance(name, str) and name.strip() for name in given
    ):
        raise UserError(
            f"--classnames {path} must be a JSON list of names, or an object from classes to names"
        )
    if len(given) != len(names):
        raise UserError(
            f"--classnames {path} has {len(given):,} names, the set has {len(names):,} classes"
        )
    return given


def spread(items: list[T], limit: int | None) -> list[T]:
    """All items, or ``limit`` of them at even distances: the first ones of a set sorted by class are of one class."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def missing_files(samples: Sequence[Sample]) -> list[Path]:
    """The samples' image files that are not there.

    Raises:
        UserError: there are no samples at all.
    """
    if not samples:
        raise UserError("there are no images")
    return [
        sample.image
        for sample in samples
        if isinstance(sample.image, Path) and not sample.image.is_file()
    ]


def find_complete(store: OutputFolder, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The ``dataset.json`` of a complete set in ``store``, None where there is none.

    Args:
        store: the output.
        identity: the entries of ``dataset.json`` that say which set this is.

    Raises:
        UserError: another set is there, or the output cannot be reached.
    """
    listing = store.listing()
    if INDEX not in listing:  # written last
        store.check_writable()
        return None
    there: dict[str, Any] = store.read_json([DATASET])[0] if DATASET in listing else {}
    if not there.keys() >= identity.keys():
        raise UserError(f"{store.out} already holds another kind of data set; choose another --out")
    for key, value in identity.items():
        if there[key] != value:
            shown = (
                ""
                if key in ("dataset", "split")
                else f", {key} {'all' if there[key] is None else there[key]}"
            )
            raise UserError(
                f"{store.out} already holds {there['dataset']} ({there['split']}{shown}): choose another --out, or "
                "delete it first"
            )
    return there


def write_set(
    store: OutputFolder,
    samples: Sequence[Sample],
    target: tuple[str, str],
    dataset: dict[str, Any],
    files: dict[str, Any],
    packages: Sequence[str],
    progress: bool = True,
) -> str:
    """Write a set, complete or not at all: shards, ``dataset.json`` and ``files``, the index last.

    Images whose file cannot be decoded are left out and counted; the others keep their bytes, pixels become PNG.

    Args:
        store: the output.
        samples: in the order in which they are written.
        target: name and MDS encoding of the targets' column.
        dataset: what goes into ``dataset.json`` besides counts and versions; ``skipped`` holds earlier counts,
            ``notes`` sentences for the summary.
        files: name -> contents of further JSON files beside the index.
        packages: whose versions matter, besides those every set has.
        progress: show a progress bar.

    Returns:
        A summary to print.

    Raises:
        UserError: no image can be decoded, or the output cannot be written.
    """
    from streaming import MDSWriter

    column, encoding = target
    unreadable: list[str] = []
    start = time.monotonic()
    with store.staged() as folder:
        columns = {"key": "str", "image": "bytes", column: encoding}
        with MDSWriter(
            out=str(folder), columns=columns, hashes=["xxh64"], progress_bar=False
        ) as writer:
            for sample, image in zip(
                samples, _files_of(samples, dataset["dataset"], progress), strict=True
            ):
                if image is None:
                    unreadable.append(sample.key)
                else:
                    writer.write({"key": sample.key, "image": image, column: sample.target})
        if len(unreadable) == len(samples):
            raise UserError(
                f"none of the {len(samples):,} images can be decoded, the first is {samples[0].key}"
            )
        dataset = {
            **dataset,
            "samples": len(samples) - len(unreadable),
            "skipped": {**dataset.get("skipped", {}), UNREADABLE: len(unreadable)},
            "bytes": sum(file.stat().st_size for file in folder.glob("shard.*")),
            "versions": {
                package: importlib.metadata.version(package)
                for package in ("alignclip", "mosaicml-streaming", "pillow", *packages)
                if package != "clip-benchmark" or benchmark_folder()  # your own lists need none
            },
        }
        for name, content in {**files, DATASET: dataset}.items():
            (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
        if store.is_remote and progress:
            print(f"uploading {dataset['bytes'] / 2**20:,.1f} MiB to {store.out}", file=sys.stderr)
    return _summary(dataset, column, unreadable, store.out, time.monotonic() - start)


def _files_of(samples: Sequence[Sample], name: str, progress: bool) -> Iterator[bytes | None]:
    """The image file of each sample, in order; None where it can't be decoded."""
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file wants fewer lines
    bar = tqdm(
        total=len(samples), desc=name, unit=" images", mininterval=interval, disable=not progress
    )
    with (
        bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):  # decoding and compressing run without the GIL
        for first in range(0, len(samples), IN_MEMORY):
            for image in pool.map(image_file, samples[first : first + IN_MEMORY]):
                yield image
                bar.update()


def image_file(sample: Sample) -> bytes | None:
    """The bytes of the sample's image file, of a new PNG where it is pixels; None where it can't be decoded."""
    if isinstance(sample.image, np.ndarray):
        png = io.BytesIO()
        Image.fromarray(sample.image).save(png, "PNG")
        return png.getvalue()
    try:
        data = sample.image.read_bytes()
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        return None
    return data if is_whole(data, EVALUATION_FORMATS) else None


def _summary(
    dataset: dict[str, Any], column: str, unreadable: Sequence[str], out: str, seconds: float
) -> str:
    rows = [
        ("set", f"{dataset['dataset']} ({dataset['split']})"),
        ("written", f"{dataset['samples']:,} samples"),
    ]
    rows += [("skipped", f"{sum(dataset['skipped'].values()):,}")]
    rows += [
        (f"  {reason}", f"{number:,}") for reason, number in dataset["skipped"].items() if number
    ]
    rows += [("note", note) for note in dataset.get("notes", ())]
    rows += [
        ("size", f"{dataset['bytes'] / 2**20:,.1f} MiB"),
        ("where", out),
        ("this run", f"{seconds:,.1f} s"),
    ]
    text = "\n".join(f"{name:<22}{value}" for name, value in rows)
    if unreadable:
        text += f"\n\ncannot be decoded: {', '.join(unreadable[:NAMED])}{', …' if len(unreadable) > NAMED else ''}"
    name = out.rstrip("/").rpartition("/")[2]
    place = f"remote={out}" if "://" in out else f"local={out}"
    task = "zero_shot" if column == "label" else "retrieval"
    command = f"composer evaluate.py … evaluators.{name}.task={task} evaluators.{name}.{place}"
    return f"{text}\n\nnext: {command}"


def run(convert: Callable[[], str]) -> None:
    """Run a converter's command and print its summary; exit status 2 with one line for what the user can mend."""
    try:
        with one_line_errors():
            print(convert())
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
