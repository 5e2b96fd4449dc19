"""Locked towers (LiT, https://arxiv.org/abs/2111.07991): parameters that a run doesn't train.

open_clip's own methods choose them: ``lock_image`` and ``lock_text`` lock a tower except its
topmost groups, whose number is ``lock_image_unlocked_groups`` or ``lock_text_unlocked_layers``.
logit_scale is always trained, and so is the projection behind a timm tower.
"""

from __future__ import annotations

from timm.layers import freeze_batch_norm_2d
from torch import nn

from alignclip.config.schema import StartConfig
from alignclip.errors import UserError, few, one_line
from alignclip.model.encoders import CLIP
from alignclip.weights.start_from import StartReport

TIMM_ERRORS = (RuntimeError, AttributeError, KeyError, NotImplementedError)  # of its towers' locks


def lock_towers(model: CLIP, config: StartConfig, start: StartReport | None = None) -> None:
    """Lock towers: before the optimizer and DDP or FSDP see their parameters.

    Args:
        model: the encoders.
        config: says what is locked.
        start: of the weights that a new run starts from; locked parameters have to be among them.

    Raises:
        UserError: a lock that would hold a module of the other tower too, or nothing, or
            everything, or parameters that aren't as they were trained.
    """
    locks = (
        ("lock_image", "lock_image_unlocked_groups", model.lock_image_tower),
        ("lock_text", "lock_text_unlocked_layers", model.lock_text_tower),
    )
    for lock, key, lock_tower in locks:
        if not getattr(config, lock):
            continue
        number, before = getattr(config, key), _locked(model)
        try:
            lock_tower(number)
        except TIMM_ERRORS as error:
            raise UserError(f"{key}={number}: this tower can't: {one_line(error)}") from None
        _check_locked(model, lock, f"{key}={number}", _locked(model) - before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if trained == {"logit_scale"}:
        raise UserError(
            "lock_image and lock_text leave nothing but logit_scale to train; unlock one of them"
        )
    if start is not None:
        _check_starting_weights(_locked(model), config, start)
    if config.lock_image_freeze_bn_stats:
        _freeze_batch_norms(model.visual)


def _locked(model: CLIP) -> set[str]:
    """Return the locked parameters, by every name that they have."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if not parameter.requires_grad}


def _check_locked(model: CLIP, lock: str, setting: str, locked: set[str]) -> None:
    """Refuse a lock of nothing, and a lock of a parameter that both towers share.

    Raises:
        UserError: says which setting to change.
    """
    key = setting.partition("=")[0]
    if not locked:
        raise UserError(
            f"{setting} leaves nothing of the tower locked; lower it, or set {lock}=false"
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in locked:
            names.setdefault(id(parameter), []).append(name)
    if shared := [several[0] for several in names.values() if len(several) > 1]:
        raise UserError(
            f"{lock} would lock {len(shared)} tensors for both towers, which share them "
            f"({few(shared)}); raise {key} above the shared modules, "
            "or share less with model.shared"
        )


def _check_starting_weights(locked: set[str], config: StartConfig, start: StartReport) -> None:
    """Refuse a lock of a tower that would have to learn more to fit its weights or its input.

    Raises:
        UserError: the tower lacks weights, or has another input or activation than in training.
    """
    for lock, changes in (
        ("lock_image", [*start.pixels, *start.activation]),
        ("lock_text", start.activation),
    ):
        if getattr(config, lock) and changes:
            raise UserError(f"{lock} keeps a tower as {config.pretrained} has it, but {changes[0]}")
    if random := sorted(locked - start.loaded):
        raise UserError(
            f"lock_image or lock_text would lock {len(random)} tensors that {config.pretrained} "
            f"doesn't have in this shape, so that they stayed random ({few(random)}); "
            "unlock more groups, or change model to what it has"
        )


def _freeze_batch_norms(tower: nn.Module) -> None:
    """Make the locked batch norms of a timm tower use their statistics also in training.

    open_clip's own freeze loses the activation that many of timm's batch norms include. timm's
    freeze keeps the activation.
    """
    for name, module in list(tower.named_modules()):
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                parent, _, child = name.rpartition(".")
                setattr(tower.get_submodule(parent), child, freeze_batch_norm_2d(module))
