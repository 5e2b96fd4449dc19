"""Parquet files that hold images: img2dataset's and Hugging Face's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignclip.conversion import text_tables
from alignclip.conversion.formats.columns import IMAGE_COLUMNS, find_columns, refuse_urls
from alignclip.conversion.formats.declaration import InputFormat, Listing
from alignclip.conversion.samples import BROKEN_INPUT, Item, Reading, Skipped, caption_of, pair
from alignclip.errors import UserError, one_line

# Rows of a file in memory: the fewer, the larger they are.
ROWS_AT_ONCE, BYTES_AT_ONCE = 32, 8 * 2**20


class Parquet(InputFormat):
    """Parquet files with a column of image files: bytes, or Hugging Face's ``{bytes, path}``."""

    words = "parquet"
    described = (
        "img2dataset's parquet (`--output_format parquet`)",
        "`jpg` or `image` (also Hugging Face's `{bytes, path}`), `caption`, `key`; without "
        "images in it, it is only the list beside a tar",
    )
    flags = ("--caption-key", "--image-key")
    endings = (".parquet",)

    def begins(self, head: bytes) -> bool:
        """See the base class."""
        return head.startswith(b"PAR1")

    def in_folder(self, listing: Listing) -> list[str]:
        """See the base class; img2dataset's list beside a folder of files is left alone."""
        names = self.among(listing.files)
        stems = {name.partition(".")[0] for name in names}
        numbered = [name for name in listing.folders if name in stems and name.isdecimal()]
        shards = [*filter(listing.holds_images, numbered)]
        return [listing.at(name) for name in names if name.partition(".")[0] not in shards]

    def read(self, path: Path, part: str, reading: Reading) -> Iterator[Item]:
        """Yield the pairs of a file.

        In memory are a few rows, and a page of the file, compressed and decompressed: pyarrow reads
        no less. A page may be as large as a row group's images.

        Raises:
            UserError: pyarrow is not installed, or there is no such column.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                "parquet files need pyarrow: pip install 'alignclip[convert]'"
            ) from None
        number = 0
        try:
            # without the pre-buffer, or a row group is in memory
            table = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
            schema = table.schema_arrow
            image_column, caption_column = _parquet_columns(path, schema, reading)
            names = [image_column, caption_column, *(["key"] if "key" in schema.names else [])]
            for batch in _row_batches(table, list(dict.fromkeys(names))):
                images = _image_files(batch.column(image_column))
                texts = {name: _column_values(batch.column(name)) for name in names[1:]}
                for i in range(len(batch)):
                    row = {name: values[i] for name, values in texts.items()}
                    key = f"{path.stem}-{number:08}"
                    if row.get("key") not in (None, ""):
                        key = str(row["key"])
                    number += 1
                    yield pair(key, images[i].as_py(), caption_of(row, caption_column))
                del batch, images  # before the next rows are read
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            yield Skipped("", BROKEN_INPUT, one_line(error))


def _parquet_columns(path: Path, schema: Any, reading: Reading) -> tuple[str, str]:
    """Return the columns of images and captions.

    Raises:
        UserError: a column is missing, or the image column holds something else than files.
    """
    import pyarrow

    names = schema.names
    url = next((name for name in names if name in text_tables.URL_COLUMNS), None)
    refuse_urls(path, "parquet", names, url, reading, IMAGE_COLUMNS)
    image, caption = find_columns(names, reading, path, IMAGE_COLUMNS, another="")
    stored = schema.field(names.index(image)).type
    if pyarrow.types.is_struct(stored):
        stored = next((field.type for field in stored if field.name == "bytes"), stored)
    if not (pyarrow.types.is_binary(stored) or pyarrow.types.is_large_binary(stored)):
        kind = str(stored).split("<")[0]
        raise UserError(
            f"{path}: the column '{image}' has to hold image files' bytes; it is of type {kind}"
        )
    return image, caption


def _row_batches(table: Any, names: Sequence[str]) -> Iterator[Any]:
    """Yield the rows, few at a time where they are large."""
    for group in range(table.num_row_groups):
        about = table.metadata.row_group(group)
        rows = BYTES_AT_ONCE * about.num_rows // max(about.total_byte_size, 1)
        rows = min(max(rows, 1), ROWS_AT_ONCE)
        yield from table.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)


def _image_files(column: Any) -> Any:
    """Return a column's files, each copied when it is asked for; of a struct the ``bytes``."""
    import pyarrow
    from pyarrow import compute

    return compute.struct_field(column, "bytes") if pyarrow.types.is_struct(column.type) else column


def _column_values(column: Any) -> list[Any]:
    """Return a column's values; invalid UTF-8, at which pyarrow raises, becomes U+FFFD."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        texts = column.cast(pyarrow.large_binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", "replace") for text in texts]
    values: list[Any] = column.to_pylist()
    return values
