"""The losses against the published code's numbers, on one process and on two, and in
reduced-precision contexts.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch.utils._python_dispatch import TorchDispatchMode

from alignclip.config.plugged import LOSS_TERMS
from alignclip.config.schema import LossConfig
from alignclip.errors import UserError
from alignclip.losses import AlignCLIPLoss, cyclip, tiles

FIXTURES = Path(__file__).parent / "fixtures"
CASES = json.loads((FIXTURES / "losses_small_index.json").read_text())
NUMBERS = np.load(FIXTURES / "losses_small.npz")
SIDES = list(itertools.product((True, False), repeat=2))
# Terms that a YAML adds. Every test of a setting below tests them, beside L_clip.
TERMS: dict[str, Any] = {"cyclip": cyclip.Settings(in_modal=0.5, cross_modal=2.0)}
DIST_SETTINGS: dict[str, dict[str, Any]] = {
    "clip": {"beta": 0.0},
    "inmod": {"rescale": False},
    "inmod_sem": {},
    "image_only": {"separate_text": False},
    "text_only": {"separate_image": False},
} | {name: {"beta": 0.0, "terms": {name: settings}} for name, settings in TERMS.items()}


class Matrices(NamedTuple):
    """The n × N matrices of a setting: kept for the backward pass, and those of logits."""

    kept: int
    logits: int


def matrices_of(name: str) -> Matrices:
    """Return the matrices of one of the settings; a term keeps none beside those of L_clip."""
    separated = {
        "inmod": Matrices(4, 4),
        "inmod_sem": Matrices(5, 4),
        "image_only": Matrices(4, 3),
        "text_only": Matrices(4, 3),
    }
    return separated.get(name, Matrices(2, 2))


def test_every_term_is_tested_here() -> None:
    assert TERMS.keys() == LOSS_TERMS.keys()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def random_batch(
    n: int, dtype: torch.dtype = torch.float64, dim: int = 16
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    image, text, semantic = (
        torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return {
        "image_features": F.normalize(image, dim=1).to(dtype).requires_grad_(),
        "text_features": F.normalize(text, dim=1).to(dtype).requires_grad_(),
        "logit_scale": torch.tensor([14.0], dtype=dtype, requires_grad=True),
        "semantic_features": (semantic + 1).to(dtype),
    }


@pytest.mark.parametrize("case", CASES, ids=[case["key"] for case in CASES])
def test_published_losses_and_gradients(case: dict[str, Any]) -> None:
    key, plain = case["key"], case["kind"] == "clip"
    prefix = f"in_{case['B']}_{case['D']}_{case['S']}_{case['dtype']}"
    image, text, semantic = (
        torch.from_numpy(NUMBERS[f"{prefix}_{name}"]) for name in ("img", "txt", "sem")
    )
    image.requires_grad_(), text.requires_grad_()
    scale = torch.tensor(case["logit_scale"], dtype=image.dtype, requires_grad=True)
    if plain:
        loss = AlignCLIPLoss(beta=0)
    else:
        rescale = case["nl_semantic_supervision"]
        # without sentence embeddings the published code ignores the flags and separates both sides
        sides = (case["separate_image"], case["separate_text"]) if rescale else (True, True)
        loss = AlignCLIPLoss(case["alpha"], case["beta"], *sides, rescale=rescale)
    losses = loss(image, text, scale, semantic)
    losses["total"].backward()

    # the published code has no halves around the pairs of cross-entropies of its AlignCLIP loss
    half = 1.0 if plain else 0.5
    theirs = {
        name: half * torch.from_numpy(NUMBERS[f"{key}_{stored}"])
        for name, stored in {
            "total": "contrastive_loss" if plain else "total_loss",
            "contrastive": "contrastive_loss" if plain else "clip_loss",
            "separation": None if plain else "inModality_loss",
            "image": "g_img",
            "text": "g_txt",
            "scale": "g_scale",
        }.items()
        if stored
    }
    double = image.dtype == torch.float64
    weighted = {
        "total": losses["total"],
        "contrastive": loss.alpha * losses["contrastive"],
        "separation": loss.beta * losses["separation"],
    }
    for name in weighted.keys() & theirs.keys():
        # fp32 losses near zero are small differences of large logits
        rtol, atol = (1e-9, 1e-12) if double else (1e-6, 1e-6)
        torch.testing.assert_close(
            weighted[name].detach(), theirs[name], rtol=rtol, atol=atol, msg=f"{key} {name}"
        )
    for name, leaf in {"image": image, "text": text, "scale": scale}.items():
        assert leaf.grad is not None
        # The scale's gradient is a sum of cosines near 1 that all but cancel in some fp32 cases.
        # Their rounding is left: half an eps, in an order that depends on the processor (ours was
        # off by 0.8e-8 on one and by 1.1e-8 on another, the stored numbers are by 0.6e-8).
        cancellation = torch.finfo(torch.float32).eps / 2 if name == "scale" and not double else 0.0
        error = float((leaf.grad - theirs[name]).norm())
        assert error < (1e-9 if double else 1e-6) * float(theirs[name].norm()) + cancellation, (
            f"{key} d/d{name}"
        )


@pytest.mark.parametrize("separate_image", [True, False])
@pytest.mark.parametrize("separate_text", [True, False])
def test_rescaled_loss_by_hand(separate_image: bool, separate_text: bool) -> None:
    batch = random_batch(5)
    v, t, s = (batch[name].detach() for name in ("image_features", "text_features", "logit_scale"))
    q = batch["semantic_features"] / batch["semantic_features"].norm(dim=1, keepdim=True)
    expected = 0.0
    for x, on in ((v, separate_image), (t, separate_text)):
        for i in range(5) if on else ():
            logits = [
                s * (v[i] @ t[i] if i == j else (x[i] @ x[j]) * (1 - q[i] @ q[j])) for j in range(5)
            ]
            expected += float(torch.logsumexp(torch.stack(logits), dim=0) - logits[i]) / 5 / 2
    losses = AlignCLIPLoss(1.0, 0.5, separate_image, separate_text)(**batch)
    assert float(losses["separation"]) == pytest.approx(expected, rel=1e-12)
    assert float(losses["total"]) == pytest.approx(
        float(losses["contrastive"]) + 0.5 * expected, rel=1e-12
    )


def test_scale_may_be_a_scalar_or_of_shape_one() -> None:
    batch = random_batch(4)
    scalar = batch | {"logit_scale": batch["logit_scale"].detach()[0]}
    for one, other in zip(
        AlignCLIPLoss()(**batch).values(), AlignCLIPLoss()(**scalar).values(), strict=True
    ):
        assert one.shape == ()
        assert torch.equal(one, other)


def test_errors() -> None:
    batch = random_batch(4)
    with pytest.raises(UserError, match="beta=0"):
        AlignCLIPLoss()(**batch | {"semantic_features": None})
    for sides in ((False, True), (True, False), (False, False)):
        with pytest.raises(UserError, match="rescale=false"):
            AlignCLIPLoss(1.0, 0.5, *sides, rescale=False)
    with pytest.raises(ValueError, match=r"\[4, 16\] and \[3, 16\]"):
        AlignCLIPLoss()(**batch | {"text_features": batch["text_features"][:3]})
    with pytest.raises(ValueError, match=r"semantic_features must be \[4, e\]"):
        AlignCLIPLoss()(**batch | {"semantic_features": batch["semantic_features"][:3]})
    with pytest.raises(ValueError, match="logit_scale"):
        AlignCLIPLoss()(**batch | {"logit_scale": torch.ones(4)})


def test_needs_semantic_says_what_the_loss_does() -> None:
    batch = random_batch(4) | {"semantic_features": None}
    for beta, rescale, (image, text) in itertools.product((0.0, 0.5), (True, False), SIDES):
        if beta and not rescale and not (image and text):
            continue
        config = LossConfig(1.0, beta, image, text, rescale)
        loss = AlignCLIPLoss(1.0, beta, image, text, rescale)
        if config.needs_semantic:
            with pytest.raises(UserError):
                loss(**batch)
            continue
        losses = loss(**batch)
        assert losses["total"].isfinite()
        if rescale or not beta:
            assert losses["separation"].item() == 0.0
            assert torch.equal(losses["total"], losses["contrastive"])


# --- precision ------------------------------------------------------------------------------------


def losses_and_gradients(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    losses = AlignCLIPLoss()(**batch)
    leaves = [batch[name] for name in ("image_features", "text_features", "logit_scale")]
    return [*losses.values(), *torch.autograd.grad(losses["total"], leaves)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_and_low_matmul_precision_change_nothing(device: str) -> None:
    """ "medium" makes fp32 matrix products bf16 where the CPU can, and TF32 on a GPU.

    Autocast makes them bf16.
    """
    batch = {
        name: value.detach().to(device).requires_grad_(value.requires_grad)
        for name, value in random_batch(128, torch.float32, dim=128).items()
    }
    batch["logit_scale"] = torch.tensor([100.0], device=device, requires_grad=True)
    expected = losses_and_gradients(batch)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            assert (
                batch["image_features"].matmul(batch["text_features"].T).dtype == torch.bfloat16
            )  # it is on
            found = losses_and_gradients(batch)
        found_without_autocast = losses_and_gradients(batch)
        assert torch.get_float32_matmul_precision() == "medium"  # and left as it was
    finally:
        torch.set_float32_matmul_precision("highest")
    for ours, other, want in zip(found, found_without_autocast, expected, strict=True):
        assert torch.equal(ours, want)
        assert torch.equal(other, want)


@pytest.mark.parametrize("name", DIST_SETTINGS)
def test_matmul_precision_is_highest_in_backward(name: str) -> None:
    """The flags that every product of the backward pass runs under."""
    seen: list[tuple[str, bool]] = []
    aten = torch.ops.aten
    products = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv}

    class WatchProducts(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            # fp64 is fp64 under all flags
            if func.overloadpacket in products and args[0].dtype != torch.float64:
                seen.append(
                    (torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"))
                )
            return func(*args, **(kwargs or {}))

    batch = random_batch(8, torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = AlignCLIPLoss(**DIST_SETTINGS[name])(**batch)["total"]
            with WatchProducts():
                total.backward()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    # two factors of each matrix of logits, and the products of a term
    factors = 2 * matrices_of(name).logits
    assert len(seen) == factors or (name in TERMS and len(seen) > factors)
    assert set(seen) == {("highest", False)}


def test_bf16_features_are_computed_in_fp32() -> None:
    batch = random_batch(8, torch.bfloat16)
    losses = AlignCLIPLoss()(**batch)
    exact = AlignCLIPLoss()(**{name: value.detach().float() for name, value in batch.items()})
    assert losses["total"].dtype == torch.float32
    for name, value in losses.items():
        assert torch.equal(value, exact[name])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIST_SETTINGS)
def test_saved_matrices(name: str) -> None:
    """Autograd keeps one n×N matrix a cross-entropy, and the weights once for both sides."""
    n = 40
    saved: dict[int, tuple[int, ...]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() >= n * n:
            saved[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    batch = random_batch(n)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = AlignCLIPLoss(**DIST_SETTINGS[name])(**batch)
    assert len(saved) == matrices_of(name).kept, saved
    losses["total"].backward()


# --- blocks of rows -------------------------------------------------------------------------------

TILED_SETTINGS: list[dict[str, Any]] = [
    {},
    {"beta": 0.0},
    {"rescale": False},
    {"separate_text": False},
    {"separate_image": False, "alpha": 2.0, "beta": 3.0},
]


def in_blocks(loss: AlignCLIPLoss, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every loss, and the gradients of each loss that has some."""
    losses = loss(**batch)
    leaves = [batch[name] for name in ("image_features", "text_features", "logit_scale")]
    gradients = [
        gradient
        for value in losses.values()
        if value.requires_grad
        for gradient in torch.autograd.grad(3 * value, leaves, retain_graph=True)
    ]
    return [*losses.values(), *gradients]


