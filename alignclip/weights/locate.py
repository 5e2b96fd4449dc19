"""Where a trained model lies: a path, a URL of an object store or a Hugging Face id → a file on this machine.

What says how large the model is (``config.yaml``, ``open_clip_config.json`` or ``config.json``) lies beside the file
afterwards, and so does its model card.
"""

from __future__ import annotations

import re
from pathlib import Path

from alignclip.errors import UserError, check_place, few, nearest, one_line
from alignclip.near import did_you_mean
from alignclip.storage import StorageError, is_absent, is_denied, open_file, open_store

RUN_CONFIG = "config.yaml"
EXPORT_CONFIG = "open_clip_config.json"
EXPORT_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # the first that is there
HF_CONFIG, HF_PREPROCESSOR = "config.json", "preprocessor_config.json"
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
HF_PARTS = tuple(
    f"{name}.index.json" for name in HF_WEIGHTS
)  # lists the files of a model that is in several
CARD = "README.md"  # a model card: the licence is in it
UNUSED = "release_unused.safetensors"  # what an authors' file holds and no model uses, kept for the way back
BESIDE = (RUN_CONFIG, EXPORT_CONFIG, HF_CONFIG, HF_PREPROCESSOR, CARD, UNUSED)
LATEST = "latest-rank0.pt"
# A checkpoint of a run by its name alone, RUN/best or RUN/ep1-ba100: the file's name goes on with this
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
_OUTER_SLASHES = {
    True: 1,
    False: 2,
}  # of hf-hub:ORG/NAME and s3://bucket: what lies deeper can be a file
KEEP_BEST = " (best needs keep_best in the run)"
HUB_TIMEOUT = 10.0  # seconds, for a first answer


def fetch(place: str, downloads: Path) -> Path:
    """The local file with the weights that a person means by ``place``.

    Args:
        place: see :func:`alignclip.weights.load.load`.
        downloads: an empty folder for what comes from an object store. The Hub has a cache of its own.

    Raises:
        UserError: there is no such thing, or it can't be reached.
    """
    check_place("path", place)
    if why := why_no_weights(place):
        raise UserError(why)
    if place.startswith("hf-hub:"):
        return _from_hub(place)
    if "://" in place:
        return _from_store(place.rstrip("/"), downloads)
    try:
        return find_on_disk(place)
    except (OSError, ValueError) as error:  # no permission, or no name that there can be
        why = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"can't read {place}: {why}") from None


def why_no_weights(place: str) -> str | None:
    """Why a file can hold no weights, told by its name alone, with the place to name instead; None where it may.

    Args:
        place: a path, a URL or a Hugging Face id.
    """
    path = Path(place.removeprefix("local-dir:")).expanduser()
    suffix = path.suffix.lower()
    if suffix not in NO_WEIGHTS or path.name.endswith(
        ".index.json"
    ):  # an index names files of weights
        return None
    is_file = (
        place.count("/") > _OUTER_SLASHES[place.startswith("hf-hub:")]
        if _is_far(place)
        else path.is_file()
    )
    return (
        f"{place} is no checkpoint, but a {suffix} file{folder_meant(place)}" if is_file else None
    )


def folder_meant(place: str) -> str:
    """The end of the sentence that a file holds no weights: its folder, unless nothing can be loaded from that."""
    if _is_far(place):
        return f"; did you mean its folder, '{place.rpartition('/')[0]}'?"
    folder = Path(place.removeprefix("local-dir:")).parent
    try:
        find_on_disk(str(folder))
    except (UserError, OSError):
        return ""
    return f"; did you mean its folder, '{folder}'?"


def _is_far(place: str) -> bool:
    """Whether a place is on another machine: an object store's or the Hub's."""
    return "://" in place or place.startswith("hf-hub:")


def find_beside(file: Path, name: str) -> Path | None:
    """A file beside one of weights, or beside what a link to it points at."""
    return next(
        (p for p in (file.parent / name, file.resolve().parent / name) if p.is_file()), None
    )


def card_beside(place: str) -> str | None:
    """The text of the model card beside a file of weights, a path or a URL, or beside what a link to it points at.

    Raises:
        UserError: the object store can't be reached.
    """
    if "://" not in place:
        found = find_beside(Path(place).expanduser(), CARD)
        return found.read_text(encoding="utf-8", errors="replace") if found else None
    store, _ = open_file(place)
    try:
        card = store.read_optional(CARD)
    except StorageError as error:
        if is_unreachable(error):  # Composer knows schemes that Streaming doesn't
            return None
        raise
    return None if card is None else card.decode("utf-8", errors="replace")


def is_unreachable(error: StorageError) -> bool:
    """Whether it is about a kind of storage: its scheme is unknown, or its library isn't installed."""
    return isinstance(error.__cause__, (ValueError, ImportError))


