"""``pretrained``: the weights that a new run starts from, whatever model they were trained as.

The value is anything that :func:`alignclip.load` takes; a state dict or training checkpoint of open_clip's, such as
``epoch_32.pt``, with nothing beside it; or one of open_clip's own models as ``MODEL/TAG``, e.g. ``ViT-B-16/openai``.
Whatever it is, its tensors are matched with this run's model by name and shape. What doesn't fit stays at its
initialisation, and is listed.

A module that both towers share here may have different numbers in the checkpoint's two towers. It gets the text
tower's, as in the published initialisation, or with ``pretrained_shared_from: vision`` the vision tower's; the other
one's where these have another shape. There is no mean: that of two networks trained apart is neither.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor

from alignclip.config import ModelConfig
from alignclip.encoders import CLIP
from alignclip.errors import UserError, nearest, one_line
from alignclip.fetching import CARD, EXPORT_CONFIG, fetch
from alignclip.licenses import forbids_derivatives, license_of
from alignclip.weights import (
    HUGGING_FACE,
    OPEN_CLIP,
    RUN,
    export_settings,
    hub_model,
    json_beside,
    read_weights,
    run_model,
)

LEAST = 0.1  # share of the model's tensors; with less, the file is of something else
SHOWN = 8  # modules in a line of the report


@dataclass
class Report:
    """What was loaded and what was not, in a few lines; and the licence of the weights where it is known."""

    text: str
    license: str | None


@dataclass
class _Source:
    """A checkpoint: tensors under our names, widths of its heads where something tells them, and what to know."""

    weights: dict[str, Tensor]
    heads: dict[str, int]
    notes: list[str]
    license: str | None


@dataclass
class _Match:
    """What went where: names of this model's tensors, shared ones by their text tower's name."""

    loaded: list[str] = field(default_factory=list)
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
    with tempfile.TemporaryDirectory(prefix="alignclip-") as downloads:  # mapped into memory until they are copied
        try:
            source = _read(place, Path(downloads))
            _check_heads(source.heads, model, config)
        except UserError as error:
            raise UserError(f"pretrained: {error}") from None
        weights = dict(source.weights)
        resized = _resize(weights, model)
        match = _copy(weights, model, shared_from)
    total = len(match.loaded) + len(match.missing) + len(match.misshaped)
    lines = [f"pretrained: {place}: loaded {len(match.loaded)} of {total} tensors"]
    lines += [f"shared modules from the {tower} tower: {_modules(n)}" for tower, n in match.shared.items() if n]
    if resized:
        lines.append(f"resized: {', '.join(resized)}")
    expected = model.state_dict()
    shapes = {name: f"{list(weights[name].shape)}, not {list(expected[name].shape)}" for name in match.misshaped}
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
    return Report("\n  ".join(lines + source.notes), source.license)


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
    if "text.token_embedding.weight" in weights:  # open_clip's CustomTextCLIP
        weights = {key.removeprefix("text."): value for key, value in weights.items()}

    heads: dict[str, int] = {}
    notes = []
    trained = run_model(file, place) if kind == RUN else hub_model(file, place) if kind == HUGGING_FACE else None
    if trained is not None:
        heads = _heads(trained.vision_cfg.head_width, trained.text_cfg.width, trained.text_cfg.heads)
    if kind == OPEN_CLIP:
        export = json_beside(file, EXPORT_CONFIG, place)
        given = export.get("model_cfg") or (open_clip.get_model_config(name) if tagged else None)
        foreign: list[str] = ["quick_gelu"] if tagged.get("quick_gelu") else []
        if isinstance(given, dict):
            values, others = export_settings(given)
            text = values["text_cfg"]
            heads = _heads(values["vision_cfg"]["head_width"], text["width"], text["heads"])
            foreign = sorted({*foreign, *others})
        if foreign:
            notes.append(f"it was trained with what our encoders don't have: {', '.join(foreign)}")
        pixels: Any = export.get("preprocess_cfg") or tagged
        default = open_clip.transform.PreprocessCfg()
        for key in ("mean", "std"):
            if key in pixels and tuple(pixels[key]) != getattr(default, key):
                notes.append(f"its pixels were normalised with another {key}: {list(pixels[key])}")
    card = file.parent / CARD
    license = license_of(card.read_text(errors="replace") if card.is_file() else None, kind)
    return _Source(weights, heads, notes, license)


def _of_open_clip(name: str, tag: str) -> Mapping[str, Any]:
    """What open_clip knows of its own model ``name/tag``; nothing where that can only be a path.

    Raises:
        UserError: an open_clip model without a tag of it, or a tag of another model.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tags:
        found: Mapping[str, Any] = open_clip.get_pretrained_cfg(name, tag)
        if not found:
            raise UserError(f"open_clip's {name} has no weights '{tag}'; write {name}/TAG; {nearest(tag, tags)}")
        return found
    models = open_clip.list_pretrained_models_by_tag(tag) if tag else []
    if models:
        raise UserError(f"open_clip has no model {name} with weights '{tag}'; {nearest(name, models)}")
    return {}


