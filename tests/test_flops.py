"""Operations of a step: those that PyTorch counts while a model trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import EVERYTHING, small_batch, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignclip.config.schema import StartConfig
from alignclip.losses import AlignCLIPLoss
from alignclip.model import blocks, flops
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders
from alignclip.training.locking import lock_towers

MODELS: dict[str, dict[str, Any]] = {
    "nothing is shared": {},
    "everything is shared": {"shared": EVERYTHING},
    "the last block is shared": {"shared": {"blocks": 1, "projection": True}},
    "sizes that differ": {
        "vision": {"width": 48, "layers": 2, "patch_size": 8, "mlp_ratio": 3.0},
        "text": {"layers": 4},
    },
    "patches are dropped": {"vision": {"patch_size": 8, "patch_dropout": 0.3}},
    "QuickGELU": {"quick_gelu": True},
    "ResNet": {"vision": {"timm_model_name": "resnet18", "timm_pool": ""}},
    "ConvNeXt": {"vision": {"timm_model_name": "convnext_atto", "timm_pool": ""}},
    "timm's ViT": {
        "vision": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 224}
    },
}
LOCKS: dict[str, dict[str, Any]] = {
    "image": {"lock_image": True},
    "image but for its top": {"lock_image": True, "lock_image_unlocked_groups": 2},
    "text": {"lock_text": True},
    "text but for its top": {"lock_text": True, "lock_text_unlocked_layers": 2},
}
LOSSES: dict[str, dict[str, Any]] = {
    "CLIP": {"beta": 0.0},
    "AlignCLIP": {"beta": 0.5},
    "images alone": {"beta": 0.5, "separate_text": False},
    "no rescaling": {"beta": 0.5, "rescale": False},
}


@pytest.fixture(autouse=True)
def no_batch_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of a small batch computes tokens that nothing needs."""
    monkeypatch.setattr(blocks, "SMALL", 0)


def step(
    sizes: dict[str, Any], lock: dict[str, Any], loss: dict[str, Any], chunk: int = 0
) -> tuple[AlignCLIPModel, dict[str, torch.Tensor]]:
    """A model, and a batch of it: captions of up to 8 tokens, padded to 12."""
    config = small_config(**sizes)
    encoders = build_encoders(config)
    lock_towers(encoders, StartConfig(**lock))
    model = AlignCLIPModel(encoders, AlignCLIPLoss(**loss), chunk)
    model.count_flops()
    _, text = small_batch(6)
    side = config.vision_cfg.image_size
    image = torch.zeros(6, 3, side, side, dtype=torch.uint8)
    return model, {"image": image, "text": text, "semantic": torch.randn(6, 5)}


def counted(model: AlignCLIPModel, batch: dict[str, torch.Tensor]) -> int:
    """Train a step, and have PyTorch count; it knows the products of plain attention alone."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(model(batch), batch)["total"].backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", MODELS)
def test_of_every_model(name: str) -> None:
    model, batch = step(MODELS[name], {}, LOSSES["AlignCLIP"])
    assert model.flops_per_batch(batch) == counted(model, batch)


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("name", ["nothing is shared", "ConvNeXt"])
def test_what_is_locked_has_no_gradients(name: str, lock: str) -> None:
    if name == "ConvNeXt" and "top" in lock:
        pytest.skip("timm's towers have groups of their own")
    model, batch = step(MODELS[name], LOCKS[lock], LOSSES["CLIP"])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image, text, _ = model(batch)
        (image.sum() + text.sum()).backward()
    assert model.pair_flops is not None
    assert 6 * model.pair_flops.at(8) == counter.get_total_flops()


@pytest.mark.parametrize("loss", LOSSES)
def test_of_every_loss(loss: str) -> None:
    model, batch = step({}, {}, LOSSES[loss])
    assert model.flops_per_batch(batch) == counted(model, batch)


def test_the_padding_of_captions_is_not_counted() -> None:
    model, batch = step({}, {}, LOSSES["CLIP"])
    padded = model.flops_per_batch(batch)
    batch["text"] = batch["text"][:, :8]
    assert model.flops_per_batch(batch) == padded
    batch["text"] = batch["text"][:1].expand(6, -1)  # the shortest caption
    assert model.flops_per_batch(batch) < padded


def test_chunks_count_once() -> None:
    model, batch = step({}, {}, LOSSES["CLIP"], chunk=2)
    whole, _ = step({}, {}, LOSSES["CLIP"])
    assert model.flops_per_batch(batch) == whole.flops_per_batch(batch) < counted(model, batch)


def test_counting_draws_nothing_from_the_random_generator() -> None:
    sizes = {"vision": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 224}}
    encoders = build_encoders(small_config(**sizes))
    before = torch.get_rng_state()
    assert flops.count_pair(encoders) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tower_that_cannot_be_counted_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = build_encoders(small_config(vision={"timm_model_name": "resnet18"}))
    monkeypatch.setattr(type(encoders.visual), "forward", lambda tower, x: x.sum().item())
    model = AlignCLIPModel(encoders, AlignCLIPLoss())
    assert model.flops_per_batch({}) == 0.0
    model.count_flops()
    assert model.flops_per_batch({}) == 0.0
