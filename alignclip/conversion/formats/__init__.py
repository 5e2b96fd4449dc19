"""The input formats: a file each, and the table by which everybody finds them.

CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from alignclip.conversion.formats.declaration import InputFormat
from alignclip.errors import UserError


def _format(name: str) -> InputFormat:
    module, _, kind = name.partition(".")
    found = getattr(import_module(f"{__name__}.{module}"), kind)()
    assert isinstance(found, InputFormat)
    return found


# Each name is a class in a module beside this one. A folder stands for the first of these formats
# that the folder holds: img2dataset puts a parquet file beside each tar.
INPUT_FORMATS = [
    _format(name)
    for name in (
        "tars.Tars",
        "parquet.Parquet",
        "csv.Csv",
        "json_lines.JsonLines",
        "files.Files",
        "mds.Mds",
    )
]
ENDINGS = tuple(ending for one in INPUT_FORMATS for ending in one.endings)
MAGIC_BYTES = 512  # bytes of a file by which a format is recognised


def format_of(place: str) -> InputFormat:
    """Return the format of a path or URL: by its name, else by its first bytes, else tar.

    Raises:
        UserError: the file can't be read.
    """
    for one in INPUT_FORMATS:
        if one.fits(place):
            return one
    path = Path(place)
    if "://" not in place and path.is_file():
        try:
            with path.open("rb") as file:
                head = file.read(MAGIC_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror}") from None
        for one in INPUT_FORMATS:
            if one.begins(head):
                return one
    return INPUT_FORMATS[0]


def in_words() -> str:
    """Return what may be an input, for ``--help``."""
    return ", ".join(one.words for one in INPUT_FORMATS)
