"""JSON lines: an object with an image's place and a caption a line, in pieces of 10,000 lines."""

from __future__ import annotations

import gzip
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from alignclip.conversion import text_tables
from alignclip.conversion.formats.columns import (
    PathTable,
    find_columns,
    pieces,
    refuse_urls,
    rows_of_piece,
)
from alignclip.conversion.formats.declaration import (
    CAPTION_LISTS,
    PAIR_COLUMNS,
    InputFormat,
    OpenInput,
    path_of,
)
from alignclip.conversion.formats.remote import image_place, read_ahead, read_image
from alignclip.conversion.samples import (
    MISSING_IMAGE,
    NO_OBJECT,
    Item,
    Reading,
    Skipped,
    as_utf8,
    caption_of,
    pair,
    pair_with_captions,
    parse_json,
)
from alignclip.data.mds_index import INDEX
from alignclip.errors import UserError, one_line
from alignclip.storage.copies import TEMPORARY, fetched

LONGEST_LINE = 2**24  # bytes; a longer line is no pair's
LINES_LOOKED_AT = 100  # lines at the beginning, of which one has to be an object

_copying = threading.Lock()


class JsonLines(PathTable):
    """JSON lines, gzipped or not; images' paths are relative to the file, local or in a bucket."""

    words = "JSON lines"
    described = (
        "JSON lines: `.jsonl`, `.ndjson`, or `.json` where it is named; gzipped, too",
        "an object a line: `image` (a path below the file's folder, an absolute one, or a "
        "bucket's URL), `caption` (a text, or a list of them: the first line says which), `key` "
        "where there is one; `--image-key` and `--caption-key` name other entries; 10,000 lines "
        "at a time. A list in a bucket or on a web server names images below its own folder, or in "
        "a bucket; other pairs are left out",
    )
    flags = ("--caption-key", "--image-key")
    endings = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

    def fits(self, place: str) -> bool:
        """See the base class; also ``.json``, where a person names it and it's no set's index."""
        is_json = path_of(place).lower().endswith((*self.endings, ".json", ".json.gz"))
        return is_json and not place.endswith(f"/{INDEX}")

    def begins(self, head: bytes) -> bool:
        """See the base class."""
        return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")

    def parts(self, place: str, reading: Reading) -> list[str]:
        """See the base class.

        Raises:
            UserError: the file is no JSON lines, a list of web addresses, or damaged.
        """
        _temporary_copy.cache_clear()
        with _local_file(place) as path:
            _entry_names(path, place, reading)
            with _damage_told(place), _open_lines(path) as file:
                return pieces(map(bytes.strip, _every_line(file)), file.tell)

    def columns(self, place: str, reading: Reading) -> dict[str, str]:
        """See the base class."""
        with _local_file(place) as path:
            names = _entry_names(path, place, reading)
        return PAIR_COLUMNS | ({"caption": CAPTION_LISTS} if names.has_lists else {})

    @contextmanager
    def opened(self, place: str, part: str, reading: Reading) -> Iterator[OpenInput]:
        """See the base class; images' paths are relative to the folder of ``place``."""
        stem = InputFormat.shard_name(self, place, part)
        folder = place.rpartition("/")[0]
        with _local_file(place) as path, _open_lines(path) as file:
            names = _entry_names(path, place, reading)
            jobs = (
                partial(_item, line, f"{stem}-{number:08}", names, folder)
                for number, line in rows_of_piece(file, _lines(file), part)
            )
            yield OpenInput(*self.stamp(path), read_ahead(jobs))


@dataclass(frozen=True)
class _Names:
    """The entries of images and captions, and whether captions are lists."""

    image: str = ""
    caption: str = ""
    has_lists: bool = False


def _item(line: bytes, key: str, names: _Names, folder: str) -> Item:
    row = parse_json(line)
    if not isinstance(row, Mapping):
        return Skipped(key, NO_OBJECT, line[:100].decode("utf-8", "replace").strip())
    name, own = row.get(names.image), row.get("key")
    key = next((str(one) for one in (own, name) if isinstance(one, (str, int)) and one != ""), key)
    key = as_utf8(key)
    try:
        image = read_image(image_place(name, folder), key)
    except ValueError as error:
        image = Skipped(key, MISSING_IMAGE, f"{error}: {name!r}")
    if isinstance(image, Skipped):
        return image
    if not names.has_lists:
        return pair(key, image, caption_of(row, names.caption))
    captions = row.get(names.caption)
    return pair_with_captions(key, image, captions if isinstance(captions, list) else [captions])


def _entry_names(path: Path, place: str, reading: Reading) -> _Names:
    """Find the names of the entries from the first line that is an object.

    Raises:
        UserError: the file doesn't begin with an object, is a list of web addresses, or an entry is
            missing.
    """
    with _damage_told(place), _open_lines(path) as file:
        start = list(islice(_lines(file), LINES_LOOKED_AT))
    row = next((row for row in map(parse_json, start) if isinstance(row, Mapping)), None)
    if not start:
        return _Names()
    if row is None:
        raise UserError(f"{place} is no JSON lines: none of its first lines is an object")
    known = list(map(str, row))
    url = next((name for name, value in row.items() if text_tables.is_web_address(value)), None)
    listed = Path(place.rpartition("/")[2] if "://" in place else place)
    refuse_urls(place, "jsonl", known, url, reading, listed=listed)
    image, caption = find_columns(known, reading, place)
    return _Names(image, caption, isinstance(row[caption], list))


@contextmanager
def _damage_told(place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:  # gzip's own have no number
            raise UserError(f"cannot read {place}: {error.strerror}") from None
        raise UserError(f"{place} is damaged: {one_line(error)}; fetch it again") from None


@contextmanager
def _local_file(place: str) -> Iterator[Path]:
    """Give the file, or this process's copy of a remote one, of which it converts many pieces.

    The copy of an earlier file goes when no thread uses the copy any more.
    """
    if "://" not in place:
        yield Path(place)
        return
    with _copying:  # a thread waits for another's copy of the same file
        held = _temporary_copy(place)
    yield held[1]


@lru_cache(1)
def _temporary_copy(url: str) -> tuple[tempfile.TemporaryDirectory[str], Path]:
    folder = tempfile.TemporaryDirectory(prefix=TEMPORARY)
    with fetched(url) as path:
        return folder, path.rename(Path(folder.name, path.name))


def _open_lines(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
    return cast("BinaryIO", gzip.open(path) if is_packed else path.open("rb"))


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines that are not blank."""
    return filter(bytes.strip, _every_line(file))


def _every_line(file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(file.readline, LONGEST_LINE), b"")
