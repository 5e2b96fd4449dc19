"""Hugging Face's ``CLIPModel``: its names and configuration as ours, and ours as its. Nothing is computed.

Its attention keeps query, key and value apart, and its projections are linear layers, so transposed. Written against
transformers' own files (``config.json`` + ``model.safetensors``); transformers itself is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from alignclip.config import ModelConfig, TextConfig, VisionConfig
from alignclip.errors import UserError

NAMES = {  # theirs, of what is neither a block nor a projection -> ours
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
PROJECTIONS = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
TOWERS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
IN_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")  # in the order in which open_clip has them in one tensor
BUFFERS = {f"{tower}.embeddings.position_ids" for tower in ("text_model", "vision_model")}  # in older files
LAYER_NORM_EPS = 1e-5


def is_clip_model(names: Iterable[str]) -> bool:
    """Whether a state dict's names are those of a ``CLIPModel``."""
    return {"text_model.embeddings.token_embedding.weight", "visual_projection.weight"} <= set(names)


def renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``CLIPModel``'s state dict with our names; what has none keeps its own, to be complained about."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # name of ours -> q, k, v
    for name, value in theirs.items():
        if name in BUFFERS:
            continue
        if name in PROJECTIONS:
            ours[PROJECTIONS[name]] = value.t().contiguous()
        elif found := re.fullmatch(r"(.+layers\.)(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", name):
            tower, layer, which, kind = found.groups()
            parts.setdefault(f"{TOWERS.get(tower, tower)}{layer}.attn.in_proj_{kind}", {})[which] = value
        elif found := re.fullmatch(r"(.+layers\.)(\d+)\.(.+)\.(weight|bias)", name):
            tower, layer, module, kind = found.groups()
            ours[f"{TOWERS.get(tower, tower)}{layer}.{IN_BLOCK.get(module, module)}.{kind}"] = value
        else:
            ours[NAMES.get(name, name)] = value
    for name, values in parts.items():
        if all(which in values for which in QKV):  # with one missing, the whole is reported as missing
            ours[name] = torch.cat([values[which] for which in QKV])
    return ours


def their_weights(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`renamed`: our state dict, of a plain ViT, with a ``CLIPModel``'s names and shapes."""
    names = {mine: name for name, mine in (NAMES | PROJECTIONS).items()}
    towers = {mine: name for name, mine in TOWERS.items()}
    modules = {mine: name for name, mine in IN_BLOCK.items()}
    theirs: dict[str, Tensor] = {}
    for name, value in ours.items():
        block = re.fullmatch(r"(.*resblocks\.)(\d+)\.(.+?)[._](weight|bias)", name)
        if block is None:
            value = value.t() if names[name] in PROJECTIONS else value
            theirs[names[name]] = value.reshape(()) if name == "logit_scale" else value
            continue
        tower, layer, module, kind = block.groups()
        if module == "attn.in_proj":
            for which, part in zip(QKV, value.chunk(3), strict=True):
                theirs[f"{towers[tower]}{layer}.self_attn.{which}.{kind}"] = part
        else:
            theirs[f"{towers[tower]}{layer}.{modules[module]}.{kind}"] = value
    return {name: value.clone().contiguous() for name, value in theirs.items()}


def their_config(config: ModelConfig) -> dict[str, Any]:
    """A ``CLIPConfig``'s values for a model of ours, whose end-of-text token is the last one.

    Raises:
        UserError: a timm tower, which a ``CLIPModel`` can't be.
    """
    vision, text = config.vision_cfg, config.text_cfg
    if vision.timm_model_name is not None:
        raise UserError(f"a CLIPModel is a plain ViT, and can't hold the timm tower {vision.timm_model_name}")
    both = {"projection_dim": config.embed_dim, "hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
    return {
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": config.init_logit_scale,
        "vision_config": both
        | {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // vision.head_width,
        },
        "text_config": both
        | {
            "max_position_embeddings": text.context_length,
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": int(text.width * text.mlp_ratio),
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "bos_token_id": text.vocab_size - 2,
            "eos_token_id": text.vocab_size - 1,
            "pad_token_id": text.vocab_size - 1,
        },
    }


def model_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a parsed ``config.json`` describes; sharing is for the weights to show.

    Raises:
        UserError: another model type, or settings that our encoders don't have.
    """
    if config.get("model_type") != "clip":
        raise UserError(f"its model_type is '{config.get('model_type')}', not 'clip'")
    given = {part: config.get(f"{part}_config") or {} for part in ("vision", "text")}
    for part, section in given.items():
        if not isinstance(section, dict):
            raise UserError(f"its {part}_config is no section")
        # transformers leaves out what is at its default; OpenAI's models have another activation than ours
        for key, default, ours in (("hidden_act", "quick_gelu", "gelu"), ("layer_norm_eps", 1e-5, LAYER_NORM_EPS)):
            if section.get(key, default) != ours:
                raise UserError(
                    f"its {part}_config.{key} is {section.get(key, default)}, and our encoders have {ours}; "
                    "load it with transformers or open_clip"
                )
    try:
        vision, text = given["vision"], given["text"]
        width, mlp = int(vision.get("hidden_size", 768)), int(vision.get("intermediate_size", 3072))
        text_width, text_mlp = int(text.get("hidden_size", 512)), int(text.get("intermediate_size", 2048))
        vocabulary = int(text.get("vocab_size", 49408))
        end = int(text.get("eos_token_id", vocabulary - 1))
        found = ModelConfig(
            int(config.get("projection_dim", 512)),
            VisionConfig(
                image_size=int(vision.get("image_size", 224)),
                patch_size=int(vision.get("patch_size", 32)),
                width=width,
                layers=int(vision.get("num_hidden_layers", 12)),
                head_width=width // int(vision.get("num_attention_heads", 12)),
                mlp_ratio=mlp / width,
            ),
            TextConfig(
                context_length=int(text.get("max_position_embeddings", 77)),
                vocab_size=vocabulary,
                width=text_width,
                heads=int(text.get("num_attention_heads", 8)),
                layers=int(text.get("num_hidden_layers", 12)),
                mlp_ratio=text_mlp / text_width,
            ),
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"its sizes are impossible: {error}") from None
    if end not in (2, vocabulary - 1):  # 2: written by an old transformers, which takes the highest id, as we do
        raise UserError(f"its text_config.eos_token_id is {end}, and our encoders end texts at {vocabulary - 1}")
    return found


def their_preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` for a parsed ``preprocessor_config.json``."""
    return {ours: config[key] for key, ours in (("image_mean", "mean"), ("image_std", "std")) if key in config}
