"""Recall@k against brute force, forced ties and clip_benchmark's definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alignclip.evaluation import retrieval
from alignclip.evaluation.retrieval import recall


def brute_force(images, texts, image_of_text, ks):
    """Sort every row by (similarity, index) and look whether a right one is among the first k."""
    scores = images @ texts.T
    result = {}
    for k in ks:
        hits = []
        for text in range(len(texts)):
            order = sorted(range(len(images)), key=lambda i: (-scores[i, text], i))
            hits.append(image_of_text[text] in order[:k])
        result[f"image_retrieval_recall@{k}"] = np.mean(hits)
        hits = []
        for image in range(len(images)):
            order = sorted(range(len(texts)), key=lambda j: (-scores[image, j], j))
            hits.append(any(image_of_text[j] == image for j in order[:k]))
        result[f"text_retrieval_recall@{k}"] = np.mean(hits)
    return result


def tied_features(rng, count):
    """Rows of ±0.5 in four dimensions: of norm 1 and with exact similarities, of which there are only five."""
    return rng.choice([-0.5, 0.5], size=(count, 4))


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_equals_brute_force_under_ties(block):
    rng = np.random.default_rng(0)
    images, texts = tied_features(rng, 40), tied_features(rng, 100)
    image_of_text = rng.permutation(np.concatenate([np.arange(40), rng.integers(0, 40, 60)]))
    ks = (1, 2, 5, 10, 39, 200)
    expected = brute_force(images, texts, image_of_text, ks)
    assert expected["image_retrieval_recall@1"] < expected["image_retrieval_recall@10"] < 1
    found = recall(*map(torch.from_numpy, (images, texts, image_of_text)), ks=ks, block=block)
    assert found == pytest.approx(expected, abs=1e-12)
    assert next(iter(found)) == "image_retrieval_recall@1"


def clip_benchmark_recall(images, texts, image_of_text, k):
    """clip_benchmark's own function, and what its ``evaluate`` makes of it: found is anything above 0."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(texts)), image_of_text] = True
    both = recall_at_k(scores, positive, k), recall_at_k(scores.T, positive.T.contiguous(), k)
    return [(found > 0).double().mean().item() for found in both]


def test_equals_clip_benchmark_with_five_captions_an_image():
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(60, 16, generator=generator), dim=-1)
    image_of_text = torch.arange(60).repeat_interleave(5)[torch.randperm(300, generator=generator)]
    texts = F.normalize(
        images[image_of_text] + 0.6 * torch.randn(300, 16, generator=generator), dim=-1
    )
    found = recall(images, texts, image_of_text, ks=(1, 5), block=32)
    for k in (1, 5):
        to_image, to_text = clip_benchmark_recall(images, texts, image_of_text, k)
        assert 0.1 < to_image < 1
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(to_image)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(to_text)


def test_by_hand():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # text 0 is nearer to image 1 than to its own; image 0 finds its second caption, text 2, first
    texts = torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    found = recall(images, texts, torch.tensor([0, 1, 0]), ks=(1, 2))
    assert found["image_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert found["image_retrieval_recall@2"] == 1
    assert found["text_retrieval_recall@1"] == 1


def test_the_length_of_features_does_not_matter():
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(30, 8, generator=generator), torch.randn(30, 8, generator=generator)
    index = torch.arange(30)
    lengths = torch.rand(30, 1, generator=generator) + 0.5
    assert recall(images * lengths, texts / lengths, index) == recall(images, texts, index)


def test_collapsed_features_score_chance():
    same = torch.full((20, 4), 0.5)
    found = recall(same, same, torch.arange(20), ks=(5,))
    assert found == {"image_retrieval_recall@5": 0.25, "text_retrieval_recall@5": 0.25}


def test_no_block_is_larger_than_asked_for(monkeypatch):
    sizes = []
    original = retrieval.best_ranks

    def spy(scores, positives):
        sizes.append(tuple(scores.shape))
        return original(scores, positives)

    monkeypatch.setattr(retrieval, "best_ranks", spy)
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    recall(features, features, torch.arange(50), block=16)
    assert sizes == [(16, 50), (16, 50), (16, 50), (2, 50)] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, t, i: (v, t[:, :3], i), "features must be"),
        (lambda v, t, i: (v, t, i[:5]), "must hold 6 integers"),
        (lambda v, t, i: (v, t, i.float()), "integers"),
        (lambda v, t, i: (v, t, i + 1), "must name rows of the 6 images"),
        (lambda v, t, i: (v, t, i - 1), "must name rows of the 6 images"),
        (lambda v, t, i: (v, t, i.clamp(max=3)), "2 of 6 images have no text"),
        (lambda v, t, i: (v / 0, t, i), "NaN or infinity"),
        (lambda v, t, i: (v, t * torch.nan, i), "NaN or infinity"),
    ],
)
def test_bad_input_is_an_error(change, message):
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        recall(*change(features, features.clone(), torch.arange(6)))


def test_k_of_zero_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        recall(torch.eye(3), torch.eye(3), torch.arange(3), ks=(0,))
