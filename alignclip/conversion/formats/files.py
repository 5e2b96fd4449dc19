"""img2dataset's files: a folder is a shard, and holds an image, a text and a json for each pair.

https://github.com/rom1504/img2dataset/blob/main/img2dataset/writer.py, ``FilesSampleWriter``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alignclip.conversion.formats.declaration import InputFormat, Listing, OpenInput
from alignclip.conversion.formats.pairing import TEXT_EXTENSIONS, Pairing, kind_of_name
from alignclip.conversion.formats.remote import read_ahead, read_object, store_at
from alignclip.conversion.samples import (
    IMAGE_EXTENSIONS,
    Ignored,
    Item,
    Reading,
)
from alignclip.errors import UserError
from alignclip.storage import StorageError, patiently


class Files(InputFormat):
    """Folders of images with texts beside them; a folder is named with a slash at the end."""

    words = "folders of files (img2dataset)"
    described = (
        "img2dataset's files (`--output_format files`, its default)",
        "folders `00000/` of `key.jpg` with `key.txt`, or `caption` in `key.json`, with the "
        "options of "
        "tars; each folder becomes one sub-folder. The parquet and json files beside the folders "
        "are "
        "left alone",
    )
    flags = ("--caption-key", "--image-key", "--encoding", "--last-dot")

    def fits(self, place: str) -> bool:
        """See the base class."""
        return place.endswith("/")

    def in_folder(self, listing: Listing) -> list[str]:
        """Return the shards' folders; or the folder itself where it holds pairs."""
        numbered = sorted(name for name in listing.folders if name.isdecimal())
        if any(_holds_images(listing.names_in(name)) for name in numbered):
            return [listing.at(f"{name}/") for name in numbered]
        if not all(_ends(name, (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)) for name in listing.files):
            return []
        stems = {name.partition(".")[0] for name in listing.files if _ends(name, TEXT_EXTENSIONS)}
        images = (name for name in listing.files if _ends(name, IMAGE_EXTENSIONS))
        is_shard = any(name.partition(".")[0] in stems for name in images)
        return [f"{listing.place}/"] if is_shard else []

    def shard_name(self, place: str, part: str) -> str:
        """See the base class."""
        return super().shard_name(place.rstrip("/"), part)

    def stamp(self, path: Path) -> tuple[int, int]:
        """Return the bytes of all files, and when the last of them was changed."""
        stats = [entry.stat() for entry in path.iterdir()]
        return sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)

    @contextmanager
    def opened(self, place: str, part: str, reading: Reading) -> Iterator[OpenInput]:
        """See the base class; the files of a bucket are read one by one, some of them ahead."""
        if "://" not in place:
            yield OpenInput(*self.stamp(Path(place)), self.read(Path(place), part, reading))
            return
        folder = place.rstrip("/")
        try:
            names = patiently(store_at(folder).names, folder)
        except StorageError as error:
            raise UserError(f"cannot fetch {place}: {error.why}") from error
        yield OpenInput(0, 0, _remote_pairs(folder, names, Pairing(reading, place)))

    def read(self, path: Path, part: str, reading: Reading) -> Iterator[Item]:
        """Yield the pairs of a local folder, in the order of their keys."""
        pairing = Pairing(reading, str(path))
        for name, key, ending in _by_key({entry.name for entry in path.iterdir()}, pairing):
            file = path / name
            if ending is None or file.is_dir():
                yield Ignored(name, "folder" if file.is_dir() else kind_of_name(name))
            else:
                yield from pairing.add(key, ending, file.stat().st_size, file.read_bytes)
        yield from pairing.finish()
        yield from pairing.halves()


def _remote_pairs(folder: str, names: set[str], pairing: Pairing) -> Iterator[Item]:
    """Yield the pairs of a folder in a bucket, in the order of their keys."""
    order = list(_by_key({name for name in names if "/" not in name}, pairing))
    wanted = [name for name, _, ending in order if ending is not None and pairing.reads(ending)]
    contents = read_ahead(partial(read_object, f"{folder}/{name}") for name in wanted)
    for name, key, ending in order:
        if ending is None:
            yield Ignored(name, kind_of_name(name))
            continue
        content = next(contents) if pairing.reads(ending) else b""
        yield from pairing.add(key, ending, len(content), partial(bytes, content))
    yield from pairing.finish()
    yield from pairing.halves()


def _by_key(names: set[str], pairing: Pairing) -> Iterator[tuple[str, str, str | None]]:
    """Yield name, key and ending of files, by keys; the ending is None where a name has no key."""
    split = [(name, *(pairing.split(name) or ("", None))) for name in names]
    yield from sorted(split, key=lambda one: (one[1], one[0]))


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.rpartition(".")[2].lower() in endings


def _holds_images(names: Iterable[str]) -> bool:
    return any(_ends(name, IMAGE_EXTENSIONS) for name in names)
