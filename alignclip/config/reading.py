"""A YAML file and ``key.sub=value`` overrides → :class:`alignclip.config.schema.RunConfig`.

An unknown key or a wrong type is an error that names the place.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
from omegaconf import DictConfig, OmegaConf

from alignclip.config import typed, yaml_text
from alignclip.config.checks import check_evaluators, validate, validate_evaluation
from alignclip.config.schema import (
    CLASSES,
    NAME,
    PLACE,
    EvaluateConfig,
    EvaluatorConfig,
    ModelConfig,
    RunConfig,
)
from alignclip.errors import UserError, check_place, nearest, one_line
from alignclip.paths import expand
from alignclip.storage import read_text

T = TypeVar("T")
Tree = dict[str, Any]

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
    ``data.streams.NAME=null`` takes a set out that the file has, ``evaluators.NAME=null`` an evaluator;
    ``data.streams=null`` and ``evaluators=null`` take all of them out.

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest one), a wrong type or range.
    """
    return _read(path, overrides, RunConfig, validate)


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluateConfig:
    """Read the configuration of ``evaluate.py``, as :func:`load` reads a run's.

    Raises:
        UserError: as :func:`load`.
    """
    return _read(path, overrides, EvaluateConfig, validate_evaluation)


def evaluators_of(
    given: Mapping[str, Mapping[str, Any] | EvaluatorConfig],
) -> dict[str, EvaluatorConfig]:
    """Return evaluators given in Python with the keys and values that they have in a file.

    Raises:
        UserError: as :func:`load_evaluation`.
    """
    plain = {
        name: {key: value for key, value in dataclasses.asdict(one).items() if value is not None}
        if isinstance(one, EvaluatorConfig)
        else dict(one)
        for name, one in given.items()
    }
    with _one_line("evaluators"):
        layer = yaml_text.parse(OmegaConf.to_yaml(OmegaConf.create({"evaluators": plain})))
    _check_keys(layer, EvaluateConfig, EvaluateConfig, "", "evaluators")
    with _one_line("evaluators"):
        values = OmegaConf.create(_typed(layer, EvaluateConfig), flags=_TEXTS)
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(EvaluateConfig, flags=_TEXTS), values)
        )
    assert isinstance(config, EvaluateConfig)
    expand_places(config)
    check_evaluators(config.evaluators)
    return config.evaluators


def model_section(text: str) -> ModelConfig:
    """The ``model`` section of a YAML text: of a run's ``config.yaml``, or of a file that has no other section.

    Raises:
        ValueError: the text is not YAML, has no such section, or one with unknown keys or values of another type.
    """
    content = yaml_text.parse(text)
    section = content.get("model") if isinstance(content, dict) else None
    if not isinstance(section, dict):
        raise ValueError("there is no model section")
    return build(ModelConfig, section)


def build(schema: type[T], values: Tree) -> T:
    """The dataclass ``schema`` of plain values; what is missing is its default.

    Raises:
        ValueError: an unknown key, or a value of another type.
    """
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema), typed.convert(values, schema, "model")
        )
        config = OmegaConf.to_object(merged)
    except (UserError, omegaconf.errors.OmegaConfBaseException) as error:
        raise ValueError(one_line(error)) from None
    assert isinstance(config, schema)
    return config


def _read(
    path: str | Path, overrides: Sequence[str], schema: type[T], check: Callable[[T], None]
) -> T:
    path = expand(str(path), "config file")
    _check_dashes(overrides)  # before the file: what follows an option is taken for it
    from_file, from_line = _read_file(path), _read_line(overrides, schema)
    merged: Any = OmegaConf.structured(schema, flags=_TEXTS)
    for section in NAMED:
        if f"{section}=null" in overrides:  # what the line names besides stays
            _names(from_file, section).clear()
            _drop_null(from_line, section)
    removed = _nulls(from_file) | _nulls(from_line)
    for where, layer in ((path, from_file), (ON_THE_LINE, from_line)):
        _check_keys(layer, schema, schema, "", where)
        for section, name in removed:
            _names(layer, section).pop(name, None)
        with _one_line(where):
            values = _typed(layer, schema)
        if layer is from_line:
            _check_null_names(layer, schema, merged)
        with _one_line(where):
            merged = OmegaConf.merge(merged, OmegaConf.create(values, flags=_TEXTS))
    with _one_line(path):
        config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    expand_places(config)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{error}{_null_hint(from_line, schema)}") from None
    return config


# OmegaConf merges and resolves ${…}; with this it takes our texts as they are
_TEXTS = {"allow_objects": True}


