"""The AlignCLIP authors' releases: one transformer for both towers, under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from alignclip.config.schema import ModelConfig, SharedConfig
from alignclip.errors import UserError
from alignclip.weights.formats.base import (
    Description,
    Format,
    Loaded,
    Weights,
    check_default_pixels,
    clones,
    described_by_run,
    weights_of,
    write_model_section,
)
from alignclip.weights.formats.by_tensors import HEAD_WIDTH, config_by_shapes
from alignclip.weights.renaming import replace_prefix
from alignclip.weights.weight_files import Content

Value = TypeVar("Value")

RELEASE_FILE = "release.pt"
# a tensor of theirs that serves both towers, and the prefixes that it has in ours, the parameter's
# own name first
_SHARED = {
    "projection": ("text_projection", "visual.proj"),
    "ln_post.": ("ln_final.", "visual.ln_post."),
    "transformer.": ("transformer.", "visual.transformer."),
    "text.token_embedding.": ("token_embedding.",),
    "text.positional_embedding": ("positional_embedding",),
    "text.text_projection": (),  # a parameter that their code never uses
}


class Release(Format):
    """Read and write the file that the authors' code reads."""

    name = "release"
    last = RELEASE_FILE
    usage = (
        "import alignclip\n\n"
        f'model, preprocess, tokenizer = alignclip.load("{{folder}}/{RELEASE_FILE}")'
    )
    license = "cc-by-nc-nd-4.0"  # of the weights that the authors have released

    def detect(self, content: Content) -> bool:
        """There is one projection, and the text's embeddings are in a tower of their own."""
        return {"projection", "text.token_embedding.weight"} <= content.state_dict.keys()

    def read(self, content: Content) -> Weights:
        """Return both towers' tensors, and apart from them what no model uses."""
        theirs = content.state_dict
        unused = {name: value for name, value in theirs.items() if not our_names(name)}
        return Weights(content, self, renamed(theirs), unused)

    def describe(self, weights: Weights) -> Description:
        """Return what a ``config.yaml`` says, or else the shapes, with the published heads."""
        if said := described_by_run(weights.content):
            return said
        config: ModelConfig | UserError
        try:
            config = infer_config(weights.tensors)
        except UserError as error:
            place = weights.content.place
            config = UserError(f"{place} is in the AlignCLIP authors' format, but {error}")
        assumed = (
            ", as all published ones; "
            "if these are others, say so with a config.yaml beside the file"
        )
        heads = dict.fromkeys(("vision", "text"), HEAD_WIDTH)
        return Description(config, "its shapes", heads, quick_gelu=False, assumed=assumed)

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Write a model that shares everything, and beside it how wide the heads are."""
        check_default_pixels(loaded, self.name)
        config = loaded.config
        if config.quick_gelu:
            raise UserError(
                "--to release can't hold model.quick_gelu: the authors' code has GELU alone"
            )
        shared, layers = config.shared, config.text_cfg.layers
        all_blocks = shared.blocks in (-1, layers) and config.vision_cfg.layers == layers
        if not (all_blocks and shared.ln_final and shared.projection):
            raise UserError(
                "--to release is for models that share everything between the towers "
                "(model.shared: blocks -1, ln_final, projection); this one does not"
            )
        weights = their_weights(weights_of(loaded))
        # where nobody knows the numbers of the projection that they never use, it gets zeros
        unused = loaded.unused or {"text.text_projection": torch.zeros_like(weights["projection"])}
        torch.save({"state_dict": weights | clones(unused)}, folder / RELEASE_FILE)
        write_model_section(loaded, folder)


def our_names(theirs: str) -> list[str]:
    """Return every name in our state dict of what the release calls ``theirs``."""
    for prefix, ours in _SHARED.items():
        if theirs.startswith(prefix):
            return [new + theirs.removeprefix(prefix) for new in ours]
    return [theirs]


def renamed(theirs: Mapping[str, Value]) -> dict[str, Value]:
    """Give a mapping with the release's names ours."""
    return {ours: value for name, value in theirs.items() for ours in our_names(name)}


def their_weights(ours: Mapping[str, Value]) -> dict[str, Value]:
    """Undo :func:`renamed`, for a state dict of a model that shares everything.

    What the release calls otherwise has a prefix in ours that no other name has.
    """
    theirs = {new: name for name, names in _SHARED.items() for new in names[:1]}
    vision = tuple(new for names in _SHARED.values() for new in names[1:])  # the text tower's again
    return {
        replace_prefix(name, theirs): value
        for name, value in ours.items()
        if not name.startswith(vision)
    }


def infer_config(weights: Mapping[str, Tensor]) -> ModelConfig:
    """Tell by the shapes which model a release's weights are of, under our names.

    Raises:
        UserError: they don't say it, or the width is no multiple of the published heads' width.
    """
    config = config_by_shapes(weights)
    width = config.text_cfg.width
    if width == 0 or width % HEAD_WIDTH:
        raise UserError(
            f"its width of {width} is no multiple of {HEAD_WIDTH}, as wide as all published heads; "
            "say how many heads it has with a config.yaml beside it, or config=ModelConfig(…)"
        )
    config.shared = SharedConfig(blocks=-1, ln_final=True, projection=True)
    return config
