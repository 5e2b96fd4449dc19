"""What a checkpoint may hold beside numbers, text and containers: the one list, and how each is made.

Each name of the list stands for a function of this file that checks what it is given and makes the same value as the
class or function that the name is of. Nothing is imported because a file names it.
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
from alignclip.weights.safe_pickle import Maker, Refused, Unknown, Unread, check_key, check_numbers

MOST_DIMENSIONS = 64
MOST_REPEATED = (
    2**20
)  # numbers of a tensor that repeats those of its storage, as an expanded one does
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    )
}  # fmt: skip
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8, "QUInt8Storage": torch.quint8, "QInt32Storage": torch.qint32,
}  # fmt: skip
# Tensors that are no plain numbers: a reader of weights passes over them.
SPECIAL_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without numbers (of the device 'meta')",
}


@dataclass(eq=False)
class StorageKind:
    """What stands for a class such as ``torch.FloatStorage``."""

    dtype: torch.dtype


@dataclass(eq=False)
class Storage:
    """A storage that lies in a file.

    Attributes:
        data: its bytes.
        dtype: of its numbers.
        truths: whether a tensor has it as truth values.
    """

    data: torch.UntypedStorage
    dtype: torch.dtype
    truths: bool = False


# --- torch ------------------------------------------------------------------------------------------------------------


def tensor(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: bool,
    hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    """Return a view of a storage, which has to lie within it, as ``torch._utils._rebuild_tensor_v2``."""
    return typed_tensor(storage, offset, size, stride, requires_grad, hooks, None, metadata)


def typed_tensor(
    storage: Any,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: bool,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    """Return a view of a storage under a dtype of its own, as ``torch._utils._rebuild_tensor_v3``."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype | None):
        raise Refused("a tensor without a storage")
    kind = dtype or storage.dtype
    if hooks or metadata or kind not in DTYPES.values():
        raise Refused("a tensor with hooks or of a kind of its own")
    size, stride = tuple(size), tuple(stride)
    check_numbers(offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS or type(requires_grad) is not bool:
        raise Refused("a tensor with sizes that don't fit its strides")
    held = storage.data.nbytes() // kind.itemsize
    reach = (
        sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if all(size) else 0
    )
    if offset + reach > held:
        raise Refused(f"a tensor that reaches beyond its storage: {list(size)} of {held} numbers")
    if math.prod(size) > max(held, MOST_REPEATED):
        raise Refused(f"a tensor of {list(size)}, of which the file holds {held} numbers")
    found = torch.empty(0, dtype=kind).set_(storage.data, offset, size, stride)
    storage.truths |= kind is torch.bool
    if requires_grad:
        found.requires_grad_()  # raises RuntimeError for whole numbers
    return found


def parameter(data: Any, requires_grad: bool, hooks: Any = None) -> nn.Parameter:
    """Return a parameter, as ``torch._utils._rebuild_parameter``."""
    if type(data) is not Tensor or hooks or type(requires_grad) is not bool:
        raise Refused("a parameter that is none")
    return nn.Parameter(data, requires_grad)


def size(values: Any) -> torch.Size:
    """Return a shape."""
    values = tuple(values)
    check_numbers(*values)
    return torch.Size(values)


def device(kind: str, index: int | None = None) -> torch.device:
    """Return the name of a device; the device needn't be there."""
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise Refused("a device that is none")
    return torch.device(kind) if index is None else torch.device(kind, index)


# --- Python -----------------------------------------------------------------------------------------------------------


def encode(text: str, encoding: str = "utf-8") -> bytes:
    """Return bytes, which protocol 2 writes as text."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refused("bytes that are none")
    return text.encode("latin-1")


def as_bytes(content: Any = b"", encoding: str = "latin-1") -> bytes:
    """Return bytes, given as such or as text."""
    return content if type(content) is bytes else encode(content, encoding)


def pairs(items: Any) -> list[tuple[Any, Any]]:
    """Return the pairs that a dict is made of."""
    if type(items) is dict:
        return [*items.items()]
    if type(items) is not list:
        raise Refused("a dict of something else")
    return [(check_key(key), value) for key, value in items]


def default_dict(factory: Any = None) -> defaultdict[Any, Any]:
    """Return an empty ``defaultdict`` of an empty value."""
    if factory is not None and not (isinstance(factory, Maker) and factory.type):
        raise Refused("a defaultdict of something that could run code")
    return defaultdict(factory.type if factory is not None else None)


def a_deque(items: Any = (), longest: int | None = None) -> deque[Any]:
    """Return a deque."""
    if type(items) not in (list, tuple) or type(longest) not in (int, type(None)):
        raise Refused("a deque of something else")
    return deque(items, longest)


def moment(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Return what makes a date or time of whole numbers and bytes."""

    def make(*values: Any) -> Any:
        if not all(
            type(v) in (int, float, bytes) or isinstance(v, (datetime.timedelta, datetime.timezone))
            for v in values
        ):
            raise Refused("a time of something else")
        return kind(*values)

    return make


def path(kind: Callable[..., pathlib.PurePath]) -> Callable[..., pathlib.PurePath]:
    """Return what makes a path of its parts."""

    def make(*parts: Any) -> pathlib.PurePath:
        return kind(*map(text, parts))

    return make


def text(value: Any) -> str:
    """Return a text."""
    if type(value) is not str:
        raise Refused("a text that is none")
    return value


def collection(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return what makes a set of the items of a list."""

    def make(items: Any = ()) -> Any:
        if type(items) not in (list, tuple, set, frozenset):
            raise Refused("a set of something else")
        return kind(map(check_key, items))

    return make


def _makers() -> dict[str, Maker]:
    made: dict[str, tuple[Callable[..., Any], Callable[[], Any] | None]] = {
        "torch._utils._rebuild_tensor_v2": (tensor, None),
        "torch._utils._rebuild_tensor_v3": (typed_tensor, None),
        "torch._utils._rebuild_parameter": (parameter, None),
        "torch.Size": (size, None),
        "torch.device": (device, None),
        "torch.torch_version.TorchVersion": (lambda version: TorchVersion(text(version)), None),
        "_codecs.encode": (encode, None),
        "collections.OrderedDict": (lambda items=(): OrderedDict(pairs([*items])), OrderedDict),
        "collections.Counter": (lambda items=(): Counter(dict(pairs(items or []))), Counter),
        "collections.defaultdict": (default_dict, None),
        "collections.deque": (a_deque, deque),
        "argparse.Namespace": (argparse.Namespace, None),
        "datetime.timedelta": (moment(datetime.timedelta), None),
        "datetime.datetime": (moment(datetime.datetime), None),
        "datetime.date": (moment(datetime.date), None),
        "datetime.time": (moment(datetime.time), None),
        "datetime.timezone": (moment(datetime.timezone), None),
        "numpy.ndarray": (_no_call, None),
        "numpy.dtype": (safe_numpy.dtype, None),
    }
    for core in (
        "numpy.core",
        "numpy._core",
    ):  # numpy 2 has moved them; a file has the name of its day
        made[f"{core}.multiarray._reconstruct"] = (safe_numpy.empty_array, None)
        made[f"{core}.multiarray.scalar"] = (safe_numpy.scalar, None)
        made[f"{core}.numeric._frombuffer"] = (safe_numpy.array_of, None)
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
            here = (
                name
                if name.startswith("Pure") or name == type(pathlib.Path()).__name__
                else f"Pure{name}"
            )
            made[f"{module}.{name}"] = (path(getattr(pathlib, here)), None)
    for module in ("builtins", "__builtin__"):
        made[f"{module}.set"] = (collection(set), set)
        made[f"{module}.frozenset"] = (collection(frozenset), None)
        made[f"{module}.bytes"] = (
            lambda: b"",
            bytes,
        )  # protocol 2 writes others as a call of encode
        made[f"{module}.bytearray"] = (lambda *content: bytearray(as_bytes(*content)), None)
        made[f"{module}.complex"] = (
            lambda real, imaginary: complex(float(real), float(imaginary)),
            None,
        )
        for kind in (dict, list, int, float, str, bool):
            made[f"{module}.{kind.__name__}"] = (_no_call, kind)
    for name, kind in (
        ("long", int),
        ("unicode", str),
    ):  # what protocol 2 calls them, as Python 2 did
        made[f"__builtin__.{name}"] = (_no_call, kind)
    return {name: Maker(name, *how) for name, how in made.items()}


def _no_call(*_: Any) -> Any:
    raise Refused("a call that plain data doesn't need")


MAKERS = _makers()


class CheckpointTypes:
    """What the pickle of a checkpoint may make.

    Args:
        storage: gives the bytes of a storage by its key and their number.
        passed_over: names beginning so stand for objects that are left out, as :class:`Unread`.
    """

    def __init__(
        self, storage: Callable[[str, int], torch.UntypedStorage], passed_over: tuple[str, ...] = ()
    ) -> None:
        self.storage = storage
        self.passed_over = passed_over
        self.unfilled: dict[int, np.ndarray[Any, Any]] = {}
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
        if whole.endswith("multiarray._reconstruct") and whole in MAKERS:
            return Maker(whole, self._empty_array)
        if whole in MAKERS:
            return MAKERS[whole]
        if self.passed_over and module == "torch._utils" and name in SPECIAL_TENSORS:
            return Maker(whole, lambda *_: Unread(whole, SPECIAL_TENSORS[name]))
        if whole.startswith(self.passed_over):
            return Maker(whole, lambda *_: Unread(whole, f"a {name}"))
        raise Unknown(whole)

    def persistent(self, saved: Any) -> Storage:
        """Return the storage that ``("storage", its type, key, location, numbers)`` means."""
        fits = type(saved) is tuple and len(saved) in (5, 6) and saved[0] == "storage"
        _, kind, key, _, count = saved[:5] if fits else (None, None, None, None, -1)
        if (
            not isinstance(kind, StorageKind)
            or type(key) is not str
            or saved[5:] not in ((), (None,))
        ):
            raise Refused("a reference to something else than a storage")
        check_numbers(count)
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
            Refused: it is one that has none, or has one already.
        """
        if isinstance(value, np.dtype):
            return safe_numpy.dtype_with(value, state)
        if isinstance(value, np.ndarray) and self.unfilled.pop(id(value), None) is value:
            safe_numpy.fill_array(value, state)
        elif isinstance(value, Unread):
            value.state = state
        elif type(value) is OrderedDict and type(state) is dict and all(map(_is_private, state)):
            vars(value).update(state)
        elif type(value) is argparse.Namespace and type(state) is dict:
            vars(value).update({text(name): held for name, held in state.items()})
        else:
            raise Refused(f"a state of a {type(value).__name__}")
        return value

    def _empty_array(self, *arguments: Any) -> np.ndarray[Any, Any]:
        found = safe_numpy.empty_array(*arguments)
        self.unfilled[id(found)] = found
        return found


def _is_private(name: Any) -> bool:
    """Whether a name is an attribute's that no method has, such as a state dict's ``_metadata``."""
    return type(name) is str and name.startswith("_") and not hasattr(OrderedDict, name)
