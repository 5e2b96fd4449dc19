"""A file of weights → a state dict under our names, and the model that it is of.

Nothing of a file is executed: pickles are read with ``weights_only=True``, so a file from a stranger can only be wrong.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]
from omegaconf import OmegaConf
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from alignclip import hugging_face, release_format
from alignclip.config import ModelConfig, SharedConfig
from alignclip.config_file import model_section
from alignclip.errors import UserError, one_line
from alignclip.fetching import EXPORT_CONFIG, HF_CONFIG, HF_PREPROCESSOR, RUN_CONFIG, UNUSED, few, find_beside

RUN, RELEASE, OPEN_CLIP = "a run's checkpoint", "the authors' format", "open_clip's format"
HUGGING_FACE = "Hugging Face's format"

# What a Composer checkpoint holds beside tensors: times, versions and numpy's random state. Plain data, all of it.
# numpy 2 has moved _reconstruct; a checkpoint names the place that it had when it was written.
SAFE_GLOBALS: list[Any] = [
    datetime.timedelta, TorchVersion, np.ndarray, np.dtype, np.dtypes.UInt32DType, np.dtypes.Int64DType,
    np.dtypes.Float64DType, (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
]  # fmt: skip


@dataclass
class Weights:
    """A file's state dict.

    Attributes:
        weights: under our names.
        kind: :data:`RUN`, :data:`RELEASE`, :data:`OPEN_CLIP` or :data:`HUGGING_FACE`.
        unused: tensors of an authors' file that no model uses, by the authors' names.
    """

    weights: dict[str, Tensor]
    kind: str
    unused: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Found(Weights):
    """A file's state dict, the model that it is of, which ``source`` tells, and how its images are prepared."""

    config: ModelConfig | None = None
    source: str = ""
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def read(file: Path, place: str) -> dict[str, Any]:
    """What a file of weights holds, its tensors mapped into memory rather than read.

    Raises:
        UserError: it is something else, truncated, or names Python objects that are not plain data.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
            if packed:  # torch packs nothing; unpacked, a few bytes can be any number
                raise UserError(f"{place} is refused: it is a compressed archive, which PyTorch doesn't write")
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UserError:
        raise
    except Exception as error:  # broken files make torch raise nearly anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{place} is refused: beside weights it holds '{code[1]}', which could run code") from None
        kind = "a safetensors file" if file.suffix == ".safetensors" else "a PyTorch checkpoint"
        raise UserError(f"{place} is not {kind}, or only a part of one ({type(error).__name__})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{place} holds a {type(content).__name__}, not a model's weights")
    return content


def read_weights(file: Path, place: str) -> Weights:
    """A file's state dict under our names, and what it is of.

    Args:
        file: where it is on this machine.
        place: what the person calls it, for errors.

    Raises:
        UserError: it holds no model's weights, or code.
    """
    content = read(file, place)
    state = content.get("state")
    if isinstance(state, dict):
        model = state.get("model")  # with Composer's EMA the averaged one: it swaps the average in before a save
        if not isinstance(model, dict) or not any(str(name).startswith("encoders.") for name in model):
            raise UserError(f"{place} is a Composer checkpoint, but not of a model of ours")
        _check_tensors(model, file, place)
        return Weights({str(name).removeprefix("encoders."): value for name, value in model.items()}, RUN)
    # a state dict of somebody else's, bare or in a training checkpoint of theirs
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{place} is not a model's weights; it holds {few(map(str, content))}")
    _check_tensors(weights, file, place)
    # of DistributedDataParallel and torch.compile
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in weights.items()}
    if release_format.is_release(weights):
        return Weights(release_format.renamed(weights), RELEASE, release_format.unused(weights))
    if hugging_face.is_clip_model(weights):
        return Weights(hugging_face.renamed(weights), HUGGING_FACE)
    return Weights(weights, OPEN_CLIP)


def _check_tensors(weights: Mapping[Any, Any], file: Path, place: str) -> None:
    """Refuse what is no tensor of numbers that lie in the file: it could not be copied, or would take any memory."""
    largest = file.stat().st_size
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{place} is not a model's weights: '{name}' is a {type(value).__name__}")
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        if not plain or value.device.type != "cpu" or value.is_quantized or value.is_nested:
            raise UserError(
                f"{place} is not a model's weights: '{name}' is a sparse, quantized or other special tensor"
            )
        if value.numel() * value.element_size() > min(value.untyped_storage().nbytes(), largest):
            raise UserError(f"{place} is refused: '{name}' is {list(value.shape)}, more than the file holds of it")


def find(file: Path, place: str, config: ModelConfig | None) -> Found:
    """A file's weights, with the model that they are of: ``config``, or what the file or its neighbour says.

    Raises:
        UserError: as :func:`read_weights`; nothing says what model it is, or one that our encoders can't be.
    """
    content = read_weights(file, place)
    weights, kind = content.weights, content.kind
    if kind != RELEASE and (file.parent / UNUSED).is_file():
        unused = read(file.parent / UNUSED, f"{UNUSED} beside {place}")
        _check_tensors(unused, file.parent / UNUSED, f"{UNUSED} beside {place}")
        content = dataclasses.replace(content, unused=unused)
    found = Found(**vars(content))
    if kind == RUN:
        found.config, found.source = run_model(file, place), f"its {RUN_CONFIG}"
        if found.config is None and config is None:
            raise UserError(f"{place}: no {RUN_CONFIG} beside it; copy it from the run's save_folder, or pass config=…")
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
            found.config, found.source = _export_model(export, weights, place), f"its {EXPORT_CONFIG}"
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
        raise UserError(f"{place} is of a Hugging Face CLIPModel, but no {HF_CONFIG} lies beside it")
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
        raise UserError(f"{place}: its images can't be prepared as it says: {one_line(error)}") from None
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
        raise UserError(f"{place}: no model can be read from the {RUN_CONFIG} beside it: {one_line(error)}") from None


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


def export_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """open_clip's ``model_cfg``: what :class:`ModelConfig` has of it, and the keys that our encoders don't have.

    Raises:
        UserError: a section that is none.
    """
    names = ("embed_dim", "init_logit_scale", "quick_gelu")
    values: dict[str, Any] = {key: given[key] for key in names if given.get(key) is not None}
    other = [key for key in given if key not in {*values, "vision_cfg", "text_cfg", "output_dict"}]
    foreign = [key for key in other if given[key] and key != "nonscalar_logit_scale"]
    for part, schema in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        section = given.get(part) or {}
        if not isinstance(section, Mapping):
            raise UserError(f"its {part} is a {type(section).__name__}, not a section")
        defaults = dataclasses.asdict(schema())
        ours = {field.name for field in dataclasses.fields(getattr(ModelConfig(), part))}
        foreign += [f"{part}.{key}" for key in section if key not in ours and section[key] != defaults.get(key)]
        values[part] = {key: section.get(key, defaults[key]) for key in ours}
    return values, foreign


def _export_model(export: dict[str, Any], weights: Mapping[str, Tensor], place: str) -> ModelConfig:
    """An export's ``model_cfg``, where our encoders can be that model, with the sharing that its weights show.

    Raises:
        UserError: no ``model_cfg``, or one with settings that our encoders don't have.
    """
    given = export.get("model_cfg")
    if not isinstance(given, dict):
        raise UserError(
            f"{place}: no {EXPORT_CONFIG} with a model_cfg beside it; add it, or pass config=ModelConfig(…)"
        )
    try:
        values, foreign = export_settings(given)
    except UserError as error:
        raise UserError(f"{place}: {EXPORT_CONFIG}: {error}") from None
    if foreign:
        raise UserError(f"{place}: our encoders don't have its model_cfg's {few(foreign)}; load it with open_clip")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    except Exception as error:
        raise UserError(f"{place}: {EXPORT_CONFIG}: {one_line(error)}") from None
    assert isinstance(config, ModelConfig)
    if config.vision_cfg.timm_model_name is None:
        config.shared = _shared_in(weights, config)
    return config


def _shared_in(weights: Mapping[str, Tensor], config: ModelConfig) -> SharedConfig:
    """Which modules of the two towers hold the same numbers: those were one and the same in training."""
    vision, text = config.vision_cfg, config.text_cfg

    def same(one: str, other: str) -> bool:
        names = [name for name in weights if name.startswith(one)]
        pairs = [(weights[name], weights.get(other + name.removeprefix(one))) for name in names]
        return bool(pairs) and all(
            b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs
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
