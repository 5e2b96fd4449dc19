"""The loss term ``cyclip`` against its formula, and in a run.

``test_losses.py`` has two processes.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_runs import SmallRuns, logged
from torch import Tensor

from alignclip.losses import AlignCLIPLoss
from alignclip.losses.cyclip import Settings

SETTINGS = Settings(in_modal=0.5, cross_modal=2.0)


def features(count: int = 8, dim: int = 16) -> list[Tensor]:
    """Image and text features, ``[count, dim]`` each, in fp64."""
    generator = torch.Generator().manual_seed(count)
    both = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return [one.clone().requires_grad_() for one in F.normalize(both, dim=-1)]


def written_out(v: Tensor, t: Tensor, settings: Settings) -> Tensor:
    """The formula of https://arxiv.org/abs/2205.14459, pair by pair."""
    total = v.new_zeros(())
    for i, j in itertools.product(range(len(v)), repeat=2):
        total = total + settings.in_modal * (v[i] @ v[j] - t[i] @ t[j]) ** 2
        total = total + settings.cross_modal * (v[i] @ t[j] - v[j] @ t[i]) ** 2
    return total / len(v)


def computed(v: Tensor, t: Tensor, settings: Settings, beta: float = 0.0) -> dict[str, Tensor]:
    loss = AlignCLIPLoss(beta=beta, rescale=False, terms={"cyclip": settings})
    return loss(v, t, torch.tensor(14.0, dtype=v.dtype))


@pytest.mark.parametrize("settings", [Settings(), Settings(1, 0), Settings(0, 3), SETTINGS])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_values_and_gradients(settings: Settings, beta: float) -> None:
    v, t = features()
    expected = written_out(v, t, settings)
    losses = computed(v, t, settings, beta)
    torch.testing.assert_close(losses["cyclip"], expected, rtol=1e-12, atol=0)
    others = losses["contrastive"] + beta * losses["separation"]
    torch.testing.assert_close(losses["total"], others + expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(one, [v, t]) for one in (losses["cyclip"], expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


def test_aligned_features_in_fp32() -> None:
    """Modalities of almost the same similarities: the term is far below the sums that make it."""
    v, t = features(256, 64)
    t = F.normalize(v + 0.02 * t, dim=1)
    exact = computed(v, t, SETTINGS)["cyclip"]
    single = computed(v.float(), t.float(), SETTINGS)["cyclip"]
    assert float((single - exact).abs() / exact) < 1e-5


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("clusters", [1, 4])
def test_collapsed_features_in_fp32(noise: float, clusters: int) -> None:
    """Similarities of one modality are almost equal: the term is the small rest of large sums."""
    v, t = (
        F.normalize(one[:clusters].repeat(256 // clusters, 1) + noise * one, dim=1).float()
        for one in features(256, 64)
    )
    v, t = (one.detach().requires_grad_() for one in (v, t))
    found = computed(v, t, SETTINGS)["cyclip"]
    exact = [one.detach().double().requires_grad_() for one in (v, t)]
    in_modal = exact[0] @ exact[0].T - exact[1] @ exact[1].T
    cross = exact[0] @ exact[1].T
    sums = SETTINGS.in_modal * in_modal**2 + SETTINGS.cross_modal * (cross - cross.T) ** 2
    expected = sums.sum() / len(v)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, [v, t]), torch.autograd.grad(expected, exact), strict=True
    ):
        assert float((one - other).norm() / other.norm()) < 1e-4


def test_a_run_logs_the_term(dataset: Path, tmp_path: Path) -> None:
    runs = SmallRuns(tmp_path, dataset, None, "max_duration=2ba", "loss.beta=0")
    trainer = runs.train("loss.cyclip={in_modal: 0.5, cross_modal: 2.0}")
    contrastive, term = (logged(trainer, f"loss/train/{n}") for n in ("contrastive", "cyclip"))
    assert min(term) > 0
    total = [one + other for one, other in zip(contrastive, term, strict=True)]
    assert logged(trainer) == pytest.approx(total, rel=1e-6)
