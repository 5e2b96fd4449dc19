"""Find a trained model on this machine: a file, a folder, or a run's checkpoint by its name."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

from alignclip.errors import UserError, few, nearest
from alignclip.near import did_you_mean
from alignclip.paths import LOCAL_DIR
from alignclip.storage import StorageError, open_file

RUN_CONFIG = "config.yaml"
EXPORT_CONFIG = "open_clip_config.json"
# the first one that is there holds the weights
EXPORT_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
HF_CONFIG = "config.json"
# how images are prepared: transformers 5 writes the first one, and transformers 4 the second
HF_PROCESSOR, HF_PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# lists the files of a model that is in several
HF_PARTS = tuple(f"{name}.index.json" for name in HF_WEIGHTS)
# an export's configuration → the files that its weights can be in
EXPORTS = {EXPORT_CONFIG: EXPORT_WEIGHTS, HF_CONFIG: HF_WEIGHTS}
CARD = "README.md"  # a model card: the licence is in it
# what an authors' file holds and no model uses, kept for the way back
UNUSED = "release_unused.safetensors"
BESIDE = (RUN_CONFIG, EXPORT_CONFIG, HF_CONFIG, HF_PROCESSOR, HF_PREPROCESSOR, CARD, UNUSED)
LATEST = "latest-rank0.pt"
# A checkpoint of a run by its name alone, RUN/best or RUN/ep1-ba100: the file's name ends with this
BY_NAME = "-rank0.pt"
NAMES = re.compile(r"best|latest|ep\d+-ba\d+")
WEIGHT_FILES = {".pt", ".pth", ".bin", ".safetensors"}
NO_WEIGHTS = {
    ".yaml",
    ".yml",
    ".json",
    ".jsonl",
    ".html",
    ".txt",
    ".md",
    ".csv",
    ".png",
    ".jpg",
    ".log",
}
KEEP_BEST = " (best needs keep_best in the run)"


def why_no_weights(place: str) -> str | None:
    """Say why a file can hold no weights, by its name alone, and what to name; None where it may.

    Args:
        place: a path, a URL or a Hugging Face id.
    """
    path = _local(place)
    suffix = path.suffix.lower()
    if suffix not in NO_WEIGHTS or path.name.endswith(".index.json"):  # which names weights
        return None
    if is_on_hub(place):
        is_file = place.count("/") > 1  # hf-hub:ORG/NAME/FILE
    elif "://" in place:
        is_file = place.count("/") > 2  # s3://bucket/FILE
    else:
        is_file = path.is_file()
    no_weights = f"{place} is no checkpoint, but a {suffix} file"
    return f"{no_weights}{folder_meant(place)}" if is_file else None


def folder_meant(place: str) -> str:
    """Offer the folder of a file without weights, unless nothing can be loaded from the folder."""
    if "://" in place or is_on_hub(place):
        return f"; did you mean its folder, '{place.rpartition('/')[0]}'?"
    folder = Path(place.removeprefix(LOCAL_DIR)).parent
    try:
        find_on_disk(str(folder))
    except (UserError, OSError):
        return ""
    return f"; did you mean its folder, '{folder}'?"


def find_beside(file: Path, name: str) -> Path | None:
    """Find a file beside one of weights, or beside the file that a link to weights points at."""
    places = (file.parent / name, file.resolve().parent / name)
    return next((path for path in places if path.is_file()), None)


def text_beside(place: str, name: str) -> str | None:
    """Read a text file beside a file of weights, a path or a URL; None where there is none.

    Raises:
        UserError: the object store can't be reached.
    """
    if "://" not in place:
        found = find_beside(_local(place), name)
        return found.read_text(encoding="utf-8", errors="replace") if found else None
    store, _ = open_file(place)
    try:
        content = store.read_optional(name)
    except StorageError as error:
        if is_about_kind(error):  # Composer knows schemes that Streaming doesn't
            return None
        raise
    return None if content is None else content.decode("utf-8", errors="replace")


def find_on_disk(place: str) -> Path:
    """Find a file: the file itself, a folder's export, a run's latest checkpoint, or RUN/best.

    Raises:
        UserError: there is no such file; with what may have been meant.
    """
    path = _local(place)
    for config, names in EXPORTS.items():
        if (path / config).is_file():
            known = (*names, *HF_PARTS) if config == HF_CONFIG else names
            if found := [path / name for name in known if (path / name).is_file()]:
                return found[0]
            raise UserError(f"{place} has a file {config}, but no {' or '.join(names)}")
    is_folder = path.is_dir() and not (path / ".metadata").is_file()
    if is_folder:
        path /= LATEST
    elif path.name and not _exists(path) and _exists(by_name := _with_ending(path)):
        path = by_name
    pointer = _pointer(path)
    if not path.exists() and pointer.is_file():
        path = path.with_name(read_link(pointer, str(pointer)).rpartition("/")[2])
    if (path / ".metadata").is_file():
        raise UserError(
            f"{place} is a sharded checkpoint: a part for each process, not one file for all"
        )
    if path.is_file():
        return path
    if path.is_symlink():
        raise UserError(f"{path} points to {path.readlink()}, which is not there")
    beside = sorted(file.name for file in path.parent.glob("*") if file.suffix in WEIGHT_FILES)
    if is_folder:
        below = sorted(str(file.parent) for file in path.parent.glob(f"*/{LATEST}"))
        hint = f"did you mean '{below[0]}'?" if below else f"its weights: {few(beside) or 'none'}"
        raise UserError(
            f"the folder {place} has neither a {LATEST} nor an export's {EXPORT_CONFIG}; {hint}"
        )
    raise UserError(_what_was_meant(place, path, beside))


def _what_was_meant(place: str, path: Path, beside: list[str]) -> str:
    """Say what may have been meant by a file that isn't there.

    Args:
        place: as it was given.
        path: where it would lie.
        beside: the names of the files of weights there.
    """
    if NAMES.fullmatch(place):
        below = (sorted(Path().glob(f"{depth}/{place}{BY_NAME}")) for depth in ("*", "*/*"))
        if run := next(chain.from_iterable(below), None):
            return f"no {place}{BY_NAME} in this folder; did you mean '{run.parent / place}'?"
    if not path.suffix:
        beside = [name.removesuffix(BY_NAME) for name in beside]
    missing = f"no such file: {place}"
    if beside and path.name in ("best", f"best{BY_NAME}"):
        missing += KEEP_BEST
    if (hint := nearest(path.name, beside)).startswith("did"):
        return f"{missing}; {hint}"
    for meant in (path, _with_ending(path)):
        if near := did_you_mean(meant, _could_hold_weights):
            return missing + near
    if path.suffix not in WEIGHT_FILES and looks_like_id(place):
        return f"no such file: {place}; did you mean 'hf-hub:{place}'?"
    return f"{missing}; {hint if beside else 'no weights lie there'}"


def _local(place: str) -> Path:
    return Path(place.removeprefix(LOCAL_DIR)).expanduser()


def is_on_hub(place: str) -> bool:
    """Tell whether a place is on the Hugging Face Hub."""
    return place.startswith("hf-hub:")


def looks_like_id(place: str) -> bool:
    """Tell whether a place may be ORG/NAME or MODEL/TAG, and no folder is called ORG or MODEL."""
    named = re.fullmatch(r"[\w-]+/[\w.-]+", place) is not None
    return named and not _local(place).parent.is_dir()


def _with_ending(path: Path) -> Path:
    """Give the file of a checkpoint that is named without the end of its name."""
    return path.with_name(path.name + BY_NAME)


def _could_hold_weights(path: Path) -> bool:
    """Tell whether a path is a folder, a file of weights or a link to one, or RUN/best."""
    return path.is_dir() or (path.suffix in WEIGHT_FILES and _exists(path))


def _exists(path: Path) -> bool:
    """Tell whether there is such a file or folder, if only as a link or as a bucket's link."""
    return path.is_symlink() or path.exists() or _pointer(path).is_file()


def _pointer(path: Path) -> Path:
    """Name a bucket's way to write a link, in a folder that was copied from a bucket."""
    return path.with_name(f"{path.name}.symlink")


def read_link(link: Path, place: str) -> str:
    """Read the key in a bucket's link.

    Raises:
        UserError: there is none.
    """
    key = link.read_bytes()[:4096].decode("utf-8", errors="replace").strip()
    if not 0 < len(key.rpartition("/")[2]) < 256 or not key.isprintable() or "\ufffd" in key:
        raise UserError(f"{place} is no link to a checkpoint: it doesn't hold a key")
    return key


def is_about_kind(error: StorageError) -> bool:
    """Tell whether a scheme is unknown, or its library isn't installed."""
    return isinstance(error.__cause__, (ValueError, ImportError))
