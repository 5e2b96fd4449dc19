"""The loss in tiles against the formulas written out: any size and option, on any ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alignclip.losses import AlignCLIPLoss, tiles
from alignclip.losses.cyclip import Settings

SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.0},
    {"alpha": 0.0},
    {"rescale": False},
    {"separate_text": False},
    {"separate_image": False, "alpha": 2.0, "beta": 3.0},
    {"separate_image": False, "separate_text": False},
    {"terms": {"cyclip": Settings(in_modal=0.5, cross_modal=2.0)}},
]
LEAVES = ("image", "text", "scale")


@dataclass(frozen=True)
class Batch:
    """A global batch; the leaves are the first three."""

    image: Tensor
    text: Tensor
    scale: Tensor
    semantic: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [getattr(self, name) for name in LEAVES]

    def part(self, rank: int, world: int) -> Batch:
        """A rank's share, of leaves of its own."""
        n = len(self.image) // world
        rows = slice(rank * n, (rank + 1) * n)
        image, text = (one.detach()[rows].clone().requires_grad_() for one in self.leaves[:2])
        scale = self.scale.detach().clone().requires_grad_()
        return Batch(image, text, scale, self.semantic[rows])

    def to(self, dtype: torch.dtype) -> Batch:
        leaves = [one.detach().to(dtype).requires_grad_() for one in self.leaves]
        return Batch(*leaves, self.semantic.to(dtype))

    def losses(self, loss: AlignCLIPLoss) -> dict[str, Tensor]:
        return loss(self.image, self.text, self.scale, self.semantic)


def batch_of(n: int, dim: int = 8, scale: float = 14.0, seed: int = 0, noise: float = 1.0) -> Batch:
    """Random pairs; with little noise the texts are almost the images."""
    generator = torch.Generator().manual_seed(1000 * n + seed)
    image, other, semantic = torch.randn(3, n, dim, generator=generator, dtype=torch.float64)
    image = F.normalize(image, dim=1)
    text = F.normalize(other if noise == 1 else image + noise * other, dim=1)
    leaves = (image, text, torch.tensor([scale], dtype=torch.float64))
    return Batch(*(one.requires_grad_() for one in leaves), semantic + 0.5)


def written_out(batch: Batch, loss: AlignCLIPLoss) -> dict[str, Tensor]:
    """The losses of the class's docstring, without cyclip.

    CE is log(1 + Σ_j≠i exp(L_ij − L_ii)): nothing rounds a small loss, or its gradients, to zero.
    """
    v, t, s = batch.leaves
    q = F.normalize(batch.semantic, dim=1)
    weights = 1 - q @ q.T

    def mean_of_rows(logits: Tensor) -> Tensor:
        negatives = logits.masked_fill(torch.eye(len(v), dtype=torch.bool), -torch.inf)
        margins = negatives.logsumexp(dim=1) - logits.diagonal()
        return torch.logaddexp(margins, torch.zeros_like(margins)).mean()

    contrastive = (mean_of_rows(s * v @ t.T) + mean_of_rows(s * t @ v.T)) / 2
    separation = torch.zeros((), dtype=v.dtype)
    for x, on in ((v, loss.separate_image), (t, loss.separate_text)):
        if not on or loss.beta == 0:
            continue
        logits = x @ x.T
        if loss.rescale:
            off_diagonal = 1 - torch.eye(len(v), dtype=v.dtype)
            logits = logits * weights * off_diagonal + torch.diag((v * t).sum(dim=1))
        separation = separation + mean_of_rows(s * logits) / 2
    return {
        "total": loss.alpha * contrastive + loss.beta * separation,
        "contrastive": contrastive,
        "separation": separation,
    }


