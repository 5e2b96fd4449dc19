"""``alignclip.load``: a trained model from a checkpoint, an authors' release, an open_clip or Hugging Face export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from alignclip.config.schema import ModelConfig
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError, few, one_line
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.weights.finite import check_weights
from alignclip.weights.locate import CARD, RUN_CONFIG, fetch, find_beside
from alignclip.weights.open_clip_models import named
from alignclip.weights.reading import Found, find, preprocess_config

Preprocess = Callable[[Image.Image], Tensor]


def load(
    path: str | Path, device: str | torch.device = "cpu", *, config: ModelConfig | str | None = None
) -> tuple[CLIP, Preprocess, SimpleTokenizer]:
    """A trained model with what it needs to be used, as ``open_clip.create_model_from_pretrained`` would give it.

    Args:
        path: one of

            - a checkpoint of ours with its run's ``config.yaml`` beside it, or the run's folder for the latest one;
              local or a URL such as ``s3://bucket/run/latest-rank0.pt`` (with Composer's EMA, a checkpoint's model is
              the averaged one);
            - a file in the format of the AlignCLIP authors' releases; a ``config.yaml`` beside it says how large the
              model is, and without one its shapes do, with heads of 64 as published;
            - an open_clip export: a folder with ``open_clip_config.json`` (or ``local-dir:FOLDER``), or a state dict,
              a training checkpoint or a TorchScript archive beside such a file; both towers' equal modules become one
              again. Without that file the shapes say which of open_clip's models it is, where only one has them;
            - a Hugging Face ``CLIPModel``: a folder with its ``config.json`` and weights, or such a file of weights;
            - ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME/FILE`` for any of these on the Hugging Face Hub.
        device: where the model shall be.
        config: the architecture, or the name of one of open_clip's models, instead of what lies beside the file or is
            read off its shapes.

    Returns:
        the model in eval mode; a function from a PIL image to its normalised float32 ``[3, image_size, image_size]``;
        a tokenizer from texts to int64 ``[n, context_length]``.

    Raises:
        UserError: no such file, not a model, a model that doesn't fit its configuration, a file with code in it.
    """
    found = open_model(path, device, config)
    preprocess = image_transform_v2(found.preprocess, is_train=False)
    found.model.preprocess = preprocess
    return found.model, preprocess, SimpleTokenizer(context_length=found.model.context_length)


def load_encoders(
    path: str | Path, device: str | torch.device = "cpu", *, config: ModelConfig | str | None = None
) -> CLIP:
    """:func:`load` for callers who feed images as training does (:func:`alignclip.data.transforms.normalize`).

    Raises:
        UserError: as :func:`load`, and for an export that wants other pixels.
    """
    return open_encoders(path, device, config).model


def open_encoders(
    path: str | Path, device: str | torch.device = "cpu", config: ModelConfig | str | None = None
) -> Loaded:
    """What :func:`load_encoders` reads, with what the file and its neighbours say of it.

    Raises:
        UserError: as :func:`load_encoders`.
    """
    found = open_model(path, device, config)
    if found.preprocess != PreprocessCfg(size=found.preprocess.size):
        raise UserError(
            f"{path} asks for other pixels than open_clip's defaults: {found.preprocess}"
        )
    return found


@dataclass
class Loaded:
    """A model and what lay beside its weights.

    Attributes:
        model: in eval mode.
        config: what it was built from.
        preprocess: how its images are prepared.
        kind: one of those in :mod:`alignclip.weights.state_dicts`.
        recipe: the text of a run's ``config.yaml``.
        card: the text of a model card.
        unused: tensors of an authors' file that no model uses, by the authors' names.
        batch: how many batches the run had trained, where the file is a run's checkpoint.
    """

    model: CLIP
    config: ModelConfig
    preprocess: PreprocessCfg
    kind: str
    recipe: str | None
    card: str | None
    unused: dict[str, Tensor]
    batch: int | None = None


def find_device(name: str | torch.device) -> torch.device:
    """Return the device by torch's name, or by the settings' name ``gpu``.

    Raises:
        UserError: torch can't use the device on this machine.
    """
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} can't be used on this machine: {one_line(error)}") from None
    return device


def open_model(
    path: str | Path, device: str | torch.device = "cpu", config: ModelConfig | str | None = None
) -> Loaded:
    """What :func:`load` reads, with what lies beside it; the arguments are the same.

    Raises:
        UserError: as :func:`load`.
    """
    place = str(path)
    device = find_device(device)
    # the weights are read where they lie, so a download has to stay until they are in the model
    with tempfile.TemporaryDirectory(prefix="alignclip-") as downloads:
        file = fetch(place, Path(downloads))
        found = find(file, place, named(config) if isinstance(config, str) else config)
        model = _build(found, place)
        check_weights(model.state_dict(), place)
        recipe, card = (_text(find_beside(file, name)) for name in (RUN_CONFIG, CARD))
        unused = {name: value.clone() for name, value in found.unused.items()}
    assert found.config is not None
    preprocess = preprocess_config(found.preprocess, place, found.config.vision_cfg.image_size)
    return Loaded(
        model.to(device).eval(),
        found.config,
        preprocess,
        found.kind,
        recipe,
        card,
        unused,
        found.batch,
    )


def _text(path: Path | None) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path else None


def _build(found: Found, place: str) -> CLIP:
    """The model with its weights.

    Raises:
        UserError: a model that can't be built, or weights that are not exactly this model's.
    """
    assert found.config is not None
    weights = dict(found.weights)
    wrong = f"{place} is not the model that {found.source} describes: "
    layers = max(found.config.text_cfg.layers, found.config.vision_cfg.layers)
    if layers > max(len(weights), ModelConfig().text_cfg.layers):
        raise UserError(f"{wrong}{layers} layers, but it has {len(weights)} tensors")
    # without memory first: a file of a few bytes may come with a configuration of any size
    expected = _encoders(found, place, "meta").state_dict()
    for name in expected:
        if name.endswith(
            "num_batches_tracked"
        ):  # batch norms of a tower that was locked with its statistics lack it
            weights.setdefault(name, torch.zeros((), dtype=torch.long))
    if (
        "logit_scale" in weights and weights["logit_scale"].numel() == 1
    ):  # [] in a release or an export
        weights["logit_scale"] = weights["logit_scale"].reshape(1)
    _check_names_and_shapes(expected, weights, wrong)
    model = _encoders(found, place, "cpu")
    first: dict[
        int, str
    ] = {}  # name of each parameter; a shared one's other name must not bring another value
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and not torch.equal(weights[other], weights[name]):
            raise UserError(f"{wrong}{other} and {name} are one and the same there, but differ")
    model.load_state_dict(weights)
    return model


def _encoders(found: Found, place: str, device: str) -> CLIP:
    """The model of the configuration, its weights random, or with no memory on the device ``meta``."""
    assert found.config is not None
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device(device),
        ):  # to load a model is not to draw one
            return build_encoders(found.config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (AssertionError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{place}: no model can be built as {found.source} says: {one_line(error)}"
        ) from None


def _check_names_and_shapes(
    expected: dict[str, Tensor], weights: dict[str, Tensor], wrong: str
) -> None:
    """Refuse a state dict that is not exactly the model's; what it lacks and has too much, three names of each."""
    complaints = []
    if missing := expected.keys() - weights.keys():
        complaints.append(f"it lacks {few(sorted(missing))}")
    if unexpected := weights.keys() - expected.keys():
        complaints.append(f"it has {few(sorted(unexpected))} in addition")
    shapes = {
        name: (list(weights[name].shape), list(expected[name].shape))
        for name in expected.keys() & weights
    }
    if differing := [
        f"{name} is {a}, not {b}" for name, (a, b) in sorted(shapes.items()) if a != b
    ]:
        complaints.append(few(differing))
    floats = {name for name, value in weights.items() if value.is_floating_point()}
    kinds = [
        name for name in sorted(shapes) if (name in floats) != expected[name].is_floating_point()
    ]
    if kinds:
        complaints.append(
            few(f"{name} is of {str(weights[name].dtype).removeprefix('torch.')}" for name in kinds)
        )
    if complaints:
        raise UserError(wrong + "; ".join(complaints))
