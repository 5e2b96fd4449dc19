"""Hugging Face's ``CLIPModel``: its names and configuration as ours, and ours as its. Nothing is computed.

Its attention keeps query, key and value apart, and its projections are linear layers, so transposed. Written against
transformers' own files (``config.json`` + ``model.safetensors``); transformers itself is not imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from alignclip.config.checks import VOCABULARY
from alignclip.config.schema import ModelConfig, TextConfig, VisionConfig
from alignclip.errors import UserError, nearest
from alignclip.weights.release_format import mlp_ratio

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
PROJECTIONS = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}
TOWERS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
IN_BLOCK = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")  # in the order in which open_clip has them in one tensor
BUFFERS = {
    f"{tower}.embeddings.position_ids" for tower in ("text_model", "vision_model")
}  # in older files
LAYER_NORM_EPS = 1e-5
ACTIVATIONS = ("gelu", "quick_gelu")  # without and with model.quick_gelu
CLIP_PROCESSOR = "CLIPImageProcessor"
PROCESSORS = (
    CLIP_PROCESSOR,
    "CLIPImageProcessorFast",
    "CLIPFeatureExtractor",
)  # the last is of older files
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def is_clip_model(names: Iterable[str]) -> bool:
    """Whether a state dict's names are those of a ``CLIPModel``."""
    return {"text_model.embeddings.token_embedding.weight", "visual_projection.weight"} <= set(
        names
    )


