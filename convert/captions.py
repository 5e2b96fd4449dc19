"""Caption embeddings from a sentence encoder."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from alignclip.errors import UserError, one_line

DEFAULT_ENCODER = "sentence-transformers/all-mpnet-base-v2"
BATCH_SIZE = 256
HUB_TIMEOUT = 5.0  # seconds, of each address that the hub has
ORGANIZATION = "sentence-transformers"  # of hub names without one
LOGGERS = ("huggingface_hub", "transformers", "sentence_transformers", "urllib3", "httpx")


class SentenceEncoder:
    """A SentenceTransformer by its name on the Hugging Face hub or its local folder, on a GPU where there is one.

    Attributes:
        name: as given.
        dimension: the width of an embedding.

    Raises:
        UserError: sentence-transformers is not installed, or there is no such model.
    """

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise UserError("caption embeddings need sentence-transformers: pip install 'alignclip[convert]'")
        place = find_encoder(name)
        import torch
        from sentence_transformers import SentenceTransformer

        # processes that convert side by side spread over the GPUs
        devices = torch.cuda.device_count()
        device = f"cuda:{os.getpid() % devices}" if devices else None
        try:
            with _quiet():
                self._model: Any = SentenceTransformer(place, device=device)
        except Exception as error:  # hub, file and model errors of three libraries
            raise UserError(f"'{place}' is no sentence encoder: {one_line(error)}") from error
        self.name = name
        self.dimension = int(self.encode(["a photo"]).shape[1])

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embed captions as the model does, without further normalisation.

        Args:
            captions: N strings.

        Returns:
            [N, dimension] float16.

        Raises:
            UserError: an embedding is out of float16's range.
        """
        # encode() sorts by length, so that a long list pads less than batches would
        embeddings = self._model.encode(list(captions), batch_size=BATCH_SIZE, show_progress_bar=False)
        halves = np.asarray(embeddings, dtype=np.float32).astype(np.float16)
        if not np.isfinite(halves).all():
            raise UserError(f"the embeddings of '{self.name}' are not finite in float16")
        return halves


def find_encoder(name: str) -> str:
    """What SentenceTransformer is to load: a local folder, a model that the hub has, or its folder in the cache.

    The hub is asked once: SentenceTransformer itself would ask for file after file, each with retries.

    Raises:
        UserError: there is no such model, or none that can be reached.
    """
    if Path(name).is_dir():
        return name
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repositories = [name] if "/" in name else [f"{ORGANIZATION}/{name}", name]
    why = "the Hugging Face hub has no such model"
    for repository in repositories:
        try:
            HfApi().model_info(repository, timeout=HUB_TIMEOUT)
            return repository
        except HFValidationError:
            raise UserError(f"no sentence encoder '{name}': there is no such folder, and it is no hub name") from None
        except RepositoryNotFoundError:
            continue
        except Exception:  # of two HTTP libraries
            why = "can't reach the Hugging Face hub"
            break
    for repository in repositories:
        try:
            return snapshot_download(repository, local_files_only=True)
        except OSError:  # not in the cache
            continue
    raise UserError(f"no sentence encoder '{name}': {why}, it's not in the cache and there is no such local folder")


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of the libraries that load a model, which announce, warn and report retries."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@cache
def load_encoder(name: str) -> SentenceEncoder:
    """The encoder of that name, loaded once a process."""
    return SentenceEncoder(name)
