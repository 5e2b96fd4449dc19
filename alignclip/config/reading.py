"""A YAML file and ``key.sub=value`` overrides → :class:`alignclip.config.schema.RunConfig`.

An unknown key or a wrong type is an error that names the place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignclip.config import yaml_text
from alignclip.config.checks import check_evaluators, intervals, validate, validate_evaluation
from alignclip.config.interpolation import resolved
from alignclip.config.keys import keys_of, members_of, section_of
from alignclip.config.overrides import (
    OverrideLine,
    Parts,
    get,
    put,
    read_line,
    refuse_dashes,
    setting_at,
)
from alignclip.config.schema import EvaluateConfig, EvaluatorConfig, ModelConfig, RunConfig
from alignclip.config.setting import check_settings, rule_of
from alignclip.config.typed import (
    SettingError,
    UnknownKeyError,
    convert_section,
)
from alignclip.config.yaml_text import Tree
from alignclip.errors import UserError, check_place, nearest, one_line
from alignclip.paths import expand
from alignclip.storage import read_text

T = TypeVar("T")

ON_THE_LINE = "the command line"
NAMED = (("data", "streams"), ("evaluators",))  # sections of names that a person chooses

# Settings of Composer, Streaming or open_clip that would change what is trained without a word.
REFUSED = {
    "device_train_microbatch_size": "microbatches would shrink the set of negatives of a "
    "contrastive loss; set model.encode_chunk_size instead: chunks of that size are encoded and "
    "recomputed, the loss sees the whole batch",
    "accumulate_train_batch_on_tokens": "a contrastive loss sees the whole batch at once; set "
    "model.encode_chunk_size",
    "eval_interval": "each of the evaluators has its own: evaluators.NAME.interval",
    "scale_schedule_ratio": "the schedule follows max_duration and scheduler.t_warmup; change "
    "these",
    "data.batch_size": "set global_train_batch_size, the batch over all ranks",
    "data.local": "name the set under data.streams, e.g. data.streams.cc12m.local=/tmp/cc12m",
    "data.remote": "name the set under data.streams, e.g. "
    "data.streams.cc12m.remote=s3://bucket/cc12m",
    "parallelism_config.fsdp2.load_monolith_rank0_only": "under FSDP2 the other ranks would keep "
    "their random weights; full checkpoints are read on every rank",
    "parallelism_config.fsdp2.state_dict_type": "checkpoints are full ones, one file whatever the "
    "number of processes",
    "parallelism_config.fsdp": "FSDP1 needs a module to run once a step, which shared blocks do "
    "not; use parallelism_config.fsdp2",
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the configuration of a pretraining run: a YAML file and ``key.sub=value`` over it.

    The file may be a URL, e.g. of the ``config.yaml`` that another run has left in its bucket.
    ``data.streams.NAME=null`` takes a set out that the file has, ``evaluators.NAME=null`` an
    evaluator; ``data.streams=null`` and ``evaluators=null`` take all of them out.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest one), a wrong type or
            range.
    """
    return _read_config(path, overrides, RunConfig, validate)


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read the configuration of ``evaluate.py``, as :func:`load` reads a run's.

    Raises:
        UserError: as :func:`load`.
    """
    return _read_config(path, overrides, EvaluateConfig, validate_evaluation)


def evaluators_of(
    given: Mapping[str, Mapping[str, Any] | EvaluatorConfig],
) -> dict[str, EvaluatorConfig]:
    """Return evaluators given in Python with the keys and values that they have in a file.

    Raises:
        UserError: as :func:`load_evaluation`.
    """
    plain = {
        name: {key: value for key, value in plain_values(one).items() if value is not None}
        if isinstance(one, EvaluatorConfig)
        else dict(one)
        for name, one in given.items()
    }
    with _errors_of(lambda key: "evaluators", EvaluateConfig):
        text = OmegaConf.to_yaml(OmegaConf.create({"evaluators": plain}))
        config = convert_section(yaml_text.parse(text), EvaluateConfig, "")
    check_settings(config, unused=intervals(config))
    found: dict[str, EvaluatorConfig] = config.evaluators
    check_evaluators(found)
    return found


def model_section(text: str) -> ModelConfig:
    """Read the ``model`` section of a YAML text, which may have others or no other one.

    Raises:
        ValueError: the text is not YAML, has no such section, or one with unknown keys or values of
            another type.
    """
    content = yaml_text.parse(text)
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError("there is no model section")
    try:
        config: ModelConfig = convert_section(section, ModelConfig, "model")
    except UserError as error:
        raise ValueError(one_line(error)) from None
    return config


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML text, every default spelled out.

    :func:`load` reads the text back to an equal configuration.
    """
    return yaml_text.dump(plain_values(config))


def plain_values(section: Any) -> Tree:
    """Return a dataclass as the nested dicts that a YAML has; what is plugged in has own keys."""
    values: Tree = {}
    for one in dataclasses.fields(section):
        value = getattr(section, one.name)
        value = _plain_value(value)
        values |= (value or {}) if rule_of(one).plugged else {one.name: value}
    return values


