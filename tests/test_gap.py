"""The gap's figures on spaces whose answers are known, and against double loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.plots import embedding_map


def random_pairs(count=37, width=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator) + 0.3, torch.randn(count, width, generator=generator)


def test_equal_modalities_have_no_gap():
    images, _ = random_pairs()
    gap = modality_gap(images, images)
    assert gap["alignment_score"] == pytest.approx(1)
    assert gap["centroid_distance"] == pytest.approx(0, abs=1e-12)
    assert gap["centroid_angle"] == pytest.approx(0, abs=1e-9)
    assert gap["uniformity_image"] == gap["uniformity_text"] == gap["uniformity_cross"]


def test_modalities_in_two_points():
    images, texts = torch.tensor([[1.0, 0.0]] * 5), torch.tensor([[0.0, 2.0]] * 5)
    gap = modality_gap(images, texts)
    assert gap["alignment_score"] == 0
    assert gap["centroid_distance"] == pytest.approx(math.sqrt(2))
    assert gap["centroid_angle"] == pytest.approx(90)
    assert gap["uniformity_image"] == pytest.approx(0, abs=1e-6)
    assert gap["uniformity_cross"] == pytest.approx(-4)  # exp(-2 · 2) everywhere
    assert modality_gap(images, -images)["centroid_angle"] == pytest.approx(180)
    assert modality_gap(images, -images)["uniformity_cross"] == pytest.approx(-8)


@pytest.mark.parametrize("block", [1, 10, 1024])
def test_equals_double_loops(block):
    images, texts = random_pairs()
    v, t = (F.normalize(x, dim=-1).double().numpy() for x in (images, texts))

    def uniformity(x, y):
        kernel = [np.exp(-2 * ((x[i] - y[j]) ** 2).sum()) for i in range(len(x)) for j in range(len(y)) if i != j]
        return math.log(np.mean(kernel))

    cosine = v.mean(0) @ t.mean(0) / np.linalg.norm(v.mean(0)) / np.linalg.norm(t.mean(0))
    expected = {
        "alignment_score": np.mean([a @ b for a, b in zip(v, t, strict=True)]),
        "centroid_distance": np.linalg.norm(v.mean(0) - t.mean(0)),
        "centroid_angle": math.degrees(math.acos(cosine)),
        "uniformity_image": uniformity(v, v),
        "uniformity_text": uniformity(t, t),
        "uniformity_cross": uniformity(v, t),
    }
    assert modality_gap(images, texts, block=block) == pytest.approx(expected, rel=1e-5)


def test_a_small_angle_is_not_lost():
    direction = torch.tensor([[1.0, 0.0]]).repeat(4, 1).double()
    turned = torch.tensor([[math.cos(1e-4), math.sin(1e-4)]]).repeat(4, 1).double()
    assert modality_gap(direction, turned)["centroid_angle"] == pytest.approx(math.degrees(1e-4), rel=1e-3)


@pytest.mark.parametrize(
    ("images", "texts", "message"),
    [
        (torch.ones(4, 3), torch.ones(5, 3), "features must be"),
        (torch.ones(4), torch.ones(4), "features must be"),
        (torch.ones(1, 3), torch.ones(1, 3), "two pairs"),
        (torch.ones(4, 3) * torch.nan, torch.ones(4, 3), "NaN"),
        (torch.ones(4, 3), torch.ones(4, 3) * torch.inf, "NaN or infinity"),
    ],
)
def test_bad_input_is_an_error(images, texts, message):
    with pytest.raises(ValueError, match=message):
        modality_gap(images, texts)


def test_the_map_is_a_png_whose_panels_differ(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    images, texts = random_pairs(200)
    embedding_map((images - 2, texts + 2), (images, images + 0.1 * texts), tmp_path / "map.png", ("before", "after"))
    pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
    assert pixels.shape[0] > 400

    def columns(colour):
        """Columns of the left half that hold a colour, to within the blending with white."""
        half = pixels[:, : pixels.shape[1] // 2]
        return np.argwhere((np.abs(half - colour).max(-1) < 80).any(0))

    # before training the modalities lie apart, along the first component
    image_columns, text_columns = columns((0, 114, 178)), columns((230, 159, 0))
    assert len(image_columns)
    assert len(text_columns)
    assert image_columns.max() < text_columns.min() or text_columns.max() < image_columns.min()
