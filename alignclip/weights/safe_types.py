"""The one list of what a checkpoint may hold beside numbers, texts and containers.

Each name of the list stands for a function of ours that checks its arguments and makes the same
value as the class or function of that name. Nothing is imported because a file names it.
"""

from __future__ import annotations

import argparse
import datetime
import math
import pathlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from alignclip.weights import safe_numpy
from alignclip.weights.renaming import replace_prefix
from alignclip.weights.safe_pickle import (
    Maker,
    Refused,
    Unknown,
    Unread,
    check_hashable,
    check_sizes,
)

Make = Callable[..., Any]

MOST_DIMENSIONS = 64
MOST_REPEATED = 2**20  # numbers of a tensor that repeats its storage's, as an expanded one does
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "uint16", "uint32", "uint64", "bool", "complex64", "complex128", "float8_e4m3fn",
        "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
    )
}  # fmt: skip
STORAGES = {
    f"{kind}Storage": getattr(torch, dtype)
    for kind, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
        "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
        "Untyped": "uint8", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32",
    }.items()
}  # fmt: skip
SPECIAL_TENSORS = {  # tensors that are no plain numbers: a reader of weights passes over them
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without numbers (of the device 'meta')",
}


@dataclass(eq=False)
class StorageKind:
    """Stand for a class such as ``torch.FloatStorage``."""

    dtype: torch.dtype


@dataclass(eq=False)
class Storage:
    """A storage that lies in a file.

    Attributes:
        data: its bytes.
        dtype: of its numbers.
        truths: whether a tensor takes its numbers for truth values.
    """

    data: torch.UntypedStorage
    dtype: torch.dtype
    truths: bool = False


def tensor(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: bool,
    hooks: Any = None,
    metadata: Any = None,
    *,
    dtype: Any = None,
) -> Tensor:
    """Return a view that lies within its storage, as ``torch._utils._rebuild_tensor_v2``."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype | None):
        raise Refused("a tensor without a storage")
    kind = dtype or storage.dtype
    if hooks or metadata or kind not in DTYPES.values():
        raise Refused("a tensor with hooks or of a kind of its own")
    size, stride = tuple(size), tuple(stride)
    check_sizes(offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS or type(requires_grad) is not bool:
        raise Refused("a tensor with sizes that don't fit its strides")
    held = storage.data.nbytes() // kind.itemsize
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if offset + (last + 1 if all(size) else 0) > held:
        raise Refused(f"a tensor that reaches beyond its storage: {list(size)} of {held} numbers")
    if math.prod(size) > max(held, MOST_REPEATED):
        raise Refused(f"a tensor of {list(size)}, of which the file holds {held} numbers")
    found = torch.empty(0, dtype=kind).set_(storage.data, offset, size, stride)
    storage.truths |= kind is torch.bool
    if requires_grad:
        found.requires_grad_()  # raises RuntimeError for whole numbers
    return found


def tensor_of_dtype(*given: Any) -> Tensor:
    """Return a view under another dtype, as ``torch._utils._rebuild_tensor_v3``."""
    return tensor(*given[:6], *given[7:], dtype=given[6])


def parameter(data: Any, requires_grad: bool, hooks: Any = None) -> nn.Parameter:
    """Return a parameter, as ``torch._utils._rebuild_parameter``."""
    if type(data) is not Tensor or hooks or type(requires_grad) is not bool:
        raise Refused("a parameter that is none")
    return nn.Parameter(data, requires_grad)


def shape(values: Any) -> torch.Size:
    """Return a shape."""
    values = tuple(values)
    check_sizes(*values)
    return torch.Size(values)


def as_bytes(content: Any = b"", encoding: str = "latin-1") -> bytes:
    """Return bytes, which protocol 2 writes as text."""
    if type(content) is bytes:
        return content
    if type(content) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("bytes that are none")
    return content.encode("latin-1")


def items_of(given: Any = ()) -> list[tuple[Any, Any]]:
    """Return the pairs that a dict is made of."""
    items = [*given.items()] if type(given) is dict else [*given]
    return [(check_hashable(key), value) for key, value in items]


def default_dict(factory: Any = None) -> defaultdict[Any, Any]:
    """Return an empty ``defaultdict`` of an empty value."""
    if factory is not None and not (isinstance(factory, Maker) and factory.type):
        raise Refused("a defaultdict of something that could run code")
    return defaultdict(factory.type if factory is not None else None)


def called_with(function: Make, *kinds: type) -> Make:
    """Return a function that is called with arguments of these types alone."""

    def make(*arguments: Any) -> Any:
        if not all(type(argument) in kinds for argument in arguments):
            raise Refused(f"a {function.__name__} of something else")
        return function(*arguments)

    return make


def path_class(name: str) -> type[pathlib.PurePath]:
    """Return a class of paths; only the pure one of another system's can be made here."""
    can_be_made = name.startswith("Pure") or name == type(pathlib.Path()).__name__
    found: type[pathlib.PurePath] = getattr(pathlib, name if can_be_made else f"Pure{name}")
    return found


