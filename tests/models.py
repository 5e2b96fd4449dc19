"""Small models and batches, and the published ones of the fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignclip.config.schema import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.weights.formats.release import renamed

FIXTURES = Path(__file__).parent / "fixtures"
EVERYTHING = {"blocks": -1, "ln_final": True, "projection": True}
MODELS = ["nano", "micro"]


def config_of(published: dict[str, Any], **shared: Any) -> ModelConfig:
    return ModelConfig(
        published["embed_dim"],
        VisionConfig(**published["vision_cfg"]),
        TextConfig(**published["text_cfg"]),
        SharedConfig(**shared),
    )


def reference(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(FIXTURES / f"model_{name}.pt", weights_only=True)
    return loaded


def load_published(published: dict[str, Any]) -> CLIP:
    model = build_encoders(config_of(published["config"], **EVERYTHING))
    weights = renamed(published["state_dict"])
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    model.load_state_dict(weights)
    return model


def small_config(**changes: Any) -> ModelConfig:
    """Towers that can share everything: 32 wide, 3 layers, 2 heads."""
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 3, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3}
    vision |= changes.pop("vision", {})
    text |= changes.pop("text", {})
    shared = SharedConfig(**changes.pop("shared", {}))
    return ModelConfig(16, VisionConfig(**vision), TextConfig(**text), shared, **changes)


def small_batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(n, 12, dtype=torch.long)
    for i in range(n):
        length = 2 + i % 7
        tokens[i, :length] = torch.randint(
            0, 62, (length,), generator=generator
        )  # id 0 is a token like any other
        tokens[i, 0], tokens[i, length] = 62, 63
    return torch.randn(n, 3, 32, 32, generator=generator), tokens
