"""Patterns on the command line, and the input shards that they stand for.

An input shard is named by a string: a path or URL, with ``#`` and a part where one file is several
shards: rows of a CSV file, a shard of an MDS set. Plans and counts keep these names.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from alignclip.conversion.formats import ENDINGS, INPUT_FORMATS, format_of
from alignclip.conversion.formats.declaration import InputFormat, Listing, OpenInput, is_web
from alignclip.conversion.samples import DEFAULT_READING, IMAGE_EXTENSIONS, Reading
from alignclip.conversion.wording import first_few
from alignclip.errors import UserError
from alignclip.near import did_you_mean
from alignclip.storage import is_passing
from alignclip.storage.copies import check_web
from alignclip.storage.staging import list_remote


class InputShard(NamedTuple):
    """An input shard: the format of its file, the file's path or URL, and the part of the file."""

    format: InputFormat
    place: str
    part: str


def expand_inputs(patterns: Sequence[str], reading: Reading = DEFAULT_READING) -> list[str]:
    """Return the names of the input shards that ``patterns`` stand for, each once, in this order.

    A pattern is a path or URL; a folder, which stands for its files of the first format that it
    holds; with ``{00000..00123}`` or ``{a,b}`` each of these; with ``*``, ``?`` or ``[]`` the files
    that exist. Folders and wildcards also work in the object stores that Streaming can list (S3,
    GCS, OCI).

    Raises:
        UserError: a pattern matches nothing, a file that is named does not exist, or a file that is
            several shards can't be read as ``reading`` says.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    missing: list[str] = []
    unseen: list[str] = []  # URLs of single files
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"unbalanced braces in '{pattern}'") from None
        for name in names:
            found += _expand_remote(name, unseen) if "://" in name else _expand_local(name, missing)
    missing += _missing_remote(unseen)
    if missing:
        near = "" if "://" in missing[0] else did_you_mean(missing[0])
        raise UserError(
            f"{len(missing)} of {len(found)} inputs do not exist, the first is {missing[0]}{near}"
        )
    if not found:
        raise UserError("no inputs")
    check_web(filter(is_web, found))
    return [
        f"{place}#{part}" if part else place
        for place in dict.fromkeys(found)
        for part in format_of(place).parts(place, reading)
    ]


def split(shard: str) -> InputShard:
    """Take the name of an input shard apart."""
    place, mark, part = shard.rpartition("#")
    if mark and (found := format_of(place)).has_parts:
        return InputShard(found, place, part)
    return InputShard(format_of(shard), shard, "")


def name_of(shard: str) -> str:
    """Return the name of the sub-folder that an input shard becomes."""
    found, place, part = split(shard)
    return found.shard_name(place, part)


def unique_names(shards: Sequence[str], taken: Sequence[str]) -> dict[str, str]:
    """Return sub-folder -> input shard; two shards may not share a sub-folder.

    Args:
        shards: as :func:`expand_inputs` has them.
        taken: the held-out split's sub-folder, where there is one.

    Raises:
        UserError: names the input that has to be renamed.
    """
    names: dict[str, str] = {}
    for shard in shards:
        name = name_of(shard)
        if not name:
            raise UserError(f"{shard} is a hidden file; rename it to convert it")
        if name in names:
            raise UserError(
                f"{names[name]} and {shard} would both become '{name}'; give each folder of inputs "
                "an --out of its own (training takes several streams)"
            )
        if name in taken:
            raise UserError(
                f"{shard} would become '{name}', which is the held-out split's name; rename it"
            )
        names[name] = shard
    return names


def input_columns(shards: Iterable[str], reading: Reading) -> dict[str, dict[str, str]]:
    """Return the columns of each input file that these shards are parts of."""
    places = {place: found for found, place, _ in map(split, shards)}
    return {place: found.columns(place, reading) for place, found in sorted(places.items())}


@contextmanager
def opened(shard: str, reading: Reading = DEFAULT_READING) -> Iterator[OpenInput]:
    """Fetch an input shard where it is remote, and read it.

    Raises:
        UserError: the shard can't be fetched, or has no such columns.
    """
    found, place, part = split(shard)
    with found.opened(place, part, reading) as input_shard:
        yield input_shard


def _expand_local(name: str, missing: list[str]) -> list[str]:
    """Return what one path stands for; put a file that isn't there on the list ``missing``."""
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
        folders = [entry.name for entry in entries if entry.is_dir()]
        files = [entry.name for entry in entries if entry.name not in {*folders}]

        def names_in(folder: str) -> Iterator[str]:
            return (entry.name for entry in (path / folder).iterdir())

        return _in_folder(Listing(str(path), files, folders, names_in))
    if path.exists() or not glob.has_magic(name):
        if not path.exists():
            missing.append(str(path))
        return [str(path)]
    matches = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    found = sorted(str(match) for match in matches if not match.name.startswith("."))
    if not found:
        raise UserError(f"no file matches '{name}'")
    return [place for match in found for place in _expand_local(match, missing)]