def gradients(losses: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The gradients of each loss that has some by each leaf."""
    found = {}
    for name, value in losses.items():
        if value.requires_grad:
            by_leaves = torch.autograd.grad(
                value, batch.leaves, retain_graph=True, materialize_grads=True
            )
            found |= {f"d {name}/d {leaf}": by for leaf, by in zip(LEAVES, by_leaves, strict=True)}
    return found


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-11, atol: float = 1e-13
) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


class CountProducts(TorchDispatchMode):
    """Counts the products of numbers in products of matrices."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            (rows, inner), (_, columns) = (one.shape for one in args[-2:])
            self.numbers += rows * inner * columns
        return func(*args, **(kwargs or {}))


@pytest.fixture
def in_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Sets the numbers of a tile."""
    return lambda numbers: monkeypatch.setattr(tiles, "CPU_TILE", numbers)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(settings: dict[str, Any], seed: int, in_tiles: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, side = (int(torch.randint(*span, (), generator=generator)) for span in ((2, 40), (1, 20)))
    side = min(max(side, n // 8), n - 1)
    loss = AlignCLIPLoss(**settings)
    batch = batch_of(n, dim=3 + seed, scale=(1.0, 14.0, 100.0)[seed % 3], seed=seed)
    expected = written_out(batch, loss)
    whole = batch.losses(loss)
    in_tiles(side * side + int(torch.randint(0, 2 * side + 1, (), generator=generator)))
    found = batch.losses(loss)
    assert_same(found, whole)
    assert_same(gradients(found, batch), gradients(whole, batch))
    if "terms" not in settings:
        assert_same(found, expected)
        assert_same(gradients(found, batch), gradients(expected, batch))


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_numerical_gradients(settings: dict[str, Any], in_tiles: Any) -> None:
    in_tiles(4)
    batch, loss = batch_of(4, dim=2, scale=2.0), AlignCLIPLoss(**settings)

    def total(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return loss(image, text, scale, batch.semantic)["total"]

    assert torch.autograd.gradcheck(total, batch.leaves)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_logits_that_lie_far_apart(settings: dict[str, Any], in_tiles: Any) -> None:
    """exp(L) of one row is far below that of another, and of the smallest number of the type."""
    batch, loss = batch_of(12, scale=900.0), AlignCLIPLoss(**settings)
    with torch.no_grad():
        batch.image[:6] = batch.image[0] + 1e-2 * batch.image[:6]
        batch.text[:6] = -batch.image[0]
        batch.text[6:] = batch.image[0]
    whole = batch.losses(loss)
    in_tiles(16)
    found = batch.losses(loss)
    assert_same(found, whole)
    assert_same(gradients(found, batch), gradients(whole, batch), atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
@pytest.mark.parametrize("noise", [1.0, 0.3, 0.03])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_single_precision(
    settings: dict[str, Any], noise: float, scale: float, in_tiles: Any
) -> None:
    """Tiles are as exact as autograd, and more exact where the loss is near zero."""
    loss = AlignCLIPLoss(**settings)
    single = batch_of(64, 32, scale, noise=noise).to(torch.float32)
    exact = single.to(torch.float64)
    expected = gradients(written_out(exact, loss), exact)
    whole = gradients(single.losses(loss), single)
    in_tiles(100)
    found = gradients(single.losses(loss), single)
    for name, value in expected.items():
        error, of_whole = (float((one[name].double() - value).norm()) for one in (found, whole))
        assert error < 1.5 * of_whole + 3e-7 * float(value.norm()) + 1e-37, name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["image", "text", "scale", "semantic"])
def test_a_number_that_is_not_finite_is_seen(where: str, value: float, in_tiles: Any) -> None:
    in_tiles(10)
    for settings, sign in itertools.product(SETTINGS[:4], (-1, 1)):
        if where == "semantic" and not (settings.get("beta", 1) and settings.get("rescale", True)):
            continue
        batch = batch_of(9)
        with torch.no_grad():  # the row's other logits may all be −∞
            for one in (batch.image, batch.text):
                one[:-1, -1] = sign * one[:-1, -1].abs()
                one[-1, -1] = 1
            getattr(batch, where).flatten()[-1] = value
        assert not batch.losses(AlignCLIPLoss(**settings))["total"].isfinite()


def test_captions_in_half_precision(in_tiles: Any) -> None:
    batch, loss = batch_of(9).to(torch.float32), AlignCLIPLoss()
    half = batch.semantic.half()
    found = {}
    for tile in (100, 10):
        in_tiles(tile)
        for semantic in (half, half.float()):
            found[tile, semantic.dtype] = loss(*batch.leaves, semantic)["total"]
    assert torch.equal(found[10, torch.float16], found[10, torch.float32])
    torch.testing.assert_close(found[10, torch.float16], found[100, torch.float16])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("trained", itertools.product((True, False), repeat=3))
def test_frozen_towers(settings: dict[str, Any], trained: tuple[bool, ...], in_tiles: Any) -> None:
    """What is trained has its gradient; what is frozen has none."""
    batch, loss = batch_of(9), AlignCLIPLoss(**settings)
    expected = torch.autograd.grad(batch.losses(loss)["total"], batch.leaves)
    for leaf, on in zip(batch.leaves, trained, strict=True):
        leaf.requires_grad_(on)
    in_tiles(10)
    total = batch.losses(loss)["total"]
    assert total.requires_grad == any(trained)
    if any(trained):
        total.backward()
    for leaf, by, on in zip(batch.leaves, expected, trained, strict=True):
        if on:
            torch.testing.assert_close(leaf.grad, by, rtol=1e-11, atol=1e-13)
        else:
            assert leaf.grad is None


def test_without_gradients(in_tiles: Any) -> None:
    in_tiles(10)
    batch, loss = batch_of(9), AlignCLIPLoss()
    expected = batch.losses(loss)["total"].detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            totals = [batch.losses(loss)["total"] for _ in range(2)]
        assert all(torch.equal(total, expected) for total in totals)
        assert not any(total.requires_grad for total in totals)


@pytest.mark.parametrize(
    ("settings", "training", "evaluation", "on_diagonal"),
    [({"beta": 0.0}, 4, 1, 0), ({"rescale": False}, 8, 2, 2), ({}, 9, 2.5, 3)],
    ids=["clip", "separated", "rescaled"],
)
def test_products(
    settings: dict[str, Any], training: float, evaluation: float, on_diagonal: int, in_tiles: Any
) -> None:
    """The products of matrices, each of 2 · n · n · d operations. Autograd takes 6, 12 and 13.

    The tiles on the diagonal of a symmetric matrix are computed whole.
    """
    n, dim, blocks = 32, 8, 8
    batch, loss = batch_of(n, dim), AlignCLIPLoss(**settings)
    in_tiles((n // blocks) ** 2)

    def products() -> float:
        with CountProducts() as counted:
            batch.losses(loss)["total"]
        return counted.numbers / (n * n * dim)

    assert products() == training + on_diagonal / blocks
    with torch.no_grad():
        assert products() == evaluation + on_diagonal / 2 / blocks


# --- several processes ----------------------------------------------------------------------------

PER_RANK = (1, 6)  # pairs
TILES = (1, 9)
OF_RANKS = {str(settings): AlignCLIPLoss(**settings) for settings in SETTINGS}


def losses_of_ranks() -> dict[Any, dict[str, Tensor]]:
    """This rank's losses and gradients: for each size of tile, number of pairs and setting."""
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[Any, dict[str, Tensor]] = {}
    for tile, n, (name, loss) in itertools.product((2**20, *TILES), PER_RANK, OF_RANKS.items()):
        tiles.CPU_TILE = tile
        part = batch_of(n * world, seed=world).part(rank, world)
        with CountProducts() as counted:
            losses = part.losses(loss)
        found[tile, n, name] = {name: value.detach() for name, value in losses.items()}
        found[tile, n, name] |= gradients(losses, part)
        if tile in TILES:
            found[tile, n, name]["products"] = torch.tensor(float(counted.numbers))
    frozen = batch_of(6 * world, seed=world).part(rank, world)
    frozen.image.requires_grad_(False)
    frozen.losses(AlignCLIPLoss())["total"].backward()
    assert frozen.text.grad is not None
    found["frozen"] = {"d total/d text": frozen.text.grad}
    return found


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(2, marks=pytest.mark.world_size(2)),
        pytest.param(3, marks=[pytest.mark.world_size(3), pytest.mark.slow]),
    ],
)
def test_ranks(world: int) -> None:
    """Each rank has what it has without tiles; the mean over ranks is the loss of one process."""
    ranks = run(world, losses_of_ranks)
    for results in ranks:
        assert_same(results["frozen"], {"d total/d text": results[1, 6, "{}"]["d total/d text"]})
    for n, (name, loss) in itertools.product(PER_RANK, OF_RANKS.items()):
        batch = batch_of(n * world, seed=world)
        losses = batch.losses(loss)
        expected = losses | gradients(losses, batch)
        for tile in TILES:
            of_ranks = [results[tile, n, name] for results in ranks]
            for found, results in zip(of_ranks, ranks, strict=True):
                whole = dict(results[2**20, n, name])
                if n > 1:  # no rank has more work than another
                    whole["products"] = of_ranks[0]["products"]
                assert_same(found, whole)
            for key, value in expected.items():
                values = [found[key] for found in of_ranks]
                is_whole = value.ndim < 2  # gradients of features are of this rank's features
                one = torch.stack(values).mean(dim=0) if is_whole else torch.cat(values) / world
                torch.testing.assert_close(one, value.detach(), rtol=1e-11, atol=1e-13, msg=key)
