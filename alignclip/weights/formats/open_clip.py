"""open_clip's state dicts and exports, and its own list of models."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from alignclip.config.schema import ModelConfig
from alignclip.errors import UserError, few, nearest, one_line
from alignclip.weights.formats.base import (
    Description,
    Format,
    Loaded,
    Reopened,
    Weights,
    described,
    described_by_run,
    encode_with,
    weights_of,
)
from alignclip.weights.formats.by_tensors import config_by_shapes, shared_in
from alignclip.weights.locate import EXPORT_CONFIG, EXPORT_WEIGHTS
from alignclip.weights.weight_files import ANCHORS, Content

QUICK = "-quickgelu"  # ends the names of open_clip's models with OpenAI's activation
# buffers and settings that older open_clip and OpenAI's own archives have beside the weights
NOT_WEIGHTS = {"attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size"}
IGNORED_KEYS = {"output_dict", "custom_text", "nonscalar_logit_scale"}  # they change no feature
SECTIONS = {"vision_cfg": open_clip.CLIPVisionCfg, "text_cfg": open_clip.CLIPTextCfg}


class OpenClip(Format):
    """Read any state dict of open_clip's, and write what stock open_clip reads."""

    name = "open_clip"
    library = "open_clip"
    last = EXPORT_CONFIG
    usage = (
        "import open_clip\n\nmodel, _, preprocess = "
        'open_clip.create_model_and_transforms("local-dir:{folder}")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")'
    )

    def detect(self, content: Content) -> bool:
        """Take every state dict of nobody else's for open_clip's."""
        return True

    def read(self, content: Content) -> Weights:
        """Return the tensors without those that are no weights."""
        weights = content.state_dict
        if ANCHORS[0] in weights:  # open_clip's CustomTextCLIP
            weights = {name.removeprefix("text."): value for name, value in weights.items()}
        plain = {name: value for name, value in weights.items() if name not in NOT_WEIGHTS}
        return Weights(content, self, plain)

    def describe(self, weights: Weights) -> Description:
        """Return what ``open_clip_config.json`` says, a run's ``config.yaml``, or the shapes.

        The widths of heads and the activation come from ``open_clip_config.json`` alone: the
        ``config.yaml`` beside weights of open_clip's training may be anybody's.
        """
        content = weights.content
        given = content.json_beside(EXPORT_CONFIG).get("model_cfg") or content.known.get(
            "model_cfg"
        )
        if isinstance(given, dict):
            found = _described_by_export(given, content.place)
        else:
            try:
                said = described_by_run(content)
            except UserError as error:
                return Description(error)
            if said:
                return Description(said.config, said.source)
            found = _described_by_shapes(weights)
        config = found.config
        if isinstance(config, ModelConfig) and config.vision_cfg.timm_model_name is None:
            config.shared = shared_in(weights.tensors, config)
        return found

    def pixels(self, content: Content) -> Mapping[str, Any]:
        """Return the export's ``preprocess_cfg``."""
        beside = content.json_beside(EXPORT_CONFIG).get("preprocess_cfg")
        return beside or content.known.get("preprocess_cfg") or {}

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Write what ``open_clip.push_to_hf_hub`` lays out; both towers get the shared numbers."""
        config = loaded.config
        vision, text = asdict(config.vision_cfg), asdict(config.text_cfg)
        vision["patch_dropout"] = 0.0  # of training; open_clip would go on with it
        if vision["timm_model_name"] is None:
            vision = {key: value for key, value in vision.items() if not key.startswith("timm_")}
        else:
            of_timm = ("image_size", "timm_model_name", "timm_pool", "timm_proj")
            vision = {key: vision[key] for key in of_timm}
        model_cfg = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
        if config.quick_gelu:
            model_cfg["quick_gelu"] = True
        pixels = asdict(loaded.preprocess)
        del pixels["size"]  # that is the model's
        settings = {"model_cfg": model_cfg, "preprocess_cfg": pixels}
        (folder / EXPORT_CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")
        save_file(weights_of(loaded), folder / EXPORT_WEIGHTS[0], metadata={"format": "pt"})

    def reopen(self, folder: Path) -> Reopened:
        """Read the export by stock open_clip."""
        model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        return Reopened(encode_with(model.eval()), prepare)


def _described_by_export(given: Mapping[str, Any], place: str) -> Description:
    """Return what a ``model_cfg`` says."""
    where = f"{place}: {EXPORT_CONFIG}"
    try:
        values, foreign = export_settings(given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        found = described(model_config(values, where), f"its {EXPORT_CONFIG}")
    except UserError as error:  # of a ResNet, whose text tower a model may start from
        text = values["text_cfg"]
        sizes = text["width"], text["heads"]
        heads = {"text": sizes[0] // max(sizes[1], 1)} if all(type(n) is int for n in sizes) else {}
        found = Description(error, heads=heads, quick_gelu=bool(values.get("quick_gelu", False)))
    found.foreign = foreign
    if foreign:
        found.config = UserError(
            f"{place}: our encoders don't have its model_cfg's {few(foreign)}; "
            "load it with open_clip"
        )
    return found


def _described_by_shapes(weights: Weights) -> Description:
    """Return the one model of open_clip's list that has these shapes."""
    content = weights.content
    names = like(weights.tensors, str(content.values.get("name", "")))
    if "input_resolution" in content.values:  # a setting that OpenAI's archives have and no others
        names = [name for name in names if name.endswith(QUICK)]
    if len(names) == 1:
        return Description(named(names[0]), f"its shapes, those of open_clip's {names[0]},")
    what = "a TorchScript archive without settings: " if content.torch_script else ""
    which = f"its shapes are those of {' and '.join(names)}; " if names else ""
    first = names[0] if names else "MODEL"
    return Description(
        UserError(
            f"{content.place}: {what}no {EXPORT_CONFIG} with a model_cfg beside it; "
            f"{which}pass config='{first}', "
            f"or put {{\"model_cfg\": open_clip.get_model_config('{first}')}} there as JSON"
        )
    )


