"""JSON lines: an object with an image's place and a caption a line, in pieces of 10,000 lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from alignclip.conversion import text_tables
from alignclip.conversion.formats.columns import PathTable, find_columns, refuse_urls
from alignclip.conversion.formats.declaration import (
    CAPTION_LISTS,
    PAIR_COLUMNS,
    InputFormat,
    OpenInput,
    path_of,
)
from alignclip.conversion.formats.lines import (
    LONGEST_LINE,
    fetched_once,
    items_of_lines,
    lines_not_blank,
    open_unpacked,
    pieces_of_lines,
    refuse_damage,
)
from alignclip.conversion.formats.remote import image_place, read_image
from alignclip.conversion.samples import (
    MISSING_IMAGE,
    NO_OBJECT,
    Item,
    Reading,
    Skipped,
    as_utf8,
    caption_of,
    member_json,
    pair,
    pair_with_captions,
)
from alignclip.data.mds_index import INDEX
from alignclip.errors import UserError

LINES_LOOKED_AT = 100  # lines at the beginning, of which one has to be an object


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
        with fetched_once(place, anew=True) as path:
            _entry_names(path, place, reading)
            with refuse_damage(place), open_unpacked(path) as file:
                return pieces_of_lines(file)

    def columns(self, place: str, reading: Reading) -> dict[str, str]:
        """See the base class."""
        with fetched_once(place) as path:
            names = _entry_names(path, place, reading)
        return PAIR_COLUMNS | ({"caption": CAPTION_LISTS} if names.has_lists else {})

    @contextmanager
    def opened(self, place: str, part: str, reading: Reading) -> Iterator[OpenInput]:
        """See the base class; images' paths are relative to the folder of ``place``."""
        stem = InputFormat.shard_name(self, place, part)
        folder = place.rpartition("/")[0]
        with fetched_once(place) as path, open_unpacked(path) as file:
            names = _entry_names(path, place, reading)

            def item_of(number: int, line: bytes) -> Item:
                return _item(line, f"{stem}-{number:08}", names, folder)

            yield OpenInput(*self.stamp(path), items_of_lines(file, part, item_of))


@dataclass(frozen=True)
class _Names:
    """The entries of images and captions, and whether captions are lists."""

    image: str = ""
    caption: str = ""
    has_lists: bool = False


def _item(line: bytes, key: str, names: _Names, folder: str) -> Item:
    row = member_json(line)
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
    with refuse_damage(place), open_unpacked(path) as file:
        lines, is_empty, row = islice(lines_not_blank(file), LINES_LOOKED_AT), True, None
        for line in lines:
            is_empty, row = False, member_json(line)
            if isinstance(row, Mapping) or len(line) == LONGEST_LINE:
                break
    if is_empty:
        return _Names()
    if not isinstance(row, Mapping):
        raise UserError(f"{place} is no JSON lines: none of its first lines is an object")
    known = list(map(str, row))
    url = next((name for name, value in row.items() if text_tables.is_web_address(value)), None)
    listed = Path(place.rpartition("/")[2] if "://" in place else place)
    refuse_urls(place, "jsonl", known, url, reading, listed=listed)
    image, caption = find_columns(known, reading, place)
    return _Names(image, caption, isinstance(row[caption], list))
