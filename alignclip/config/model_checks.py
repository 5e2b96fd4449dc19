"""Sizes that a model can have, and what its towers can share: known from the configuration."""

from __future__ import annotations

from alignclip.config.schema import ModelConfig, VisionConfig
from alignclip.config.setting import check_settings
from alignclip.errors import UserError


def check_model(config: ModelConfig) -> None:
    """Refuse sizes for which open_clip fails with a shape error, or computes something else.

    Raises:
        UserError: the first contradiction found.
    """
    check_settings(config, "model.", unused_sizes(config.vision_cfg))
    vision, text, shared = config.vision_cfg, config.text_cfg, config.shared
    _check_multiple("text_cfg.width", text.width, "text_cfg.heads", text.heads)
    if vision.timm_model_name is not None:
        if shared.blocks or shared.ln_final or shared.projection:
            raise UserError(
                "model.shared: nothing can be shared with timm's tower model.vision_cfg."
                f"timm_model_name={vision.timm_model_name}; set blocks=0, ln_final=false and "
                "projection=false"
            )
        return
    below = vision.image_size // vision.patch_size * vision.patch_size
    sizes = " or ".join(str(size) for size in (below, below + vision.patch_size) if size > 0)
    _check_multiple(
        *("vision_cfg.image_size", vision.image_size),
        *("vision_cfg.patch_size", vision.patch_size),
        f"; the nearest are {sizes}",
    )
    _check_multiple("vision_cfg.width", vision.width, "vision_cfg.head_width", vision.head_width)
    _check_sharing(config)


def unused_sizes(vision: VisionConfig) -> set[str]:
    """Return the keys of our ViT's sizes, where a tower of timm's takes its place."""
    sizes = ("patch_size", "width", "layers", "head_width", "mlp_ratio")
    return {f"model.vision_cfg.{size}" for size in sizes if vision.timm_model_name is not None}


def _check_multiple(key: str, value: int, of: str, divisor: int, hint: str = "") -> None:
    if value % divisor:
        raise UserError(f"model.{key}={value} is no multiple of model.{of}={divisor}{hint}")


def _check_sharing(config: ModelConfig) -> None:
    """Refuse to share a module that has another size in the other tower."""
    vision, text, shared = config.vision_cfg, config.text_cfg, config.shared
    what = f"model.shared.blocks={shared.blocks}"
    wanted = {
        what: bool(shared.blocks),
        "model.shared.ln_final=true": shared.ln_final,
        "model.shared.projection=true": shared.projection,
    }
    # what is shared, the image tower's key and value, the text tower's
    equal: list[tuple[str, str, float, str, float]] = [
        (one, "width", vision.width, "width", text.width)
        for one, shares in wanted.items()
        if shares
    ]
    if shared.blocks:
        equal += [
            (what, "width/head_width", vision.width // vision.head_width, "heads", text.heads),
            (what, "mlp_ratio", vision.mlp_ratio, "mlp_ratio", text.mlp_ratio),
        ]
    if shared.blocks == -1:
        equal.append((what, "layers", vision.layers, "layers", text.layers))
    for one, vision_key, vision_value, text_key, text_value in equal:
        if vision_value != text_value:
            raise UserError(
                f"{one} needs equal towers, but model.vision_cfg.{vision_key}={vision_value} "
                f"and model.text_cfg.{text_key}={text_value}"
            )
    if shared.blocks > min(vision.layers, text.layers):
        raise UserError(
            f"{what} is more than there are: model.vision_cfg.layers={vision.layers}, "
            f"model.text_cfg.layers={text.layers}"
        )
