"""The input formats: a file each, and the table by which everybody finds them.

How to add a format
-------------------

1. Write a module with a subclass of :class:`~alignclip.conversion.formats.declaration.InputFormat`.
   Its attributes say what files are called and which options count; ``read`` yields a file's pairs.
   Formats whose files are several input shards, or that read more than one file, override more
   methods.
2. Add a line to :data:`INPUT_FORMATS`.

The command line, patterns and folders, the plan and the table in ``docs/convert.md`` (which a test
compares) then know the format. Another test asks for its endings in the verifier's hint.
"""

from __future__ import annotations

from pathlib import Path

from alignclip.conversion.formats.csv import Csv
from alignclip.conversion.formats.declaration import InputFormat
from alignclip.conversion.formats.files import Files
from alignclip.conversion.formats.json_lines import JsonLines
from alignclip.conversion.formats.mds import Mds
from alignclip.conversion.formats.parquet import Parquet
from alignclip.conversion.formats.tars import Tars
from alignclip.errors import UserError

# A folder stands for the first of these formats that it holds: img2dataset puts a parquet file
# beside each tar.
INPUT_FORMATS: tuple[InputFormat, ...] = (Tars(), Parquet(), Csv(), JsonLines(), Files(), Mds())
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