@pytest.mark.parametrize("settings", TILED_SETTINGS, ids=str)
@pytest.mark.parametrize(("n", "tile"), [(2, 1), (9, 18), (9, 80), (40, 640)])
def test_blocks_of_rows_change_nothing(
    settings: dict[str, Any], n: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, loss = random_batch(n), AlignCLIPLoss(**settings)
    batch["semantic_features"][0] = 0  # unlike itself, too: 1 − S is 1 on the diagonal
    whole = in_blocks(loss, batch)
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    for ours, want in zip(in_blocks(loss, batch), whole, strict=True):
        assert ours.shape == want.shape
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(loss(**batch)["total"], loss(**batch)["total"].detach())


def test_blocks_of_rows_take_a_scalar_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CPU_TILE", 20)
    batch = random_batch(10)
    scalar = batch["logit_scale"].detach()[0].requires_grad_()
    AlignCLIPLoss()(**batch)["total"].backward()
    AlignCLIPLoss()(**batch | {"logit_scale": scalar})["total"].backward()
    assert scalar.grad is not None
    assert batch["logit_scale"].grad is not None
    assert float(scalar.grad) == float(batch["logit_scale"].grad)


def test_blocks_of_rows_keep_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as a block of logits is kept for the backward pass, and none is larger."""
    n, tile = 64, 256
    monkeypatch.setattr(tiles, "CPU_TILE", tile)
    largest = 0

    class WatchSizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor):
                largest = max(largest, found.numel())
            return found

    batch = random_batch(n, dim=2)
    with WatchSizes():
        AlignCLIPLoss()(**batch)["total"].backward()
    assert largest == tile


def test_a_small_batch_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("in blocks")

    monkeypatch.setattr(tiles, "_Tiles", never)
    AlignCLIPLoss()(**random_batch(64))["total"].backward()


# --- several processes ----------------------------------------------------------------------------

DIST = torch.load(FIXTURES / "losses_dist2.pt", weights_only=True)


def distributed_losses() -> dict[str, dict[str, torch.Tensor]]:
    """This rank's losses and gradients in every setting, and alone in a group of its own.

    All of it again in blocks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([r]) for r in range(world)][rank]
    settings = DIST_SETTINGS | {"alone": {"group": alone}}
    found = {}
    for suffix, tile in (("", tiles.CPU_TILE), (" in blocks", len(DIST["img"]))):
        tiles.CPU_TILE = tile  # in blocks: a row each
        for name, kwargs in settings.items():
            found[name + suffix] = part_losses(AlignCLIPLoss(**kwargs), rank, world)
    return found


