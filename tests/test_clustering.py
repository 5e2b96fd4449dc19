"""Clustering: scikit-learn's figures, what a gap does to clusters of both modalities, one rank
and several alike.
"""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
import torch.nn.functional as F
from evaluations import encoder_of, evaluator_of, small_model, write_labelled

from alignclip.config.metrics import metrics_of
from alignclip.evaluation.evaluator import TaskResult
from alignclip.evaluation.tasks.clustering import Settings, cluster, clustering_chance

metrics = pytest.importorskip("sklearn.metrics")


def space(gap: float, classes: int = 5, count: int = 200) -> tuple[torch.Tensor, ...]:
    """Images around the text of their class; the modalities are ``gap`` apart in one direction."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(classes, 16, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    images = texts[labels] + 0.3 * torch.randn(count, 16, generator=generator)
    images[:, 0] += gap
    texts[:, 0] -= gap
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1), labels


def test_equals_scikit_learn() -> None:
    from sklearn.cluster import KMeans

    images, _, labels = space(0.0, classes=7)
    images = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    expected = KMeans(7, n_init=4, random_state=3).fit(images.double().numpy()).labels_
    found = cluster(images, labels, Settings(n_init=4, random_state=3))
    assert 0.2 < found["v_measure"] < 0.95
    assert found == {
        "v_measure": pytest.approx(metrics.v_measure_score(labels, expected)),
        "ari": pytest.approx(metrics.adjusted_rand_score(labels, expected)),
    }


def test_a_gap_splits_clusters_of_both_modalities_and_not_of_one() -> None:
    found = []
    for gap in (0.0, 4.0):
        images, texts, labels = space(gap)
        both = torch.cat([images, texts[labels]])
        found.append(
            (cluster(images, labels, Settings()), cluster(both, labels.repeat(2), Settings()))
        )
    (alone, together), (alone_with_gap, apart) = found
    assert alone["ari"] == together["ari"] == pytest.approx(1)
    assert alone_with_gap["v_measure"] > 0.9
    assert apart["v_measure"] < 0.9 * together["v_measure"]
    assert apart["ari"] < 0.7 * together["ari"]


def test_chance_is_what_clusters_at_random_score() -> None:
    labels = torch.arange(20).repeat(6)
    chance = clustering_chance(labels)
    assert chance.keys() == metrics_of("clustering").keys()
    noise = torch.randn(120, 8, generator=torch.Generator().manual_seed(0))
    found = cluster(noise, labels, Settings(n_init=1))
    assert 0.2 < chance["v_measure"] == pytest.approx(found["v_measure"], abs=0.1)
    assert found["ari"] == pytest.approx(chance["ari"], abs=0.05)


def evaluate(folder: str) -> TaskResult:
    return evaluator_of("clustering", folder)(encoder_of(small_model(), batch_size=3))


@pytest.mark.slow
@pytest.mark.world_size(3)
def test_several_ranks_find_what_one_finds(tmp_path: Path) -> None:
    write_labelled(tmp_path, 25)
    alone = evaluate(str(tmp_path))
    assert alone.metrics.keys() == alone.chance.keys() == metrics_of("clustering").keys()
    assert all(0 <= alone.metrics[name] <= 1 for name in ("v_measure", "v_measure_with_texts"))
    for found in processes.run(3, evaluate, str(tmp_path)):
        assert found.metrics == pytest.approx(alone.metrics)
        assert found.chance == alone.chance
