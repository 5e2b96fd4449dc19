"""Converters of evaluation sets: options that name files, one MDS set, complete or absent."""

from __future__ import annotations

import hashlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from PIL import Image

from alignclip.checked_json import has_type, parse_json
from alignclip.config.differences import differences
from alignclip.config.setting import setting
from alignclip.conversion.formats.remote import read_ahead
from alignclip.conversion.progress import progress_bar
from alignclip.conversion.records import CARD_FILE, package_versions, to_json
from alignclip.conversion.wording import first_few
from alignclip.data.image_files import EVALUATION_FORMATS, is_whole
from alignclip.errors import UserError, check_place
from alignclip.near import did_you_mean
from alignclip.storage.staging import INDEX, OutputFolder

README = "convert/README.md says what to download"
INSTALL = "pip install 'alignclip[evaluate]'"
UNREADABLE_IMAGE = "unreadable image"
NAMED_UNREADABLE = 5  # unreadable images named in the summary

T = TypeVar("T")


def image_limit() -> Any:
    """Make a field of the converters' options: ``--limit``, the number of images to write."""
    text = "only N images, spread evenly over the set (default: all)"
    return setting(None, at_least=1, metavar="N", help=text)


@dataclass(frozen=True)
class EvaluationSample:
    """An image and what belongs to it.

    Attributes:
        key: the path in the source, or the index where the source has no files.
        image: the file, or uint8 pixels [height, width] (grey) or [height, width, 3] (RGB).
        target: the class index, or the captions.
    """

    key: str
    image: Path | np.ndarray
    target: int | list[str]


@dataclass(frozen=True)
class SetToWrite:
    """A set that is to be written.

    Attributes:
        samples: in the order in which they are written.
        column: name and MDS encoding of the targets' column.
        about: what goes into ``dataset.json`` about the source.
        notes: sentences for the summary, and for ``dataset.json``.
        skipped: reason -> images that were left out before.
        files: name -> contents of further JSON files beside the index.
        packages: whose versions matter, besides the packages that every set has.
    """

    samples: Sequence[EvaluationSample]
    column: tuple[str, str]
    about: dict[str, str]
    notes: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    packages: tuple[str, ...] = ()


def convert_set(
    out: str, identity: dict[str, Any], read: Callable[[], SetToWrite], progress: bool
) -> str:
    """Write a set and return a summary; a complete one that is there already stays as it is.

    Args:
        out: the output.
        identity: entries of ``dataset.json`` that tell the set from others: ``dataset``, ``split``,
            …
        read: from the source to the set; not called where a complete set is there.
        progress: show a progress bar.

    Raises:
        UserError: another set is there, or the output can't be reached or written; what ``read``
            raises.
    """
    store = OutputFolder(out)
    if (there := _complete(store, identity)) is not None:
        name = f"{identity['dataset']} ({identity['split']})"
        return f"{store.out} holds {name} already, {there['samples']:,} samples: nothing to do"
    return _write_set(store, identity, read(), progress)


def local_path(flag: str, place: str | None, folder: bool = False) -> Path:
    """Return ``place`` as an absolute local path.

    Raises:
        UserError: the place is not given, a URL, not there, or no ``folder`` where one is wanted.
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


def read_option_file(flag: str, path: Path) -> Any:
    """Return the contents of a JSON file that an option names.

    Raises:
        UserError: the file cannot be read or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))  # an editor's mark
    except OSError as error:
        raise UserError(f"cannot read {flag} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{flag} {path} is not JSON: {error}") from None


def fingerprint(flag: str, path: str | None) -> str | None:
    """Return a file's name and a hash of its contents, to compare what sets were made with."""
    if path is None:
        return None
    digest = hashlib.sha256(local_path(flag, path).read_bytes()).hexdigest()[:12]
    return f"{Path(path).name} ({digest})"


def spread(items: list[T], limit: int | None) -> list[T]:
    """Return ``limit`` items at even distances: the first ones of a sorted set are of one class."""
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def with_images(
    samples: Sequence[EvaluationSample], advice: str, if_all: str, skip: bool = False
) -> tuple[list[EvaluationSample], int]:
    """Return the samples whose images are there, and the number of the others.

    Args:
        samples: of the set.
        advice: the end of the error message; ``if_all`` where all images are missing.
        skip: leave samples out whose images are missing.

    Raises:
        UserError: there are no samples; images are missing and shall not be left out, or all are
            missing.
    """
    if not samples:
        raise UserError("there are no images")
    there: list[EvaluationSample] = []
    missing: list[EvaluationSample] = []
    for sample in samples:
        is_there = not isinstance(sample.image, Path) or sample.image.is_file()
        (there if is_there else missing).append(sample)
    if missing and not (skip and there):
        raise UserError(
            f"{len(missing):,} of {len(samples):,} images are missing, the first is "
            f"{missing[0].image}; {advice if there else if_all}"
        )
    return there, len(missing)


