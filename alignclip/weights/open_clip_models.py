"""open_clip's own list of models: the settings of one by its name, or by the shapes of its weights."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import open_clip
from omegaconf import OmegaConf
from torch import Tensor

from alignclip.config.schema import ModelConfig
from alignclip.errors import UserError, nearest, one_line

QUICK = "-quickgelu"  # ends the names of open_clip's models with OpenAI's activation
# Buffers and settings of a model that older open_clip and OpenAI's own archives have beside the weights.
NO_WEIGHTS = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size")


def export_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return open_clip's ``model_cfg`` as values of :class:`ModelConfig`, and the keys that our encoders don't have.

    Raises:
        UserError: a section that is none.
    """
    names = ("embed_dim", "init_logit_scale", "quick_gelu")
    values: dict[str, Any] = {key: given[key] for key in names if given.get(key) is not None}
    # a custom text tower has other names; where it is of another kind its section says how
    plain = {
        *values,
        "vision_cfg",
        "text_cfg",
        "output_dict",
        "custom_text",
        "nonscalar_logit_scale",
    }
    foreign = [key for key in given if key not in plain and given[key]]
    for part, schema in (
        ("vision_cfg", open_clip.CLIPVisionCfg),
        ("text_cfg", open_clip.CLIPTextCfg),
    ):
        section = given.get(part) or {}
        if not isinstance(section, Mapping):
            raise UserError(f"its {part} is a {type(section).__name__}, not a section")
        defaults = dataclasses.asdict(schema())
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
    try:
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(ModelConfig), dict(values))
        )
    except Exception as error:  # OmegaConf's, of many kinds
        raise UserError(f"{what}: {one_line(error)}") from None
    assert isinstance(config, ModelConfig)
    return config


def named(name: str) -> ModelConfig:
    """Return the configuration of an open_clip model such as ``ViT-B-32``.

    Raises:
        UserError: there is none of that name, or our encoders can't be that one.
    """
    given = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if given is None:
        raise UserError(
            f"config={name} is none of open_clip's models; {nearest(name, _plain_models())}"
        )
    values, foreign = export_settings(given)
    if foreign or name not in _plain_models():
        raise UserError(f"config={name}: our encoders can't be that model; load it with open_clip")
    return model_config(values, f"config={name}")


def like(weights: Mapping[str, Tensor], run_name: str = "") -> list[str]:
    """Return the names of open_clip's models whose weights have these shapes.

    Two of one pair differ in the activation alone, which no weight shows: ``ViT-B-32`` and ``ViT-B-32-quickgelu``.

    Args:
        weights: under open_clip's names.
        run_name: what open_clip's training called its run, in which the model's name is.
    """
    sizes = _sizes_of(weights)
    found = [name for name, those in _plain_models().items() if those == sizes]
    trained = re.search(r"model_(.+?)-lr_", run_name)
    return [name for name in found if trained and name.replace("/", "-") == trained[1]] or found


@cache
def _plain_models() -> dict[str, str]:
    """Return the sizes of each of open_clip's models that our encoders can be, as a text to compare."""
    known = {}
    for name in open_clip.list_models():
        values, foreign = export_settings(open_clip.get_model_config(name))
        vision, text = values["vision_cfg"], values["text_cfg"]
        if foreign or vision["timm_model_name"] or type(vision["layers"]) is not int:
            continue
        known[name] = json.dumps(
            [
                [values["embed_dim"], vision["width"], vision["patch_size"], vision["layers"]],
                [
                    (vision["image_size"] // vision["patch_size"]) ** 2 + 1,
                    int(vision["width"] * vision["mlp_ratio"]),
                ],
                [text["context_length"], text["vocab_size"], text["width"], text["layers"]],
                [int(text["width"] * text["mlp_ratio"])],
            ]
        )
    return known


def _sizes_of(weights: Mapping[str, Tensor]) -> str:
    """Return the same text of a state dict, or nothing where it is of no such model."""

    def shape(name: str) -> list[int]:
        return list(weights[name].shape)

    def layers(prefix: str) -> int:
        return len(
            {name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)}
        )

    try:
        width, _, patch, _ = shape("visual.conv1.weight")
        return json.dumps(
            [
                [
                    shape("text_projection")[1],
                    width,
                    patch,
                    layers("visual.transformer.resblocks."),
                ],
                [
                    len(weights["visual.positional_embedding"]),
                    *shape("visual.transformer.resblocks.0.mlp.c_fc.bias"),
                ],
                [
                    *shape("positional_embedding")[:1],
                    *shape("token_embedding.weight"),
                    layers("transformer.resblocks."),
                ],
                shape("transformer.resblocks.0.mlp.c_fc.bias"),
            ]
        )
    except (KeyError, ValueError, IndexError, TypeError):
        return ""


def choices(names: Sequence[str]) -> str:
    """Return the end of an error sentence: how a person says of which model a file without settings is."""
    which, first = (
        (f"its shapes are those of {' and '.join(names)}; ", names[0]) if names else ("", "MODEL")
    )
    return (
        f"{which}pass config='{first}', "
        f"or put {{\"model_cfg\": open_clip.get_model_config('{first}')}} there as JSON"
    )
