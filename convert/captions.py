"""Caption embeddings from a sentence encoder."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from alignclip.errors import UserError, one_line

DEFAULT_ENCODER = "sentence-transformers/all-mpnet-base-v2"
BATCH_SIZE = 256


class SentenceEncoder:
    """A SentenceTransformer by its name on the Hugging Face hub or its local folder, on a GPU where there is one.

    Attributes:
        name: as given.
        dimension: the width of an embedding.

    Raises:
        UserError: sentence-transformers is not installed, or there is no such model.
    """

    def __init__(self, name: str) -> None:
        try:
            import torch
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("caption embeddings need sentence-transformers: pip install 'alignclip[convert]'") from None
        # processes that convert side by side spread over the GPUs
        devices = torch.cuda.device_count()
        device = f"cuda:{os.getpid() % devices}" if devices else None
        try:
            self._model: Any = SentenceTransformer(name, device=device)
        except Exception as error:  # hub, file and model errors of three libraries
            raise UserError(
                f"no sentence encoder '{name}' (a model on the Hugging Face hub or a local folder): {one_line(error)}"
            ) from error
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


@cache
def load_encoder(name: str) -> SentenceEncoder:
    """The encoder of that name, loaded once a process."""
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)  # it announces each load
    return SentenceEncoder(name)
