"""Checkpoints on their way into a bucket wait where it is away; Composer gives up after seconds, and ends the run."""

from __future__ import annotations

import logging
from typing import Any

from composer.utils import ObjectStoreTransientError, remote_uploader, retry

from alignclip.errors import causes, describe_storage_error

log = logging.getLogger(__name__)

ATTEMPTS = 10  # they sleep 2^i s between: 8 minutes and a half
PASSING = (408, 429)  # of the HTTP statuses below 500: too slow, too often

_upload = remote_uploader._upload_file_to_object_store  # what Composer's processes run


def upload_patiently(**arguments: Any) -> int:
    """Composer's own upload, again and again where the storage may come back.

    Raises:
        Exception: of the cloud's client, where asking again won't help, or it has been away for too long.
    """

    @retry(ObjectStoreTransientError, num_attempts=ATTEMPTS)
    def upload() -> int:
        try:
            return _upload(**arguments)
        except Exception as error:
            if not may_pass(error):
                raise
            log.warning(f"{arguments['remote_file_name']} waits for its bucket: {describe_storage_error(error)}")
            raise ObjectStoreTransientError(str(error)) from error

    return upload()


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: no answer, or one that blames the server."""
    if any(type(one).__name__ in ("NoCredentialsError", "PartialCredentialsError") for one in causes(error)):
        return False
    responses = [response for one in causes(error) if isinstance(response := getattr(one, "response", None), dict)]
    statuses = [response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500) for response in responses]
    return not isinstance(error, FileNotFoundError) and all(s >= 500 or s in PASSING for s in statuses)


def install() -> None:
    """Have Composer's uploaders, which are processes of their own, run :func:`upload_patiently`."""
    setattr(remote_uploader, _upload.__name__, upload_patiently)
