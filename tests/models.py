"""Small models and batches, the published ones of the fixtures, and files of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from alignclip.config.schema import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.errors import UserError
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.weights.formats.release import our_names, renamed

FIXTURES = Path(__file__).parent / "fixtures"
EVERYTHING = {"blocks": -1, "ln_final": True, "projection": True}
MODELS = ["nano", "micro"]


@contextmanager
def refused(words: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """See that a person gets one line with these words, a regular expression."""
    with pytest.raises(UserError, match=words) as error:
        yield error
    assert "\n" not in str(error.value)


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


def widths_of_64(**shared: Any) -> ModelConfig:
    vision, text = {"width": 64, "head_width": 64}, {"width": 64, "heads": 1}
    return small_config(vision=vision, text=text, shared=shared)


def small_batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(n, 12, dtype=torch.long)
    for i in range(n):
        length = 2 + i % 7
        # id 0 is a token like any other
        tokens[i, :length] = torch.randint(0, 62, (length,), generator=generator)
        tokens[i, 0], tokens[i, length] = 62, 63
    return torch.randn(n, 3, 32, 32, generator=generator), tokens


def picture() -> Image.Image:
    """Not square, and not RGB."""
    return Image.effect_mandelbrot((70, 50), (-2, -1.5, 1, 1.5), 20).convert("P")


def drawn(config: ModelConfig, seed: int = 0) -> CLIP:
    """Random weights, none at its initial 0 or 1."""
    torch.manual_seed(seed)
    model = build_encoders(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def sections(config: ModelConfig) -> dict[str, Any]:
    """A configuration as open_clip's ``model_cfg``."""
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": dataclasses.asdict(config.vision_cfg),
        "text_cfg": dataclasses.asdict(config.text_cfg),
    }


def stock(config: ModelConfig) -> open_clip.CLIP:
    return open_clip.CLIP(**sections(config))


def assert_equal_weights(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    """Every tensor of a model is the expected one, whose single numbers may have another shape."""
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name].reshape(value.shape)), name


# --- files ------------------------------------------------------------------------------------


def write_model_yaml(path: Path, config: ModelConfig, **recipe: Any) -> Path:
    content = {"model": OmegaConf.structured(config), **recipe}
    path.write_text(OmegaConf.to_yaml(content), encoding="utf-8")
    return path


def write_run(folder: Path, config: ModelConfig, model: CLIP | None = None, **recipe: Any) -> Path:
    """The latest checkpoint of a run with its configuration, as the run leaves them."""
    weights = (model or drawn(config)).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": {f"encoders.{name}": value for name, value in weights.items()}}
    torch.save({"state": state}, folder / "latest-rank0.pt")
    write_model_yaml(folder / "config.yaml", config, **recipe)
    return folder


def write_export(
    folder: Path, config: ModelConfig, weights: dict[str, Tensor], **preprocess: Any
) -> Path:
    """As ``open_clip.push_to_hf_hub.save_for_hf`` writes it."""
    folder.mkdir(parents=True)
    settings = {"model_cfg": sections(config), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    copies = {name: value.clone() for name, value in weights.items()}
    save_file(copies, folder / "open_clip_model.safetensors")
    return folder


def release_of(model: CLIP) -> dict[str, Tensor]:
    """A model's weights under the release's names, which a fixture has."""
    weights = model.state_dict()
    names = reference("micro")["state_dict"]
    release = {name: weights[our_names(name)[0]] for name in names if our_names(name)}
    return release | {
        "logit_scale": weights["logit_scale"][0],
        "text.text_projection": torch.zeros_like(weights["text_projection"]),
    }
