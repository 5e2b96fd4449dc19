"""Records of a run in its save folder, a line of JSON each: evaluations and learning curves."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

from alignclip.checked_json import has_type, parse_json
from alignclip.storage import Store, describe_storage_error

RecordLine = Mapping[str, Any]
_Figures = dict[str, float | None]


class _OfBatch(TypedDict):
    batch: int


class _Line(_OfBatch, total=False):
    """A line of a record; each kind of record has some of the entries."""

    losses: _Figures
    lr: float | None
    logit_scale: float | None
    metrics: _Figures
    chance: _Figures
    verdict: str | None


class RecordFile:
    """A file of a run's folder that is written anew; into a bucket beside the training.

    Trouble is reported and ends no run. For rank 0 alone.

    Args:
        store: the run's folder.
        name: the file's.
        complaint: how the report of trouble begins.
    """

    def __init__(self, store: Store, name: str, complaint: str) -> None:
        self.store, self.name, self._complaint = store, name, complaint
        self._writer = ThreadPoolExecutor(1)  # one at a time, so that the last one stays

    def write(self, lines: Iterable[RecordLine]) -> None:
        """Replace the file."""
        self.reported(lambda: self._write_text(text_of(lines)))

    def _write_text(self, text: str) -> None:
        written = self._writer.submit(self.reported, lambda: self.store.write_text(self.name, text))
        if not self.store.is_remote:
            written.result()

    def finish(self) -> None:
        """Wait until the file is where it belongs; may be called again."""
        self._writer.shutdown()

    def reported(self, action: Callable[[], None]) -> None:
        """Run ``action``, and report what goes wrong."""
        try:
            action()
        except Exception as error:  # of the file system, or any cloud's
            said = f"{self._complaint}: {describe_storage_error(error)}"
            logging.getLogger(__name__).warning(said)


def text_of(lines: Iterable[RecordLine]) -> str:
    """Return the lines as text; their numbers must be finite, see :func:`without_nan`."""
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)


def lines_in(text: str) -> list[dict[str, Any]]:
    """Return the lines of a text that name a batch; what is none, as after a kill, is left out.

    NaN and Infinity, which are no JSON, are read as None.
    """
    lines = []
    for line in text.splitlines():
        try:
            read = parse_json(line, constant=lambda _: None)
        except ValueError:
            continue
        if has_type(read, _Line):
            lines.append(read)
    return lines


def without_nan(value: Any) -> Any:
    """Return a value as JSON has it: numbers that are not finite are None, also inside."""
    if isinstance(value, Mapping):
        return {key: without_nan(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(values: Mapping[str, float | None]) -> dict[str, float]:
    """Return numbers as they were measured: None is NaN."""
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
