"""Parameter groups, optimizer and learning-rate schedule of the published recipe, by timm."""

from __future__ import annotations

import math
import re
from typing import Any

import timm.models
import timm.optim
import torch
from open_clip.timm_model import TimmModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from alignclip.config.schema import OptimizerConfig
from alignclip.errors import UserError, nearest
from alignclip.model.encoders import CLIP

# Of torch's optimizers, those with a kernel that steps all parameters at once. SGD has one, too.
# But where its first step is skipped, the momentum is whatever lay in the memory.
FUSED = (torch.optim.Adam, torch.optim.AdamW)
SECOND_ORDER = {"adahessian"}  # these differentiate the gradients
# of a parameter group; the rest are an optimizer's own counters, which belong to its state
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay", "fused")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group trainable parameters, each once: without weight decay, and with ``weight_decay``.

    Not decayed are parameters of at most one dimension (biases, norms, class embedding, logit
    scale), as in CLIP (https://arxiv.org/abs/2103.00020, section 2.5). Position embeddings are
    decayed: open_clip's models would exempt them by their ``no_weight_decay()``, which is therefore
    not consulted.
    """
    groups: list[dict[str, Any]] = timm.optim.param_groups_weight_decay(model, weight_decay)
    return groups


def layer_depths(model: CLIP) -> dict[nn.Parameter, int]:
    """Count how far each parameter lies below the top of its tower, for ``layer_decay``.

    0 are projections, the norms behind the blocks and logit_scale; then the blocks, from 1 for the
    last, whatever the other tower's number is (a shared block has the same depth in both); below
    the first block the embeddings. In a timm tower the layers are those of the model's own
    ``group_matcher``. With lr · layer_decay^depth as in BEiT (https://arxiv.org/abs/2106.08254)
    and, but for the last norm, :func:`timm.optim.param_groups_layer_decay` on a model with its
    classifier.
    """
    depths = dict.fromkeys(model.parameters(), 0)

    def tower(blocks: nn.Module, *below: nn.Module | nn.Parameter) -> None:
        layers = list(blocks.children())
        for i, block in enumerate(layers):
            depths.update(dict.fromkeys(block.parameters(), len(layers) - i))
        for part in below:
            parameters = [part] if isinstance(part, nn.Parameter) else part.parameters()
            depths.update(dict.fromkeys(parameters, len(layers) + 1))

    tower(model.transformer.resblocks, model.token_embedding, model.positional_embedding)
    visual = model.visual
    if isinstance(visual, TimmModel):
        depths |= _timm_depths(visual.trunk)
    else:
        tower(
            visual.transformer.resblocks,
            *(visual.conv1, visual.class_embedding, visual.positional_embedding, visual.ln_pre),
        )
    return depths


def _timm_depths(trunk: Any) -> dict[nn.Parameter, int]:
    """Count the same in timm's model without its head: 1 is its last block.

    timm counts what lies behind the blocks, where its matcher says so, to the last of them; here it
    is at 0.
    """
    from timm.models._manipulate import MATCH_PREV_GROUP

    matcher = trunk.group_matcher(coarse=False)
    layers = timm.models.group_parameters(trunk, matcher, reverse=True)
    patterns: list[tuple[str, Any]] = []
    for given in matcher.values() if isinstance(matcher, dict) else ():
        patterns += given if isinstance(given, (list, tuple)) else [(given, None)] if given else []
    top = max(layers.values())

    def is_above(name: str) -> bool:
        """Tell whether a parameter of the last layer follows a block, or is matched by nothing."""
        suffix = next(
            (suffix for pattern, suffix in patterns if re.match(pattern, name)), MATCH_PREV_GROUP
        )
        return bool(patterns) and layers[name] == top and suffix == MATCH_PREV_GROUP

    above = {name for name in layers if is_above(name)}
    last = max((layer for name, layer in layers.items() if name not in above), default=top)
    return {
        trunk.get_parameter(name): 0 if name in above else last + 1 - layer
        for name, layer in layers.items()
    }


def decay_by_layer(
    groups: list[dict[str, Any]], depths: dict[nn.Parameter, int], lr: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Split parameter groups by depth, with lr · layer_decay^depth each, the full rate first."""
    split: dict[tuple[int, int], dict[str, Any]] = {}
    for i, group in enumerate(groups):
        for parameter in group["params"]:
            depth = depths[parameter]
            at = split.setdefault(
                (depth, i), {**group, "lr": lr * layer_decay**depth, "params": []}
            )
            at["params"].append(parameter)
    return [split[key] for key in sorted(split)]


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, is_on_gpu: bool = False
) -> torch.optim.Optimizer:
    """Build the optimizer that ``config.opt`` names in timm, by layer if so configured.

    The first group has the full learning rate
    (:class:`alignclip.training.callbacks.TrainingMonitor` logs it).

    ``betas`` and ``eps`` reach the optimizer as they stand, so they are worth a look when ``opt``
    changes. One that the optimizer doesn't take is left out while it is at its default, and refused
    when it was set.

    Raises:
        UserError: an unknown name (with the nearest), one that isn't installed, or an argument it
            doesn't take.
    """
    try:
        info = timm.optim.get_optimizer_info(config.opt)
    except ValueError:
        names = [str(name) for name in timm.optim.list_optimizers()]
        raise UserError(
            f"optimizer.opt: unknown '{config.opt}'; {nearest(config.opt, names)}"
        ) from None

    if config.opt.lower() in SECOND_ORDER:
        raise UserError(
            f"optimizer.opt: {config.opt} needs gradients of gradients, which training doesn't "
            "compute"
        )

    default = OptimizerConfig()
    kwargs: dict[str, Any] = {}
    if info.has_eps:
        kwargs["eps"] = config.eps
    elif config.eps != default.eps:
        raise UserError(f"optimizer.eps: {config.opt} takes none; leave it out")
    if info.has_betas and len(config.betas) == info.num_betas:
        kwargs["betas"] = tuple(config.betas)
    elif config.betas != default.betas:
        takes = f"{info.num_betas} values" if info.has_betas else "none"
        raise UserError(f"optimizer.betas: {config.opt} takes {takes}, not {config.betas}")

    can_fuse = info.opt_class in FUSED
    if config.fused and not can_fuse:
        raise UserError(f"optimizer.fused: {config.opt} has no fused kernel; leave it out")
    if can_fuse and (is_on_gpu if config.fused is None else config.fused):
        kwargs["fused"] = True

    groups = parameter_groups(model, config.weight_decay)
    if config.layer_decay is not None:
        assert isinstance(model, CLIP)
        groups = decay_by_layer(groups, layer_depths(model), config.lr, config.layer_decay)
    try:
        return timm.optim.create_optimizer_v2(
            groups, opt=config.opt, lr=config.lr, weight_decay=0.0, **kwargs
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise UserError(f"optimizer: {config.opt} can't be built: {error}") from None


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each parameter group, for :func:`restore_settings`."""
    return [
        {key: group[key] for key in SETTINGS if key in group} for group in optimizer.param_groups
    ]


def restore_settings(
    optimizer: torch.optim.Optimizer, scheduler: LambdaLR, settings: list[dict[str, Any]]
) -> tuple[float, float]:
    """Give an optimizer that a checkpoint was loaded into the settings and rates of *this* run.

    A checkpoint brings the rate that its own schedule has for the next step, and its own base
    rates. The next step would use that rate, whatever the length of this run is; and a rate set
    anew would have no effect at all.

    Args:
        optimizer: after the checkpoint was loaded.
        scheduler: of this run, with the checkpoint's step count.
        settings: :func:`group_settings` the optimizer before.

    Returns:
        the rate of the first group's next step as the checkpoint has it, and as this run's schedule
        has it.
    """
    before = float(optimizer.param_groups[0]["lr"])
    for group, configured in zip(optimizer.param_groups, settings, strict=True):
        group.update(configured)
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state.get(parameter, {})
            if "step" in state:  # a fused kernel counts on the device, the others on the host
                state["step"] = state["step"].to(parameter.device, torch.float32)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    rates = [
        base * of(scheduler.last_epoch)
        for base, of in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return before, float(rates[0])


def lr_multiplier(step: int, warmup_steps: int, total_steps: int, alpha_f: float = 0.0) -> float:
    """Return the factor on the base learning rate in optimizer step ``step``, counted from 0.

    A linear warm-up, (step + 1) / warmup_steps, so that the first step already learns and step
    warmup_steps - 1 has the full rate; then half a cosine from 1 to ``alpha_f`` at ``total_steps``,
    and ``alpha_f`` thereafter. With alpha_f = 0, open_clip's and the published schedule.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if step >= total_steps:
        return alpha_f
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
    return alpha_f + (1 - alpha_f) * cosine
