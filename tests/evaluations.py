"""Small sets and models to evaluate, and the plainest loop to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import EVERYTHING, small_config
from runs import jpeg
from streaming import MDSWriter

from alignclip.config.reading import evaluators_of
from alignclip.data.transforms import center_crop, normalize
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.evaluator import Evaluator
from alignclip.evaluation.sets import EvaluationSet, OpenSets
from alignclip.model.encoders import CLIP, build_encoders

CLASSES = ["dog", "red car", "a tree in the snow"]
WORDS = ["red", "blue", "dog", "car", "on", "the", "left", "of", "a", "tree"]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved meanwhile."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig

    def savefig(figure: Any, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers drawn from a seed of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(features: torch.Tensor) -> np.ndarray:
    """Features of length 1, by NumPy."""
    values = features.double().numpy()
    found: np.ndarray = values / np.linalg.norm(values, axis=-1, keepdims=True)
    return found


def small_model(**shared: Any) -> CLIP:
    torch.manual_seed(0)
    text = {"context_length": 32, "vocab_size": 49408}
    return build_encoders(small_config(shared=shared or EVERYTHING, text=text))


def encoder_of(model: CLIP, batch_size: int = 4, progress: bool = False) -> Encoder:
    return Encoder(model, torch.device("cpu"), batch_size=batch_size, progress=progress)


def evaluator_of(task: str, place: Any, opened: OpenSets | None = None, **more: Any) -> Evaluator:
    """An evaluator named ``e`` of a set in a folder, or in a bucket with its cache."""
    where = {"remote": str(place)} if "://" in str(place) else {"local": str(place)}
    keys = {"task": task, "num_workers": 0, "batch_size": 4, **where, **more}
    return Evaluator("e", evaluators_of({"e": keys})["e"], opened or OpenSets())


def images_of(
    stream: Any, encoder: Encoder, column: str = "label"
) -> tuple[torch.Tensor, list[Any]]:
    samples = EvaluationSet(stream, column, OpenSets())
    samples.image_size = encoder.image_size
    return encoder.images(samples)


def write(out: Any, rows: list[dict[str, Any]], columns: dict[str, str], **more: Any) -> None:
    """An MDS set of images; the rows have the other columns, or an image of their own."""
    columns = {"key": "str", "image": "bytes", **columns}
    with MDSWriter(**{"out": str(out), "columns": columns, "hashes": ["xxh64"], **more}) as writer:
        for i, row in enumerate(rows):
            writer.write({"key": f"k{i}", "image": jpeg(np.random.default_rng(i)), **row})


def write_labelled(
    out: Any, count: int, seed: int = 0, classes: list[str] = CLASSES
) -> list[tuple[bytes, int]]:
    """Samples of a classification set, and its ``classes.json`` where it is a folder."""
    rng = np.random.default_rng(seed)
    samples = [(jpeg(rng), int(rng.integers(len(classes)))) for _ in range(count)]
    rows = [{"image": image, "label": label} for image, label in samples]
    write(out, rows, {"label": "int"})
    if "://" not in str(out):
        write_classes(out, classnames=classes)
    return samples


def write_classes(folder: Any, **more: Any) -> None:
    content = {"classnames": CLASSES, "templates": ["a {c}.", "the {c}"], **more}
    Path(folder, "classes.json").write_text(json.dumps(content), encoding="utf-8")


def write_captioned(out: Any, count: int, several: bool = True) -> list[tuple[bytes, Any]]:
    rng = np.random.default_rng(1)

    def caption() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 12)))

    samples: list[tuple[bytes, Any]] = [
        (jpeg(rng), [caption() for _ in range(rng.integers(1, 4))] if several else caption())
        for _ in range(count)
    ]
    rows = [{"image": image, "caption": captions} for image, captions in samples]
    write(out, rows, {"caption": "json" if several else "str"}, size_limit="20kb")
    return samples


@torch.no_grad()
def one_by_one(
    model: CLIP, images: list[bytes], texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features by the plainest loop."""
    model.eval()
    encoder = encoder_of(model)
    pixels = [normalize(center_crop(image, encoder.image_size)[None]) for image in images]
    return (
        F.normalize(torch.cat([model.encode_image(one) for one in pixels]), dim=-1),
        F.normalize(
            torch.cat([model.encode_text(encoder.tokenizer([one])) for one in texts]), dim=-1
        ),
    )
