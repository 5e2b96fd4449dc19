"""NumPy's numbers and arrays, as a pickle writes them, without objects and records."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from alignclip.weights.safe_pickle import Maker, Refused, check_sizes

NumpyArray = np.ndarray[Any, Any]


def dtype(name: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    """Return a dtype of numbers or text; objects and records are refused."""
    if type(name) is not str or len(name) > 8:
        raise Refused("a dtype that is none")
    found = np.dtype(name, False, True)
    if found.kind not in "biufcSU" or found.hasobject or found.fields or found.subdtype:
        raise Refused(f"a numpy array of '{name}'")
    return found


def dtype_with(found: np.dtype[Any], state: Any) -> np.dtype[Any]:
    """Return a dtype in the byte order of its state."""
    order, *rest = state[1:] if type(state) is tuple and len(state) in (8, 9) else [None]
    plain = rest[:3] == [None] * 3 and (found.kind in "SU" or rest[3:5] == [-1, -1])
    if order not in ("<", ">", "|", "=") or not plain:
        raise Refused("a numpy array of records")
    return found.newbyteorder(order) if order == ">" else found


def numbers(content: Any, kind: Any, shape: tuple[int, ...] = ()) -> bytes:
    """Return the bytes of an array of a dtype.

    Raises:
        Refused: bytes of objects, more or less bytes than the shape has, or truth values that are
            neither 0 nor 1, with which NumPy miscounts.
    """
    content = content.encode("latin-1") if type(content) is str else content
    if not isinstance(kind, np.dtype) or type(content) not in (bytes, bytearray):
        raise Refused("a numpy array of objects")
    check_sizes(*shape)
    if type(shape) is not tuple or len(content) != math.prod(shape) * kind.itemsize:
        raise Refused("a numpy array of another size")
    if kind.kind == "b" and content and max(content) > 1:
        raise Refused("a numpy array of truth values that are none")
    return bytes(content)


def scalar(kind: Any, content: Any = b"") -> Any:
    """Return a NumPy number, as ``numpy._core.multiarray.scalar``."""
    held = numbers(content, kind)
    return np.frombuffer(held, kind)[0] if kind.itemsize else kind.type()


def empty_array(kind: Any, shape: Any, code: Any) -> NumpyArray:
    """Return an array that gets its numbers later, as ``numpy._core.multiarray._reconstruct``."""
    is_array = isinstance(kind, Maker) and kind.name.endswith(".ndarray")
    if not is_array or shape != (0,) or code not in (b"b", "b"):
        raise Refused("a numpy array of a kind of its own")
    return np.empty(0, np.int8)


def fill_array(found: NumpyArray, state: Any) -> None:
    """Give an array its numbers."""
    _, shape, kind, fortran, content = state
    held = numbers(content, kind, shape)
    if type(fortran) is not bool:
        raise Refused("a numpy array of another size")
    found.__setstate__((1, shape, kind, fortran, held))  # type: ignore[arg-type]  # its bool


def array_of(content: Any, kind: Any, shape: Any, order: Any) -> NumpyArray:
    """Return an array, as ``numpy._core.numeric._frombuffer`` of pickle's protocol 5."""
    held = np.frombuffer(bytearray(numbers(content, kind, shape)), kind)
    return held.reshape(shape, order="F" if order == "F" else "C")
