"""The verbs of a format of weights: detect, read, describe, write, and read again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from torch import Tensor, nn

from alignclip.config.reading import model_section
from alignclip.config.schema import ModelConfig
from alignclip.errors import UserError, one_line
from alignclip.model.encoders import CLIP
from alignclip.weights.locate import RUN_CONFIG, find_beside
from alignclip.weights.weight_files import Content

Preprocess = Callable[[Image.Image], Tensor]
# images, tokens -> image features, text features, exp(logit_scale)
Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Weights:
    """A file's weights.

    Attributes:
        content: of the file.
        format: that the file is in.
        tensors: under our names.
        unused: tensors of an authors' file that no model uses, by the authors' names.
        batch: how many batches a run had trained, where the file says it.
    """

    content: Content
    format: Format
    tensors: dict[str, Tensor]
    unused: dict[str, Tensor] = field(default_factory=dict)
    batch: int | None = None


@dataclass
class Description:
    """The model of a file's weights, as the file and its neighbours describe it.

    Attributes:
        config: the model, or why nothing says which model it is.
        source: what says it, for errors.
        heads: how wide an attention head is, by tower, where that is known.
        quick_gelu: whether the model was trained with it, where that is known.
        foreign: settings that our encoders don't have.
        assumed: ends an error about heads whose width is assumed.
    """

    config: ModelConfig | UserError
    source: str = ""
    heads: dict[str, int] = field(default_factory=dict)
    quick_gelu: bool | None = None
    foreign: list[str] = field(default_factory=list)
    assumed: str = ""


@dataclass
class Loaded:
    """A model and what lay beside its weights.

    Attributes:
        model: in eval mode.
        config: what it was built from.
        preprocess: how its images are prepared.
        format: of the file.
        recipe: the text of a run's ``config.yaml``.
        card: the text of a model card.
        unused: tensors of an authors' file that no model uses, by the authors' names.
        batch: how many batches the run had trained, where the file is a run's checkpoint.
    """

    model: CLIP
    config: ModelConfig
    preprocess: PreprocessCfg
    format: Format
    recipe: str | None
    card: str | None
    unused: dict[str, Tensor]
    batch: int | None = None


@dataclass(frozen=True)
class Reopened:
    """An export as its format's library reads it: its encoders, and its preparation of an image."""

    encode: Encode
    prepare: Preprocess


class Format(ABC):
    """A format of weights.

    Attributes:
        name: in ``--to``.
        library: what the Hugging Face Hub calls the library that reads the format.
        last: the file without which nobody takes a folder for a model.
        usage: Python that loads an export in ``{folder}``.
        license: of files that come without one.
    """

    name: ClassVar[str]
    library: ClassVar[str] = "alignclip"
    last: ClassVar[str]
    usage: ClassVar[str]
    license: ClassVar[str | None] = None

    @abstractmethod
    def detect(self, content: Content) -> bool:
        """Tell whether a file is in this format."""

    @abstractmethod
    def read(self, content: Content) -> Weights:
        """Give the weights our names.

        Raises:
            UserError: they are no model's weights.
        """

    @abstractmethod
    def describe(self, weights: Weights) -> Description:
        """Tell which model the weights are of.

        Raises:
            UserError: what says it is broken.
        """

    def pixels(self, content: Content) -> Mapping[str, Any]:
        """Return open_clip's ``preprocess_cfg`` of the file; empty where nothing says it.

        Raises:
            UserError: open_clip can't prepare images so.
        """
        return {}

    @abstractmethod
    def write(self, loaded: Loaded, folder: Path) -> None:
        """Write a model into an empty folder.

        Raises:
            UserError: the format can't hold this model.
        """

    def reopen(self, folder: Path) -> Reopened | None:
        """Read an export by the library that ``usage`` shows; None where that is ours."""
        return None

    def usage_at(self, place: str) -> str:
        """Return the Python that loads an export at a path or URL; only ours reads URLs."""
        if "://" not in place or self.library == "alignclip":
            return self.usage.format(folder=place)
        return f'import alignclip\n\nmodel, preprocess, tokenizer = alignclip.load("{place}")'


# --- reading ----------------------------------------------------------------------------------


def described(config: ModelConfig, source: str) -> Description:
    """Return what a whole configuration says."""
    text = config.text_cfg
    heads = {"vision": config.vision_cfg.head_width, "text": text.width // max(text.heads, 1)}
    return Description(config, source, heads, config.quick_gelu)


def described_by_run(content: Content) -> Description | None:
    """Return what the ``model`` section of a run's ``config.yaml`` beside the file says, if any.

    That section alone counts: the rest says how the model was trained, and keys of older versions
    there shall not matter.

    Raises:
        UserError: the file or the section can't be read.
    """
    found = find_beside(content.file, RUN_CONFIG)
    if found is None:
        return None
    try:
        return described(model_section(found.read_text(encoding="utf-8")), f"its {RUN_CONFIG}")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{content.place}: no model can be read from the {RUN_CONFIG} beside it: "
            f"{one_line(error)}"
        ) from None


def preprocess_config(given: Any, place: str, image_size: int) -> PreprocessCfg:
    """Return open_clip's settings for a ``preprocess_cfg`` at the model's image size.

    One number as mean or std is the number of all channels.

    Raises:
        UserError: it is no such thing.
    """
    try:
        found = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), dict(given)))
        for key in ("mean", "std"):
            value = getattr(found, key)
            numbers = tuple(map(float, (value,) * 3 if isinstance(value, (int, float)) else value))
            if len(numbers) != 3:
                raise ValueError(f"{key} has {len(numbers)} numbers, not 3")
            if not all(map(math.isfinite, numbers)) or (key == "std" and min(numbers) <= 0):
                raise ValueError(f"{key} can't be {list(numbers)}")
            setattr(found, key, numbers)
        found.size = image_size
        image_transform_v2(found, is_train=False)
    except (AssertionError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{place}: its images can't be prepared as it says: {one_line(error)}"
        ) from None
    return found


# --- writing ----------------------------------------------------------------------------------


def clones(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, shared ones for each of their names."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}


def weights_of(loaded: Loaded) -> dict[str, Tensor]:
    """Return the state dict with both towers' names and ``logit_scale`` of shape []."""
    weights = clones(loaded.model.state_dict())
    return weights | {"logit_scale": weights["logit_scale"].reshape(())}


def write_model_section(loaded: Loaded, folder: Path) -> None:
    """Write a ``config.yaml`` with the model alone."""
    section = {"model": OmegaConf.structured(loaded.config)}
    (folder / RUN_CONFIG).write_text(OmegaConf.to_yaml(section), encoding="utf-8")


def check_default_pixels(loaded: Loaded, to: str) -> None:
    """Refuse other pixels than CLIP's, for a format that can't say how images are prepared.

    Raises:
        UserError: the model wants others.
    """
    if loaded.preprocess != PreprocessCfg(size=loaded.preprocess.size):
        raise UserError(
            f"--to {to} can't hold that this model's images are prepared otherwise: "
            f"{loaded.preprocess}"
        )


def encode_with(model: nn.Module) -> Encode:
    """Return the encoders of a model that has open_clip's methods."""

    def encode(images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            scale = model.logit_scale.exp()  # type: ignore[operator]
            image = model.encode_image(images)  # type: ignore[operator]
            return image, model.encode_text(tokens), scale.reshape(())  # type: ignore[operator]

    return encode
