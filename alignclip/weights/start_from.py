"""``pretrained``: the weights that a new run starts from, whatever model they were trained as.

The value is anything that :func:`alignclip.load` takes; a state dict or training checkpoint of
open_clip's, such as ``epoch_32.pt``, with nothing beside it; or one of open_clip's own models as
``MODEL/TAG``, e.g. ``ViT-B-16/openai``. The checkpoint's tensors are matched with this run's model
by name and shape. A tensor that doesn't fit stays at its initialisation, and is listed.

A module that both towers share here may have different numbers in the checkpoint's two towers. It
gets the text tower's numbers, as in the published initialisation, or with
``pretrained_shared_from: vision`` the vision tower's; the other tower's where more of them fit. A
block is never put together from both, and there is no mean: the mean of two networks that were
trained apart is neither.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from open_clip.transform import PreprocessCfg
from torch import Tensor

from alignclip.config.schema import ModelConfig
from alignclip.errors import UserError, nearest, one_line
from alignclip.model.encoders import CLIP
from alignclip.storage.temporary import temporary_folder
from alignclip.weights.fetch import fetch
from alignclip.weights.finite import check_finite
from alignclip.weights.formats import open_weights
from alignclip.weights.formats.base import Description, Weights, preprocess_config
from alignclip.weights.formats.by_tensors import are_equal
from alignclip.weights.licenses import forbids_derivatives, license_of
from alignclip.weights.locate import CARD, text_beside

# what is told of tensors
SHARED = {tower: f"shared modules from the {tower} tower" for tower in ("text", "vision")}
MISSING, MISSHAPED = "not in the checkpoint", "of another shape"
REPORTED = (*SHARED.values(), "resized", MISSING, MISSHAPED, "left over")
LEAST_SHARE = 0.1  # of the model's tensors; with less, the file is of something else
MOST_MODULES = 8  # in a line of the report


@dataclass
class StartReport:
    """An account of what a model was given of a checkpoint.

    Attributes:
        text: what was loaded and what was not, in a few lines.
        license: of the weights, where it is known.
        loaded: the names of the tensors that the model was given, all names of shared ones.
        pixels: how the checkpoint's images were prepared otherwise, in a sentence each.
        activation: that the checkpoint was trained with another one, in a sentence.
    """

    text: str
    license: str | None
    loaded: frozenset[str]
    pixels: list[str]
    activation: list[str]


@dataclass
class _Match:
    """The fate of a model's tensors. A shared tensor has its text name here.

    Attributes:
        total: how many there are.
        loaded: all names of those that were loaded.
        told: names by what is told of them, in the report's order.
    """

    total: int
    loaded: set[str]
    told: dict[str, list[str]]


def load_pretrained(model: CLIP, place: str, shared_from: str, config: ModelConfig) -> StartReport:
    """Copy a checkpoint's weights into ``model``, in place, as far as they fit.

    Draws no random numbers, so that every rank ends up with the same.

    Args:
        model: freshly built from ``config``.
        place: see above.
        shared_from: ``text`` or ``vision``.
        config: of the model.

    Raises:
        UserError: no such thing, not a model's weights, heads of another width, or nearly nothing
            fits.
    """
    # a download stays until its weights, which are mapped into memory, are copied
    with temporary_folder() as downloads:
        try:
            source = _open_checkpoint(place, downloads)
            description = source.format.describe(source)
            pixels = _other_pixels(source)
            license = license_of(text_beside(str(source.content.file), CARD), source.format)
            _check_heads(description, config)
        except UserError as error:
            raise UserError(f"pretrained: {error}") from None
        weights = dict(source.tensors)
        resized = _resize(weights, model)
        match = _copy(weights, model, shared_from)
        match.told["resized"] = resized
        check_finite(model.state_dict(), f"pretrained: {place}")
        lines = _tensor_lines(place, model, weights, match)
    if license:
        lines.append(f"licence: {license}, which holds for what is trained from it, too")
        if forbids_derivatives(license):
            lines[-1] += ", and forbids passing that on"
    if description.foreign:
        foreign = ", ".join(sorted(description.foreign))
        lines.append(f"it was trained with what our encoders don't have: {foreign}")
    activation = []
    quick_gelu = source.content.known.get("quick_gelu") or description.quick_gelu
    if quick_gelu not in (None, config.quick_gelu):
        how, value = ("with", "true") if quick_gelu else ("without", "false")
        activation.append(f"it was trained {how} quick_gelu: set model.quick_gelu={value}")
    text = "\n  ".join([*lines, *activation, *pixels])
    return StartReport(text, license, frozenset(match.loaded), pixels, activation)


# --- the checkpoint ---------------------------------------------------------------------------


def _open_checkpoint(place: str, downloads: Path) -> Weights:
    """Find and read the file; with ``MODEL/TAG``, what open_clip's list says of it is known."""
    name, _, tag = place.partition("/")
    listed: Mapping[str, Any] = {}
    if not Path(place).exists() and "://" not in place:
        listed = _of_open_clip(name, tag)
    if not listed:
        return open_weights(fetch(place, downloads), place)
    if listed.get("hf_hub"):
        file = fetch(f"hf-hub:{listed['hf_hub'].rstrip('/')}", downloads)
    else:
        try:
            file = Path(open_clip.download_pretrained(listed))
        except Exception as error:  # of urllib, and open_clip's of a wrong hash
            raise UserError(f"{place} can't be downloaded: {one_line(error)}") from None
    # of open_clip's older models the weights say quick_gelu, not the model
    known = {
        "model_cfg": open_clip.get_model_config(name),
        "preprocess_cfg": listed,
        "quick_gelu": bool(listed.get("quick_gelu")),
    }
    return open_weights(file, place, known)