def _typed(layer: Tree, schema: type) -> Tree:
    """A layer's values by the schema's types; classes' arguments are typed by :mod:`alignclip.training.plugins`."""
    hints = typing.get_type_hints(schema)
    values: Tree = {}
    for key, value in layer.items():
        if key not in CLASSES:
            values[key] = typed.convert(value, hints[key], key)
            continue
        if not isinstance(value, dict):
            raise UserError(
                f"'{key}' holds names of classes with arguments below each, not {value!r}"
            )
        for name, arguments in value.items():
            if not (arguments is None or isinstance(arguments, dict)):
                raise UserError(
                    f"'{key}.{name}' holds arguments with their names, not {arguments!r}"
                )
        values[key] = value
    return values


def _read_file(path: str) -> Tree:
    check_place("config file", path)
    is_url = "://" in path and "=" not in path  # an override is none
    try:
        text = read_text(path) if is_url else Path(path).read_text(encoding="utf-8")
        content = yaml_text.parse(text)
    except UserError:
        raise
    except FileNotFoundError:
        if "=" in path:
            raise UserError(
                f"the first argument is the YAML file, e.g. yamls/alignclip.yaml, not '{path}'"
            ) from None
        yamls = [str(p) for p in Path(path).parent.glob("*.yaml")]
        raise UserError(
            f"no config file '{path}': {nearest(path, yamls) if yamls else 'no YAML lies there'}"
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a YAML file") from None
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except ValueError as error:  # of YAML's parser, and files that are no text
        raise UserError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict | None):
        raise UserError(f"{path} does not hold keys and values")
    return content or {}


def _check_dashes(overrides: Sequence[str]) -> None:
    """Refuse options, which people who come from open_clip may type."""
    for item in overrides:
        if item.startswith("-") and "=" in item:
            raise UserError(f"override '{item}': write '{item.lstrip('-')}', without dashes")
        if item.startswith("-"):
            flags = "docs/migration.md says what open_clip's flags are here"
            raise UserError(
                f"override '{item}': settings are key.sub=value, without dashes; {flags}"
            )


def _read_line(overrides: Sequence[str], schema: type) -> Tree:
    """The overrides as one tree; a later one wins."""
    tree: Tree = {}
    for item in overrides:
        if "=" not in item:
            raise UserError(f"override '{item}' is not of the form key.sub=value")
        key, _, text = item.partition("=")
        parts = [part.strip("[]") for part in re.findall(r"\[[^\]]*\]|[^.\[\]]+", key.strip())]
        if not parts:
            raise UserError(f"override '{item}' has no key before the '='")
        hint, metadata = _setting(schema, parts)
        value = typed.convert_line(text, hint, key.strip(), is_path=PLACE in metadata)
        _put(tree, parts, value)
    return tree


def _put(tree: Tree, parts: Sequence[str], value: Any) -> None:
    """Set a key below others; a section is added to what the overrides before have set in it."""
    for part in parts[:-1]:
        inner = tree.get(part)
        tree[part] = inner = inner if isinstance(inner, dict) else {}
        tree = inner
    before = tree.get(parts[-1])
    if isinstance(before, dict) and isinstance(value, dict):
        for key, inner in value.items():
            _put(before, [key], inner)
    else:
        tree[parts[-1]] = value


def _setting(schema: Any, parts: Sequence[str]) -> tuple[Any, typing.Mapping[str, Any]]:
    """The annotation of a key, and the metadata of its field; Any of what is no key, or a class's argument."""
    hint, metadata = schema, typing.cast("typing.Mapping[str, Any]", {})
    for depth, part in enumerate(parts):
        inner = typed.dataclass_in(hint)
        is_section = inner is not None and not any(
            typing.get_origin(m) is dict for m in typed.members_of(hint)
        )
        if inner is not None and is_section:
            fields = {f.name: f for f in dataclasses.fields(inner)}
            if part not in fields:
                return Any, {}
            hint, metadata = typing.get_type_hints(inner)[part], fields[part].metadata
            if part in CLASSES and depth == 0:
                depths = {0: hint, 1: dict[str, Any] | None}
                return depths.get(len(parts) - 1, Any), {}
        elif values := next(
            (m for m in typed.members_of(hint) if typing.get_origin(m) is dict), None
        ):
            hint = typing.get_args(values)[1]
        else:
            return Any, {}
    return hint, metadata