def _heads(vision: int, width: int, heads: int) -> dict[str, int]:
    return {"vision": vision, "text": width // max(heads, 1)}


def _check_heads(heads: dict[str, int], model: CLIP, config: ModelConfig) -> None:
    """Shapes don't tell how a width is cut into heads, and cut otherwise the weights compute something else."""
    if not heads:
        return
    text = config.text_cfg
    ours = {"text": (text.width // text.heads, f"model.text_cfg.heads={text.heads}")}
    if config.vision_cfg.timm_model_name is None:
        ours["vision"] = (config.vision_cfg.head_width, f"model.vision_cfg.head_width={config.vision_cfg.head_width}")
    for tower, (width, key) in ours.items():
        if heads[tower] != width:
            raise UserError(f"the checkpoint's {tower} heads are {heads[tower]} wide, but with {key} they are {width}")


# --- into the model ---------------------------------------------------------------------------------------------------


def _resize(weights: dict[str, Tensor], model: CLIP) -> list[str]:
    """Position embeddings of another image size or context length, interpolated by open_clip; says which."""
    resized = []
    for name, resize, extra in (
        ("visual.positional_embedding", resize_pos_embed, 1),  # a class token before a square grid
        ("positional_embedding", resize_text_pos_embed, 0),
    ):
        there, here = weights.get(name), model.state_dict().get(name)
        if there is None or here is None or there.dim() != 2 or here.dim() != 2 or there.shape[1] != here.shape[1]:
            continue
        positions = len(there) - extra
        if len(there) == len(here) or positions < 1 or (extra and math.isqrt(positions) ** 2 != positions):
            continue
        weights[name] = there.float()
        resize(weights, model)
        resized.append(f"{name} {len(there)} → {len(here)}")
    return resized


@torch.no_grad()
def _copy(weights: Mapping[str, Tensor], model: CLIP, shared_from: str) -> _Match:
    """Every tensor of the model that the checkpoint has in the same shape, under any of its names."""
    tensors: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (tensor, []))[1].append(name)
    match = _Match()
    for tensor, names in tensors.values():
        by_tower = {"vision" if name.startswith("visual.") else "text": name for name in names}
        label = by_tower.get("text", names[0])
        fitting = {tower: name for tower, name in by_tower.items() if _fits(weights.get(name), tensor)}
        if not fitting:
            there = [name for name in names if name in weights]
            (match.misshaped if there else match.missing).append(there[0] if there else label)
            continue
        tower = shared_from if shared_from in fitting else next(iter(fitting))
        value = weights[fitting[tower]]
        if len(names) > 1 and not (len(fitting) > 1 and torch.equal(*(weights[name] for name in fitting.values()))):
            match.shared[tower].append(label)
        tensor.copy_(value.reshape(tensor.shape))
        match.loaded.append(label)
    return match


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
            module = re.sub(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$", "", name)
            groups.setdefault(module, []).append(name)
    shown = []
    for group, members in groups.items():
        shape = (shapes or {}).get(members[0]) if len(members) == 1 else None
        shown.append(f"{group}.{_ranges(blocks[group])}" if group in blocks else group)
        shown[-1] += f" ({shape})" if shape else ""
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _ranges(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> ``0-2+5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
