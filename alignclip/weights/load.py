"""``alignclip.load``: a trained model from a file of any format."""

from __future__ import annotations

from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from alignclip.config.schema import ModelConfig
from alignclip.data.tokenizer import SimpleTokenizer
from alignclip.errors import UserError, few, one_line
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.storage.temporary import temporary_folder
from alignclip.weights.fetch import fetch
from alignclip.weights.finite import check_finite
from alignclip.weights.formats import open_weights
from alignclip.weights.formats.base import Loaded, Preprocess, Weights, preprocess_config
from alignclip.weights.formats.open_clip import named
from alignclip.weights.locate import CARD, RUN_CONFIG, UNUSED, find_beside, text_beside
from alignclip.weights.weight_files import check_tensors, read


def load(
    path: str | Path, device: str | torch.device = "cpu", *, config: ModelConfig | str | None = None
) -> tuple[CLIP, Preprocess, SimpleTokenizer]:
    """Load a trained model with what it needs, as ``open_clip.create_model_from_pretrained`` does.

    Args:
        path: one of

            - a checkpoint of ours with its run's ``config.yaml`` beside it, or the run's folder for
              the latest one; local or a URL such as ``s3://bucket/run/latest-rank0.pt`` (with
              Composer's EMA, a checkpoint's model is the averaged one);
            - a file in the format of the AlignCLIP authors' releases; a ``config.yaml`` beside it
              says how large the model is, and without one its shapes do, with heads of 64 as
              published;
            - an open_clip export: a folder with ``open_clip_config.json`` (or
              ``local-dir:FOLDER``), or a state dict, a training checkpoint or a TorchScript archive
              beside such a file; both towers' equal modules become one again. Without that file the
              shapes say which of open_clip's models it is, where only one has them;
            - a Hugging Face ``CLIPModel``: a folder with its ``config.json`` and weights, or such a
              file of weights;
            - ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME/FILE`` for any of these on the Hugging Face
              Hub.
        device: where the model shall be.
        config: the architecture, or the name of one of open_clip's models, instead of what lies
            beside the file or is read off its shapes.

    Returns:
        the model in eval mode; a function from a PIL image to its normalised float32
        ``[3, image_size, image_size]``; a tokenizer from texts to int64 ``[n, context_length]``.

    Raises:
        UserError: no such file, not a model, a model that doesn't fit its configuration, a file
            with code in it.
    """
    found = open_model(path, device, config)
    preprocess = image_transform_v2(found.preprocess, is_train=False)
    found.model.preprocess = preprocess
    return found.model, preprocess, SimpleTokenizer(context_length=found.model.context_length)


def load_encoders(
    path: str | Path, device: str | torch.device = "cpu", *, config: ModelConfig | str | None = None
) -> CLIP:
    """Load a model for images that :func:`alignclip.data.transforms.normalize` prepares.

    Raises:
        UserError: as :func:`load`, and for an export that wants other pixels.
    """
    return open_encoders(path, device, config).model


def open_encoders(
    path: str | Path, device: str | torch.device = "cpu", config: ModelConfig | str | None = None
) -> Loaded:
    """Load a model as :func:`load_encoders` does, with what the file and its neighbours say of it.

    Raises:
        UserError: as :func:`load_encoders`.
    """
    found = open_model(path, device, config)
    if found.preprocess != PreprocessCfg(size=found.preprocess.size):
        raise UserError(
            f"{path} asks for other pixels than open_clip's defaults: {found.preprocess}"
        )
    return found


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
    """Load a model as :func:`load` does, with what lies beside it.

    Raises:
        UserError: as :func:`load`.
    """
    place = str(path)
    device = find_device(device)
    given = named(config) if isinstance(config, str) else config
    # the weights are read where they lie, so a download has to stay until they are in the model
    with temporary_folder() as downloads:
        weights = open_weights(fetch(place, downloads), place)
        file, form = weights.content.file, weights.format
        unused = weights.unused or _kept_apart(file, place)
        pixels = form.pixels(weights.content)
        found, source = (given, "config=") if given is not None else _described(weights)
        model = _build_model(weights.tensors, found, place, source)
        check_finite(model.state_dict(), place)
        recipe, card = (text_beside(str(file), name) for name in (RUN_CONFIG, CARD))
        unused = {name: value.clone() for name, value in unused.items()}
    preprocess = preprocess_config(pixels, place, found.vision_cfg.image_size)
    model = model.to(device).eval()
    return Loaded(model, found, preprocess, form, recipe, card, unused, weights.batch)


