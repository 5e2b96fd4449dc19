"""Composer's algorithms, callbacks and loggers by their class names, checked when the YAML is read."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import typing
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
from alignclip.errors import UserError, nearest
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
CLIPPING_TYPES = ("norm", "value", "adaptive")


def check(config: RunConfig) -> RunConfig:
    """Refuse unknown classes and arguments of ``algorithms``, ``callbacks`` and ``loggers``, naming the nearest.

    Loggers whose package is missing, too.

    Returns:
        the configuration with the arguments' texts converted to what the classes' annotations ask for.

    Raises:
        UserError: the first one found.
    """
    typed_sections: dict[str, dict[str, Arguments | None]] = {
        section: {} for section, *_ in _SECTIONS
    }
    for section, module, base in _SECTIONS:
        classes: dict[str, type[Any]] = _classes(module, base)
        for name, arguments in getattr(config, section).items():
            if name not in classes:
                home = [s for s, m, b in _SECTIONS if name in _classes(m, b)]
                if home:
                    raise UserError(f"{section}: {name} is one of the {home[0]}: {home[0]}.{name}")
                raise UserError(
                    f"{section}: no class '{name}' in {module.__name__}; {nearest(name, classes)}"
                )
            if section == "algorithms" and name in REFUSED_ALGORITHMS:
                raise UserError(f"algorithms.{name} is refused: {REFUSED_ALGORITHMS[name]}")
            _check_arguments(f"{section}.{name}", classes[name], arguments or {})
            if (
                name == "GradientClipping"
                and (kind := str((arguments or {}).get("clipping_type"))) not in CLIPPING_TYPES
            ):
                raise UserError(
                    f"algorithms.{name}.clipping_type={kind}: {nearest(kind, CLIPPING_TYPES)}"
                )
            if name in _EXTRAS and importlib.util.find_spec(_EXTRAS[name]) is None:
                hint = f"pip install 'alignclip[{_EXTRAS[name]}]'"
                raise UserError(f"{section}.{name} needs a package that is not installed: {hint}")
            typed_sections[section][name] = arguments and typed(
                f"{section}.{name}", classes[name], arguments
            )
    return dataclasses.replace(config, **typed_sections)  # type: ignore[arg-type]


def typed(where: str, cls: type, arguments: Arguments) -> Arguments:
    """A class's arguments as its annotations ask for them: a text stays as it was typed, ``~`` is home.

    Raises:
        UserError: an argument of another type.
    """
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # names that the class imports for type checkers alone
        hints = {name: p.annotation for name, p in inspect.signature(cls).parameters.items()}
    known = {
        name: hint
        for name, hint in hints.items()
        if not isinstance(hint, str) and hint is not inspect._empty
    }
    return {
        name: paths.expand_all(
            convert(value, known[name], f"{where}.{name}") if name in known else natural(value),
            f"{where}.{name}",
        )
        for name, value in arguments.items()
    }


def build(config: RunConfig, section: str) -> list[Any]:
    """Instances of everything that a section names, in its order.

    Raises:
        UserError: a package is missing, or the class refuses its arguments.
    """
    module, base = next((m, b) for s, m, b in _SECTIONS if s == section)
    classes: dict[str, type[Any]] = _classes(module, base)
    built = []
    for name, arguments in getattr(config, section).items():
        arguments = typed(f"{section}.{name}", classes[name], arguments or {})
        try:
            built.append(RESUMABLE_LOGGERS.get(name, classes[name])(**arguments))
        except MissingConditionalImportError as error:
            hint = " ".join(str(error).split())
            raise UserError(
                f"{section}.{name} needs a package that is not installed: {hint}"
            ) from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{section}.{name}: {' '.join(str(error).split())}") from None
    return built


def _classes(module: ModuleType, base: type[T]) -> dict[str, type[T]]:
    """The classes of a module that a YAML may name; checkpoints are saved by ``save_folder`` and its neighbours."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value is not base
        and name != "CheckpointSaver"
    }


def _check_arguments(where: str, cls: type, arguments: Arguments) -> None:
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


# Packages, and our extras of the same names: known before data and model are built, and Composer would name its own.
_EXTRAS = {"TensorboardLogger": "tensorboard", "WandBLogger": "wandb"}
_SECTIONS: tuple[tuple[str, ModuleType, type], ...] = (
    ("algorithms", composer.algorithms, Algorithm),
    ("callbacks", composer.callbacks, Callback),
    ("loggers", composer.loggers, LoggerDestination),
)
