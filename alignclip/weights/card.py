"""The README.md of an export: what the model is, how it was trained, what it reaches, its licence.

A card is made to be published: no path of this machine is in it.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from alignclip.config.yaml_text import natural, parse
from alignclip.weights.figures import Measured, results_table
from alignclip.weights.formats.base import Format, Loaded
from alignclip.weights.licenses import License
from alignclip.weights.publishing import is_url, public, public_place

SHOWN_SETTINGS = (  # of a run's config.yaml
    "loss", "optimizer", "scheduler", "max_duration", "global_train_batch_size", "precision",
    "seed", "pretrained", "lock_image", "lock_text", "algorithms",
)  # fmt: skip


def recipe_of(loaded: Loaded) -> dict[str, Any]:
    """Return a run's configuration; one that can't be read is no reason not to export a model."""
    try:
        content = natural(parse(loaded.recipe or ""))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_card(
    loaded: Loaded, place: str, license: License, results: Measured | None, form: Format, out: str
) -> str:
    """Write the text of a card.

    Args:
        loaded: the model.
        place: where it was read.
        license: of the export.
        results: what evaluations of this model have measured.
        form: of the export.
        out: where it will lie; of a folder of this machine the name is published.
    """
    source = Path(public_place(place))
    data = ModelCardData(
        license=license.name,
        library_name=form.library,
        tags=["clip", "alignclip"],
        pipeline_tag="zero-shot-image-classification",
    )
    recipe = recipe_of(loaded)
    origin = f"A CLIP model, converted from `{source.name}` by alignclip.\n"
    if "data" in recipe:
        origin = (
            "A CLIP model trained with alignclip (AlignCLIP, https://arxiv.org/abs/2406.17639).\n"
        )
    notes = "\n".join([license.name or "None given.", *(f"- {note}" for note in license.notes)])
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {recipe.get('run_name') or source.stem or 'model'}\n",
        origin,
        f"## Use\n\n```python\n{form.usage_at(public_place(out))}\n```\n",
        "## Model\n",
        _table(_sizes(loaded)),
        f"## Training\n\n{_table(_training_rows(recipe))}" if recipe.get("data") else "",
        f"## Metrics\n\n{results_table(results)}\n" if results else "",
        f"## Licence\n\n{notes}\n",
        f"Written by alignclip {importlib.metadata.version('alignclip')}.\n",
    ]
    return "\n".join(part for part in parts if part)


def _sizes(loaded: Loaded) -> dict[str, Any]:
    config = loaded.config
    vision, text, shared = config.vision_cfg, config.text_cfg, config.shared
    blocks = f"{shared.blocks} blocks" if shared.blocks else "no blocks"
    everything = shared.blocks == -1 and shared.ln_final and shared.projection
    plain = f"ViT, {vision.width} wide, {vision.layers} layers, patches of {vision.patch_size}"
    parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    return {
        "image tower": f"{vision.timm_model_name or plain}, {vision.image_size} pixels",
        "text tower": f"{text.width} wide, {text.layers} layers, {text.context_length} tokens",
        "embedding": config.embed_dim,
        "shared between the towers": "everything" if everything else blocks,
        "parameters": f"{parameters:,.1f} M",
    }


def _training_rows(recipe: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, stream in (recipe["data"].get("streams") or {}).items():
        remote = str((stream or {}).get("remote") or "")
        rows[f"data: {name}"] = public_place(remote) if is_url(remote) else "not published"
    for key in SHOWN_SETTINGS:
        value = public(recipe.get(key))
        if value and isinstance(value, dict):
            rows[key] = ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
        elif value:
            rows[key] = value
    return rows


def _table(rows: dict[str, Any]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"
