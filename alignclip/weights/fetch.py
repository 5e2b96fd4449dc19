"""A URL of an object store or a Hugging Face id → the file of a model on this machine.

What says how large the model is (``config.yaml``, ``open_clip_config.json`` or ``config.json``)
lies beside the file afterwards, and so does its model card.
"""

from __future__ import annotations

from pathlib import Path

from alignclip.errors import UserError, check_place, few, nearest, one_line
from alignclip.storage import StorageError, hub, is_absent, is_denied, open_store
from alignclip.weights.locate import (
    BESIDE,
    BY_NAME,
    EXPORTS,
    HF_PARTS,
    KEEP_BEST,
    LATEST,
    NAMES,
    WEIGHT_FILES,
    find_on_disk,
    is_about_kind,
    is_on_hub,
    read_link,
    why_no_weights,
)

HUB_ANSWER_TIMEOUT = 10.0  # seconds, for a first answer


def fetch(place: str, downloads: Path) -> Path:
    """Find or download the file with the weights that a person means by ``place``.

    Args:
        place: see :func:`alignclip.load`.
        downloads: an empty folder for what comes from an object store. The Hub has a cache of its
            own.

    Raises:
        UserError: there is no such thing, or it can't be reached.
    """
    check_place("path", place)
    if why := why_no_weights(place):
        raise UserError(why)
    if is_on_hub(place):
        return _from_hub(place)
    if "://" in place:
        return _from_store(place.rstrip("/"), downloads)
    try:
        return find_on_disk(place)
    except (OSError, ValueError) as error:  # no permission, or a name that no file can have
        why = error.strerror if isinstance(error, OSError) else one_line(error)
        raise UserError(f"can't read {place}: {why}") from None


class _Downloads:
    """Download files of the store that a URL names into a folder, where they are there.

    Attributes:
        why: the last refusal: the file may not be read, or isn't there and the key may not list.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.root = "/".join(url.split("/")[:3])
        self.store = open_store(self.root)
        self.why: str | None = None

    def get(self, remote: str, name: str) -> bool:
        """Download ``remote`` as ``name``; tell whether it is there.

        Raises:
            StorageError: the store can't be reached.
        """
        try:
            self.store.download(remote.removeprefix(f"{self.root}/"), self.folder / name)
        except StorageError as error:
            if is_about_kind(error):  # this is about the place that was named, not about a file
                raise StorageError(error.right, self.url, error.why) from error.__cause__
            if is_denied(error):
                self.why = error.why
            elif not is_absent(error):
                raise
            return False
        return True


def _from_store(url: str, folder: Path) -> Path:
    """Download what a URL means, and the configuration beside it.

    Raises:
        UserError: there is no such thing, or it can't be reached.
    """
    downloads = _Downloads(url, folder)
    above, _, short = url.rpartition("/")
    by_name = short + BY_NAME
    parent, name = (above, short) if Path(url).suffix in WEIGHT_FILES else (url, "")
    if NAMES.fullmatch(short) and any(
        downloads.get(f"{above}/{found}", found) for found in (by_name, f"{by_name}.symlink")
    ):
        parent, name = above, by_name
    beside = [config for config in BESIDE if downloads.get(f"{parent}/{config}", config)]
    known = next((EXPORTS[config] for config in EXPORTS if config in beside), ())
    names = [name] if name else [*known, LATEST]
    for name in names:
        if (folder / name).is_file() or downloads.get(f"{parent}/{name}", name):
            return folder / name
        # Composer's link in a bucket: an object with the key
        link = f"{parent}/{name}.symlink"
        if downloads.get(link, "symlink"):
            target = f"{downloads.root}/{read_link(folder / 'symlink', link)}"
            if downloads.get(target, name):
                return folder / name
            gone = ", which is not there, or is a sharded checkpoint"
            why = f": {downloads.why}" if downloads.why else gone
            raise UserError(f"{parent}/{name} points to {target}{why}")
    also = f", and no {by_name} at {above}" if NAMES.fullmatch(short) else ""
    why = f": {downloads.why}" if downloads.why else "; check the bucket and the path"
    why += KEEP_BEST if short in ("best", f"best{BY_NAME}") else ""
    raise UserError(f"no {' or '.join(names)} at {parent}{also}{why}")


def _from_hub(place: str) -> Path:
    """Give the cached copy of ``hf-hub:ORG/NAME`` (its one model) or ``hf-hub:ORG/NAME/FILE``.

    The list of files is asked for first, once: a download would try for minutes to reach a Hub that
    doesn't answer.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download

    org, name, *rest = f"{place.removeprefix('hf-hub:')}/".split("/")
    repository, file = f"{org}/{name}", "/".join(rest).rstrip("/")
    if not name:
        raise UserError(f"{place}: write hf-hub:ORG/NAME, or hf-hub:ORG/NAME/FILE")
    cached: Path | None = None
    # an impossible name is a ValueError
    refused: tuple[type[Exception], ...] = (*hub.no_answer(), ValueError)
    try:
        try:
            listed = HfApi().model_info(repository, timeout=HUB_ANSWER_TIMEOUT).siblings or []
            files = [entry.rfilename for entry in listed]
        except errors.HfHubHTTPError:  # the Hub's own answer
            raise
        except hub.no_answer():  # what was downloaded before
            cached = hub.cached_snapshot(repository)
            files = sorted(path.relative_to(cached).as_posix() for path in cached.rglob("*"))
        file = file or _choose(place, files)
        if file not in files:
            weights = [known for known in files if Path(known).suffix in WEIGHT_FILES]
            where = "in the local cache" if cached else "there"
            raise UserError(f"{place} is not {where}; {nearest(file, weights)}")
        if cached is not None:
            return cached / file
        beside = {Path(file).with_name(config).as_posix() for config in BESIDE}
        for needed in [*beside.intersection(files), file]:
            path = hf_hub_download(repository, needed, etag_timeout=HUB_ANSWER_TIMEOUT)
        return Path(path)
    except errors.GatedRepoError:
        why = f": access has to be asked for at huggingface.co/{repository}"
    except errors.RepositoryNotFoundError:
        why = ": no such repository, or a private one (set HF_TOKEN)"
    except errors.LocalEntryNotFoundError:
        why = " is not in the local cache, and huggingface.co can't be reached"
    except refused as error:
        why = f": {one_line(error)}"
    raise UserError(f"{place}{why}")


def _choose(place: str, files: list[str]) -> str:
    """Choose the file of weights among the files of a repository that holds one model.

    Raises:
        UserError: there are none, or several of which a person has to choose.
    """
    weights = [file for file in files if Path(file).suffix in WEIGHT_FILES]
    exported = (file for config in EXPORTS if config in files for file in EXPORTS[config])
    if found := next((file for file in exported if file in weights), None):
        return found
    if not weights:
        raise UserError(f"{place}: no weights there")
    if any(file in HF_PARTS for file in files):
        raise UserError(
            f"{place} is in several files; download the repository, and name the folder that it is "
            "in"
        )
    if len(weights) > 1:
        raise UserError(
            f"{place} has several models: {few(weights)}; name one, e.g. {place}/{weights[0]}"
        )
    return weights[0]