def _in_folder(listing: Listing) -> list[str]:
    """Return what a folder stands for.

    Raises:
        UserError: the folder holds no inputs.
    """
    for one in INPUT_FORMATS:
        if found := one.in_folder(listing):
            _say_what_is_left_out(listing, found)
            return found
    place, formats = listing.place, ", ".join(f"*{ending}" for ending in ENDINGS)
    if "://" in place:
        raise UserError(f"nothing matches '{place}/*.tar'")
    loose = any(name.lower().endswith(IMAGE_EXTENSIONS) for name in listing.files)
    way = f"; for images with texts beside them: tar --sort=name -cf pairs.tar -C {place} ."
    raise UserError(f"no {formats} in the folder {place}{way if loose else ''}")


def _say_what_is_left_out(listing: Listing, taken: Sequence[str]) -> None:
    """Name a folder's inputs of other formats, but for tables that describe a file beside them."""
    names = [place.rstrip("/").rpartition("/")[2] for place in taken]
    stems = {name.split(".")[0] for name in names}
    inputs = [name for name in listing.files if name.lower().endswith(ENDINGS)]
    left = sorted(name for name in inputs if name not in names and name.split(".")[0] not in stems)
    if left:
        print(f"not taken from {listing.place}: {first_few(left)}; name them", file=sys.stderr)


def _expand_remote(url: str, unseen: list[str]) -> list[str]:
    """Return what one URL stands for; put a file, not looked for yet, on the list ``unseen``."""
    is_pattern = not is_web(url) and glob.has_magic(url)
    is_file = url.lower().endswith(".gz") or (
        not url.endswith("/") and any(one.fits(url) for one in INPUT_FORMATS)
    )
    if is_web(url) or (is_file and not is_pattern):
        if not is_web(url):
            unseen.append(url)
        return [url]
    folder, pattern = url.rsplit("/", 1) if is_pattern else (url.rstrip("/"), "")
    if glob.has_magic(folder):
        raise UserError(
            f"a wildcard in '{url}' may stand in the last part only; use braces for the folders"
        )
    shown = [name for name in list_remote(folder) if not name.startswith(".")]
    files = sorted(name for name in shown if "/" not in name)
    if not pattern:
        below: dict[str, list[str]] = {}
        for name in shown:
            if "/" in name:
                below.setdefault(name.split("/")[0], []).append(name.split("/", 1)[1])
        return _in_folder(Listing(folder, files, [*below], below.__getitem__))
    found = [f"{folder}/{name}" for name in files if fnmatch(name, pattern)]
    if not found:
        raise UserError(f"nothing matches '{folder}/{pattern}'")
    return found


def _missing_remote(urls: Sequence[str]) -> list[str]:
    """Return the URLs that their folders lack; trust a folder that can't be listed."""
    by_folder: dict[str, list[str]] = {}
    for url in urls:
        by_folder.setdefault(url.rpartition("/")[0], []).append(url)
    missing: list[str] = []
    for folder, files in by_folder.items():
        try:
            names = list_remote(folder)
        except (
            UserError
        ) as error:  # Azure, or a public bucket that may not be listed: fetching tells
            if error.__cause__ is not None and is_passing(error.__cause__):
                raise  # nobody is there: told at once, not after the minutes of an outage
            continue
        missing += [url for url in files if url.rpartition("/")[2] not in names]
    return missing