def part_losses(loss: AlignCLIPLoss, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of the ``rank``-th of ``world`` parts of the fixture's batch."""
    n = len(DIST["img"]) // world
    image, text, semantic = (
        DIST[name][rank * n : (rank + 1) * n].clone() for name in ("img", "txt", "sem")
    )
    image.requires_grad_(), text.requires_grad_()
    scale = torch.tensor([DIST["logit_scale"]], dtype=torch.float64, requires_grad=True)
    losses = loss(image, text, scale, semantic)
    losses["total"].backward()
    assert image.grad is not None
    assert text.grad is not None
    assert scale.grad is not None
    values = {name: value.detach() for name, value in losses.items()}
    return values | {"image": image.grad, "text": text.grad, "scale": scale.grad}


@pytest.fixture(scope="module")
def on_two_ranks() -> list[dict[str, dict[str, torch.Tensor]]]:
    return run(2, distributed_losses)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["clip", "inmod"])
def test_two_ranks_against_the_published_code(kind: str, on_two_ranks: list[Any]) -> None:
    half = 1.0 if kind == "clip" else 0.5
    for ours, theirs in zip(on_two_ranks, DIST["per_rank"].values(), strict=True):
        reference = theirs[f"{kind}|local_loss=True|gather_with_grad=True"]
        total = reference["contrastive_loss" if kind == "clip" else "total_loss"]
        assert float(ours[kind]["total"]) == pytest.approx(half * total, rel=1e-12)
        for name, stored in {"image": "g_img", "text": "g_txt"}.items():
            assert relative_error(ours[kind][name], half * reference[stored]) < 1e-12
        assert float(ours[kind]["scale"]) == pytest.approx(half * reference["g_scale"], rel=1e-12)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", DIST_SETTINGS)
