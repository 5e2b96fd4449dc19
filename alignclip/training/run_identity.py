"""The settings that make a run what it is, and how two starts of a run differ."""

from __future__ import annotations

import dataclasses
from typing import Any

from alignclip.config.differences import differences
from alignclip.config.reading import to_yaml
from alignclip.config.schema import CLASSES, RunConfig, StartConfig
from alignclip.config.typed import RETIRED
from alignclip.config.yaml_text import natural, parse

# sections and settings with which a rerun would be another run
IDENTITY_SECTIONS = (
    "model", "loss", "data", "optimizer", "scheduler", "algorithms", "global_train_batch_size",
    "seed", "train_subset_num_batches", *(f.name for f in dataclasses.fields(StartConfig)),
)  # fmt: skip
# … except those that only say where and how fast: the same samples in the same order
FREE_SETTINGS = {
    "model.encode_chunk_size", "data.num_workers", "data.prefetch_factor", "data.pin_memory",
    "data.persistent_workers", "data.multiprocessing_context", "data.predownload",
    "data.cache_limit", "data.validate_hash", "data.keep_zip",
}  # fmt: skip
UNSET = "not set"


def identity_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List what makes two configurations two different runs, as ``key: before → now``.

    A setting that did not exist yet when ``before`` was written had its present default then.
    """
    old, new = with_defaults(before), with_defaults(now)
    return changes(
        {key: value for key, value in old.items() if _makes_another_run(key, new)},
        {key: value for key, value in new.items() if _makes_another_run(key, new)},
    )


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the differences of two flat dicts, as ``key: old → new``.

    A text is the same with and without quotation marks: earlier versions took some texts for
    numbers. Null is the same as no such key, except of a class, which null leaves in.
    """

    def same(key: str, a: Any, b: Any) -> bool:
        is_class = key.split(".")[0] in CLASSES
        neither_is_set = all(value in (None, UNSET) for value in (a, b))
        return str(a) == str(b) or a == b or (neither_is_set and not is_class)

    every = dict.fromkeys(sorted(old | new), UNSET) | new
    found = differences(old, every, UNSET, same)
    return [f"{key}: {before} → {now}" for key, (before, now) in found.items()]


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Flatten a configuration to ``section.key: value``, over the defaults of today."""
    flat = _flatten(nested(to_yaml(RunConfig()))) | _flatten(values)
    return {key: value for key, value in flat.items() if key not in RETIRED}


def nested(text: str) -> dict[str, Any]:
    """Read YAML text as nested dicts.

    Raises:
        ValueError: it is no YAML, or has no keys and values.
    """
    values = natural(parse(text))
    if not isinstance(values, dict):
        raise ValueError("it does not hold keys and values")
    return values


def _makes_another_run(key: str, values: dict[str, Any]) -> bool:
    if key.split(".")[0] not in IDENTITY_SECTIONS or key in FREE_SETTINGS:
        return False
    stream, _, name = key.rpartition(".")
    is_cache = name == "local" and stream.startswith("data.streams.")
    # a remote stream's local copy may move; without a remote the local folder is the set itself
    return not (is_cache and values.get(f"{stream}.remote"))


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
