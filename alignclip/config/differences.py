"""The comparison of settings: is this the same run, the same conversion, the same set?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def differences(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    absent: Any = None,
    same: Callable[[str, Any, Any], bool] = lambda key, a, b: bool(a == b),
) -> dict[str, tuple[Any, Any]]:
    """Find the settings that are not what they were: key → value before, value now.

    Args:
        before: the settings as they were, of which others than those of ``now`` don't matter.
        now: the settings that are asked for; the result has their order.
        absent: the value of a setting that was not there before.
        same: whether two values of a setting are one and the same, by the setting's key.
    """
    pairs = {key: (before.get(key, absent), value) for key, value in now.items()}
    return {key: (a, b) for key, (a, b) in pairs.items() if not same(key, a, b)}
