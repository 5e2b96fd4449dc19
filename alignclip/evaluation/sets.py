"""Evaluation sets: MDS shards read sample by sample, each exactly once."""

from __future__ import annotations

import os
from typing import Any, TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from alignclip.checked_json import has_type, parse_json
from alignclip.config.schema import SetConfig
from alignclip.data.mds_index import CLASSES
from alignclip.data.streaming_patches import CachedDataset
from alignclip.data.streams import (
    cached_stream,
    check_task_columns,
    local_folder,
    place_of,
    read_index,
)
from alignclip.data.transforms import center_crop
from alignclip.errors import UserError, one_line
from alignclip.ranks import errors_on_all_ranks, raise_on_all_ranks
from alignclip.storage import StorageError, describe_storage_error, read_text


class _Texts(TypedDict):
    classnames: list[str]
    templates: list[str]


class _Classes(_Texts, total=False):
    """The entries that ``classes.json`` has to hold."""

    classes: int


HASH = "xxh64"  # our converters'


class OpenSets:
    """The sets of a process, each opened once: Streaming refuses a second reader of a cache."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str | None, str, str | None], CachedDataset] = {}

    def open(self, stream: SetConfig) -> CachedDataset:
        """Open a set, whose samples then are read by index.

        Raises:
            UserError: it isn't there or can't be read.
        """
        key = (stream.remote, local_folder("evaluation", stream), stream.split)
        if key in self._opened:
            return self._opened[key]
        remote, local, split = key
        with errors_on_all_ranks():  # the ranks open a set together
            shards = read_index("", stream, local)
        hashes = [name for shard in shards[:1] for name in shard["hashes"]]
        # whichever hash the set was written with is checked
        checked = HASH if HASH in hashes else next(iter(hashes), None)
        with errors_on_all_ranks():
            try:
                one = cached_stream(
                    "evaluation", stream, remote=remote, split=split, validate_hash=checked
                )
                dataset = CachedDataset(streams=[one], batch_size=1, shuffle=False)
            except Exception as error:  # of the file system, or any cloud's
                why = describe_storage_error(error)
                raise UserError(f"the set {remote or local}: {why}") from None
        self._opened[key] = dataset
        return dataset


def shard_columns(dataset: CachedDataset) -> list[dict[str, str]]:
    """Return the columns and encodings of each shard."""
    shards: list[Any] = list(dataset.shards)
    return [dict(zip(one.column_names, one.column_encodings, strict=True)) for one in shards]


class EvaluationSet(Dataset[tuple[Tensor, Any]]):
    """A set by index: ``(image, other)``, where other is a label or captions.

    Args:
        stream: where it lies and is cached.
        column: ``label`` (int) or ``caption`` (text, or a list of texts).
        opened: the sets of this process.

    Attributes:
        image_size: pixels a side of what the model takes; set before the samples are read.

    Raises:
        UserError: it isn't there, can't be read, or has no such column.
    """

    image_size: int

    def __init__(self, stream: SetConfig, column: str, opened: OpenSets) -> None:
        self.name = stream.remote or stream.local
        self.key = (str(self.name), str(stream.split), column)
        self._dataset = opened.open(stream)
        check_task_columns(f"evaluation set {self.name}", shard_columns(self._dataset), column)
        self.column = column

    def __len__(self) -> int:
        return int(self._dataset.size)

    def recover(self) -> None:
        """Free what the processes of a failed evaluation had begun to download.

        On every rank, when none of them reads any more.
        """
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            self._dataset.release()
        raise_on_all_ranks(None)  # nobody reads before that

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        try:
            sample = self._dataset[index]
        except Exception as error:  # of the file system, or any cloud's
            raise RuntimeError(f"{self.name}: {one_line(error)}") from None
        try:
            image = center_crop(sample["image"], self.image_size)
        except Exception as error:  # PIL raises nearly anything on broken files
            # a set with a hole would be another set
            raise RuntimeError(
                f"{self.name}: the image of sample {index} '{sample.get('key')}': {error}"
            ) from None
        other = sample[self.column]
        return image, int(other) if self.column == "label" else other


def read_classes(stream: SetConfig) -> tuple[list[str], list[str]]:
    """Read the class names and the prompt templates of a classification set.

    Raises:
        UserError: no such file beside the index, or not one of ``convert/classification.py``.
    """
    where = place_of(stream, CLASSES)
    try:
        values = parse_json(read_text(where))
    except StorageError:
        raise
    except (UserError, ValueError):
        values = None
    if not has_type(values, _Classes) or not all(map(str.strip, _texts_of(values))):
        raise UserError(
            f"{where} holds no classnames and templates; "
            "write the set with convert/classification.py"
        )
    names, templates = values["classnames"], values["templates"]
    classes = values.get("classes", len(names))
    if classes != len(names):
        raise UserError(f"{where} has {len(names)} classnames, and the set has {classes} classes")
    return names, templates


def _texts_of(values: _Classes) -> list[str]:
    """Return names and templates; an empty text where one of the lists is empty."""
    return [one for name in ("classnames", "templates") for one in values[name] or [""]]
