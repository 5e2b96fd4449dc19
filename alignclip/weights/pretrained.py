"""``pretrained``: the weights that a new run starts from, whatever model they were trained as.

The value is anything that :func:`alignclip.load` takes; a state dict or training checkpoint of open_clip's, such as
``epoch_32.pt``, with nothing beside it; or one of open_clip's own models as ``MODEL/TAG``, e.g. ``ViT-B-16/openai``.
Whatever it is, its tensors are matched with this run's model by name and shape. What doesn't fit stays at its
initialisation, and is listed.

A module that both towers share here may have different numbers in the checkpoint's two towers. It gets the text
tower's, as in the published initialisation, or with ``pretrained_shared_from: vision`` the vision tower's; the other
one's where more of it fits. A block is never put together from both, and there is no mean: that of two networks trained
apart is neither.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from alignclip.weights.finite import check_weights
from alignclip.weights.licenses import forbids_derivatives, license_of
from alignclip.weights.locate import EXPORT_CONFIG, card_beside, fetch
from alignclip.weights.open_clip_models import export_settings
from alignclip.weights.reading import (
    hub_model,
    hub_pixels,
    json_beside,
    preprocess_config,
    run_model,
)
from alignclip.weights.release_format import HEAD_WIDTH
from alignclip.weights.state_dicts import HUGGING_FACE, OPEN_CLIP, RELEASE, read_weights

LEAST = 0.1  # share of the model's tensors; with less, the file is of something else
SHOWN = 8  # modules in a line of the report


@dataclass
class Report:
    """What a model was given of a checkpoint.

    Attributes:
        text: what was loaded and what was not, in a few lines.
        license: of the weights, where it is known.
        loaded: the names of the tensors that it was given, all of them of those that are shared.
        pixels: how the checkpoint's images were prepared otherwise, in a sentence each.
        activation: that it was trained with another one, in a sentence.
    """

    text: str
    license: str | None
    loaded: frozenset[str]
    pixels: list[str]
    activation: list[str]


@dataclass
class _Source:
    """A checkpoint.

    Attributes:
        weights: under our names.
        license: where it is known.
        heads: widths, where something tells them.
        quick_gelu: where something tells it.
        foreign: settings that our encoders don't have.
        pixels: see :class:`Report`.
        assumed: how it is known how wide the heads are, where nothing says it.
    """

    weights: dict[str, Tensor]
    license: str | None
    heads: dict[str, int] = field(default_factory=dict)
    quick_gelu: bool | None = None
    foreign: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)
    assumed: str = ""


@dataclass
class _Match:
    """What went where: names of this model's tensors, shared ones by their text tower's name, ``names`` by both."""

    loaded: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    missing: list[str] = field(default_factory=list)
    misshaped: list[str] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=lambda: {"text": [], "vision": []})


def load_pretrained(model: CLIP, place: str, shared_from: str, config: ModelConfig) -> Report:
    """Copy a checkpoint's weights into ``model``, in place, as far as they fit.

    Draws no random numbers, so that every rank ends up with the same.

    Args:
        model: freshly built from ``config``.
        place: see above.
        shared_from: ``text`` or ``vision``.

    Raises:
        UserError: no such thing, not a model's weights, heads of another width, or nearly nothing fits.
    """
    with tempfile.TemporaryDirectory(
        prefix="alignclip-"
    ) as downloads:  # mapped into memory until they are copied
        try:
            source = _read(place, Path(downloads))
            _check_heads(source, config)
        except UserError as error:
            raise UserError(f"pretrained: {error}") from None
        weights = dict(source.weights)
        resized = _resize(weights, model)
        match = _copy(weights, model, shared_from)
        check_weights(
            {name: weights[name] for name in match.loaded if name in weights},
            f"pretrained: {place}",
        )
    total = len(match.loaded) + len(match.missing) + len(match.misshaped)
    lines = [f"pretrained: {place}: loaded {len(match.loaded)} of {total} tensors"]
    lines += [
        f"shared modules from the {tower} tower: {_modules(n)}"
        for tower, n in match.shared.items()
        if n
    ]
    if resized:
        lines.append(f"resized: {', '.join(resized)}")
    expected = model.state_dict()
    shapes = {
        name: f"{list(weights[name].shape)}, not {list(expected[name].shape)}"
        for name in match.misshaped
    }
    for what, names in (
        ("not in the checkpoint", match.missing),
        ("of another shape", match.misshaped),
        ("left over", sorted(weights.keys() - expected.keys())),
    ):
        if names:
            lines.append(f"{what}: {_modules(names, shapes)}")
    if len(match.loaded) < max(1, LEAST * total):
        raise UserError("; ".join([f"{lines[0]}, which is not this model", *lines[1:]]))
    if source.license:
        lines.append(f"licence: {source.license}, which holds for what is trained from it, too")
        if forbids_derivatives(source.license):
            lines[-1] += ", and forbids passing that on"
    if source.foreign:
        lines.append(
            f"it was trained with what our encoders don't have: {', '.join(source.foreign)}"
        )
    activation = []
    if source.quick_gelu not in (None, config.quick_gelu):
        how, value = ("with", "true") if source.quick_gelu else ("without", "false")
        activation.append(f"it was trained {how} quick_gelu: set model.quick_gelu={value}")
    text = "\n  ".join([*lines, *activation, *source.pixels])
    return Report(text, source.license, frozenset(match.names), source.pixels, activation)


# --- what the checkpoint is -------------------------------------------------------------------------------------------


def _read(place: str, downloads: Path) -> _Source:
    """Find the file and what is known of the model in it."""
    name, _, tag = place.partition("/")
    tagged: Mapping[str, Any] = {}
    if not Path(place).exists() and "://" not in place:
        tagged = _of_open_clip(name, tag)
    if tagged.get("hf_hub"):
        file = fetch(f"hf-hub:{tagged['hf_hub'].rstrip('/')}", downloads)
    elif tagged:
        try:
            file = Path(open_clip.download_pretrained(tagged))
        except Exception as error:  # of urllib, and open_clip's of a wrong hash
            raise UserError(f"{place} can't be downloaded: {one_line(error)}") from None
    else:
        file = fetch(place, downloads)
    content = read_weights(file, place)
    weights, kind = content.weights, content.kind
    source = _Source(weights, license_of(card_beside(str(file)), kind))
    if kind == OPEN_CLIP:
        _describe_open_clip(
            source, file, place, tagged, open_clip.get_model_config(name) if tagged else None
        )
        return source
    if kind == RELEASE:
        source.quick_gelu, source.heads = False, dict.fromkeys(("vision", "text"), HEAD_WIDTH)
        source.assumed = ", as all published ones; if these are others, say so with a config.yaml beside the file"
    trained = hub_model(file, place) if kind == HUGGING_FACE else run_model(file, place)
    if trained is not None:
        source.heads = _heads(
            trained.vision_cfg.head_width, trained.text_cfg.width, trained.text_cfg.heads
        )
        source.quick_gelu, source.assumed = trained.quick_gelu, ""
    if kind == HUGGING_FACE:
        try:
            source.pixels = _other_pixels(hub_pixels(file, place), place)
        except UserError as error:  # our own crops are made otherwise anyway
            source.pixels = [str(error)]
    return source


def _describe_open_clip(
    source: _Source, file: Path, place: str, tagged: Mapping[str, Any], known: dict[str, Any] | None
) -> None:
    """What open_clip's own list, and the ``open_clip_config.json`` beside the weights, say of a model."""
    export = json_beside(file, EXPORT_CONFIG, place)
    given = export.get("model_cfg") or known
    if isinstance(given, dict):
        values, source.foreign = export_settings(given)
        text = values["text_cfg"]
        source.heads = _heads(values["vision_cfg"]["head_width"], text["width"], text["heads"])
        source.quick_gelu = bool(values.get("quick_gelu", False))
    if "quick_gelu" in tagged:  # of its older models the weights say it, not the model
        source.quick_gelu = bool(tagged["quick_gelu"]) or source.quick_gelu
    source.foreign.sort()
    source.pixels = _other_pixels(export.get("preprocess_cfg") or tagged, place)


