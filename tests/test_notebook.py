"""What a notebook asks for: public names, texts and pictures as they are, metrics, samples to
look at.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import small_config
from PIL import Image
from runs import write_set
from s3 import S3Server
from torch.utils.data import DataLoader

import alignclip
from alignclip.config.schema import EvaluatorConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders

CAPTIONS = ["a red dot", "blue on the left!", ""]


@pytest.fixture(scope="module")
def model() -> CLIP:
    """Small, with the whole vocabulary."""
    torch.manual_seed(0)
    return build_encoders(small_config(text={"vocab_size": 49408, "context_length": 77})).eval()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_set(str(folder), 24, columns="plain")
    return folder


def picture(seed: int) -> Image.Image:
    return Image.effect_noise((40 + seed, 50), 90 + seed).convert("P")


@pytest.mark.slow
def test_public_names_are_offered_before_they_are_imported() -> None:
    code = (
        "import sys, alignclip; offered = dir(alignclip);"
        "assert {'load', 'evaluate', 'dataset', 'CLIP', 'ModelConfig', 'UserError', "
        "'AlignCLIPLoss'} <= set(offered);"
        "assert {name for name in offered if not name.startswith('__')} == set(alignclip.__all__);"
        "assert not {'torch', 'numpy', 'open_clip', 'streaming', 'composer'} & set(sys.modules);"
        "assert all(getattr(alignclip, name) is not None for name in alignclip.__all__);"
        "assert not {'composer'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_texts_as_they_are(model: CLIP) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokens = SimpleTokenizer(context_length=77)(CAPTIONS)
    assert torch.equal(model.encode_text(CAPTIONS), model.encode_text(tokens))
    assert torch.equal(
        model.encode_text(tuple(CAPTIONS), normalize=True),
        model.encode_text(tokens, normalize=True),
    )
    assert torch.equal(model.encode_text(CAPTIONS[0]), model.encode_text(tokens[:1]))
    assert model.encode_text("a very long text " * 100).shape == (1, 16)


@torch.no_grad()
def test_pictures_as_they_are(model: CLIP, tmp_path: Path) -> None:
    from open_clip import image_transform

    pictures = [picture(i) for i in range(3)]
    pixels = torch.stack([image_transform(32, is_train=False)(one) for one in pictures])
    assert torch.equal(model.encode_image(pictures), model.encode_image(pixels))
    assert torch.equal(model.encode_image(pictures[0]), model.encode_image(pixels[:1]))
    model.preprocess = lambda image: torch.zeros(3, 32, 32)  # a loaded model has its own
    try:
        assert torch.equal(
            model.encode_image(pictures[0]), model.encode_image(torch.zeros(1, 3, 32, 32))
        )
    finally:
        model.preprocess = None
    with pytest.raises(TypeError, match=r"not str: PIL.Image.open\(path\)"):
        model.encode_image(["cat.jpg"])  # type: ignore[list-item]


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_similarity_of_pictures_and_texts(model: CLIP, batch_size: int) -> None:
    from open_clip import image_transform
    from open_clip.tokenizer import SimpleTokenizer

    pictures = [picture(i) for i in range(3)]
    pixels = torch.stack([image_transform(32, is_train=False)(one) for one in pictures])
    expected = model.similarity(pixels, SimpleTokenizer(context_length=77)(CAPTIONS))
    torch.testing.assert_close(model.similarity(pictures, CAPTIONS, batch_size), expected)
    torch.testing.assert_close(model.similarity(pictures[1], CAPTIONS[2]), expected[1:2, 2:])
    torch.testing.assert_close(model.similarity(pixels, CAPTIONS[0], batch_size), expected[:, :1])


def test_evaluate(model: CLIP, pairs: Path) -> None:
    given: dict[str, Any] = {"found": {"task": "retrieval", "local": str(pairs), "num_workers": 0}}
    found = alignclip.evaluate(model, given, progress=False)
    assert 0 <= found["found"]["image_retrieval_recall@5"] <= 1
    assert type(found) is dict
    assert all(type(value) is float for value in found["found"].values())
    config = EvaluatorConfig(task="gap", local=str(pairs), num_workers=0)
    again = alignclip.evaluate(
        model, {**given, "gap": config}, progress=False
    )  # a set of this process, once more
    assert again["found"] == found["found"]
    assert "margin" in again["gap"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"x": {"task": "retreival", "local": "x"}},
            r"evaluators\.x\.task=retreival: did you mean 'retrieval'",
        ),
        ({"x": {"tusk": "retrieval", "local": "x"}}, r"tusk.*task"),
        ({"x": {"task": "retrieval", "local": "x", "batch_size": "many"}}, "batch_size"),
        ({"x": {"task": "retrieval", "local": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"x": {"task": "linear_probe", "local": "x"}}, "train"),
    ],
)
def test_evaluators_that_are_none(model: CLIP, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        alignclip.evaluate(model, given, progress=False)
    assert "\n" not in str(error.value)


def test_evaluate_takes_a_path_as_load_does(
    model: CLIP, pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"found": {"task": "retrieval", "local": str(pairs), "num_workers": 0}}
    asked: list[str] = []
    monkeypatch.setattr(
        "alignclip.weights.load.load_encoders", lambda place: asked.append(place) or model
    )
    expected = alignclip.evaluate(model, given, progress=False)
    assert alignclip.evaluate("runs/emoji", given, progress=False) == expected
    assert alignclip.evaluate(Path("runs/emoji"), given, progress=False) == expected
    assert asked == ["runs/emoji"] * 2
    monkeypatch.undo()
    with pytest.raises(UserError, match="nowhere"):
        alignclip.evaluate(tmp_path / "nowhere", given, progress=False)


def test_what_is_no_model(model: CLIP) -> None:
    given: dict[str, Any] = {}
    with pytest.raises(
        TypeError,
        match=r"must be a model or a path, not tuple; alignclip\.load returns the model first",
    ):
        alignclip.evaluate((model, None, None), given, progress=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a model or a path, not dict$"):
        alignclip.evaluate({}, given, progress=False)  # type: ignore[arg-type]


def test_dataset(pairs: Path) -> None:
    found = alignclip.dataset(pairs)
    assert len(found) == 24
    assert str(pairs) in repr(found)
    assert "24 samples of" in repr(found)
    first = found[0]
    assert first.key == "00000"
    assert isinstance(first.image, Image.Image)
    assert first.image.size == (48, 40)
    assert first.captions == [first.caption]
    assert found[-1].key == "00023"
    assert [one.key for one in found[2:4]] == ["00002", "00003"]
    assert [one.key for one in found] == [f"{i:05}" for i in range(24)]
    for number in (24, -25):
        with pytest.raises(IndexError, match=rf"no sample {number} of 24 samples \(0 to 23\)"):
            found[number]
    batches = DataLoader(found, batch_size=8, collate_fn=list)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len(alignclip.dataset(str(pairs))) == 24, "opened a second time"


def test_datasets_that_are_none(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        alignclip.dataset(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is for a set in an object store"):
        alignclip.dataset(pairs, cache=str(tmp_path))


def test_a_dataset_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.bucket()
    write_set(f"{bucket}/set", 12, columns="plain")
    found = alignclip.dataset(f"{bucket}/set", cache=str(tmp_path / "cache"))
    assert found[11].key == "00011"
