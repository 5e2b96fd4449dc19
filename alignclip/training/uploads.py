"""Checkpoints on their way into a bucket wait where it is away; Composer gives up after seconds, and ends the run."""

from __future__ import annotations

from typing import Any

from composer.utils import remote_uploader

from alignclip.storage import (
    TRAINING_PATIENCE,
    StorageError,
    describe_storage_error,
    expect_plain_s3,
    patiently,
)

_upload = remote_uploader._upload_file_to_object_store  # what Composer's processes run


def upload_patiently(**arguments: Any) -> int:
    """Composer's own upload, again and again where the storage may come back.

    Raises:
        StorageError: asking again won't help, or the storage has been away for too long. It is one line: the
            cloud's own exception would reach the training process without what caused it.
    """
    store, name = arguments["remote_backend_name"], arguments["remote_file_name"]
    bucket = arguments["backend_kwargs"].get("bucket") or arguments["backend_kwargs"].get(
        "container", ""
    )
    place = f"{store}://{bucket}/{name}"
    try:
        return patiently(lambda: _upload(**arguments), place, TRAINING_PATIENCE)
    except Exception as error:  # every provider has its own
        raise StorageError("write", place, describe_storage_error(error, "write")) from None


def install() -> None:
    """Have Composer's uploaders, which are processes of their own, run :func:`upload_patiently`.

    Composer's own test of the credentials writes to the bucket's root, where a key may have no right. The save
    folder itself has been tried by now.
    """
    expect_plain_s3()
    setattr(remote_uploader, _upload.__name__, upload_patiently)
    setattr(remote_uploader, remote_uploader.validate_credentials.__name__, _is_tried)


def _is_tried(remote_backend: object, remote_file_name_to_test: str) -> None:
    """Take the place of Composer's ``validate_credentials``."""