def _of_open_clip(name: str, tag: str) -> Mapping[str, Any]:
    """Return what open_clip knows of its own model ``name/tag``, if that is one.

    Raises:
        UserError: an open_clip model without a tag of it, or a tag of another model.
    """
    if tags := open_clip.list_pretrained_tags_by_model(name):
        found: Mapping[str, Any] = open_clip.get_pretrained_cfg(name, tag)
        if not found:
            raise UserError(
                f"open_clip's {name} has no weights '{tag}'; write {name}/TAG; {nearest(tag, tags)}"
            )
        return found
    if models := open_clip.list_pretrained_models_by_tag(tag) if tag else []:
        raise UserError(
            f"open_clip has no model {name} with weights '{tag}'; {nearest(name, models)}"
        )
    return {}


def _other_pixels(source: Weights) -> list[str]:
    """Tell in what a checkpoint's ``preprocess_cfg`` differs from what we train with."""
    content = source.content
    try:
        given = source.format.pixels(content)
    except UserError as error:  # our own crops are made otherwise anyway
        return [str(error)]
    found, default = preprocess_config(given, content.place, image_size=224), PreprocessCfg()
    return [
        f"its pixels were normalised with another {key}: {list(getattr(found, key))}"
        for key in ("mean", "std")
        if getattr(found, key) != getattr(default, key)
    ]