def export_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return open_clip's ``model_cfg`` as our settings, and the keys that our encoders don't have.

    Raises:
        UserError: a section that is none.
    """
    names = ("embed_dim", "init_logit_scale", "quick_gelu")
    values: dict[str, Any] = {key: given[key] for key in names if given.get(key) is not None}
    plain = {*values, *SECTIONS, *IGNORED_KEYS}
    foreign = [key for key in given if key not in plain and given[key]]
    for part, schema in SECTIONS.items():
        section = given.get(part) or {}
        if not isinstance(section, Mapping):
            raise UserError(f"its {part} is a {type(section).__name__}, not a section")
        defaults = asdict(schema())
        ours = {field.name for field in dataclasses.fields(getattr(ModelConfig(), part))}
        foreign += [
            f"{part}.{key}"
            for key in section
            if key not in ours and section[key] != defaults.get(key)
        ]
        values[part] = {key: section.get(key, defaults[key]) for key in ours}
    return values, foreign


def model_config(values: Mapping[str, Any], what: str) -> ModelConfig:
    """Return the configuration of :func:`export_settings`'s values.

    Raises:
        UserError: they are none; ``what`` begins the sentence.
    """
    if "${" in str(values):  # OmegaConf would look into this machine's environment
        raise UserError(f"{what}: a setting refers to another place (${{…}})")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), dict(values))
        config = OmegaConf.to_object(merged)
    except Exception as error:  # OmegaConf's, of many kinds
        raise UserError(f"{what}: {one_line(error)}") from None
    assert isinstance(config, ModelConfig)
    return config


# --- open_clip's list -------------------------------------------------------------------------


def named(name: str) -> ModelConfig:
    """Return the configuration of an open_clip model such as ``ViT-B-32``.

    Raises:
        UserError: there is none of that name, or our encoders can't be that one.
    """
    plain = _plain_models()
    if name in plain:
        return deepcopy(plain[name])
    if name in open_clip.list_models():
        raise UserError(f"config={name}: our encoders can't be that model; load it with open_clip")
    raise UserError(f"config={name} is none of open_clip's models; {nearest(name, plain)}")


def like(weights: Mapping[str, Tensor], run_name: str = "") -> list[str]:
    """Return the names of open_clip's models whose weights have these shapes.

    Two of a pair such as ``ViT-B-32`` and ``ViT-B-32-quickgelu`` differ in the activation alone,
    which no weight shows.

    Args:
        weights: under open_clip's names.
        run_name: of open_clip's training, which has the model's name in it.
    """
    try:
        sizes = _visible_sizes(config_by_shapes(weights))
    except UserError:
        return []
    found = [name for name, config in _plain_models().items() if _visible_sizes(config) == sizes]
    trained = re.search(r"model_(.+?)-lr_", run_name)
    return [name for name in found if trained and name.replace("/", "-") == trained[1]] or found


@cache
def _plain_models() -> dict[str, ModelConfig]:
    """Return those of open_clip's models that our encoders can be."""
    known = {}
    for name in open_clip.list_models():
        values, foreign = export_settings(open_clip.get_model_config(name))
        if not foreign and not values["vision_cfg"]["timm_model_name"]:
            with suppress(UserError):  # a ResNet has a number of layers for each stage
                known[name] = model_config(values, name)
    return known


def _visible_sizes(config: ModelConfig) -> list[int]:
    """Return the sizes that shapes show: all but the heads'."""
    vision, text = config.vision_cfg, config.text_cfg
    sizes = [config.embed_dim, vision.patch_size, vision.image_size // vision.patch_size]
    for tower in (vision, text):
        sizes += [tower.width, tower.layers, int(tower.width * tower.mlp_ratio)]
    return [*sizes, text.context_length, text.vocab_size]