def renamed(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ``CLIPModel``'s state dict with our names; what has none keeps its own, to be complained about."""
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # name of ours -> q, k, v
    for name, value in theirs.items():
        if name in BUFFERS:
            continue
        if name in PROJECTIONS:
            ours[PROJECTIONS[name]] = value.t().contiguous()
        elif found := re.fullmatch(
            r"(.+layers\.)(\d+)\.self_attn\.([qkv]_proj)\.(weight|bias)", name
        ):
            tower, layer, which, kind = found.groups()
            parts.setdefault(f"{TOWERS.get(tower, tower)}{layer}.attn.in_proj_{kind}", {})[
                which
            ] = value
        elif found := re.fullmatch(r"(.+layers\.)(\d+)\.(.+)\.(weight|bias)", name):
            tower, layer, module, kind = found.groups()
            ours[f"{TOWERS.get(tower, tower)}{layer}.{IN_BLOCK.get(module, module)}.{kind}"] = value
        else:
            ours[NAMES.get(name, name)] = value
    for name, values in parts.items():
        if all(
            which in values for which in QKV
        ):  # with one missing, the whole is reported as missing
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


def special_tokens(vocab_size: int) -> tuple[int, int]:
    """Ids of the start and the end of a text: CLIP's tokenizer's, or the last two where the vocabulary is smaller."""
    end = min(vocab_size, VOCABULARY) - 1
    return end - 1, end


def their_config(config: ModelConfig) -> dict[str, Any]:
    """A ``CLIPConfig``'s values for a model of ours, whose texts end with the highest id that they hold.

    Raises:
        UserError: a timm tower, which a ``CLIPModel`` can't be.
    """
    vision, text = config.vision_cfg, config.text_cfg
    if vision.timm_model_name is not None:
        raise UserError(
            f"a CLIPModel is a plain ViT, and can't hold the timm tower {vision.timm_model_name}"
        )
    start, end = special_tokens(text.vocab_size)
    both = {
        "projection_dim": config.embed_dim,
        "hidden_act": ACTIVATIONS[config.quick_gelu],
        "layer_norm_eps": LAYER_NORM_EPS,
    }
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
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
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
        if section.get("layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
            raise UserError(
                f"its {part}_config.layer_norm_eps is {section['layer_norm_eps']}, and our encoders have "
                f"{LAYER_NORM_EPS}; load it with transformers or open_clip"
            )
    # transformers leaves out what is at its default
    activations = [section.get("hidden_act", "quick_gelu") for section in given.values()]
    if activations[0] not in ACTIVATIONS or activations[0] != activations[1]:
        raise UserError(
            f"its towers' hidden_act are {activations[0]} and {activations[1]}, and our encoders have gelu or "
            "quick_gelu in both; load it with transformers or open_clip"
        )
    try:
        vision, text = given["vision"], given["text"]
        width, mlp = int(vision.get("hidden_size", 768)), int(vision.get("intermediate_size", 3072))
        text_width, text_mlp = (
            int(text.get("hidden_size", 512)),
            int(text.get("intermediate_size", 2048)),
        )
        vocabulary = int(text.get("vocab_size", 49408))
        end = int(text.get("eos_token_id", VOCABULARY - 1))
        found = ModelConfig(
            int(config.get("projection_dim", 512)),
            VisionConfig(
                image_size=int(vision.get("image_size", 224)),
                patch_size=int(vision.get("patch_size", 32)),
                width=width,
                layers=int(vision.get("num_hidden_layers", 12)),
                head_width=width // int(vision.get("num_attention_heads", 12)),
                mlp_ratio=mlp_ratio(mlp, width),
            ),
            TextConfig(
                context_length=int(text.get("max_position_embeddings", 77)),
                vocab_size=vocabulary,
                width=text_width,
                heads=int(text.get("num_attention_heads", 8)),
                layers=int(text.get("num_hidden_layers", 12)),
                mlp_ratio=mlp_ratio(text_mlp, text_width),
            ),
            quick_gelu=activations[0] == "quick_gelu",
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"its sizes are impossible: {error}") from None
    # 2: written by an old transformers, which takes the highest id, as we do; of a vocabulary that was enlarged,
    # CLIP's own tokenizer writes none of the ids above its end of text
    if end not in (2, vocabulary - 1, special_tokens(vocabulary)[1]):
        raise UserError(
            f"its text_config.eos_token_id is {end}, and our encoders end texts at {vocabulary - 1}"
        )
    return found


def their_preprocessor(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's ``preprocess_cfg`` for a parsed ``preprocessor_config.json``.

    The image's size is left to the model's, as open_clip does.

    Raises:
        UserError: another processor than CLIP's, or steps that open_clip's can't be told to take.
    """
    kind = config.get("image_processor_type", config.get("feature_extractor_type", CLIP_PROCESSOR))
    if kind not in PROCESSORS:
        raise UserError(f"its images are prepared by a {kind}; {nearest(str(kind), PROCESSORS)}")
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    squash = isinstance(size, Mapping) and "height" in size
    crops = config.get("do_center_crop", True)
    sides = [*_sides(size), *(_sides(crop) if crops else ())]
    resample = config.get("resample", 3)
    interpolation = next((name for number, name in RESAMPLE.items() if number == resample), None)
    problems = {
        "do_resize is false": not config.get("do_resize", True),
        "do_rescale is false": not config.get("do_rescale", True),
        f"rescale_factor is {config.get('rescale_factor')}": not _is_a_255th(
            config.get("rescale_factor")
        ),
        f"resample is {resample}, neither 2 nor 3": interpolation is None,
        "do_center_crop is false for images that aren't resized to a square": not (crops or squash),
        f"size {size} and crop_size {crop} are not one square": len(set(sides)) != 1,
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise UserError(f"its images are prepared as open_clip's can't be: {found[0]}")
    result: dict[str, Any] = {
        "interpolation": interpolation,
        "resize_mode": "squash" if squash else "shortest",
        "mean": config.get("image_mean"),
        "std": config.get("image_std"),
    }
    if not config.get("do_normalize", True):
        result |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    return {key: value for key, value in result.items() if value is not None}


def _sides(size: Any) -> list[str]:
    """What transformers' ways to write a size say, as text: whatever it is, it can be compared."""
    return [str(side) for side in size.values()] if isinstance(size, Mapping) else [str(size)]


def _is_a_255th(factor: Any) -> bool:
    return factor is None or (
        isinstance(factor, float) and math.isclose(factor, 1 / 255, rel_tol=1e-6)
    )


def processor_settings(preprocess: PreprocessCfg, image_size: int) -> dict[str, Any]:
    """The arguments of a ``CLIPImageProcessor`` that prepares images as open_clip's evaluation transform does.

    Raises:
        UserError: a way to resize that it doesn't have.
    """
    if preprocess.resize_mode not in ("shortest", "squash"):
        raise UserError(
            f"a CLIPImageProcessor can't resize as this model wants it: {preprocess.resize_mode}"
        )
    square = {"height": image_size, "width": image_size}
    squash = preprocess.resize_mode == "squash"
    return {
        "size": square if squash else {"shortest_edge": image_size},
        "do_center_crop": not squash,
        "crop_size": square,
        "resample": 2
        if preprocess.interpolation == "bilinear"
        else 3,  # open_clip takes bicubic for all others
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