def image_bytes(sample: EvaluationSample) -> bytes | None:
    """Return an image file's bytes, a new PNG for pixels; None where it can't be decoded."""
    if isinstance(sample.image, np.ndarray):
        png = io.BytesIO()
        Image.fromarray(sample.image).save(png, "PNG")
        return png.getvalue()
    try:
        data = sample.image.read_bytes()
    except (OSError, ValueError):  # ValueError: a path with a zero byte
        return None
    return data if is_whole(data, EVALUATION_FORMATS) else None


class _ConvertedSet(TypedDict):
    """The entries that the ``dataset.json`` of a set has to hold."""

    dataset: str
    split: str
    samples: int


def _complete(store: OutputFolder, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Return the ``dataset.json`` of a complete set; None where there is none.

    Raises:
        UserError: another set is there, or the output cannot be reached.
    """
    listing = store.listing()
    if INDEX not in listing:  # written last
        store.check_writable()
        return None
    there: Any = store.read_json([CARD_FILE])[0] if CARD_FILE in listing else None
    if not has_type(there, _ConvertedSet) or not there.keys() >= identity.keys():
        raise UserError(f"{store.out} already holds another kind of data set; choose another --out")
    for key, (other, _) in differences(there, identity).items():
        shown = f", {key} {'all' if other is None else other}"
        shown = "" if key in ("dataset", "split") else shown
        raise UserError(
            f"{store.out} already holds {there['dataset']} ({there['split']}{shown}): choose "
            "another --out, or delete it first"
        )
    card: dict[str, Any] = there
    return card


def _write_set(
    store: OutputFolder, identity: dict[str, Any], source: SetToWrite, progress: bool
) -> str:
    """Write shards, JSON files, the index last; leave out images that cannot be decoded."""
    from alignclip.conversion.mds_writer import JoinedShardWriter

    target, encoding = source.column
    columns = {"key": "str", "image": "bytes", target: encoding}
    unreadable: list[str] = []
    start = time.monotonic()
    with store.staged() as folder:
        with JoinedShardWriter(columns, folder) as writer:
            images = _decoded_images(source.samples, identity["dataset"], progress)
            for sample, image in zip(source.samples, images, strict=True):
                if image is None:
                    unreadable.append(sample.key)
                else:
                    writer.write({"key": sample.key, "image": image, target: sample.target})
        number = len(source.samples)
        if len(unreadable) == number:
            first = source.samples[0].key
            raise UserError(f"none of the {number:,} images can be decoded, the first is {first}")
        card = {
            **identity,
            **source.about,
            "notes": source.notes,
            "samples": number - len(unreadable),
            "skipped": {**source.skipped, UNREADABLE_IMAGE: len(unreadable)},
            "bytes": sum(file.stat().st_size for file in folder.glob("shard.*")),
            "versions": package_versions(*source.packages),
        }
        for name, content in {**source.files, CARD_FILE: card}.items():
            (folder / name).write_text(to_json(content), encoding="utf-8")
        if store.is_remote and progress:
            print(f"uploading {card['bytes'] / 2**20:,.1f} MiB to {store.out}", file=sys.stderr)
    return _summary(card, target, unreadable, store.out, time.monotonic() - start)


def _decoded_images(
    samples: Sequence[EvaluationSample], name: str, progress: bool
) -> Iterable[bytes | None]:
    """Yield the image file of each sample, in order; see :func:`image_bytes`."""
    # decoding and compressing run without the GIL
    images = read_ahead(partial(image_bytes, sample) for sample in samples)
    settings = {"total": len(samples), "desc": name, "unit": " images"}
    return progress_bar(progress, iterable=images, **settings)


def _summary(
    card: dict[str, Any], target: str, unreadable: Sequence[str], out: str, seconds: float
) -> str:
    rows = [
        ("set", f"{card['dataset']} ({card['split']})"),
        ("written", f"{card['samples']:,} samples"),
        ("skipped", f"{sum(card['skipped'].values()):,}"),
        *((f"  {reason}", f"{number:,}") for reason, number in card["skipped"].items() if number),
        *(("note", note) for note in card["notes"]),
        ("size", f"{card['bytes'] / 2**20:,.1f} MiB"),
        ("where", out),
        ("this run", f"{seconds:,.1f} s"),
    ]
    text = "\n".join(f"{name:<22}{value}" for name, value in rows)
    if unreadable:
        text += f"\n\ncannot be decoded: {first_few(unreadable, NAMED_UNREADABLE)}"
    name = out.rstrip("/").rpartition("/")[2]
    place = f"remote={out}" if "://" in out else f"local={out}"
    task = "zero_shot" if target == "label" else "retrieval"
    command = f"composer evaluate.py … evaluators.{name}.task={task} evaluators.{name}.{place}"
    return f"{text}\n\nnext: {command}"
