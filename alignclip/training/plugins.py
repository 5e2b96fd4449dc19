"""Algorithms, callbacks and loggers by their class names, checked when the YAML is read."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import composer.algorithms
import composer.callbacks
import composer.loggers
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.utils import MissingConditionalImportError

from alignclip import paths
from alignclip.config.schema import RunConfig
from alignclip.config.typed import convert
from alignclip.config.yaml_text import natural
from alignclip.errors import UserError, nearest, one_line
from alignclip.training.speed import SpeedMonitor
from alignclip.training.trackers import RESUMABLE_LOGGERS

T = TypeVar("T")
Arguments = dict[str, Any]

_DICT_BATCH = (
    "it mixes or picks samples of (input, target) batches, and an image–text batch is neither"
)
_WIDTH = "it changes what the image tower can take, and the position embedding has one size"
# Algorithms of Composer that break these models or their objective.
REFUSED_ALGORITHMS = {
    "MixUp": _DICT_BATCH,
    "CutMix": _DICT_BATCH,
    "CutOut": _DICT_BATCH,
    "LabelSmoothing": _DICT_BATCH,
    "SelectiveBackprop": _DICT_BATCH,
    "RandAugment": "set the crop under data.scale and data.ratio instead",
    "AugMix": "set the crop under data.scale and data.ratio instead",
    "ColOut": _WIDTH,
    "ProgressiveResizing": _WIDTH,
    "SeqLengthWarmup": "captions are already cut to the longest of the batch",
    "Alibi": "it knows Hugging Face's language models only",
    "GatedLinearUnits": "it knows Hugging Face's BERT only",
    "NoOpModel": "it trains nothing",
}
# Classes of ours that do better under a name of Composer's
OWN_CLASSES: dict[str, type[Any]] = {**RESUMABLE_LOGGERS, "SpeedMonitor": SpeedMonitor}
CLIPPING_TYPES = ("norm", "value", "adaptive")


def check(config: RunConfig) -> RunConfig:
    """Refuse unknown classes and arguments of ``algorithms``, ``callbacks`` and ``loggers``.

    Returns:
        the configuration with the arguments converted to what the classes' annotations ask for.

    Raises:
        UserError: the first one found, with the nearest name; or a package that is missing.
    """
    sections: dict[str, Any] = {}
    for section in _SECTIONS:
        named = getattr(config, section).items()
        sections[section] = {
            name: resolve(section, name, given)[1] or given for name, given in named
        }
    return dataclasses.replace(config, **sections)


def resolve(section: str, name: str, given: Arguments | None) -> tuple[type[Any], Arguments]:
    """Return the class that a section names, and its arguments by the class's annotations.

    Raises:
        UserError: see :func:`check`.
    """
    where, cls, arguments = f"{section}.{name}", find_class(section, name), given or {}
    if section == "algorithms" and name in REFUSED_ALGORITHMS:
        raise UserError(f"{where} is refused: {REFUSED_ALGORITHMS[name]}")
    _check_signature(where, cls, arguments)
    kind = str(arguments.get("clipping_type"))
    if name == "GradientClipping" and kind not in CLIPPING_TYPES:
        raise UserError(f"{where}.clipping_type={kind}: {nearest(kind, CLIPPING_TYPES)}")
    if name in _EXTRAS and importlib.util.find_spec(_EXTRAS[name]) is None:
        hint = f"pip install 'alignclip[{_EXTRAS[name]}]'"
        raise UserError(f"{where} needs a package that is not installed: {hint}")
    return cls, typed(where, cls, arguments)


def typed(where: str, cls: type, arguments: Arguments) -> Arguments:
    """Convert a class's arguments to what its annotations ask for; ``~`` is home.

    Raises:
        UserError: an argument of another type.
    """
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except Exception:  # names for type checkers alone, and annotations that can't be evaluated
        hints = {name: p.annotation for name, p in inspect.signature(cls).parameters.items()}
    known = {
        name: hint
        for name, hint in hints.items()
        if not isinstance(hint, str) and hint is not inspect._empty
    }
    return {
        name: paths.expand_all(
            _convert(value, known[name], f"{where}.{name}") if name in known else natural(value),
            f"{where}.{name}",
        )
        for name, value in arguments.items()
    }


def _convert(value: Any, hint: Any, key: str) -> Any:
    try:
        return convert(value, hint, key)
    except UserError:
        raise
    except Exception as error:  # of a person's dataclass
        raise UserError(f"{key}: {type(error).__name__}: {one_line(error)}") from None


def instances(config: RunConfig, section: str) -> list[Any]:
    """Make an instance of every class that a section names, in the section's order.

    Raises:
        UserError: a package is missing, or the class refuses its arguments.
    """
    built = []
    for name, arguments in getattr(config, section).items():
        cls, arguments = resolve(section, name, arguments)
        try:
            built.append(OWN_CLASSES.get(name, cls)(**arguments))
        except MissingConditionalImportError as error:
            hint = " ".join(str(error).split())
            raise UserError(
                f"{section}.{name} needs a package that is not installed: {hint}"
            ) from None
        except UserError:
            raise
        except Exception as error:  # a person's code raises anything
            said = " ".join(str(error).split())
            if not isinstance(error, TypeError | ValueError) or not said:
                said = f"{type(error).__name__}: {said}"
            raise UserError(f"{section}.{name}: {said}") from None
    return built


def find_class(section: str, name: str) -> type[Any]:
    """Return the class that a section names: Composer's by its name, anyone's as ``module.Class``.

    The module is looked for in the working directory, too.

    Raises:
        UserError: there is no such class; says which one is the nearest.
    """
    classes: dict[str, type[Any]] = _classes(*_SECTIONS[section])
    if name in classes:
        return classes[name]
    if home := [other for other in _SECTIONS if name in _classes(*_SECTIONS[other])]:
        raise UserError(f"{section}: {name} is one of the {home[0]}: {home[0]}.{name}")
    module, base = _SECTIONS[section]
    path, _, class_name = name.rpartition(".")
    if path:
        module = _import_module(path, f"{section}.{name}")
        found = getattr(module, class_name, None)
        if isinstance(found, type) and found.__module__.startswith("composer."):
            # what is known of Composer's classes is known by their short names
            raise UserError(f"{section}: {name} is Composer's: write it as {found.__name__}")
        if isinstance(found, type) and issubclass(found, base):
            return found
        if isinstance(found, type):
            must = f"it must derive from {base.__module__.rpartition('.')[0]}.{base.__name__}"
            raise UserError(f"{section}: {name} is none of the {section}; {must}")
        classes = _classes(module, base)
    hint = nearest(class_name, classes)
    raise UserError(f"{section}: no class '{class_name}' in {module.__name__}; {hint}")


def _import_module(path: str, where: str) -> ModuleType:
    """Import a person's module.

    Raises:
        UserError: there is none; says where it was looked for. Or the module can't be imported.
    """
    here = str(Path.cwd())
    if here not in sys.path:  # a script's own folder is there, the working directory is not
        sys.path.append(here)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and f"{path}.".startswith(f"{error.name}."):
            places = f"looked for in {here} and among the installed packages"
            raise UserError(f"{where}: there is no module '{error.name}'; {places}") from None
        raise UserError(f"{where}: {path} can't be imported: {one_line(error)}") from None
    except Exception as error:  # a person's code raises anything
        kind = type(error).__name__
        raise UserError(f"{where}: {path} can't be imported: {kind}: {one_line(error)}") from None


def _classes(module: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """Return the classes of a module that a YAML may name.

    ``CheckpointSaver`` is none of these: ``save_folder`` and its neighbours say what is saved.
    """
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value is not base
        and name != "CheckpointSaver"
    }


def _check_signature(where: str, cls: type, arguments: Arguments) -> None:
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in arguments:
        if key not in parameters:
            raise UserError(f"unknown key '{where}.{key}'; {nearest(key, parameters)}")
    missing = [
        n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    missing = [n for n in missing if n not in arguments]
    if missing:
        raise UserError(f"{where} needs {', '.join(missing)}")


# Packages, and our extras of the same names; Composer would name its own extras.
_EXTRAS = {"TensorboardLogger": "tensorboard", "WandBLogger": "wandb"}
_SECTIONS: dict[str, tuple[ModuleType, type]] = {
    "algorithms": (composer.algorithms, Algorithm),
    "callbacks": (composer.callbacks, Callback),
    "loggers": (composer.loggers, LoggerDestination),
}
