"""The README.md of an export: what the model is, how it was trained, what it reaches, who may use it how.

The licence is carried along: from the card beside the source, or, for weights in the AlignCLIP authors' format that
come without one, that of their releases. A card is made to be published: no path of this machine is in it.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from alignclip.config.yaml_text import natural, parse
from alignclip.errors import UserError
from alignclip.weights.exports import Format
from alignclip.weights.figures import Figures
from alignclip.weights.licenses import forbids_derivatives, license_of, named_license
from alignclip.weights.loading import Loaded
from alignclip.weights.publishing import is_url, public, public_place

SHOWN = (  # of a run's config.yaml
    "loss", "optimizer", "scheduler", "max_duration", "global_train_batch_size", "precision", "seed", "pretrained",
    "lock_image", "lock_text", "algorithms",
)  # fmt: skip


@dataclass(frozen=True)
class License:
    """A licence's identifier as the Hugging Face Hub writes it, and what a person has to be told about it."""

    name: str | None
    notes: list[str]


def choose_license(loaded: Loaded, place: str, given: str | None) -> License:
    """The licence of an export.

    Raises:
        UserError: ``given`` would replace a licence that forbids derivatives.
    """
    carried = license_of(loaded.card, loaded.kind)
    notes = []
    known = public_place(place)  # notes are printed, and published in the card
    if (
        carried and named_license(loaded.card) is None
    ):  # of the authors' format; it may be somebody's own training
        if given:
            notes.append(
                f"{known} is in the AlignCLIP authors' format, and their weights are {carried}: "
                f"--license {given} is for weights that you trained yourself"
            )
            carried = None
        else:
            notes.append(
                f"{known} is in the AlignCLIP authors' format, and their weights are {carried}; weights of your own: "
                "--license"
            )
    if carried and given and carried.lower() != given.lower():
        if forbids_derivatives(carried):
            raise UserError(
                f"--license {given}: {place} is {carried}, which its derivatives can't leave"
            )
        notes.append(f"{known} says {carried}; the export says {given}")
    name = given or carried
    if name and forbids_derivatives(name):
        notes.append(
            f"{name} forbids passing on derivatives: converted or fine-tuned, keep these weights to yourself"
        )
    recipe = _recipe(loaded)
    start = recipe.get("pretrained") or recipe.get("load_path")
    if start and carried is None:
        notes.append(
            f"this model started from {public_place(str(start))}, whose licence holds for it, too"
        )
    if name is None:
        notes.append(
            "no licence: nobody else may use the model until you name one (--license apache-2.0)"
        )
    return License(name, notes)


def write_card(
    loaded: Loaded, place: str, license: License, figures: Figures | None, form: Format, out: str
) -> str:
    """The text of a card.

    Args:
        loaded: the model.
        place: where it was read.
        license: of :func:`choose_license`.
        figures: what evaluations of this model have measured.
        form: of the export.
        out: where it will lie; of a folder of this machine the name is published.
    """
    known = public_place(place)
    data = ModelCardData(
        license=license.name,
        library_name=form.library,
        tags=["clip", "alignclip"],
        pipeline_tag="zero-shot-image-classification",
    )
    config = loaded.config
    vision, text, shared = config.vision_cfg, config.text_cfg, config.shared
    everything = shared.blocks == -1 and shared.ln_final and shared.projection
    what = (
        "everything" if everything else f"{shared.blocks} blocks" if shared.blocks else "no blocks"
    )
    tower = (
        vision.timm_model_name
        or f"ViT, {vision.width} wide, {vision.layers} layers, patches of {vision.patch_size}"
    )
    parameters = sum(p.numel() for p in loaded.model.parameters()) / 1e6
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        "# " + (_recipe(loaded).get("run_name") or Path(known).stem or "model") + "\n",
        "A CLIP model trained with alignclip (AlignCLIP, https://arxiv.org/abs/2406.17639).\n"
        if "data" in _recipe(loaded)
        else f"A CLIP model, converted from `{Path(known).name}` by alignclip.\n",
        "## Use\n\n```python\n" + form.usage_at(public_place(out)) + "\n```\n",
        "## Model\n",
        _table(
            {
                "image tower": f"{tower}, {vision.image_size} pixels",
                "text tower": f"{text.width} wide, {text.layers} layers, {text.context_length} tokens",
                "embedding": config.embed_dim,
                "shared between the towers": what,
                "parameters": f"{parameters:,.1f} M",
            }
        ),
        _recipe_part(loaded),
        "## Metrics\n\n" + figures.table() + "\n" if figures else "",
        "## Licence\n\n"
        + "\n".join([license.name or "None given.", *(f"- {note}" for note in license.notes)])
        + "\n",
        f"Written by alignclip {importlib.metadata.version('alignclip')}.\n",
    ]
    return "\n".join(part for part in parts if part)


def _recipe(loaded: Loaded) -> dict[str, Any]:
    """A run's configuration; what can't be read is no reason not to export a model that can."""
    if not loaded.recipe:
        return {}
    try:
        content = natural(parse(loaded.recipe))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _recipe_part(loaded: Loaded) -> str:
    recipe = _recipe(loaded)
    data = recipe.get("data") or {}
    if not data:
        return ""
    streams = data.get("streams") or {}
    rows: dict[str, Any] = {}
    for name, stream in streams.items():
        remote = str((stream or {}).get("remote") or "")
        rows[f"data: {name}"] = public_place(remote) if is_url(remote) else "not published"
    for key in SHOWN:
        if value := public(recipe.get(key)):
            shown = (
                {k: v for k, v in value.items() if v is not None}
                if isinstance(value, dict)
                else value
            )
            rows[key] = (
                ", ".join(f"{k} {v}" for k, v in shown.items())
                if isinstance(shown, dict)
                else shown
            )
    return "## Training\n\n" + _table(rows)


def _table(rows: dict[str, Any]) -> str:
    return (
        "\n".join(
            ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
        )
        + "\n"
    )