def find_on_disk(place: str) -> Path:
    """The file itself, a folder's export, a run's latest checkpoint, or one of a run by its name (``RUN/best``)."""
    path = Path(place.removeprefix("local-dir:")).expanduser()
    for config, names in ((EXPORT_CONFIG, EXPORT_WEIGHTS), (HF_CONFIG, HF_WEIGHTS + HF_PARTS)):
        if path.is_dir() and (path / config).is_file():
            found = [path / name for name in names if (path / name).is_file()]
            if not found:
                whole = [name for name in names if name not in HF_PARTS]
                raise UserError(f"{place} has a file {config}, but no {' or '.join(whole)}")
            return found[0]
    is_folder = path.is_dir() and not (path / ".metadata").is_file()
    if is_folder:
        path /= LATEST
    if not is_folder and path.name and not _is_there(path):
        by_name = path.with_name(path.name + BY_NAME)
        path = by_name if _is_there(by_name) else path
    pointer = _pointer(path)
    if not path.exists() and pointer.is_file():
        path = path.with_name(_target(pointer, str(pointer)).rpartition("/")[2])
    if (path / ".metadata").is_file():
        raise UserError(
            f"{place} is a sharded checkpoint: a part for each process, not one file for all"
        )
    if path.is_file():
        return path
    if path.is_symlink():
        raise UserError(f"{path} points to {path.readlink()}, which is not there")
    beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in WEIGHT_FILES)
    if is_folder:
        below = sorted(str(p.parent) for p in path.parent.glob(f"*/{LATEST}"))
        hint = f"did you mean '{below[0]}'?" if below else f"its weights: {few(beside) or 'none'}"
        raise UserError(
            f"the folder {place} has neither a {LATEST} nor an export's {EXPORT_CONFIG}; {hint}"
        )
    if NAMES.fullmatch(place):
        runs = (
            run
            for folders in ("*", "*/*")
            for run in sorted(Path().glob(f"{folders}/{place}{BY_NAME}"))
        )
        if (run := next(runs, None)) is not None:
            raise UserError(
                f"no {place}{BY_NAME} in this folder; did you mean '{run.parent / place}'?"
            )
    if not path.suffix:
        beside = [name.removesuffix(BY_NAME) for name in beside]
    best = KEEP_BEST if beside and path.name in ("best", f"best{BY_NAME}") else ""
    if (hint := nearest(path.name, beside)).startswith("did"):
        raise UserError(f"no such file: {place}{best}; {hint}")
    for meant in (path, path.with_name(path.name + BY_NAME)):
        if near := did_you_mean(meant, _could_hold_weights):
            raise UserError(f"no such file: {place}{best}{near}")
    if (
        re.fullmatch(r"[\w-]+/[\w.-]+", place)
        and not path.parent.is_dir()
        and path.suffix not in WEIGHT_FILES
    ):
        raise UserError(f"no such file: {place}; did you mean 'hf-hub:{place}'?")
    raise UserError(f"no such file: {place}{best}; {hint if beside else 'no weights lie there'}")


def _could_hold_weights(path: Path) -> bool:
    """Whether a path is a folder, a file of weights or a link to one, or a checkpoint by its name."""
    return path.is_dir() or (path.suffix in WEIGHT_FILES and _is_there(path))


def _is_there(path: Path) -> bool:
    """Whether there is such a file or folder, if only as a link or as a bucket's link."""
    return path.is_symlink() or path.exists() or _pointer(path).is_file()


def _pointer(path: Path) -> Path:
    """A bucket's way to write a link, in a folder that was copied from one."""
    return path.with_name(f"{path.name}.symlink")


def _target(link: Path, place: str) -> str:
    """The key that is in a bucket's link.

    Raises:
        UserError: there is none.
    """
    key = link.read_bytes()[:4096].decode("utf-8", errors="replace").strip()
    if not 0 < len(key.rpartition("/")[2]) < 256 or not key.isprintable() or "\ufffd" in key:
        raise UserError(f"{place} is no link to a checkpoint: it doesn't hold a key")
    return key