def _plain_value(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain_values(value)
    if isinstance(value, dict):
        return {name: _plain_value(inner) for name, inner in value.items()}
    return [_plain_value(item) for item in value] if isinstance(value, list) else value


def _read_config(
    path: str | Path, overrides: Sequence[str], schema: type[T], check: Callable[[T], None]
) -> T:
    path = expand(str(path), "config file")
    refuse_dashes(overrides)  # before the file: what follows an option is taken for the file
    tree, line = _read_file(path), list(read_line(overrides, schema))
    for parts in _null_names(line, schema):
        if get(tree, parts) is None:  # as "unset" null would change nothing, and it may be a name
            key = ".".join(parts)
            quoted = f"for the name null put it in quotes: {key}=\"'null'\""
            raise UserError(f"{key}=null: it is unset anyway; {quoted}")
    for section in NAMED:
        if (section, None) in line:  # what the line names besides stays
            put(tree, section, None)
            line.remove((section, None))
    from_line: Tree = {}
    for parts, value in line:
        put(tree, parts, value)
        put(from_line, parts, value)
    for section in NAMED:
        _drop_nulls(tree, section)

    def where(key: str) -> str:
        found = get(from_line, key.partition("[")[0].split("."), default=tree)
        return path if found is tree else ON_THE_LINE

    with _errors_of(where, schema):
        config: T = convert_section(resolved(tree, schema), schema, "")
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{error}{_null_hint(line, schema)}") from None
    return config


@contextmanager
def _errors_of(where: Callable[[str], str], schema: type) -> Iterator[None]:
    """Say in one line which key is wrong, and where the key stands."""
    try:
        yield
    except UnknownKeyError as error:
        raise UserError(f"{where(error.key)}: {_unknown(error, schema)}") from None
    except SettingError as error:
        raise UserError(f"{where(error.key)}: {error}") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UserError(f"{where(key)}: {key}: {one_line(error)}") from None


def _unknown(error: UnknownKeyError, schema: type) -> str:
    """Say that a key is refused, stands in another section, or is unknown."""
    if error.key in REFUSED:
        return f"'{error.key}' is refused: {REFUSED[error.key]}"
    name = error.key.rpartition(".")[2]
    elsewhere = [known for known in _all_keys(schema) if known.rpartition(".")[2] == name]
    if len(elsewhere) == 1:
        return f"unknown key '{error.key}'; did you mean '{elsewhere[0]}'?"
    return str(error)


def _all_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield every key of a dataclass and of those below it; not those below a person's names."""
    for name, key in keys_of(schema).items():
        yield f"{prefix}{name}"
        if (section := section_of(key.hint)) is not None:
            yield from _all_keys(section, f"{prefix}{name}.")


def _read_file(path: str) -> Tree:
    check_place("config file", path)
    is_url = "://" in path and "=" not in path  # an override is none
    try:
        text = read_text(path) if is_url else Path(path).read_text(encoding="utf-8")
        content = yaml_text.parse(text)
    except FileNotFoundError:
        if "=" in path:
            example = "yamls/alignclip.yaml"
            raise UserError(
                f"the first argument is the YAML file, e.g. {example}, not '{path}'"
            ) from None
        yamls = [str(p) for p in Path(path).parent.glob("*.yaml")]
        hint = nearest(path, yamls) if yamls else "no YAML lies there"
        raise UserError(f"no config file '{path}': {hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:  # of YAML's parser, and files that are no text
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{path} does not hold keys and values")
    return content or {}


def _drop_nulls(tree: Tree, section: Parts) -> None:
    """Take the names out that are null, so that an override removes what a file has."""
    names = get(tree, section, default=tree)
    if names is None:
        put(tree, section, {})
    elif isinstance(names, dict) and names is not tree:
        for name in [name for name, value in names.items() if value is None]:
            del names[name]


def _nulls(line: OverrideLine) -> Iterator[Parts]:
    """Yield the keys that the command line sets to null, also within a mapping."""
    for parts, value in line:
        if value is None:
            yield parts
        elif isinstance(value, dict):
            yield from _nulls([((*parts, name), inner) for name, inner in value.items()])


def _null_names(line: OverrideLine, schema: type) -> Iterator[Parts]:
    """Yield the keys of optional names that the command line sets to null."""
    for parts in _nulls(line):
        hint, rule = setting_at(schema, parts)
        if rule.name and type(None) in members_of(hint):
            yield parts


def _null_hint(line: OverrideLine, schema: type) -> str:
    """Return what to add to an error where an override has unset a text."""
    for parts in _nulls(line):
        if str in members_of(setting_at(schema, parts)[0]):
            quoted = "for the text null put it in quotes: \"'null'\""
            return f" ({'.'.join(parts)}=null leaves it unset; {quoted})"
    return ""
