"""Read off the tensors of a model which model they are of: sizes, and what both towers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignclip.config.schema import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.errors import UserError

HEAD_WIDTH = 64  # of every published model: shapes don't tell how a width is cut into heads


def shared_in(weights: Mapping[str, Tensor], config: ModelConfig) -> SharedConfig:
    """Tell which modules of the two towers hold equal numbers: in training they were one."""
    vision, text = config.vision_cfg, config.text_cfg

    def same(one: str, other: str) -> bool:
        names = [name for name in weights if name.startswith(one)]
        return bool(names) and all(
            are_equal(weights[name], weights.get(other + name.removeprefix(one))) for name in names
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


def are_equal(one: Tensor, other: Tensor | None) -> bool:
    """Tell whether two tensors have one shape, one type and the same numbers."""
    alike = other is not None and one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one, other)  # type: ignore[arg-type]


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio from which open_clip, which rounds down, gets ``hidden`` again.

    The quotient itself may be too small.

    Raises:
        ZeroDivisionError: no width.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def config_by_shapes(weights: Mapping[str, Tensor]) -> ModelConfig:
    """Return the sizes of a plain ViT that weights under our names show, with heads of 64.

    Raises:
        UserError: a tensor that the sizes come from is missing or has other dimensions.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights or weights[name].dim() != dimensions:
            raise UserError(
                f"it has no '{name}' of {dimensions} dimensions, which its sizes would come from"
            )
        return tuple(weights[name].shape)

    def tower(blocks: str, width: int) -> dict[str, Any]:
        hidden, _ = shape(f"{blocks}0.mlp.c_fc.weight", 2)
        names = {name.removeprefix(blocks) for name in weights if name.startswith(blocks)}
        layers = len({name.split(".")[0] for name in names})
        return {"width": width, "layers": layers, "mlp_ratio": mlp_ratio(hidden, max(width, 1))}

    width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    tokens, _ = shape("visual.positional_embedding", 2)  # a class token before the grid
    context_length, text_width = shape("positional_embedding", 2)
    vision = VisionConfig(
        image_size=math.isqrt(tokens - 1) * patch_size if tokens else 0,
        patch_size=patch_size,
        head_width=HEAD_WIDTH,
        **tower("visual.transformer.resblocks.", width),
    )
    text = TextConfig(
        context_length=context_length,
        vocab_size=shape("token_embedding.weight", 2)[0],
        heads=text_width // HEAD_WIDTH,
        **tower("transformer.resblocks.", text_width),
    )
    return ModelConfig(shape("text_projection", 2)[1], vision, text)
