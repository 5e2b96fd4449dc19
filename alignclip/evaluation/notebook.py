"""Functions for notebooks: the metrics of a model, and the samples of a set to look at.

Both are what the commands use: :func:`evaluate` runs the evaluators of ``evaluate.py``, and
:func:`dataset` reads MDS sets as evaluation does.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image
from torch.utils.data import Dataset

from alignclip.config.reading import evaluators_of
from alignclip.config.schema import EvaluatorConfig, SetConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP
from alignclip.paths import expand
from alignclip.runtime.stand_ins import stand_ins

if TYPE_CHECKING:
    from alignclip.evaluation.sets import OpenSets


def evaluate(
    model: CLIP | str | Path,
    evaluators: Mapping[str, Mapping[str, Any] | EvaluatorConfig],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Evaluate a model as ``evaluate.py`` does.

    Args:
        model: of :func:`alignclip.load`, on the device on which it shall run; or a path, URL or
            ``hf-hub:`` name as :func:`alignclip.load` takes it, whose model then runs on the CPU.
        evaluators: by a name of your choice, with the keys that they have in a YAML file:
            ``{"pairs": {"task": "retrieval", "local": "sets/coco"}}``. ``docs/evaluation.md`` has
            the tasks.
        dtype: of autocast while encoding, e.g. ``torch.bfloat16``; by default the model's own.
        progress: whether to show a bar.

    Returns:
        metrics by the evaluator's name and theirs; ``docs/evaluation.md`` says what
        each is.

    Raises:
        UserError: an unknown task or key; a set that isn't there or isn't what its task needs; a
            path without a model.
        TypeError: ``model`` is neither a model nor a path.
    """
    with stand_ins():  # Streaming takes seconds
        from alignclip.evaluation.evaluator import evaluate_model

    configs = evaluators_of(evaluators)
    found = evaluate_model(_model(model), configs, dtype=dtype, progress=progress, opened=_opened())
    return {name: result.metrics for name, result in found.items()}


def _model(given: CLIP | str | Path) -> CLIP:
    """Return the model itself, or the one at a path.

    Raises:
        UserError: the path has no model.
        TypeError: it is neither.
    """
    if isinstance(given, str | Path):
        from alignclip.weights.load import load_encoders

        return load_encoders(expand(str(given), "model"))
    if not isinstance(given, torch.nn.Module):
        hint = "; alignclip.load returns the model first" if isinstance(given, tuple) else ""
        raise TypeError(f"model must be a model or a path, not {type(given).__name__}{hint}")
    return given


@dataclass(frozen=True)
class Pair:
    """A sample of a set.

    Attributes:
        key: its own; its number where the set has no keys.
        image: as PIL reads it, in whatever mode it is.
        caption: the first one where there are several; nothing in a classification set.
        captions: all of them.
        columns: everything that the set has of the sample, the image as encoded bytes.
    """

    key: str
    image: Image.Image
    caption: str
    captions: list[str]
    columns: dict[str, Any] = field(repr=False)  # a notebook would show all bytes of the image


class Pairs(Dataset[Pair]):
    """The samples of an MDS set by number, from 0 on, also from the end or as slices.

    Args:
        stream: where the set lies and is cached.

    Raises:
        UserError: no such set, it can't be read, or it has no images.
    """

    def __init__(self, stream: SetConfig) -> None:
        with stand_ins():
            from alignclip.data.streams import check_columns
            from alignclip.evaluation.sets import shard_columns

        self.place = str(stream.remote or stream.local)
        self._samples = _opened().open(stream)
        self.columns: dict[str, str] = {}
        for columns in shard_columns(self._samples):
            self.columns |= columns
        check_columns(f"the set {self.place}", [self.columns], {"image"})

    def __len__(self) -> int:
        """Return how many samples there are."""
        return int(self._samples.size)

    def __iter__(self) -> Iterator[Pair]:
        """Go through all samples in the set's order."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        """Say what the set holds."""
        return f"Pairs({self.place}: {len(self)} samples of {', '.join(self.columns)})"

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        """Return a sample, or a list of some.

        Raises:
            IndexError: there is no such sample.
            OSError: its image can't be decoded.
        """
        count = len(self)
        try:
            at = range(count)[index]
        except IndexError:
            numbers = f"{count} samples (0 to {count - 1})" if count else "0 samples"
            raise IndexError(f"{self.place}: there is no sample {index} of {numbers}") from None
        if isinstance(at, range):
            return [self[one] for one in at]
        columns: dict[str, Any] = dict(self._samples[at])
        caption = columns.get("caption") or []
        captions = [str(text) for text in (caption if isinstance(caption, list) else [caption])]
        image = Image.open(io.BytesIO(columns["image"]))
        image.load()
        key, first = str(columns.get("key", at)), captions[0] if captions else ""
        return Pair(key, image, first, captions, columns)


def dataset(path: str | Path, *, split: str | None = None, cache: str | None = None) -> Pairs:
    """Open an image–text or classification set to look at its samples.

    Args:
        path: the folder of an MDS set, or its URL in an object store.
        split: of the set, where it has some.
        cache: the folder where a URL's shards are kept; by default one below the system's temporary
            folder.

    Raises:
        UserError: no such set, it can't be read, or it has no images.
    """
    place = expand(str(path), "dataset")
    if "://" in place:
        local = expand(cache, "cache") if cache else None
        return Pairs(SetConfig(remote=place, local=local, split=split))
    if cache is not None:
        raise UserError(f"cache={cache} is for a set in an object store; {path} is a folder")
    return Pairs(SetConfig(local=place, split=split))


@functools.cache
def _opened() -> OpenSets:
    """Return the sets of this process: Streaming refuses a second reader of one."""
    with stand_ins():  # Streaming takes seconds
        from alignclip.evaluation.sets import OpenSets

    return OpenSets()
