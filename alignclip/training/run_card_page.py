"""``run.md``: a run's card for people, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alignclip.config.metrics import arrow, metric_named
from alignclip.training.history import PAGE, PICTURE
from alignclip.training.limits import percent
from alignclip.training.pace import duration
from alignclip.training.run_card import Evaluation, Hours, RunCard

Cells = Sequence[str]


def card_text(card: RunCard) -> str:
    """Return the text of a run's card."""
    parts = [
        f"# Run `{card.run_name}`",
        f"{_status(card)}. `config.yaml` has every setting, `starts.json` every start.",
        _markdown_table(("", ""), _facts(card)),
        "## Time",
        _markdown_table(("", "time", "share"), _times(card.hours)),
        "## Losses",
        _markdown_table(
            ("", "last"), ((name, _number(value)) for name, value in card.losses.items())
        ),
    ]
    if card.curves:
        parts += [f"![learning curves]({PICTURE})", f"[{PAGE}]({PAGE}) has the same curves."]
    if card.evaluations:
        rows = (row for name, one in card.evaluations.items() for row in _metrics(name, one))
        parts += ["## Evaluation", _markdown_table(("evaluator", "batch", "metric", "value"), rows)]
    parts += [
        "## Starts",
        _markdown_table(("time", "after batch", "ranks", "device", "commit"), _starts(card)),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in card.starts[-1].versions.items())
    parts += ["## Software", versions, f"```\n{card.starts[-1].command}\n```"]
    return "\n\n".join(parts) + "\n"


def _status(card: RunCard) -> str:
    went_on = len(card.starts) - 1
    times = f", in {went_on + 1} starts" if went_on else ""
    return f"{card.status.capitalize()} after {card.batch:,} of {card.of_batches:,} batches{times}"


def _facts(card: RunCard) -> list[Cells]:
    data, hardware, speed = card.data, card.hardware, card.speed
    sets = ", ".join(f"`{name}` ({place})" for name, place in data.sets.items())
    mfu = "" if speed.mfu is None else f", MFU {percent(speed.mfu)}"
    machines = f" on {hardware.machines} machines" if hardware.machines > 1 else ""
    return [
        ("data", f"{sets}: {data.samples:,} samples"),
        ("seen", f"{speed.samples_seen:,} samples, {data.epochs:.2f} epochs"),
        ("batch", f"{data.global_train_batch_size:,}"),
        *_recipe_rows(card),
        ("hardware", f"{hardware.ranks} × {hardware.device}{machines}"),
        ("machine", f"{hardware.cpu}, {hardware.cores} cores"),
        ("speed", f"{speed.samples_per_second:,.0f} samples/s{mfu}"),
    ]


def _recipe_rows(card: RunCard) -> list[Cells]:
    recipe = card.recipe
    vision, text, shared = recipe.model.vision_cfg, recipe.model.text_cfg, recipe.model.shared
    tower = vision.timm_model_name or f"{vision.layers} blocks of width {vision.width}, patches of "
    tower += "" if vision.timm_model_name else f"{vision.patch_size}"
    blocks = "all" if shared.blocks == -1 else str(shared.blocks)
    are_shared = {
        f"{blocks} blocks": bool(shared.blocks),
        "LayerNorm": shared.ln_final,
        "projection": shared.projection,
    }
    named = ", ".join(name for name, on in are_shared.items() if on) or "nothing"
    loss, optimizer, schedule = recipe.loss, recipe.optimizer, recipe.scheduler
    sides = {"images": loss.separate_image, "texts": loss.separate_text}
    separated = " and ".join(name for name, on in sides.items() if on) or "nothing"
    separation = f" + {loss.beta:g} · separation ({separated})" if loss.beta else ""
    terms = "".join(f" + {name}" for name in loss.terms)
    betas = "/".join(f"{beta:g}" for beta in optimizer.betas)
    return [
        (
            "model",
            f"{recipe.parameters / 1e6:,.1f} M parameters, features of {recipe.model.embed_dim}",
        ),
        ("image tower", f"{vision.image_size} pixels, {tower}"),
        ("text tower", f"{text.context_length} tokens, {text.layers} blocks of width {text.width}"),
        ("shared", named),
        ("loss", f"{loss.alpha:g} · contrastive{separation}{terms}"),
        (
            "optimizer",
            f"{optimizer.opt}, lr {optimizer.lr:g}, betas {betas}, "
            f"eps {optimizer.eps:g}, weight decay {optimizer.weight_decay:g}",
        ),
        (
            "schedule",
            f"{schedule.t_warmup} of warm-up, cosine to {schedule.alpha_f:g} · lr at "
            f"{recipe.max_duration}",
        ),
        ("precision", f"{recipe.precision}, seed {recipe.seed}"),
    ]


def _times(hours: Hours) -> list[Cells]:
    parts = {
        "training": hours.training,
        "of it waiting for data": hours.data_wait,
        "evaluation": hours.evaluation,
        "checkpoints": hours.checkpoints,
        "all": hours.total,
    }
    return [
        (name, duration(3600 * value), percent(value / hours.total))
        for name, value in parts.items()
    ]


def _metrics(name: str, one: Evaluation) -> list[Cells]:
    return [
        (name, f"{one.batch:,}", f"{metric} {arrow(metric)}".strip(), _number(value))
        for metric, value in one.metrics.items()
        if metric_named(metric).watch
    ]


def _starts(card: RunCard) -> list[Cells]:
    return [
        (
            one.time,
            f"{one.batch:,}",
            str(one.world_size),
            one.device,
            f"`{one.git.commit[:12]}`{' + changes' if one.git.dirty else ''}" if one.git else "",
        )
        for one in card.starts
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _markdown_table(head: Cells, rows: Iterable[Cells]) -> str:
    """Return a table; a text may hold a bar."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines)