def _described(weights: Weights) -> tuple[ModelConfig, str]:
    description = weights.format.describe(weights)
    if isinstance(description.config, UserError):
        raise description.config
    return description.config, description.source


def _kept_apart(file: Path, place: str) -> dict[str, Tensor]:
    """Return tensors of an authors' file that an export to another format has kept beside it."""
    path, what = find_beside(file, UNUSED), f"{UNUSED} beside {place}"
    if path is None:
        return {}
    unused = read(path, what).values
    check_tensors(unused, what)
    return unused


def _build_model(tensors: dict[str, Tensor], config: ModelConfig, place: str, source: str) -> CLIP:
    """Build the model with its weights.

    Raises:
        UserError: a model that can't be built, or weights that are not exactly this model's.
    """
    weights = dict(tensors)
    wrong = f"{place} is not the model that {source} describes: "
    layers = max(config.text_cfg.layers, config.vision_cfg.layers)
    if layers > max(len(weights), ModelConfig().text_cfg.layers):
        raise UserError(f"{wrong}{layers} layers, but it has {len(weights)} tensors")
    # without memory first: a file of a few bytes may come with a configuration of any size
    expected = _encoders(config, place, source, "meta").state_dict()
    for name in expected:
        # batch norms of a tower that was locked with its statistics lack it
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, torch.zeros((), dtype=torch.long))
    scale = weights.get("logit_scale")
    if scale is not None and scale.numel() == 1:  # [] in a release or an export
        weights["logit_scale"] = scale.reshape(1)
    _check_names_and_shapes(expected, weights, wrong)
    model = _encoders(config, place, source, "cpu")
    # a shared parameter has two names, and its second name must not bring another value
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and not torch.equal(weights[other], weights[name]):
            raise UserError(f"{wrong}{other} and {name} are one and the same there, but differ")
    model.load_state_dict(weights)
    return model


def _encoders(config: ModelConfig, place: str, source: str, device: str) -> CLIP:
    """Build a model with random weights; on the device ``meta`` they take no memory."""
    try:
        # to load a model draws no random numbers
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return build_encoders(config)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except (AssertionError, RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise UserError(
            f"{place}: no model can be built as {source} says: {one_line(error)}"
        ) from None


def _check_names_and_shapes(
    expected: dict[str, Tensor], weights: dict[str, Tensor], wrong: str
) -> None:
    """Refuse a state dict that is not exactly the model's.

    Raises:
        UserError: says what is missing, too much or of another kind, three names each.
    """
    shapes, kinds = [], []
    for name in sorted(expected.keys() & weights.keys()):
        there, here = weights[name], expected[name]
        if there.shape != here.shape:
            shapes.append(f"{name} is {list(there.shape)}, not {list(here.shape)}")
        if there.is_floating_point() != here.is_floating_point():
            kinds.append(f"{name} is of {str(there.dtype).removeprefix('torch.')}")
    complaints = [
        ("it lacks {}", sorted(expected.keys() - weights.keys())),
        ("it has {} in addition", sorted(weights.keys() - expected.keys())),
        ("{}", shapes),
        ("{}", kinds),
    ]
    if told := [words.format(few(names)) for words, names in complaints if names]:
        raise UserError(wrong + "; ".join(told))