def _from_store(url: str, downloads: Path) -> Path:
    """Download what a URL means, and the configuration beside it.

    Raises:
        UserError: there is no such thing, or it can't be reached.
    """
    root = "/".join(url.split("/")[:3])
    store = open_store(root)
    refusals = []  # of what is there and may not be read, or isn't there and the key may not list

    def get(remote: str, name: str) -> bool:
        try:
            store.download(remote.removeprefix(f"{root}/"), downloads / name)
        except StorageError as error:
            if is_unreachable(
                error
            ):  # whichever file was asked for first, this is about the place that was named
                raise StorageError(error.right, url, error.why) from error.__cause__
            if not is_absent(error) and not is_denied(error):
                raise
            refusals.extend([error.why] if is_denied(error) else [])
            return False
        return True

    parent, _, name = url.rpartition("/") if Path(url).suffix in WEIGHT_FILES else (url, "", "")
    above, _, short = url.rpartition("/")
    by_name = short + BY_NAME
    if NAMES.fullmatch(short) and any(
        get(f"{above}/{found}", found) for found in (by_name, f"{by_name}.symlink")
    ):
        parent, name = above, by_name
    beside = {config for config in BESIDE if get(f"{parent}/{config}", config)}
    known = EXPORT_WEIGHTS if EXPORT_CONFIG in beside else HF_WEIGHTS if HF_CONFIG in beside else ()
    names = [name] if name else [*known, LATEST]
    for name in names:
        if (downloads / name).is_file() or get(f"{parent}/{name}", name):
            return downloads / name
        if get(
            f"{parent}/{name}.symlink", "symlink"
        ):  # Composer's link in a bucket: an object with the key
            key = _target(downloads / "symlink", f"{parent}/{name}.symlink")
            target = f"{root}/{key}"
            if get(target, name):
                return downloads / name
            why = (
                f": {refusals[-1]}"
                if refusals
                else ", which is not there, or is a sharded checkpoint"
            )
            raise UserError(f"{parent}/{name} points to {target}{why}")
    also = f", and no {by_name} at {above}" if NAMES.fullmatch(short) else ""
    why = f": {refusals[-1]}" if refusals else "; check the bucket and the path"
    why += KEEP_BEST if short in ("best", f"best{BY_NAME}") else ""
    raise UserError(f"no {' or '.join(names)} at {parent}{also}{why}")


def _from_hub(place: str) -> Path:
    """The cached copy of ``hf-hub:ORG/NAME`` (an export, or its one file of weights) or ``hf-hub:ORG/NAME/FILE``.

    What is there is asked for first, once: a download would try for minutes to reach a Hub that doesn't answer.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    org, name, *rest = f"{place.removeprefix('hf-hub:')}/".split("/")
    repository, file = f"{org}/{name}", "/".join(rest).rstrip("/")
    if not name:
        raise UserError(f"{place}: write hf-hub:ORG/NAME, or hf-hub:ORG/NAME/FILE")
    cached: Path | None = None
    try:
        try:
            listed = hub.HfApi().model_info(repository, timeout=HUB_TIMEOUT).siblings or []
            files = [entry.rfilename for entry in listed]
        except errors.HfHubHTTPError:  # the Hub's own answer
            raise
        except OSError:  # no answer: what was downloaded before
            cached = Path(hub.snapshot_download(repository, local_files_only=True))
            files = sorted(path.relative_to(cached).as_posix() for path in cached.rglob("*"))
        file = file or _choose(place, files)
        if file not in files:
            weights = [known for known in files if Path(known).suffix in WEIGHT_FILES]
            raise UserError(
                f"{place} is not {'in the local cache' if cached else 'there'}; {nearest(file, weights)}"
            )
        if cached is not None:
            return cached / file
        for config in BESIDE:
            beside = Path(file).with_name(config).as_posix()
            if beside in files:
                hub.hf_hub_download(repository, beside, etag_timeout=HUB_TIMEOUT)
        return Path(hub.hf_hub_download(repository, file, etag_timeout=HUB_TIMEOUT))
    except errors.GatedRepoError:
        raise UserError(
            f"{place}: access has to be asked for at huggingface.co/{repository}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{place}: no such repository, or a private one (set HF_TOKEN)") from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{place} is not in the local cache, and huggingface.co can't be reached"
        ) from None
    except (
        OSError,
        ValueError,
    ) as error:  # requests' exceptions are OSErrors; an impossible name is a ValueError
        raise UserError(f"{place}: {one_line(error)}") from None


def _choose(place: str, files: list[str]) -> str:
    """The file of weights among those of a repository that holds one model.

    Raises:
        UserError: there are none, or several of which a person has to choose.
    """
    weights = [file for file in files if Path(file).suffix in WEIGHT_FILES]
    export = [
        file
        for config, names in ((EXPORT_CONFIG, EXPORT_WEIGHTS), (HF_CONFIG, HF_WEIGHTS))
        for file in names
        if file in weights and config in files
    ]
    if not weights:
        raise UserError(f"{place}: no weights there")
    if not export and any(file in HF_PARTS for file in files):
        raise UserError(
            f"{place} is in several files; download the repository, and name the folder that it is in"
        )
    if not export and len(weights) > 1:
        raise UserError(
            f"{place} has several models: {few(weights)}; name one, e.g. {place}/{weights[0]}"
        )
    return (export or weights)[0]
