"""Locked towers (LiT, https://arxiv.org/abs/2111.07991): parameters that stay as the run finds them.

open_clip's own methods choose them: ``lock_image`` and ``lock_text`` lock a tower but for its topmost groups, of which
``lock_image_unlocked_groups`` and ``lock_text_unlocked_layers`` say how many. logit_scale is always trained.
"""

from __future__ import annotations

from alignclip.config import StartConfig
from alignclip.encoders import CLIP
from alignclip.errors import UserError, one_line
from alignclip.fetching import few


def lock_towers(model: CLIP, config: StartConfig) -> None:
    """Take the locked towers' parameters out of training, for before the optimizer and DDP or FSDP see them.

    Raises:
        UserError: a lock that would hold a module of the other tower too, or nothing, or everything.
    """
    if config.lock_image:
        count = config.lock_image_unlocked_groups
        try:
            model.lock_image_tower(unlocked_groups=count, freeze_bn_stats=config.lock_image_freeze_bn_stats)
        except (RuntimeError, AttributeError, KeyError, NotImplementedError) as error:  # of timm's towers
            raise UserError(f"lock_image_unlocked_groups={count}: this tower can't: {one_line(error)}") from None
        _check(model, "lock_image", "lock_image_unlocked_groups", count)
    if config.lock_text:
        before = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        count = config.lock_text_unlocked_layers
        model.lock_text_tower(unlocked_layers=count)
        _check(model, "lock_text", "lock_text_unlocked_layers", count, before)
    if all(name == "logit_scale" for name, parameter in model.named_parameters() if parameter.requires_grad):
        raise UserError("lock_image and lock_text leave nothing but logit_scale to train; unlock one of them")


def _check(model: CLIP, lock: str, key: str, count: int, before: frozenset[str] | set[str] = frozenset()) -> None:
    locked: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad and name not in before:
            locked.setdefault(id(parameter), []).append(name)
    if not locked:
        raise UserError(f"{key}={count} leaves nothing of the tower locked; lower it, or set {lock}=false")
    if shared := [names[0] for names in locked.values() if len(names) > 1]:
        raise UserError(
            f"{lock} would lock {len(shared)} tensors for both towers, which share them ({few(shared)}); "
            f"raise {key} above the shared modules, or share less with model.shared"
        )
