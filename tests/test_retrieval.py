"""Recall@k against brute force, forced ties and clip_benchmark's definition."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import normal
from torch.profiler import ProfilerActivity, profile

from alignclip.evaluation import retrieval
from alignclip.evaluation.ranking import best_ranks
from alignclip.evaluation.retrieval import recall


def brute_force(scores, positive, k):
    """Sort every row by (score, index) and look whether a right one is among the first k."""
    hits = []
    for row, right in zip(scores, positive, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], item))
        hits.append(right[order[:k]].any())
    return np.mean(hits)


@pytest.mark.parametrize("block", [1, 7, 64, 1024])
def test_equals_brute_force_under_ties(block):
    rng = np.random.default_rng(0)
    # rows of ±0.5 in four dimensions: of norm 1, with exact similarities, of which there are five
    images, texts = (rng.choice([-0.5, 0.5], size=(count, 4)) for count in (40, 100))
    image_of_text = rng.permutation(np.concatenate([np.arange(40), rng.integers(0, 40, 60)]))
    positive = image_of_text[:, None] == np.arange(40)
    expected = {}
    for k in (1, 2, 5, 10, 39, 200):
        scores = texts @ images.T
        expected[f"image_retrieval_recall@{k}"] = brute_force(scores, positive, k)
        expected[f"text_retrieval_recall@{k}"] = brute_force(scores.T, positive.T, k)
    assert expected["image_retrieval_recall@1"] < expected["image_retrieval_recall@10"] < 1
    # the lengths of features don't matter
    given = map(torch.from_numpy, (2 * images, texts / 4, image_of_text))
    found = recall(*given, ks=(1, 2, 5, 10, 39, 200), block=block)
    assert found == pytest.approx(expected, abs=1e-12)
    assert next(iter(found)) == "image_retrieval_recall@1"


def clip_benchmark_recall(scores, positive, k):
    """clip_benchmark's own function, and what its ``evaluate`` makes of it: found is anything
    above 0.
    """
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    return (recall_at_k(scores, positive, k) > 0).double().mean().item()


def test_equals_clip_benchmark_with_five_captions_an_image():
    images = F.normalize(normal(60, 16), dim=-1)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    image_of_text = torch.arange(60).repeat_interleave(5)[order]
    texts = F.normalize(images[image_of_text] + 0.6 * normal(300, 16, seed=1), dim=-1)
    found = recall(images, texts, image_of_text, ks=(1, 5), block=32)
    scores, positive = texts @ images.T, image_of_text[:, None] == torch.arange(60)
    for k in (1, 5):
        to_image = clip_benchmark_recall(scores, positive, k)
        to_text = clip_benchmark_recall(scores.T, positive.T.contiguous(), k)
        assert 0.1 < to_image < 1
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(to_image)
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(to_text)


def test_no_block_is_larger_than_asked_for(monkeypatch):
    sizes = []
    original = retrieval.best_ranks

    def spy(scores, positives):
        sizes.append(tuple(scores.shape))
        return original(scores, positives)

    monkeypatch.setattr(retrieval, "best_ranks", spy)
    recall(normal(50, 4), normal(50, 4), torch.arange(50), block=16)
    assert sizes == [(16, 50), (16, 50), (16, 50), (2, 50)] * 2


def test_ranks_take_less_memory_than_the_scores():
    scores, own = normal(256, 1024), torch.arange(256)[:, None]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        best_ranks(scores, own)
    assert max(event.cpu_memory_usage for event in profiled.events()) <= scores.numel()
