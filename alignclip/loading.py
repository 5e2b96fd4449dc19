"""``alignclip.load``: a trained model from a checkpoint, a release of the authors' or an open_clip export.

Nothing of a file is executed: pickles are read with ``weights_only=True``, so a file from a stranger can only be wrong.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]
from omegaconf import OmegaConf
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.torch_version import TorchVersion

from alignclip.config import ModelConfig, SharedConfig
from alignclip.encoders import CLIP, build_encoders
from alignclip.errors import UserError, one_line
from alignclip.fetching import EXPORT_CONFIG, RUN_CONFIG, fetch, few
from alignclip.release_format import infer_config, is_release, renamed

Preprocess = Callable[[Image.Image], Tensor]

# What a Composer checkpoint holds beside tensors: times, versions and numpy's random state. Plain data, all of it.
# numpy 2 has moved _reconstruct; a checkpoint names the place that it had when it was written.
SAFE_GLOBALS: list[Any] = [
    datetime.timedelta, TorchVersion, np.ndarray, np.dtype, np.dtypes.UInt32DType, np.dtypes.Int64DType,
    np.dtypes.Float64DType, (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
]  # fmt: skip


def load(
    path: str | Path, device: str | torch.device = "cpu", *, config: ModelConfig | None = None
) -> tuple[CLIP, Preprocess, SimpleTokenizer]:
    """A trained model with what it needs to be used, as ``open_clip.create_model_from_pretrained`` would give it.

    Args:
        path: one of

            - a checkpoint of ours with its run's ``config.yaml`` beside it, or the run's folder for the latest one;
              local or a URL such as ``s3://bucket/run/latest-rank0.pt`` (with Composer's EMA, a checkpoint's model is
              the averaged one);
            - a file in the format of the AlignCLIP authors' releases;
            - an open_clip export: a folder with ``open_clip_config.json`` (or ``local-dir:FOLDER``), or a state dict
              beside such a file; both towers' equal modules become one again;
            - ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME/FILE`` for any of these on the Hugging Face Hub.
        device: where the model shall be.
        config: the architecture, instead of the one that lies beside the file or is read off its shapes.

    Returns:
        the model in eval mode; a function from a PIL image to its normalised float32 ``[3, image_size, image_size]``;
        a tokenizer from texts to int64 ``[n, context_length]``.

    Raises:
        UserError: no such file, not a model, a model that doesn't fit its configuration, a file with code in it.
    """
    model, preprocess = _load(path, device, config)
    return model, image_transform_v2(preprocess, is_train=False), SimpleTokenizer(context_length=model.context_length)


def load_encoders(path: str | Path, device: str | torch.device = "cpu", *, config: ModelConfig | None = None) -> CLIP:
    """:func:`load` for callers who feed images as training does (:func:`alignclip.transforms.normalize`).

    Raises:
        UserError: as :func:`load`, and for an export that wants other pixels.
    """
    model, preprocess = _load(path, device, config)
    if preprocess != PreprocessCfg(size=preprocess.size):
        raise UserError(f"{path}: its {EXPORT_CONFIG} asks for other pixels than open_clip's defaults: {preprocess}")
    return model


@dataclass
class _Found:
    """What a file holds: ``weights`` under our names, and the model they are of, which ``source`` tells."""

    weights: dict[str, Tensor]
    config: ModelConfig
    source: str
    preprocess: Mapping[str, Any] = field(default_factory=dict)


def _load(path: str | Path, device: str | torch.device, config: ModelConfig | None) -> tuple[CLIP, PreprocessCfg]:
    place = str(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} can't be used on this machine: {one_line(error)}") from None
    # the weights are read where they lie, so a download has to stay until they are in the model
    with tempfile.TemporaryDirectory(prefix="alignclip-") as downloads:
        file = fetch(place, Path(downloads))
        content = _read(file, place)
        if isinstance(content.get("state"), dict):
            found = _of_checkpoint(content["state"], file, place, config)
        else:
            found = _of_state_dict(content, file, place, config)
        model = _build(found, place)
    try:
        preprocess = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), dict(found.preprocess)))
        preprocess.mean, preprocess.std = tuple(map(float, preprocess.mean)), tuple(map(float, preprocess.std))
        preprocess.size = found.config.vision_cfg.image_size
        image_transform_v2(preprocess, is_train=False)
    except (AssertionError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{place}: preprocess_cfg in its {EXPORT_CONFIG} is impossible: {one_line(error)}") from None
    return model.to(device).eval(), preprocess


# --- what a file is ---------------------------------------------------------------------------------------------------


def _read(file: Path, place: str) -> dict[str, Any]:
    """What a file of weights holds, its tensors mapped into memory rather than read.

    Raises:
        UserError: it is something else, truncated, or names Python objects that are not plain data.
    """
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # broken files make torch raise nearly anything
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(f"{place} is refused: beside weights it holds '{code[1]}', which could run code") from None
        kind = "a safetensors file" if file.suffix == ".safetensors" else "a PyTorch checkpoint"
        raise UserError(f"{place} is not {kind}, or only a part of one ({type(error).__name__})") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{place} holds a {type(content).__name__}, not a model's weights")
    return content


def _of_checkpoint(state: dict[str, Any], file: Path, place: str, config: ModelConfig | None) -> _Found:
    """The encoders in a Composer checkpoint; its EMA swaps the averaged weights in before a save."""
    model = state.get("model")
    if not isinstance(model, dict) or not any(str(name).startswith("encoders.") for name in model):
        raise UserError(f"{place} is a Composer checkpoint, but not of a model of ours")
    weights = {str(name).removeprefix("encoders."): value for name, value in model.items()}
    return _Found(weights, config or _run_config(file, place), "config=" if config else f"its {RUN_CONFIG}")


def _of_state_dict(content: dict[str, Any], file: Path, place: str, config: ModelConfig | None) -> _Found:
    """A state dict of the authors' or of open_clip, bare or in a training checkpoint of theirs."""
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{place} is not a model's weights; it holds {few(map(str, content))}")
    # of DistributedDataParallel and torch.compile
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in weights.items()}
    if is_release(weights):
        weights = renamed(weights)
        try:
            return _Found(weights, config or infer_config(weights), "config=" if config else "its shapes")
        except UserError as error:
            raise UserError(f"{place} is in the AlignCLIP authors' format, but {error}") from None
    export = _export_config(file, place)
    preprocess = export.get("preprocess_cfg") or {}
    if config:
        return _Found(weights, config, "config=", preprocess)
    return _Found(weights, _export_model(export, weights, place), f"its {EXPORT_CONFIG}", preprocess)