def test_two_ranks_average_to_one_process(name: str, on_two_ranks: list[Any]) -> None:
    single = part_losses(AlignCLIPLoss(**DIST_SETTINGS[name]), rank=0, world=1)
    ranks = [results[name] for results in on_two_ranks]
    for key in single.keys() - {"image", "text"}:
        mean = torch.stack([rank[key] for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, single[key], rtol=1e-12, atol=1e-14)
    for key in ("image", "text"):
        # each rank's features reach the losses of both ranks; averaging gradients over ranks halves
        # their sum
        torch.testing.assert_close(
            torch.cat([rank[key] for rank in ranks]) / 2, single[key], rtol=1e-11, atol=1e-13
        )


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", [*DIST_SETTINGS, "alone"])
def test_two_ranks_in_blocks_of_rows(name: str, on_two_ranks: list[Any]) -> None:
    for results in on_two_ranks:
        whole, in_blocks = results[name], results[f"{name} in blocks"]
        for key, value in whole.items():
            torch.testing.assert_close(in_blocks[key], value, rtol=1e-11, atol=1e-13)


@pytest.mark.world_size(2)
def test_group_bounds_the_batch(on_two_ranks: list[Any]) -> None:
    for rank, results in enumerate(on_two_ranks):
        for key, value in part_losses(AlignCLIPLoss(), rank, world=2).items():
            torch.testing.assert_close(results["alone"][key], value, rtol=1e-12, atol=1e-14)
