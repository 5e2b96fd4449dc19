"""Composer's checkpoint of a run of ours, with the run's ``config.yaml`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from alignclip.errors import UserError
from alignclip.weights.formats.base import (
    Description,
    Format,
    Loaded,
    Weights,
    check_default_pixels,
    clones,
    described_by_run,
    write_model_section,
)
from alignclip.weights.locate import RUN_CONFIG
from alignclip.weights.weight_files import Content, check_tensors

CHECKPOINT = "model.pt"
PREFIX = "encoders."  # of the encoders in our ComposerModel


class Composer(Format):
    """Read and write what a run saves, the model's part of it."""

    name = "composer"
    last = CHECKPOINT
    usage = (
        "import alignclip\n\n"
        f'model, preprocess, tokenizer = alignclip.load("{{folder}}/{CHECKPOINT}")\n'
        "# to train on from it: composer pretrain.py my.yaml "
        f"pretrained={{folder}}/{CHECKPOINT}"
    )

    def detect(self, content: Content) -> bool:
        """Composer keeps everything under ``state``."""
        return isinstance(content.values.get("state"), dict)

    def read(self, content: Content) -> Weights:
        """Return the model; with Composer's EMA it is the averaged one, swapped in by a save."""
        state = content.values["state"]
        model = state.get("model")
        if not isinstance(model, dict) or not any(str(name).startswith(PREFIX) for name in model):
            raise UserError(f"{content.place} is a Composer checkpoint, but not of a model of ours")
        check_tensors(model, content.place)
        tensors = {str(name).removeprefix(PREFIX): value for name, value in model.items()}
        return Weights(content, self, tensors, batch=_batch(state))

    def describe(self, weights: Weights) -> Description:
        """Return what the run's configuration says."""
        return described_by_run(weights.content) or Description(
            UserError(
                f"{weights.content.place}: no {RUN_CONFIG} beside it; "
                "copy it from the run's save_folder, or pass config=…"
            )
        )

    def write(self, loaded: Loaded, folder: Path) -> None:
        """Write what ``load_path`` with ``load_weights_only=true`` and ``pretrained`` read."""
        check_default_pixels(loaded, self.name)
        tensors = clones(loaded.model.state_dict())
        model = {f"{PREFIX}{name}": value for name, value in tensors.items()}
        torch.save({"state": {"model": model}}, folder / CHECKPOINT)
        write_model_section(loaded, folder)


def _batch(state: Mapping[Any, Any]) -> int | None:
    """Return the batch in a Composer checkpoint's state; None where there is no such number."""
    value: Any = state
    for key in ("timestamp", "Timestamp", "batch"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if type(value) is int else None