def _line_nulls(
    layer: Tree, schema: type, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    """The keys of text settings that a layer sets to null."""
    for key, value in layer.items():
        if isinstance(value, dict):
            yield from _line_nulls(value, schema, (*prefix, key))
        elif value is None and str in typed.members_of(_setting(schema, (*prefix, key))[0]):
            yield (*prefix, key)


def _check_null_names(layer: Tree, schema: type, before: Any) -> None:
    """Refuse ``split=null`` where no file names a split: as "unset" it would change nothing, and it may be a name.

    Raises:
        UserError: says how each of both is written.
    """
    for parts in _line_nulls(layer, schema):
        value: Any = before
        for part in parts:
            value = value.get(part) if isinstance(value, DictConfig) else None
        if value is None and NAME in _setting(schema, parts)[1]:
            key = ".".join(parts)
            raise UserError(
                f"{key}=null: it is unset anyway; for the name null put it in quotes: {key}=\"'null'\""
            )


def _null_hint(layer: Tree, schema: type) -> str:
    """What to add to an error where an override has unset a text."""
    nulls = [".".join(parts) for parts in _line_nulls(layer, schema)]
    return (
        f" ({nulls[0]}=null leaves it unset; for the text null put it in quotes: \"'null'\")"
        if nulls
        else ""
    )


def expand_places(section: Any, prefix: str = "") -> None:
    """Write out ``~`` in every setting that the schema marks as a path or URL.

    Raises:
        UserError: a home folder that isn't known.
    """
    for f in dataclasses.fields(section):
        value, key = getattr(section, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            expand_places(value, f"{key}.")
        elif isinstance(value, dict) and f.name not in CLASSES:
            for name, inner in value.items():
                if dataclasses.is_dataclass(inner):
                    expand_places(inner, f"{key}.{name}.")
                elif PLACE in f.metadata:
                    value[name] = expand(inner, f"{key}.{name}")
        elif PLACE in f.metadata and value:
            setattr(section, f.name, expand(value, key))


def _names(layer: Tree, section: str) -> Tree:
    """What a layer has in a section of names, where it has that section at all."""
    values: Any = layer
    for key in section.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _drop_null(layer: Tree, section: str) -> None:
    """Leave a section out of a layer that sets the whole section to null."""
    *above, last = section.split(".")
    for key in above:
        layer = layer.get(key) or {}
    if layer.get(last, {}) is None:
        del layer[last]


def _nulls(layer: Tree) -> set[tuple[str, str]]:
    """The names that a layer sets to null, to take them out of the layers below."""
    return {(s, name) for s in NAMED for name, entry in _names(layer, s).items() if entry is None}


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """OmegaConf's complaints about types, in one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except omegaconf.errors.OmegaConfBaseException as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{where}: {key}{str(error).splitlines()[0]}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML text, every default spelled out; :func:`load` reads it back equal."""
    return yaml_text.dump(dataclasses.asdict(config))


def _check_keys(values: Any, schema: Any, root: type, prefix: str, where: str) -> None:
    """Walk a plain dict beside the dataclass it is meant for and refuse the first key that the dataclass lacks."""
    if not isinstance(values, dict):
        if values is not None and prefix:
            raise UserError(
                f"{where}: '{prefix[:-1]}' is a section with keys of its own, not the value {values!r}"
            )
        return
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        full = f"{prefix}{key}"
        if full in REFUSED:
            raise UserError(f"{where}: '{full}' is refused: {REFUSED[full]}")
        if key not in hints:
            elsewhere = [known for known in _all_keys(root) if known.rpartition(".")[2] == key]
            hint = (
                f"did you mean '{elsewhere[0]}'?"
                if len(elsewhere) == 1
                else nearest(str(key), hints)
            )
            raise UserError(f"{where}: unknown key '{full}'; {hint}")
        inner = typed.dataclass_in(hints[key])
        if inner is None:
            continue
        if typing.get_origin(hints[key]) is dict:
            if value is not None and not isinstance(value, dict):
                raise UserError(
                    f"{where}: '{full}' holds names with settings below each, not {value!r}"
                )
            for name, entry in (value or {}).items():
                _check_keys(entry, inner, root, f"{full}.{name}.", where)
        else:
            _check_keys(value, inner, root, f"{full}.", where)


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    """Every key of a dataclass and of those below it, in full; not those below a name that a person chooses."""
    found = []
    for key, hint in typing.get_type_hints(schema).items():
        inner = None if typing.get_origin(hint) is dict else typed.dataclass_in(hint)
        found += [f"{prefix}{key}"] + (_all_keys(inner, f"{prefix}{key}.") if inner else [])
    return found