def _run_config(file: Path, place: str) -> ModelConfig:
    """The ``model`` section of the ``config.yaml`` beside a checkpoint, or beside what a link to it points at.

    That section alone: the rest says how it was trained, and keys of older versions there shall not matter.
    """
    found = [path for path in (file.parent / RUN_CONFIG, file.resolve().parent / RUN_CONFIG) if path.is_file()]
    if not found:
        raise UserError(f"{place}: no {RUN_CONFIG} beside it; copy it from the run's save_folder, or pass config=…")
    try:
        content: Any = OmegaConf.load(found[0])
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), content["model"]))
    except Exception as error:  # of YAML's parser and of OmegaConf
        raise UserError(f"{place}: no model can be read from the {RUN_CONFIG} beside it: {one_line(error)}") from None
    assert isinstance(config, ModelConfig)
    return config


def _export_config(file: Path, place: str) -> dict[str, Any]:
    """The parsed ``open_clip_config.json`` beside a file, or nothing."""
    path = file.parent / EXPORT_CONFIG
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{place}: the {EXPORT_CONFIG} beside it is not JSON: {one_line(error)}") from None
    return content if isinstance(content, dict) else {}


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
    values: dict[str, Any] = {key: given[key] for key in ("embed_dim", "init_logit_scale") if key in given}
    other = [key for key in given if key not in {*values, "vision_cfg", "text_cfg", "output_dict"}]
    foreign = [key for key in other if given[key] and key != "nonscalar_logit_scale"]
    for part, schema in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        section = given.get(part) or {}
        defaults = dataclasses.asdict(schema())
        ours = {field.name for field in dataclasses.fields(getattr(ModelConfig(), part))}
        foreign += [f"{part}.{key}" for key in section if key not in ours and section[key] != defaults.get(key)]
        values[part] = {key: section.get(key, defaults[key]) for key in ours}
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


# --- into a model -------------------------------------------------------------------------------------------------


def _build(found: _Found, place: str) -> CLIP:
    """The model with its weights.

    Raises:
        UserError: a model that can't be built, or weights that are not exactly this model's.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # to load a model is not to draw one
            model = build_encoders(found.config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (AssertionError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{place}: no model can be built as {found.source} says: {one_line(error)}") from None
    weights = dict(found.weights)
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{place} is not a model's weights: '{name}' is a {type(value).__name__}")
    if "logit_scale" in weights and weights["logit_scale"].numel() == 1:  # [] in a release or an export
        weights["logit_scale"] = weights["logit_scale"].reshape(1)
    wrong = f"{place} is not the model that {found.source} describes: "
    _check_names_and_shapes(model.state_dict(), weights, wrong)
    first: dict[int, str] = {}  # name of each parameter; a shared one's other name must not bring another value
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and not torch.equal(weights[other], weights[name]):
            raise UserError(f"{wrong}{other} and {name} are one and the same there, but differ")
    model.load_state_dict(weights)
    return model


def _check_names_and_shapes(expected: dict[str, Tensor], weights: dict[str, Tensor], wrong: str) -> None:
    """Refuse a state dict that is not exactly the model's; what it lacks and has too much, three names of each."""
    complaints = []
    if missing := expected.keys() - weights.keys():
        complaints.append(f"it lacks {few(sorted(missing))}")
    if unexpected := weights.keys() - expected.keys():
        complaints.append(f"it has {few(sorted(unexpected))} in addition")
    shapes = {name: (list(weights[name].shape), list(expected[name].shape)) for name in expected.keys() & weights}
    if differing := [f"{name} is {a}, not {b}" for name, (a, b) in sorted(shapes.items()) if a != b]:
        complaints.append(few(differing))
    if complaints:
        raise UserError(wrong + "; ".join(complaints))