def _check_heads(source: Description, config: ModelConfig) -> None:
    """Refuse weights whose heads have another width: they would compute something else.

    Raises:
        UserError: names the setting.
    """
    text, vision = config.text_cfg, config.vision_cfg
    ours = {"text": (text.width // text.heads, f"model.text_cfg.heads={text.heads}")}
    if vision.timm_model_name is None:
        ours["vision"] = vision.head_width, f"model.vision_cfg.head_width={vision.head_width}"
    for tower, (width, key) in ours.items():
        if (theirs := source.heads.get(tower, width)) != width:
            raise UserError(
                f"the checkpoint's {tower} heads are {theirs} wide, but with {key} they are {width}"
                + source.assumed
            )


# --- into the model ---------------------------------------------------------------------------


def _resize(weights: dict[str, Tensor], model: CLIP) -> list[str]:
    """Interpolate position embeddings of another image size or text length; return their names."""
    resized = []
    expected = model.state_dict()
    for name, resize, extra in (
        ("visual.positional_embedding", resize_pos_embed, 1),  # a class token before a square grid
        ("positional_embedding", resize_text_pos_embed, 0),
    ):
        there, here = weights.get(name), expected.get(name)
        if there is None or here is None or there.shape == here.shape:
            continue
        if there.dim() != 2 or here.dim() != 2 or there.shape[1] != here.shape[1]:
            continue
        positions = len(there) - extra
        if positions >= 1 and not (extra and math.isqrt(positions) ** 2 != positions):
            weights[name] = there.float()
            resize(weights, model)
            resized.append(f"{name} {len(there)} → {len(here)}")
    return resized


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: CLIP, shared_from: str) -> _Match:
    """Copy every tensor that the checkpoint has in the same shape, under any of its names."""
    tensors: dict[int, tuple[Tensor, dict[str, str]]] = {}  # with its names, by tower
    for name, tensor in model.state_dict(keep_vars=True).items():
        tower = "vision" if name.startswith("visual.") else "text"
        tensors.setdefault(id(tensor), (tensor, {}))[1][tower] = name
    fitting = Counter(
        (_shared_unit(names), tower)
        for tensor, names in tensors.values()
        for tower, name in names.items()
        if _fits(weights.get(name), tensor)
    )
    told: dict[str, list[str]] = {what: [] for what in REPORTED}
    match = _Match(len(tensors), set(), told)
    for tensor, names in tensors.values():
        label = names.get("text") or names["vision"]
        # one tower for all of a shared block: one network's attention and another's MLP are none
        tower = max(
            names, key=lambda tower: (fitting[_shared_unit(names), tower], tower == shared_from)
        )
        value = weights.get(names[tower])
        if value is None or not _fits(value, tensor):
            there = [name for name in (names[tower], *names.values()) if name in weights]
            told[MISSHAPED if there else MISSING].append(there[0] if there else label)
            continue
        if not all(are_equal(value, weights.get(name)) for name in names.values()):
            told[SHARED[tower]].append(label)
        tensor.copy_(value.reshape(tensor.shape))
        match.loaded |= set(names.values())
    return match


def _shared_unit(names: Mapping[str, str]) -> str:
    """Name what comes from one tower as a whole: a block, a norm, or a tensor that stands alone."""
    name = names.get("text") or names["vision"]
    found = re.match(r"(.*resblocks\.\d+|ln_final)\.", name)
    return found[1] if found else name


def _fits(value: Tensor | None, tensor: Tensor) -> bool:
    """Tell whether a checkpoint's tensor can be the model's; one number may be [] or [1]."""
    if value is None or value.is_floating_point() != tensor.is_floating_point():
        return False
    return value.shape == tensor.shape or value.numel() == tensor.numel() == 1


# --- the report -------------------------------------------------------------------------------


def _tensor_lines(
    place: str, model: CLIP, weights: Mapping[str, Tensor], match: _Match
) -> list[str]:
    """Return the lines about tensors.

    Raises:
        UserError: nearly nothing fits.
    """
    expected, told = model.state_dict(), match.told
    told["left over"] = sorted(weights.keys() - expected.keys())
    loaded = match.total - len(told[MISSING]) - len(told[MISSHAPED])
    lines = [f"pretrained: {place}: loaded {loaded} of {match.total} tensors"]
    shapes = {
        name: f"{list(weights[name].shape)}, not {list(expected[name].shape)}"
        for name in told[MISSHAPED]
    }
    lines += [f"{what}: {_modules(names, shapes)}" for what, names in told.items() if names]
    if loaded < max(1, LEAST_SHARE * match.total):
        raise UserError("; ".join([f"{lines[0]}, which is not this model", *lines[1:]]))
    return lines


def _modules(names: Iterable[str], shapes: Mapping[str, str]) -> str:
    """Name the modules of tensors, blocks as ranges; a tensor that stands alone with its shapes."""
    groups: dict[str, list[str]] = {}
    blocks: dict[str, set[int]] = {}
    ends = r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$"
    for name in names:
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            blocks.setdefault(found[1], set()).add(int(found[2]))
            groups.setdefault(found[1], [])
        else:
            groups.setdefault(re.sub(ends, "", name), []).append(name)
    shown = []
    for group, members in groups.items():
        shape = shapes.get(members[0]) if len(members) == 1 else None
        shown.append(f"{group}.{_ranges(blocks[group])}" if group in blocks else group)
        shown[-1] += f" ({shape})" if shape else ""
    more = len(shown) - MOST_MODULES
    return ", ".join(shown[:MOST_MODULES]) + (f" and {more} more" if more > 0 else "")


def _ranges(numbers: set[int]) -> str:
    """Write {0, 1, 2, 5} as ``0-2+5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return "+".join("-".join(map(str, ends)) for ends in runs)
