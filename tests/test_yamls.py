"""The files of yamls/: models that can be built, recipes that differ in what their comments say and
in nothing else.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FIXTURES

from alignclip.config.reading import load
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.weights.formats.release import renamed

FOLDER = Path(__file__).parent.parent / "yamls"
RECIPE = FOLDER / "alignclip.yaml"
YAMLS = sorted(path for path in FOLDER.glob("*.yaml") if path.stem != "evaluate")

L_16 = ["model.vision_cfg.layers=16", "model.text_cfg.layers=16"]
NOTHING_SHARED = [
    "model.shared.blocks=0",
    "model.shared.ln_final=false",
    "model.shared.projection=false",
]
# What makes each of the recipe, besides the names of the run and of its set.
DIFFERENCES = {
    "alignclip": [],
    "sharedclip": ["loss.beta=0", "optimizer.eps=1e-6"],
    "clip": ["loss.beta=0", "optimizer.eps=1e-6", *NOTHING_SHARED],
    "alignclip-vit-b-16-512": ["model.embed_dim=512"],
    "alignclip-vit-l-16": L_16,
    "alignclip-cc3m": ["scheduler.t_warmup=3000ba"],
    "alignclip-datacomp": [
        *(
            "max_duration=3125ba",
            "global_train_batch_size=4096",
            "save_interval=500ba",
            "scheduler.t_warmup=500ba",
        ),
        *("optimizer.lr=5e-4", "optimizer.weight_decay=0.2", "optimizer.eps=1e-6"),
        *("model.embed_dim=512", "model.vision_cfg.patch_size=32"),
    ],
}


def on_meta(path: Path) -> CLIP:
    """The model of a file, shapes without values."""
    with torch.device("meta"):
        return build_encoders(load(path).model)


def settings(path: Path, *overrides: str) -> dict[str, Any]:
    """What a file says, without the names of the run and of its only set."""
    config = load(path, [*overrides, "run_name=any"])
    (stream,) = config.data.streams.values()
    stream.local = "anywhere"
    config.data.streams = {"any": stream}
    return asdict(config)


def test_every_recipe_is_known_here() -> None:
    assert {path.stem for path in YAMLS} == DIFFERENCES.keys() | {
        "debug",
        "quickstart",
        "finetune-retrieval",
    }


@pytest.mark.parametrize("name", DIFFERENCES)
def test_recipes_differ_in_what_they_say_alone(name: str) -> None:
    assert settings(FOLDER / f"{name}.yaml") == settings(RECIPE, *DIFFERENCES[name])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_is_one_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 50


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_models_can_be_built(path: Path) -> None:
    config, model = load(path).model, on_meta(path)
    assert model.text_projection.shape[1] == config.embed_dim
    together = model.visual.proj is model.text_projection
    assert together == (path.stem != "clip")


def test_published_models_have_the_published_parameters() -> None:
    """ViT-B-16 as released; the other two by what their names change in it."""
    b_16: dict[str, list[int]] = json.loads(
        (FIXTURES / "vitb16_state_dict_shapes.json").read_text()
    )
    b_16["logit_scale"] = [1]
    del b_16["text.text_projection"]  # a parameter that the published code never uses
    last = {name: shape for name, shape in b_16.items() if ".resblocks.11." in name}
    more = {
        name.replace(".11.", f".{i}."): shape for name, shape in last.items() for i in range(12, 16)
    }
    published = {
        "alignclip": (b_16, 124_393_729),
        "alignclip-vit-b-16-512": (b_16 | {"projection": [768, 512]}, 124_197_121),
        "alignclip-vit-l-16": (b_16 | more, 152_745_217),
    }
    for name, (shapes, count) in published.items():
        model = on_meta(FOLDER / f"{name}.yaml")
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == renamed(
            shapes
        )
        ours = sum(parameter.numel() for parameter in model.parameters())
        assert ours == sum(math.prod(shape) for shape in shapes.values()) == count
