"""A YAML file and ``key.sub=value`` overrides → :class:`alignclip.config.RunConfig`.

An unknown key or a wrong type is an error that names the place.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
from omegaconf import DictConfig, OmegaConf

from alignclip.config import EvaluateConfig, RunConfig
from alignclip.config_checks import validate, validate_evaluation
from alignclip.errors import UserError, check_place, nearest
from alignclip.fetching import read_text

T = TypeVar("T")

ON_THE_LINE = "the command line"
NAMED = ("data.streams", "evaluators")  # sections of names that a person chooses

# Settings that exist in Composer, Streaming or open_clip and would change what is trained without a word.
REFUSED = {
    "device_train_microbatch_size": "microbatches would shrink the set of negatives of a contrastive loss; set "
    "model.encode_chunk_size instead: chunks of that size are encoded and recomputed, the loss sees the whole batch",
    "accumulate_train_batch_on_tokens": "a contrastive loss sees the whole batch at once; set model.encode_chunk_size",
    "eval_interval": "each of the evaluators has its own: evaluators.NAME.interval",
    "scale_schedule_ratio": "the schedule follows max_duration and scheduler.t_warmup; change these",
    "data.batch_size": "set global_train_batch_size, the batch over all ranks",
    "data.local": "name the set under data.streams, e.g. data.streams.cc12m.local=/tmp/cc12m",
    "data.remote": "name the set under data.streams, e.g. data.streams.cc12m.remote=s3://bucket/cc12m",
    "parallelism_config.fsdp2.load_monolith_rank0_only": "under FSDP2 the other ranks would keep their random weights; "
    "full checkpoints are read on every rank",
    "parallelism_config.fsdp2.state_dict_type": "checkpoints are full ones, one file whatever the number of processes",
    "parallelism_config.fsdp": "FSDP1 needs a module to run once a step, which shared blocks do not; use "
    "parallelism_config.fsdp2",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a pretraining run: a YAML file and ``key.sub=value`` overrides over it.

    The file may be a URL, e.g. of the ``config.yaml`` that another run has left in its bucket.
    ``data.streams.NAME=null`` takes a set out that the file has, ``evaluators.NAME=null`` an evaluator.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest one), a wrong type or range.
    """
    config = _read(path, overrides, RunConfig)
    validate(config)
    return config


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read the configuration of ``evaluate.py``, as :func:`load` reads a run's.

    Raises:
        UserError: as :func:`load`.
    """
    config = _read(path, overrides, EvaluateConfig)
    validate_evaluation(config)
    return config


def _read(path: str | Path, overrides: Sequence[str], schema: type[T]) -> T:
    from_file, from_line = _read_file(path), _read_line(overrides)
    merged: Any = OmegaConf.structured(schema)
    removed = _nulls(from_file) | _nulls(from_line)
    for where, layer in ((str(path), from_file), (ON_THE_LINE, from_line)):
        _check_keys(OmegaConf.to_container(layer), schema, schema, "", where)
        for section, name in removed:
            if name in _names(layer, section):
                del OmegaConf.select(layer, section)[name]
        with _one_line(where):
            merged = OmegaConf.merge(merged, layer)
    with _one_line(str(path)):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    return config


def _read_file(path: str | Path) -> DictConfig:
    check_place("config file", str(path))
    is_url = "://" in str(path) and "=" not in str(path)  # an override is none
    try:
        content = OmegaConf.create(read_text(str(path))) if is_url else OmegaConf.load(path)
    except UserError:
        raise
    except FileNotFoundError:
        if "=" in str(path):
            raise UserError(f"the first argument is the YAML file, e.g. yamls/alignclip.yaml, not '{path}'") from None
        yamls = [str(p) for p in Path(path).parent.glob("*.yaml")]
        raise UserError(
            f"no config file '{path}': {nearest(str(path), yamls) if yamls else 'no YAML lies there'}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file") from None
    except Exception as error:  # of YAML's parser, and files that are no text
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} does not hold keys and values")
    return content


def _read_line(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if item.startswith("-"):
            raise UserError(f"override '{item}': write '{item.lstrip('-')}', without dashes")
        if "=" not in item:
            raise UserError(f"override '{item}' is not of the form key.sub=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise UserError(f"overrides {list(overrides)}: {' '.join(str(error).split())}") from None


def _names(layer: DictConfig, section: str) -> dict[str, Any]:
    """What a layer has in a section of names, where it has that section at all."""
    values: Any = OmegaConf.to_container(layer)
    for key in section.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _nulls(layer: DictConfig) -> set[tuple[str, str]]:
    """The names that a layer sets to null, to take them out of the layers below."""
    return {(s, name) for s in NAMED for name, entry in _names(layer, s).items() if entry is None}


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """OmegaConf's complaints about types, in one line."""
    try:
        yield
    except omegaconf.errors.OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{where}: {key}{str(error).splitlines()[0]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, every default spelled out; :func:`load` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_keys(values: Any, schema: Any, root: type, prefix: str, where: str) -> None:
    """Walk a plain dict beside the dataclass it is meant for and refuse the first key that the dataclass lacks."""
    if not isinstance(values, dict):
        if values is not None and prefix:
            raise UserError(f"{where}: '{prefix[:-1]}' is a section with keys of its own, not the value {values!r}")
        return
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in REFUSED:
            raise UserError(f"{where}: '{full}' is refused: {REFUSED[full]}")
        if key not in hints:
            elsewhere = [known for known in _all_keys(root) if known.rpartition(".")[2] == key]
            hint = f"did you mean '{elsewhere[0]}'?" if len(elsewhere) == 1 else nearest(str(key), hints)
            raise UserError(f"{where}: unknown key '{full}'; {hint}")
        inner = _dataclass_in(hints[key])
        if inner is None:
            continue
        if typing.get_origin(hints[key]) is dict:
            if value is not None and not isinstance(value, dict):
                raise UserError(f"{where}: '{full}' holds names with settings below each, not {value!r}")
            for name, entry in (value or {}).items():
                _check_keys(entry, inner, root, f"{full}.{name}.", where)
        else:
            _check_keys(value, inner, root, f"{full}.", where)


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    """Every key of a dataclass and of those below it, in full; not those below a name that a person chooses."""
    found = []
    for key, hint in typing.get_type_hints(schema).items():
        inner = None if typing.get_origin(hint) is dict else _dataclass_in(hint)
        found += [f"{prefix}{key}"] + (_all_keys(inner, f"{prefix}{key}.") if inner else [])
    return found


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that an annotation (X, Optional[X] or dict[str, X]) holds, if it holds one."""
    candidates = (hint, *typing.get_args(hint))
    return next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)
