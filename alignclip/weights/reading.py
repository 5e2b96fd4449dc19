"""A file of weights and what lies beside it → the model that it is of, and how its images are prepared."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from torch import Tensor

from alignclip.config.reading import model_section
from alignclip.config.schema import ModelConfig, SharedConfig
from alignclip.errors import UserError, few, one_line
from alignclip.weights import hugging_face, release_format
from alignclip.weights.locate import (
    EXPORT_CONFIG,
    HF_CONFIG,
    HF_PREPROCESSOR,
    RUN_CONFIG,
    UNUSED,
    find_beside,
)
from alignclip.weights.open_clip_models import (
    QUICK,
    choices,
    export_settings,
    like,
    model_config,
    named,
)
from alignclip.weights.state_dicts import (
    HUGGING_FACE,
    OPEN_CLIP,
    RELEASE,
    RUN,
    Weights,
    check_tensors,
    read_weights,
)
from alignclip.weights.weight_files import read


@dataclass
class Found(Weights):
    """A file's state dict, the model that it is of, which ``source`` tells, and how its images are prepared."""

    config: ModelConfig | None = None
    source: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def find(file: Path, place: str, config: ModelConfig | None) -> Found:
    """A file's weights, with the model that they are of: ``config``, or what the file or its neighbour says.

    Raises:
        UserError: as :func:`read_weights`; nothing says what model it is, or one that our encoders can't be.
    """
    content = read_weights(file, place)
    weights, kind = content.weights, content.kind
    if kind != RELEASE and (file.parent / UNUSED).is_file():
        unused = read(file.parent / UNUSED, f"{UNUSED} beside {place}").values
        check_tensors(unused, f"{UNUSED} beside {place}")
        content = dataclasses.replace(content, unused=unused)
    found = Found(**vars(content))
    if kind == RUN:
        found.config, found.source = run_model(file, place), f"its {RUN_CONFIG}"
        if found.config is None and config is None:
            raise UserError(
                f"{place}: no {RUN_CONFIG} beside it; copy it from the run's save_folder, or pass config=…"
            )
    elif kind == RELEASE and config is None:
        found.config, found.source = run_model(file, place), f"its {RUN_CONFIG}"
        try:
            if found.config is None:
                found.config, found.source = release_format.infer_config(weights), "its shapes"
        except UserError as error:
            raise UserError(f"{place} is in the AlignCLIP authors' format, but {error}") from None
    elif kind == HUGGING_FACE:
        found.preprocess = hub_pixels(file, place)
        if config is None:
            found.config, found.source = hub_model(file, place), f"its {HF_CONFIG}"
            found.config.shared = _shared_in(weights, found.config)
    elif kind == OPEN_CLIP:
        export = json_beside(file, EXPORT_CONFIG, place)
        found.preprocess = export.get("preprocess_cfg") or {}
        if config is None:
            found.config, found.source = _open_clip_model(export, content, file, place)
    if config is not None:
        found.config, found.source = config, "config="
    return found


def hub_model(file: Path, place: str) -> ModelConfig:
    """The model of a ``CLIPModel``'s ``config.json`` beside a file; sharing is for the weights to show.

    Raises:
        UserError: there is none, or one that our encoders can't be.
    """
    given = json_beside(file, HF_CONFIG, place)
    if not given:
        raise UserError(
            f"{place} is of a Hugging Face CLIPModel, but no {HF_CONFIG} lies beside it"
        )
    try:
        return hugging_face.model_config(given)
    except UserError as error:
        raise UserError(f"{place}: {HF_CONFIG}: {error}") from None


