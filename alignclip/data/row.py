"""An image–text pair as it is stored, and what may be wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alignclip.errors import UserError, printable

MOST_SHOWN = 60  # characters of what stands in the place of a caption


class Row(NamedTuple):
    """A sample as it is stored."""

    sample_id: int
    columns: dict[str, Any]

    @property
    def key(self) -> object:
        """The sample's key; its id in a set without keys."""
        return self.columns.get("key", self.sample_id)

    def flaw(self) -> str | None:
        """Say why the sample can't be trained on, whatever its image is; None where it can.

        A set that other programs wrote may hold ``null`` or an empty list for a caption.
        """
        caption, semantic = self.columns["caption"], self.columns.get("semantic")
        captions = caption if isinstance(caption, list) else [caption]
        if not captions or not all(isinstance(one, str) for one in captions):
            return f"has no caption but {printable(repr(caption)[:MOST_SHOWN])}"
        if isinstance(caption, list) and semantic is not None:
            rows = len(semantic) if np.ndim(semantic) else 0
            if rows != len(caption):
                return f"has {len(caption)} captions, but {rows} caption embeddings"
        return None

    def draw(self, seed: int) -> tuple[str, Any]:
        """Return the caption with its embedding, one of several as ``seed`` draws it.

        The sample has no :meth:`flaw`.
        """
        caption, semantic = self.columns["caption"], self.columns.get("semantic")
        if not isinstance(caption, list):
            return caption, semantic
        drawn = seed % len(caption)
        return caption[drawn], None if semantic is None else semantic[drawn]


def stack_embeddings(embeddings: Sequence[Any], rows: Sequence[Row]) -> np.ndarray:
    """Stack caption embeddings to float16 ``[n, dimension]``.

    A number out of float16's range becomes infinite, and the run says so.

    Raises:
        UserError: two samples have embeddings of different shapes.
    """
    shapes = [np.shape(one) for one in embeddings]
    for row, shape in zip(rows, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f"the caption embedding of sample '{row.key}' has the shape {list(shape)}, the one "
                f"of sample '{rows[0].key}' {list(shapes[0])}: convert both with one encoder"
            )
    with np.errstate(over="ignore"):
        return np.array(embeddings).astype(np.float16, copy=False)
