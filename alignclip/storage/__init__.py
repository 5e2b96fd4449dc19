"""Read, write, list and delete in folders and object stores alike, with errors in one line.

A place is a path or a URL.

- One small text file: :func:`read_text`.
- A folder or a URL with its files: ``store = open_store(place)``, then ``read_bytes``,
  ``read_text``,
  ``read_optional`` (None where there is no such file), ``write_text``, ``put``, ``download``,
  ``names``, ``size``, ``delete`` and ``check_writable`` (:class:`Store`). :func:`open_file` gives
  the store and the name of a single file.
- Each of these raises :class:`StorageError`, a :class:`alignclip.errors.UserError` of one line.
  Its ``why`` is the line without the place. :func:`is_absent`, :func:`is_denied`,
  :func:`is_about_name` and :func:`is_full` tell what the error means.
  :func:`describe_storage_error` puts any library's error into words.
- To wait while a store is away: ``patiently(lambda: store.put(path, name), store.place)``.
- A local file that appears whole or not at all: :func:`write_whole`, :func:`write_text_whole`.
  Nothing else in the package writes beside a file's place and renames.
- A folder or URL that is filled by complete sub-folders:
  :class:`alignclip.storage.staging.OutputFolder`.
- A new folder or URL that appears as a whole: :func:`alignclip.storage.new_folder.new_folder`.
- A remote file as a local one for a while: :func:`alignclip.storage.copies.fetched`.

The libraries of object stores take seconds to import. So they are imported where they are used.
"""

from alignclip.storage.clouds import open_file, open_store, read_text
from alignclip.storage.endpoint import expect_plain_s3
from alignclip.storage.patience import PATIENCE, patiently, slowness_said
from alignclip.storage.store import Store
from alignclip.storage.trouble import (
    is_about_name,
    is_absent,
    is_denied,
    is_full,
    is_passing,
)
from alignclip.storage.whole import (
    check_folder_writable,
    leaving_nothing,
    to_disk,
    write_text_whole,
    write_whole,
)
from alignclip.storage.words import StorageError, cannot, describe_storage_error, why_not_written

__all__ = [
    "PATIENCE",
    "StorageError",
    "Store",
    "cannot",
    "check_folder_writable",
    "describe_storage_error",
    "expect_plain_s3",
    "is_about_name",
    "is_absent",
    "is_denied",
    "is_full",
    "is_passing",
    "leaving_nothing",
    "open_file",
    "open_store",
    "patiently",
    "read_text",
    "slowness_said",
    "to_disk",
    "why_not_written",
    "write_text_whole",
    "write_whole",
]