def _other_pixels(given: Any, place: str) -> list[str]:
    """In what a ``preprocess_cfg`` differs from what we train with."""
    default = PreprocessCfg()
    found = preprocess_config(given, place, image_size=224)
    return [
        f"its pixels were normalised with another {key}: {list(getattr(found, key))}"
        for key in ("mean", "std")
        if getattr(found, key) != getattr(default, key)
    ]


def _of_open_clip(name: str, tag: str) -> Mapping[str, Any]:
    """What open_clip knows of its own model ``name/tag``; nothing where that can only be a path.

    Raises:
        UserError: an open_clip model without a tag of it, or a tag of another model.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tags:
        found: Mapping[str, Any] = open_clip.get_pretrained_cfg(name, tag)
        if not found:
            raise UserError(
                f"open_clip's {name} has no weights '{tag}'; write {name}/TAG; {nearest(tag, tags)}"
            )
        return found
    models = open_clip.list_pretrained_models_by_tag(tag) if tag else []
    if models:
        raise UserError(
            f"open_clip has no model {name} with weights '{tag}'; {nearest(name, models)}"
        )
    return {}


def _heads(vision: int, width: int, heads: int) -> dict[str, int]:
    return {"vision": vision, "text": width // max(heads, 1)}


def _check_heads(source: _Source, config: ModelConfig) -> None:
    """Shapes don't tell how a width is cut into heads, and cut otherwise the weights compute something else."""
    if not source.heads:
        return
    text = config.text_cfg
    ours = {"text": (text.width // text.heads, f"model.text_cfg.heads={text.heads}")}
    if config.vision_cfg.timm_model_name is None:
        ours["vision"] = (
            config.vision_cfg.head_width,
            f"model.vision_cfg.head_width={config.vision_cfg.head_width}",
        )
    for tower, (width, key) in ours.items():
        if source.heads[tower] != width:
            raise UserError(
                f"the checkpoint's {tower} heads are {source.heads[tower]} wide, but with {key} they are {width}"
                + source.assumed
            )


# --- into the model ---------------------------------------------------------------------------------------------------


def _resize(weights: dict[str, Tensor], model: CLIP) -> list[str]:
    """Position embeddings of another image size or context length, interpolated by open_clip; says which."""
    resized = []
    for name, resize, extra in (
        ("visual.positional_embedding", resize_pos_embed, 1),  # a class token before a square grid
        ("positional_embedding", resize_text_pos_embed, 0),
    ):
        there, here = weights.get(name), model.state_dict().get(name)
        if (
            there is None
            or here is None
            or there.dim() != 2
            or here.dim() != 2
            or there.shape[1] != here.shape[1]
        ):
            continue
        positions = len(there) - extra
        if (
            len(there) == len(here)
            or positions < 1
            or (extra and math.isqrt(positions) ** 2 != positions)
        ):
            continue
        weights[name] = there.float()
        resize(weights, model)
        resized.append(f"{name} {len(there)} → {len(here)}")
    return resized


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: CLIP, shared_from: str) -> _Match:
    """Every tensor of the model that the checkpoint has in the same shape, under any of its names."""
    tensors: dict[int, tuple[Tensor, dict[str, str]]] = {}  # with its names, by tower
    for name, tensor in model.state_dict(keep_vars=True).items():
        tower = "vision" if name.startswith("visual.") else "text"
        tensors.setdefault(id(tensor), (tensor, {}))[1][tower] = name
    fitting = Counter(
        (_unit(names), tower)
        for tensor, names in tensors.values()
        for tower, name in names.items()
        if _fits(weights.get(name), tensor)
    )
    match = _Match()
    for tensor, names in tensors.values():
        label = names.get("text") or names["vision"]
        # one tower for all of a shared block: attention of one network and MLP of another are no block
        tower = max(names, key=lambda tower: (fitting[_unit(names), tower], tower == shared_from))
        value = weights.get(names[tower])
        if value is None or not _fits(value, tensor):
            there = next(
                (name for name in (names[tower], *names.values()) if name in weights), None
            )
            (match.misshaped if there else match.missing).append(there or label)
            continue
        if len(names) > 1 and not all(_same(weights.get(name), value) for name in names.values()):
            match.shared[tower].append(label)
        tensor.copy_(value.reshape(tensor.shape))
        match.loaded.append(label)
        match.names |= set(names.values())
    return match


def _unit(names: Mapping[str, str]) -> str:
    """What has to come from one tower as a whole: a block, a norm, or a tensor that stands alone."""
    name = names.get("text") or names["vision"]
    found = re.match(r"(.*resblocks\.\d+|ln_final)\.", name)
    return found[1] if found else name


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other)


def _fits(value: Tensor | None, tensor: Tensor) -> bool:
    """Whether a checkpoint's tensor can be the model's; one number may be [] there and [1] here."""
    if value is None or value.is_floating_point() != tensor.is_floating_point():
        return False
    return value.shape == tensor.shape or value.numel() == tensor.numel() == 1


def _modules(names: Iterable[str], shapes: Mapping[str, str] | None = None) -> str:
    """Tensors' names as those of their modules, blocks as ranges; with its shapes, a tensor that stands alone."""
    groups: dict[str, list[str]] = {}
    blocks: dict[str, set[int]] = {}
    for name in names:
        if found := re.match(r"(.*?)\.(\d+)\.", name):
            blocks.setdefault(found[1], set()).add(int(found[2]))
            groups.setdefault(found[1], [])
        else:
            module = re.sub(
                r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name
            )
            groups.setdefault(module, []).append(name)
    shown = []
    for group, members in groups.items():
        shape = (shapes or {}).get(members[0]) if len(members) == 1 else None
        shown.append(f"{group}.{_ranges(blocks[group])}" if group in blocks else group)
        shown[-1] += f" ({shape})" if shape else ""
    return ", ".join(shown[:SHOWN]) + (
        f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    )


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> ``0-2+5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
