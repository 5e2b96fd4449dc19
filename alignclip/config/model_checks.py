"""What sizes a model can have, and what its towers can share: known from the configuration alone."""

from __future__ import annotations

from dataclasses import asdict

from alignclip.config.schema import ModelConfig
from alignclip.errors import UserError


def check_model(config: ModelConfig) -> None:
    """Refuse what open_clip would fail on with a shape error, or accept and compute something else.

    Raises:
        UserError: the first contradiction found.
    """
    vision, text = config.vision_cfg, config.text_cfg
    numbers = {"vision_cfg.image_size": vision.image_size, "embed_dim": config.embed_dim}
    numbers |= {f"text_cfg.{key}": value for key, value in asdict(text).items()}
    if vision.timm_model_name is None:
        ours = ("patch_size", "width", "layers", "head_width", "mlp_ratio")
        numbers |= {f"vision_cfg.{key}": getattr(vision, key) for key in ours}
    for key, number in numbers.items():
        if not number > 0:
            raise UserError(f"model.{key}={number} must be positive")
    if text.width % text.heads:
        raise UserError(
            f"model.text_cfg.width={text.width} is no multiple of model.text_cfg.heads={text.heads}"
        )
    if vision.timm_model_name is not None:
        if config.shared.blocks or config.shared.ln_final or config.shared.projection:
            raise UserError(
                f"model.shared: nothing can be shared with timm's tower model.vision_cfg.timm_model_name="
                f"{vision.timm_model_name}; set blocks=0, ln_final=false and projection=false"
            )
        return
    if vision.image_size % vision.patch_size:
        below = vision.image_size // vision.patch_size * vision.patch_size
        sizes = " or ".join(str(size) for size in (below, below + vision.patch_size) if size > 0)
        raise UserError(
            f"model.vision_cfg.image_size={vision.image_size} is no multiple of "
            f"model.vision_cfg.patch_size={vision.patch_size}; the nearest are {sizes}"
        )
    if vision.width % vision.head_width:
        raise UserError(
            f"model.vision_cfg.width={vision.width} is no multiple of model.vision_cfg.head_width={vision.head_width}"
        )
    _check_sharing(config)


def _check_sharing(config: ModelConfig) -> None:
    """A shared module must have the same size in both towers."""
    vision, text, shared = config.vision_cfg, config.text_cfg, config.shared
    if shared.blocks < -1:
        raise UserError(
            f"model.shared.blocks={shared.blocks} must be a number of blocks, or -1 for all of them"
        )

    def must_equal(
        what: str, vision_key: str, vision_value: float, text_key: str, text_value: float
    ) -> None:
        if vision_value != text_value:
            raise UserError(
                f"{what} needs equal towers, but model.vision_cfg.{vision_key}={vision_value} "
                f"and model.text_cfg.{text_key}={text_value}"
            )

    wanted = {
        f"model.shared.blocks={shared.blocks}": bool(shared.blocks),
        "model.shared.ln_final=true": shared.ln_final,
        "model.shared.projection=true": shared.projection,
    }
    for what, is_shared in wanted.items():
        if is_shared:
            must_equal(what, "width", vision.width, "width", text.width)
    if not shared.blocks:
        return
    what = f"model.shared.blocks={shared.blocks}"
    must_equal(what, "width/head_width", vision.width // vision.head_width, "heads", text.heads)
    must_equal(what, "mlp_ratio", vision.mlp_ratio, "mlp_ratio", text.mlp_ratio)
    if shared.blocks == -1:
        must_equal(what, "layers", vision.layers, "layers", text.layers)
    elif shared.blocks > min(vision.layers, text.layers):
        raise UserError(
            f"{what} is more than there are: model.vision_cfg.layers={vision.layers}, "
            f"model.text_cfg.layers={text.layers}"
        )
