"""The authors' release files: their names as the names our models use, and their sizes. Nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from alignclip.config.schema import ModelConfig, SharedConfig, TextConfig, VisionConfig
from alignclip.errors import UserError

T = TypeVar("T")

HEAD_WIDTH = 64  # of every published model: shapes don't tell how a width is cut into heads

# a tensor of theirs that serves both towers, and the prefixes it has in ours, the parameter's own name first
_SHARED = {
    "projection": ("text_projection", "visual.proj"),
    "ln_post.": ("ln_final.", "visual.ln_post."),
    "transformer.": ("transformer.", "visual.transformer."),
    "text.token_embedding.": ("token_embedding.",),
    "text.positional_embedding": ("positional_embedding",),
    "text.text_projection": (),  # a parameter that their code never uses
}


def is_release(names: Iterable[str]) -> bool:
    """Whether a state dict's names are the release's: one projection, the text's embeddings in a tower of its own."""
    return {"projection", "text.token_embedding.weight"} <= set(names)


def our_names(theirs: str) -> list[str]:
    """Every name in our state dict of what the release calls ``theirs``."""
    for prefix, ours in _SHARED.items():
        if theirs.startswith(prefix):
            return [new + theirs.removeprefix(prefix) for new in ours]
    return [theirs]


def renamed(theirs: Mapping[str, T]) -> dict[str, T]:
    """A mapping with the release's names, with ours."""
    return {ours: value for name, value in theirs.items() for ours in our_names(name)}


def unused(theirs: Mapping[str, T]) -> dict[str, T]:
    """Of a mapping with the release's names, what has no place in ours."""
    return {name: value for name, value in theirs.items() if not our_names(name)}


def their_weights(ours: Mapping[str, T]) -> dict[str, T]:
    """The inverse of :func:`renamed`, for a state dict of which everything is shared.

    What the release calls otherwise has a prefix there, which none of the other names has.
    """
    theirs = {new: name for name, names in _SHARED.items() for new in names[:1]}
    vision = tuple(new for names in _SHARED.values() for new in names[1:])
    result = {}
    for name, value in ours.items():
        if name.startswith(vision):  # the same tensor as the text tower's
            continue
        prefix = next((new for new in theirs if name.startswith(new)), "")
        result[theirs.get(prefix, "") + name.removeprefix(prefix)] = value
    return result


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which open_clip, which rounds down, gets ``hidden`` again; the quotient itself may be too small.

    Raises:
        ZeroDivisionError: no width.
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def infer_config(weights: Mapping[str, Tensor]) -> ModelConfig:
    """The model whose state dict this is, everything shared, by the shapes.

    Args:
        weights: of a release, with our names (:func:`renamed`).

    Raises:
        UserError: a tensor that the sizes come from is missing or has other dimensions, or the width is no multiple of
            64, the published heads' width.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in weights or weights[name].dim() != dimensions:
            raise UserError(
                f"it has no '{name}' of {dimensions} dimensions, which its sizes would come from"
            )
        return tuple(weights[name].shape)

    width, _, patch_size, _ = shape("visual.conv1.weight", 4)
    tokens, _ = shape("visual.positional_embedding", 2)  # a class token before the grid
    vocab_size, _ = shape("token_embedding.weight", 2)
    hidden, _ = shape("transformer.resblocks.0.mlp.c_fc.weight", 2)
    if width == 0 or width % HEAD_WIDTH:
        raise UserError(
            f"its width of {width} is no multiple of {HEAD_WIDTH}, as wide as all published heads; "
            "say how many heads it has with a config.yaml beside it, or config=ModelConfig(…)"
        )
    layers = len(
        {name.split(".")[2] for name in weights if name.startswith("transformer.resblocks.")}
    )
    return ModelConfig(
        shape("text_projection", 2)[1],
        VisionConfig(
            image_size=math.isqrt(tokens - 1) * patch_size if tokens else 0,
            patch_size=patch_size,
            width=width,
            layers=layers,
            head_width=HEAD_WIDTH,
            mlp_ratio=mlp_ratio(hidden, width),
        ),
        TextConfig(
            context_length=shape("positional_embedding", 2)[0],
            vocab_size=vocab_size,
            width=width,
            heads=width // HEAD_WIDTH,
            layers=layers,
            mlp_ratio=mlp_ratio(hidden, width),
        ),
        SharedConfig(blocks=-1, ln_final=True, projection=True),
    )
