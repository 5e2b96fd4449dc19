"""A pickle machine that makes plain data and calls nothing that a pickle names.

Python's unpickler imports what a file names and calls it. This machine knows pickle's opcodes by
:mod:`pickletools`, which only parses. It asks a :class:`Types` for everything that is not a number,
a text or a container. A name that :class:`Types` doesn't know ends the reading with
:class:`Refused`.
"""

from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

# An opcode takes one byte of a file, and may make an object of a hundred bytes. A checkpoint has
# some ten thousand opcodes.
MOST_OPCODES = 20_000_000
PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)
DICTS = (dict, OrderedDict, defaultdict, Counter)

IGNORED = {"PROTO", "FRAME", "STOP"}
PUSHED = {  # push their argument
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
NEW: dict[str, Callable[[], Any]] = {  # push a value without looking at the stack
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
COLLECTED: dict[str, Callable[[list[Any]], Any]] = {  # make one value of all above the last mark
    "LIST": list,
    "TUPLE": tuple,
    "DICT": lambda items: dict(key_value_pairs(items)),
    "FROZENSET": lambda items: frozenset(map(check_hashable, items)),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FILLED: dict[str, tuple[type, ...]] = {  # add items to a container of these types
    "APPEND": (list, deque),
    "APPENDS": (list, deque),
    "ADDITEMS": (set,),
    "SETITEM": DICTS,
    "SETITEMS": DICTS,
}


class Refused(Exception):
    """A pickle asks for what plain data doesn't need; the message is a noun."""


class Unknown(Refused):
    """A pickle names a class or function that is on no list; the message is its name."""


@dataclass(eq=False)
class Maker:
    """Stand for a class or function that a pickle names.

    Attributes:
        name: what the pickle calls it.
        make: our own function that makes the same value. It checks its arguments, and raises
            :class:`Refused`, ``TypeError`` or ``ValueError``.
        type: the class itself, where a ``defaultdict`` may call it for an empty value.
    """

    name: str
    make: Callable[..., Any]
    type: Callable[[], Any] | None = None


@dataclass(eq=False)
class Unread:
    """Stand for an object that was not made.

    Attributes:
        name: of the object's class or of the function that makes it, with its module.
        what: what the object is, with its article.
        state: what the file says of it.
    """

    name: str
    what: str
    state: Any = None


class Types(Protocol):
    """The objects that a machine may make beside numbers, texts and containers."""

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name: a :class:`Maker`, or a value such as a dtype."""

    def persistent(self, saved: Any) -> Any:
        """Return the storage that a persistent id means."""

    def build(self, value: Any, state: Any) -> Any:
        """Give a freshly made value its state; return the value, or what takes its place."""


def check_hashable(value: Any) -> Any:
    """Return a key of a dict or an item of a set; a nested one could take for ever to hash."""
    flat = type(value) is tuple and all(type(item) in PLAIN for item in value)
    if type(value) in PLAIN or flat or isinstance(value, np.generic):
        return value
    raise Refused(f"a {type(value).__name__} as a key")


def check_sizes(*values: Any) -> None:
    """Refuse what is no whole number from 0 on that fits into 62 bits."""
    if not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise Refused("a size that is none")


def key_value_pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    """Return keys and values that alternate as pairs."""
    return [
        (check_hashable(key), value) for key, value in zip(items[::2], items[1::2], strict=True)
    ]


class Machine:
    """Read one pickle. Broken ones raise ``IndexError``, ``KeyError``, ``TypeError`` or others.

    Args:
        types: what the machine may make.
    """

    def __init__(self, types: Types) -> None:
        self.types = types
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self, source: BinaryIO) -> Any:
        """Return the value of the pickle at ``source``'s position; leave the position behind it.

        Raises:
            Refused: it names what :class:`Types` doesn't know, or is no pickle of plain data.
        """
        for count, (operation, argument, _) in enumerate(pickletools.genops(source)):
            if count > MOST_OPCODES:
                raise Refused(f"more than {MOST_OPCODES} steps to make it")
            if operation.name not in IGNORED:
                self._step(operation.name, argument)
        return self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in PUSHED:
            self.stack.append(argument)
        elif name in NEW:
            self.stack.append(NEW[name]())
        elif name in COLLECTED:
            items = self._pop_mark()
            self.stack.append(COLLECTED[name](items))
        elif name in TUPLES:
            self.stack.append(tuple(self._pop_last(TUPLES[name])))
        elif name in FILLED:
            self._fill(name)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else int(argument)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._find(argument.split(" ", 1) if argument else self._pop_last(2))
        elif name in ("REDUCE", "NEWOBJ"):
            self._call(*self._pop_last(2))
        elif name == "BUILD":
            self._build(self.stack.pop())
        elif name == "BINPERSID":
            self.stack.append(self.types.persistent(self.stack.pop()))
        elif name == "MARK":
            self.outer.append(self.stack)
            self.stack = []
        elif name == "POP_MARK" or (name == "POP" and not self.stack):
            self._pop_mark()
        elif name == "POP":
            self.stack.pop()
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        else:
            raise Refused(f"pickle's {name}")

    def _pop_mark(self) -> list[Any]:
        """Return what lies above the last mark, and go on with the stack below the mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _pop_last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError("too few values")
        del self.stack[-count:]
        return items

    def _fill(self, name: str) -> None:
        """Add items to the container below them; the items of an :class:`Unread` are dropped."""
        last = 2 if name == "SETITEM" else 1
        items = self._pop_mark() if name.endswith("S") else self._pop_last(last)
        target = self.stack[-1]
        if isinstance(target, Unread):
            return
        if type(target) not in FILLED[name]:
            raise Refused(f"items of a {type(target).__name__}")
        if isinstance(target, (list, deque)):
            target.extend(items)
        elif isinstance(target, set):
            target.update(map(check_hashable, items))
        else:  # update() of a Counter would add
            for key, value in key_value_pairs(items):
                target[key] = value

    def _find(self, names: list[Any]) -> None:
        module, name = names
        if type(name) is not str or type(module) is not str:
            raise Refused("a name that is no text")
        self.stack.append(self.types.find(module, name))

    def _call(self, maker: Any, arguments: Any) -> None:
        if not isinstance(maker, Maker) or type(arguments) is not tuple:
            raise Refused(f"a call of a {type(maker).__name__}")
        self.stack.append(maker.make(*arguments))

    def _build(self, state: Any) -> None:
        value = self.stack[-1]
        built = self.types.build(value, state)
        if built is not value:
            self.stack[-1] = built
            for key, known in self.memo.items():
                if known is value:
                    self.memo[key] = built
