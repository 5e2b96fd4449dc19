"""The Hugging Face Hub, as versions 0.36 to 2 of huggingface_hub tell of it.

huggingface_hub is imported where it is used.
"""

from __future__ import annotations

import json
from pathlib import Path


def no_answer() -> tuple[type[Exception], ...]:
    """Return the errors where no Hub answers, or something that is no Hub: a page with a login.

    Among the Hub's own errors stands the base class of what its HTTP library raises: of requests up
    to version 0.36, which is an OSError; of httpx in version 1; of httpx2 in version 2.
    """
    from huggingface_hub import errors

    return OSError, errors.HTTPError, json.JSONDecodeError


def cached_snapshot(repository: str) -> Path:
    """Find the folder of the files of a repository that were downloaded before.

    The folder holds the files that somebody asked for, and a repository has others, too:
    huggingface_hub 2 calls that an error, which names the folder.

    Raises:
        huggingface_hub.errors.LocalEntryNotFoundError: there is none. It is an OSError.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        if folder := getattr(error, "snapshot_path", None):
            return Path(folder)
        raise
