"""Folders and object stores alike: read, write, list, delete; what passes, and how to wait; whole files only.

Imports of the clouds' libraries take seconds, so nothing here imports them before it needs them.
"""

from alignclip.storage.endpoint import expect_plain_s3
from alignclip.storage.patience import PATIENCE, TRAINING_PATIENCE, patiently
from alignclip.storage.store import Bucket, Folder, Store, open_file, open_store
from alignclip.storage.trouble import is_absent, is_denied, is_full, is_passing
from alignclip.storage.whole import (
    check_folder_writable,
    free_bytes,
    to_disk,
    why_not_written,
    write_text_whole,
    write_whole,
)
from alignclip.storage.words import StorageError, describe_storage_error

__all__ = [
    "PATIENCE",
    "TRAINING_PATIENCE",
    "Bucket",
    "Folder",
    "StorageError",
    "Store",
    "check_folder_writable",
    "describe_storage_error",
    "expect_plain_s3",
    "free_bytes",
    "is_absent",
    "is_denied",
    "is_full",
    "is_passing",
    "open_file",
    "open_store",
    "patiently",
    "to_disk",
    "why_not_written",
    "write_text_whole",
    "write_whole",
]
