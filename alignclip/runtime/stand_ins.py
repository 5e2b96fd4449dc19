"""Stand-ins for packages that others import at their top and a run never calls.

Composer, Streaming, open_clip and timm import torchmetrics, transformers, Weights & Biases and
others for a base class, a check or an annotation. That takes longer than PyTorch does. While these
packages are imported, a module of :data:`STAND_INS` gives promises instead: a promise imports the
real thing when somebody calls it, derives from it or looks into it.

Afterwards nothing of this is left among the imported modules. Whoever imports a package then gets
the package.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Union

# module -> the classes and functions of it that are promised; any other name imports the module.
# Tested with mosaicml 0.32.1, mosaicml-streaming 0.13.0, open_clip 3.3.0, timm 1.0.31, torch 2.7.0,
# 2.11.0 and 2.15.0.
STAND_INS: dict[str, tuple[str, ...]] = {
    # Composer, for annotations and isinstance
    "torchmetrics": ("Metric", "MetricCollection"),
    "torchmetrics.classification": ("BinaryAccuracy", "MulticlassAccuracy"),
    "composer.metrics": ("CrossEntropy",),
    # Composer's logger for a platform that is Databricks' own
    "mcli": (),
    # Composer, for algorithms that change Hugging Face's BERT
    "transformers": ("BertPreTrainedModel",),
    "transformers.models.bert.modeling_bert": ("BertIntermediate", "BertOutput"),
    # Streaming, for batches of texts; and its classes for well-known sets
    "transformers.feature_extraction_utils": ("BatchFeature",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
    "streaming.multimodal": (),
    "streaming.text": (),
    "streaming.vision": (),
    # open_clip, for models that need transformers
    "open_clip.coca_model": ("CoCa",),
    "open_clip.hf_model": ("HFTextEncoder",),
    # Composer, torch.distributed, torchvision and torch.utils.checkpoint, for torch.compile. A run
    # has it in the end: torch's optimizers import it.
    "torch._dynamo": ("OptimizedModule",),
    "torch._dynamo.external_utils": ("is_compiling",),
    "torch._dynamo.utils": ("is_compile_supported",),
    "torch._functorch._aot_autograd.functional_utils": ("is_fun",),
    # torch._functorch, for graphs that torch.compile cuts
    "networkx": ("DiGraph",),
    # timm, for functions that it offers
    "timm.models": (
        "create_model",
        "get_pretrained_cfg",
        "get_pretrained_cfg_value",
        "group_parameters",
        "is_model",
        "is_model_pretrained",
        "list_models",
        "list_modules",
        "list_pretrained",
        "model_entrypoint",
    ),
    # timm, for a log of its training script
    "wandb": (),
    # Composer, for buckets reached by SFTP
    "paramiko": ("SSHClient",),
    "paramiko.client": ("MissingHostKeyPolicy",),
}


@contextmanager
def stand_ins() -> Iterator[None]:
    """Have the modules of :data:`STAND_INS` promised where this thread imports them in the block.

    A module that has been imported before stays what it is.
    """
    if _finder() is not None:  # this block is inside of another one
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.forget("")


class Promise:
    """A class or function that is imported when somebody uses it.

    ``isinstance`` and ``issubclass`` import nothing: without the module there is no instance.
    """

    def __init__(self, module: str, name: str) -> None:
        self._module, self.__name__, self.__qualname__ = module, name, name

    def _kept(self) -> Any:
        return getattr(_import(self._module), self.__name__)

    def _is_imported(self) -> bool:
        return not isinstance(sys.modules.get(self._module), StandIn | None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the real thing."""
        return self._kept()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # typing, copy and inspect ask everything for these
            raise AttributeError(name)
        return getattr(self._kept(), name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._kept(),)

    def __instancecheck__(self, instance: object) -> bool:
        return self._is_imported() and isinstance(instance, self._kept())

    def __subclasscheck__(self, cls: type) -> bool:
        return self._is_imported() and issubclass(cls, self._kept())

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007  # `self | other` asks this method again

    def __ror__(self, other: Any) -> Any:
        return Union[other, self]  # noqa: UP007


class StandIn(ModuleType):
    """A module that promises some of its names, and is imported for any other one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # the import system and inspect ask
            raise AttributeError(name)
        stands_in = sys.modules.get(self.__name__) is self
        if stands_in and (self.__name__, name) == ("torch._dynamo", "disable"):
            return _disable  # torchvision decorates by it
        if stands_in and name in STAND_INS.get(self.__name__, ()):
            return Promise(self.__name__, name)
        return getattr(_import(self.__name__), name)

    def __dir__(self) -> list[str]:
        return dir(_import(self.__name__))


class _Finder:
    """Finds stand-ins, and makes them.

    Attributes:
        names: of the modules that are stood in for.
    """

    def __init__(self) -> None:
        self.names = {*STAND_INS}
        self._made: set[str] = set()
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a stand-in for a module; None where there is none, or another thread asks."""
        if threading.get_ident() != self._thread:
            return None
        if isinstance(sys.modules.get(name.rpartition(".")[0]), StandIn):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        if name not in self.names:
            return None
        others = (one.find_spec(name, path) for one in sys.meta_path if one is not self)
        if (found := next(filter(None, others), None)) is None:
            return None  # it is not installed
        # torch asks where packages lie that torch.compile leaves alone
        return ModuleSpec(
            name,
            self,  # type: ignore[arg-type]
            origin=found.origin,
            is_package=True,
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the stand-in."""
        self._made.add(spec.name)
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a stand-in has no code."""

    def forget(self, top: str) -> None:
        """Stand in for a module and for all below it no more; for none at all, where it is ""."""
        self.names = {name for name in self.names if not _is_below(name, top)}
        for name in [name for name in self._made if _is_below(name, top)]:
            self._made.remove(name)
            if isinstance(sys.modules.get(name), StandIn):
                del sys.modules[name]
            parent, _, child = name.rpartition(".")
            # torch imports such a module by itself when the name is asked for
            if hasattr(sys.modules.get(parent), "__getattr__"):
                vars(sys.modules[parent]).pop(child, None)


def _disable(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """Do what ``torch._dynamo.disable`` does, at the function's first call.

    Args:
        function: None: return a decorator.
        recursive: as there.
        reason: is for a message of torch.compile alone, and unknown before torch 2.8.
    """
    return sys.modules["torch"]._disable_dynamo(function, recursive)


def _is_below(name: str, top: str) -> bool:
    return not top or f"{name}.".startswith(f"{top}.")


def _finder() -> _Finder | None:
    return next((one for one in sys.meta_path if isinstance(one, _Finder)), None)


def _import(name: str) -> ModuleType:
    """Import what a stand-in stands for, and what it lies in."""
    parts = name.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    first = next((one for one in names if isinstance(sys.modules.get(one), StandIn)), None)
    finder = _finder()
    if first is not None and finder is not None:
        finder.forget(first)
    return importlib.import_module(name)
