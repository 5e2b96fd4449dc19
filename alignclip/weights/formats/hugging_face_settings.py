"""A ``CLIPModel``'s ``config.json`` and its image processor's settings ⇄ our settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from open_clip.transform import PreprocessCfg

from alignclip.config.schema import VOCABULARY, ModelConfig, TextConfig, VisionConfig
from alignclip.errors import UserError, nearest
from alignclip.weights.formats.by_tensors import mlp_ratio

# sizes of a tower: our name, their name, transformers' default, which transformers leaves out
VISION = (
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 32),
    ("width", "hidden_size", 768),
    ("layers", "num_hidden_layers", 12),
)
TEXT = (
    ("context_length", "max_position_embeddings", 77),
    ("vocab_size", "vocab_size", 49408),
    ("width", "hidden_size", 512),
    ("heads", "num_attention_heads", 8),
    ("layers", "num_hidden_layers", 12),
)
LAYER_NORM_EPS = 1e-5
ACTIVATIONS = ("gelu", "quick_gelu")  # without and with model.quick_gelu
INSTEAD = "load it with transformers or open_clip"
CLIP_PROCESSOR = "CLIPImageProcessor"
PROCESSORS = (CLIP_PROCESSOR, "CLIPImageProcessorFast", "CLIPFeatureExtractor")  # the last is old
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


# --- sizes ------------------------------------------------------------------------------------


def special_tokens(vocab_size: int) -> tuple[int, int]:
    """Return the ids of a text's start and end: CLIP's, or a smaller vocabulary's last two."""
    end = min(vocab_size, VOCABULARY) - 1
    return end - 1, end


def their_config(config: ModelConfig) -> dict[str, Any]:
    """Return a ``CLIPConfig``'s values for a model whose texts end with their highest id.

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
        | {theirs: getattr(vision, ours) for ours, theirs, _ in VISION}
        | {
            "intermediate_size": int(vision.width * vision.mlp_ratio),
            "num_attention_heads": vision.width // vision.head_width,
        },
        "text_config": both
        | {theirs: getattr(text, ours) for ours, theirs, _ in TEXT}
        | {
            "intermediate_size": int(text.width * text.mlp_ratio),
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end,
        },
    }


def our_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that a parsed ``config.json`` describes, without its sharing.

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
                f"its {part}_config.layer_norm_eps is {section['layer_norm_eps']}, "
                f"and our encoders have {LAYER_NORM_EPS}; {INSTEAD}"
            )
    vision, text = given["vision"], given["text"]
    activations = [section.get("hidden_act", "quick_gelu") for section in (vision, text)]
    if activations[0] not in ACTIVATIONS or activations[0] != activations[1]:
        raise UserError(
            f"its towers' hidden_act are {activations[0]} and {activations[1]}, "
            f"and our encoders have gelu or quick_gelu in both; {INSTEAD}"
        )
    try:
        image: dict[str, Any] = {
            ours: int(vision.get(theirs, default)) for ours, theirs, default in VISION
        }
        words = {ours: int(text.get(theirs, default)) for ours, theirs, default in TEXT}
        heads = int(vision.get("num_attention_heads", 12))
        image_mlp = mlp_ratio(int(vision.get("intermediate_size", 3072)), image["width"])
        text_mlp = mlp_ratio(int(text.get("intermediate_size", 2048)), words["width"])
        end = int(text.get("eos_token_id", VOCABULARY - 1))
        found = ModelConfig(
            int(config.get("projection_dim", 512)),
            VisionConfig(**image, head_width=image["width"] // heads, mlp_ratio=image_mlp),
            TextConfig(**words, mlp_ratio=text_mlp),
            quick_gelu=activations[0] == "quick_gelu",
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UserError(f"its sizes are impossible: {error}") from None
    # 2: of an old transformers, which takes the highest id, as we do. CLIP's own tokenizer writes
    # no id of an enlarged vocabulary above its end of text.
    last = words["vocab_size"] - 1
    if end not in (2, last, special_tokens(words["vocab_size"])[1]):
        raise UserError(
            f"its text_config.eos_token_id is {end}, and our encoders end texts at {last}"
        )
    return found


# --- images -----------------------------------------------------------------------------------


def our_pixels(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's ``preprocess_cfg`` for the parsed settings of an image processor.

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
    resample = config.get("resample", 3)
    interpolation = next((name for number, name in RESAMPLE.items() if number == resample), None)
    factor = config.get("rescale_factor", 1 / 255)
    rescales = factor is None or (
        isinstance(factor, float) and math.isclose(factor * 255, 1, rel_tol=1e-6)
    )
    sides = {*_sides(size), *(_sides(crop) if crops else ())}
    problems = {
        "do_resize is false": not config.get("do_resize", True),
        "do_rescale is false": not config.get("do_rescale", True),
        f"rescale_factor is {factor}": not rescales,
        f"resample is {resample}, neither 2 nor 3": interpolation is None,
        "do_center_crop is false for images that aren't resized to a square": not (crops or squash),
        f"size {size} and crop_size {crop} are not one square": len(sides) != 1,
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
    """Return the sides in any of transformers' ways to write a size, as texts to compare."""
    return [str(side) for side in size.values()] if isinstance(size, Mapping) else [str(size)]


def processor_settings(preprocess: PreprocessCfg, image_size: int) -> dict[str, Any]:
    """Return a ``CLIPImageProcessor``'s arguments for open_clip's evaluation transform.

    Raises:
        UserError: a way to resize that it doesn't have.
    """
    if preprocess.resize_mode not in ("shortest", "squash"):
        raise UserError(
            f"a CLIPImageProcessor can't resize as this model wants it: {preprocess.resize_mode}"
        )
    square = {"height": image_size, "width": image_size}
    squash = preprocess.resize_mode == "squash"
    bilinear = preprocess.interpolation == "bilinear"  # open_clip takes bicubic for all others
    return {
        "size": square if squash else {"shortest_edge": image_size},
        "do_center_crop": not squash,
        "crop_size": square,
        "resample": 2 if bilinear else 3,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }
