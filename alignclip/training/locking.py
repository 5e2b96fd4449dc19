"""Locked towers (LiT, https://arxiv.org/abs/2111.07991): parameters that stay as the run finds them.

open_clip's own methods choose them: ``lock_image`` and ``lock_text`` lock a tower but for its topmost groups, of which
``lock_image_unlocked_groups`` and ``lock_text_unlocked_layers`` say how many. logit_scale is always trained, and so is
the projection behind a timm tower.
"""

from __future__ import annotations

from timm.layers import freeze_batch_norm_2d
from torch import nn

from alignclip.config.schema import StartConfig
from alignclip.errors import UserError, few, one_line
from alignclip.model.encoders import CLIP
from alignclip.weights.start_from import StartReport


def lock_towers(model: CLIP, config: StartConfig, start: StartReport | None = None) -> None:
    """Take the locked towers' parameters out of training, for before the optimizer and DDP or FSDP see them.

    Args:
        start: of the weights that a new run starts from; what is locked has to be theirs.

    Raises:
        UserError: a lock that would hold a module of the other tower too, or nothing, or everything, or what isn't
            as it was trained.
    """
    whole = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if config.lock_image:
        count = config.lock_image_unlocked_groups
        try:
            model.lock_image_tower(unlocked_groups=count)
        except (
            RuntimeError,
            AttributeError,
            KeyError,
            NotImplementedError,
        ) as error:  # of timm's towers
            raise UserError(
                f"lock_image_unlocked_groups={count}: this tower can't: {one_line(error)}"
            ) from None
        _check(model, "lock_image", "lock_image_unlocked_groups", count)
    if config.lock_text:
        before = {
            name for name, parameter in model.named_parameters() if not parameter.requires_grad
        }
        count = config.lock_text_unlocked_layers
        model.lock_text_tower(unlocked_layers=count)
        _check(model, "lock_text", "lock_text_unlocked_layers", count, before)
    trained = {
        name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad
    }
    if trained == {"logit_scale"}:
        raise UserError(
            "lock_image and lock_text leave nothing but logit_scale to train; unlock one of them"
        )
    if start is not None:
        _check_start(whole - trained, config, start)
    if config.lock_image_freeze_bn_stats:
        _freeze_batch_norms(model.visual)


def _check_start(locked: set[str], config: StartConfig, start: StartReport) -> None:
    """A locked tower can't learn what it lacks, nor get used to another input or activation than it was trained with.

    Raises:
        UserError: it would have to.
    """
    for lock, others in (
        ("lock_image", [*start.pixels, *start.activation]),
        ("lock_text", start.activation),
    ):
        if getattr(config, lock) and others:
            raise UserError(f"{lock} keeps a tower as {config.pretrained} has it, but {others[0]}")
    if random := sorted(locked - start.loaded):
        raise UserError(
            f"lock_image or lock_text would lock {len(random)} tensors that {config.pretrained} doesn't have in this "
            f"shape, so that they stayed random ({few(random)}); unlock more groups, or change model to what it has"
        )


def _freeze_batch_norms(tower: nn.Module) -> None:
    """Make the locked batch norms of a tower of timm's use the statistics that they have, also in training.

    open_clip's own freeze loses the activation that many of timm's batch norms include; timm's keeps it.
    """
    for name, module in list(tower.named_modules()):
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                parent, _, child = name.rpartition(".")
                setattr(tower.get_submodule(parent), child, freeze_batch_norm_2d(module))


def _check(
    model: CLIP, lock: str, key: str, count: int, before: frozenset[str] | set[str] = frozenset()
) -> None:
    locked: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad and name not in before:
            locked.setdefault(id(parameter), []).append(name)
    if not locked:
        raise UserError(
            f"{key}={count} leaves nothing of the tower locked; lower it, or set {lock}=false"
        )
    if shared := [names[0] for names in locked.values() if len(names) > 1]:
        raise UserError(
            f"{lock} would lock {len(shared)} tensors for both towers, which share them ({few(shared)}); "
            f"raise {key} above the shared modules, or share less with model.shared"
        )
