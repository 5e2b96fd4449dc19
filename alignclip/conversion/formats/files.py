"""img2dataset's files: a folder is a shard, and holds an image, a text and a json for each pair.

https://github.com/rom1504/img2dataset/blob/main/img2dataset/writer.py, ``FilesSampleWriter``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alignclip.conversion.formats.declaration import InputFormat, Listing, OpenInput, has_ending
from alignclip.conversion.formats.pairing import (
    TEXT_EXTENSIONS,
    Pairing,
    kind_of_name,
    name_in_utf8,
)
from alignclip.conversion.formats.remote import read_ahead, read_image
from alignclip.conversion.samples import (
    IMAGE_EXTENSIONS,
    MISSING_IMAGE,
    UNREADABLE_FILE,
    Ignored,
    Item,
    Reading,
    Skipped,
)
from alignclip.errors import UserError
from alignclip.storage import StorageError, open_store, patiently


class Files(InputFormat):
    """Folders of images with texts beside them; a folder is named with a slash at the end."""

    words = "folders of files (img2dataset)"
    described = (
        "img2dataset's files (`--output_format files`, its default)",
        "folders `00000/` of `key.jpg` with `key.txt`, or `caption` in `key.json`, with the "
        "options of tars; each folder becomes one sub-folder. The parquet and json files beside "
        "the folders are left alone",
    )
    flags = ("--caption-key", "--image-key", "--encoding", "--last-dot")

    def fits(self, place: str) -> bool:
        """See the base class."""
        return place.endswith("/")

    def in_folder(self, listing: Listing) -> list[str]:
        """Return the shards' folders; or the folder itself where it holds pairs."""
        numbered = sorted(name for name in listing.folders if name.isdecimal())
        if any(map(listing.holds_images, numbered)):
            return [listing.at(f"{name}/") for name in numbered]
        stems = {
            name.partition(".")[0] for name in listing.files if has_ending(name, TEXT_EXTENSIONS)
        }
        images = (name for name in listing.files if has_ending(name, IMAGE_EXTENSIONS))
        is_shard = any(name.partition(".")[0] in stems for name in images)
        return [f"{listing.place}/"] if is_shard else []

    def shard_name(self, place: str, part: str) -> str:
        """See the base class."""
        return super().shard_name(place.rstrip("/"), part)

    def stamp(self, path: Path) -> tuple[int, int]:
        """Return the bytes of all files, and when the last of them was changed."""
        stats = [stat for entry in path.iterdir() if (stat := _stat(entry))]
        return sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)

    @contextmanager
    def opened(self, place: str, part: str, reading: Reading) -> Iterator[OpenInput]:
        """See the base class; files are read one by one, some of them ahead."""
        folder, stamp = place.rstrip("/"), (0, 0)
        if "://" in place:
            try:
                names = patiently(open_store(folder).names, folder)
            except StorageError as error:
                raise UserError(f"cannot fetch {place}: {error.why}") from error
        else:
            entries = list(Path(folder).iterdir())
            names = {f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries}
            stamp = self.stamp(Path(folder))
        yield OpenInput(*stamp, _pairs_of_files(folder, names, Pairing(reading, place)))


def _pairs_of_files(folder: str, names: Iterable[str], pairing: Pairing) -> Iterator[Item]:
    """Yield the pairs of a folder, in the order of their keys, and sub-folders as what they are.

    Args:
        folder: path or URL, without a slash at the end.
        names: of the files, relative to the folder, as the system has them; a sub-folder's has a
            slash.
        pairing: puts the files together.
    """
    own = {name.partition("/")[0] + name.partition("/")[1] for name in names}
    order = sorted((*(pairing.split(name_in_utf8(name)) or ("", "")), name) for name in own)
    places = ((f"{folder}/{name}", key) for key, ending, name in order if pairing.reads(ending))
    contents = read_ahead(partial(read_image, *place) for place in places)
    for key, ending, name in order:
        shown = name_in_utf8(name)
        if not key:
            is_folder = name.endswith("/")
            yield Ignored(shown.rstrip("/"), "folder" if is_folder else kind_of_name(shown))
            continue
        content = next(contents) if pairing.reads(ending) else b""
        is_unreadable = isinstance(content, Skipped) and content.reason == MISSING_IMAGE
        if is_unreadable and "://" not in folder:
            yield Ignored(shown, UNREADABLE_FILE)
            continue
        if pairing.is_complete(key, ending):
            yield from pairing.finish()
        if isinstance(content, bytes):
            pairing.add(key, ending, len(content), partial(bytes, content))
        else:
            pairing.refuse(key, ending, content.detail, UNREADABLE_FILE if is_unreadable else None)
    yield from pairing.finish()
    yield from pairing.halves()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # a link to nowhere
        return None