def hub_pixels(file: Path, place: str) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` for the ``preprocessor_config.json`` beside a file.

    Raises:
        UserError: one that open_clip's transform can't be told to do.
    """
    try:
        return hugging_face.their_preprocessor(json_beside(file, HF_PREPROCESSOR, place))
    except UserError as error:
        raise UserError(f"{place}: {HF_PREPROCESSOR}: {error}") from None


def preprocess_config(given: Any, place: str, image_size: int) -> PreprocessCfg:
    """open_clip's settings for a ``preprocess_cfg``, at the model's image size; one number is that of all channels.

    Raises:
        UserError: it is no such thing.
    """
    try:
        found = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), dict(given)))
        for key in ("mean", "std"):
            value = getattr(found, key)
            numbers = tuple(map(float, (value,) * 3 if isinstance(value, (int, float)) else value))
            if len(numbers) != 3:
                raise ValueError(f"{key} has {len(numbers)} numbers, not 3")
            if not all(map(math.isfinite, numbers)) or (key == "std" and min(numbers) <= 0):
                raise ValueError(f"{key} can't be {list(numbers)}")
            setattr(found, key, numbers)
        found.size = image_size
        image_transform_v2(found, is_train=False)
    except (AssertionError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{place}: its images can't be prepared as it says: {one_line(error)}"
        ) from None
    return found


def run_model(file: Path, place: str) -> ModelConfig | None:
    """The ``model`` section of the ``config.yaml`` beside a checkpoint, or beside what a link to it points at, if any.

    That section alone: the rest says how it was trained, and keys of older versions there shall not matter.
    """
    found = find_beside(file, RUN_CONFIG)
    if found is None:
        return None
    try:
        return model_section(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place}: no model can be read from the {RUN_CONFIG} beside it: {one_line(error)}"
        ) from None


def json_beside(file: Path, name: str, place: str) -> dict[str, Any]:
    """The parsed JSON file of that name beside a file of weights, or nothing.

    Raises:
        UserError: it is no JSON.
    """
    path = file.parent / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: the {name} beside it is not JSON: {one_line(error)}") from None
    return content if isinstance(content, dict) else {}


def _open_clip_model(
    export: dict[str, Any], content: Weights, file: Path, place: str
) -> tuple[ModelConfig, str]:
    """Return the model of a file in open_clip's format, with the sharing that its weights show, and what says it.

    That is the export's ``model_cfg``, a run's ``config.yaml``, or the shapes, where only one of open_clip's own models
    has them.

    Raises:
        UserError: nothing says it, or it has settings that our encoders don't have.
    """
    given = export.get("model_cfg")
    if isinstance(given, dict):
        try:
            values, foreign = export_settings(given)
        except UserError as error:
            raise UserError(f"{place}: {EXPORT_CONFIG}: {error}") from None
        if foreign:
            raise UserError(
                f"{place}: our encoders don't have its model_cfg's {few(foreign)}; load it with open_clip"
            )
        config, source = model_config(values, f"{place}: {EXPORT_CONFIG}"), f"its {EXPORT_CONFIG}"
    elif (trained := run_model(file, place)) is not None:
        return trained, f"its {RUN_CONFIG}"
    else:
        names = like(content.weights, content.run_name)
        names = [name for name in names if name.endswith(QUICK)] if content.by_openai else names
        if len(names) != 1:
            what = "a TorchScript archive without settings: " if content.torch_script else ""
            raise UserError(
                f"{place}: {what}no {EXPORT_CONFIG} with a model_cfg beside it; {choices(names)}"
            )
        config, source = named(names[0]), f"its shapes, those of open_clip's {names[0]},"
    if config.vision_cfg.timm_model_name is None:
        config.shared = _shared_in(content.weights, config)
    return config, source


def _shared_in(weights: Mapping[str, Tensor], config: ModelConfig) -> SharedConfig:
    """Which modules of the two towers hold the same numbers: those were one and the same in training."""
    vision, text = config.vision_cfg, config.text_cfg

    def same(one: str, other: str) -> bool:
        names = [name for name in weights if name.startswith(one)]
        pairs = [(weights[name], weights.get(other + name.removeprefix(one))) for name in names]
        return bool(pairs) and all(
            b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
            for a, b in pairs
        )

    if vision.width != text.width:
        return SharedConfig()
    blocks = 0
    if text.width == text.heads * vision.head_width:
        while blocks < min(vision.layers, text.layers) and same(
            f"transformer.resblocks.{text.layers - 1 - blocks}.",
            f"visual.transformer.resblocks.{vision.layers - 1 - blocks}.",
        ):
            blocks += 1
    return SharedConfig(
        -1 if blocks == vision.layers == text.layers else blocks,
        same("ln_final.", "visual.ln_post."),
        same("text_projection", "visual.proj"),
    )