MOMENT = (int, float, bytes, datetime.timedelta, datetime.timezone)
MAKERS: dict[str, Make] = {
    "torch._utils._rebuild_tensor_v2": tensor,
    "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
    "torch._utils._rebuild_parameter": parameter,
    "torch.Size": shape,
    "torch.device": called_with(torch.device, str, int),
    "torch.torch_version.TorchVersion": called_with(TorchVersion, str),
    "_codecs.encode": as_bytes,
    "collections.OrderedDict": lambda *given: OrderedDict(items_of(*given)),
    "collections.Counter": lambda *given: Counter(dict(items_of(*given))),
    "collections.defaultdict": default_dict,
    "collections.deque": called_with(deque, list, tuple, int, type(None)),
    "argparse.Namespace": called_with(argparse.Namespace),
    **{
        f"datetime.{kind.__name__}": called_with(kind, *MOMENT)
        for kind in (datetime.timedelta, datetime.datetime, datetime.date, datetime.time,
                     datetime.timezone)
    },
    **{
        f"pathlib.{name}": called_with(path_class(name), str)
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
    "numpy.ndarray": called_with(np.ndarray),  # is named, and never called
    "numpy.dtype": safe_numpy.dtype,
    "numpy._core.multiarray._reconstruct": safe_numpy.empty_array,
    "numpy._core.multiarray.scalar": safe_numpy.scalar,
    "numpy._core.numeric._frombuffer": safe_numpy.array_of,
    "builtins.set": lambda items=(): set(map(check_hashable, items)),
    "builtins.frozenset": lambda items=(): frozenset(map(check_hashable, items)),
    "builtins.bytearray": lambda *content: bytearray(as_bytes(*content)),
    "builtins.complex": called_with(complex, int, float),
    # called without arguments; protocol 2 writes bytes as a call of encode
    **{
        f"builtins.{kind.__name__}": called_with(kind)
        for kind in (bytes, dict, list, int, float, str, bool)
    },
}  # fmt: skip
# how names of the list begin elsewhere: in Python 2, which protocol 2 keeps, NumPy 1, Python 3.13
RENAMED = {
    "__builtin__.long": "builtins.int",
    "__builtin__.unicode": "builtins.str",
    "__builtin__.": "builtins.",
    "numpy.core.": "numpy._core.",
    "pathlib._local.": "pathlib.",
}
EMPTY: dict[str, Callable[[], Any]] = {  # classes of empty values, as a defaultdict makes them
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (OrderedDict, Counter, deque, set, bytes, dict, list, int, float, str, bool)
}


class CheckpointTypes:
    """The objects that the pickle of a checkpoint may make.

    Args:
        storage: gives the bytes of a storage by its key and their number.
        passed_over: names that begin so stand for objects that are left out, as :class:`Unread`.
    """

    def __init__(
        self, storage: Callable[[str, int], torch.UntypedStorage], passed_over: tuple[str, ...] = ()
    ) -> None:
        self.storage = storage
        self.passed_over = passed_over
        self.unfilled: dict[int, safe_numpy.NumpyArray] = {}
        self.storages: list[Storage] = []

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name in a pickle.

        Raises:
            Refused: it is on no list.
        """
        whole = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return StorageKind(STORAGES[name])
        known = replace_prefix(whole, RENAMED)
        if known in MAKERS:
            empty = MAKERS[known] is safe_numpy.empty_array
            return Maker(known, self._empty_array if empty else MAKERS[known], EMPTY.get(known))
        if self.passed_over and module == "torch._utils" and name in SPECIAL_TENSORS:
            return Maker(whole, lambda *_: Unread(whole, SPECIAL_TENSORS[name]))
        if whole.startswith(self.passed_over):
            return Maker(whole, lambda *_: Unread(whole, f"a {name}"))
        raise Unknown(whole)

    def persistent(self, saved: Any) -> Storage:
        """Return the storage that ``("storage", its type, key, location, numbers)`` means."""
        fits = type(saved) is tuple and len(saved) in (5, 6) and saved[0] == "storage"
        kind, key, count = (saved[1], saved[2], saved[4]) if fits else (None, None, -1)
        view = saved[5:] if fits else ()
        if not isinstance(kind, StorageKind) or type(key) is not str or view not in ((), (None,)):
            raise Refused("a reference to something else than a storage")
        check_sizes(count)
        self.storages.append(Storage(self.storage(key, count * kind.dtype.itemsize), kind.dtype))
        return self.storages[-1]

    def check_truths(self) -> None:
        """Refuse truth values that are neither 0 nor 1, with which kernels may miscount."""
        for storage in self.storages:
            if storage.truths and storage.data.nbytes():
                numbers = torch.empty(0, dtype=torch.uint8).set_(storage.data)
                if int(numbers.max()) > 1:
                    raise Refused("truth values that are neither 0 nor 1")

    def build(self, value: Any, state: Any) -> Any:
        """Give a freshly made value its state.

        Raises:
            Refused: a value of another type, or one that has its state already.
        """
        if isinstance(value, np.dtype):
            return safe_numpy.dtype_with(value, state)
        if isinstance(value, np.ndarray) and self.unfilled.pop(id(value), None) is value:
            safe_numpy.fill_array(value, state)
        elif isinstance(value, Unread):
            value.state = state
        elif type(value) in (OrderedDict, argparse.Namespace) and type(state) is dict:
            if any(type(name) is not str or hasattr(type(value), name) for name in state):
                raise Refused(f"a state of a {type(value).__name__}")
            vars(value).update(state)
        else:
            raise Refused(f"a state of a {type(value).__name__}")
        return value

    def _empty_array(self, *arguments: Any) -> safe_numpy.NumpyArray:
        found = safe_numpy.empty_array(*arguments)
        self.unfilled[id(found)] = found
        return found
