"""A pickle machine that makes plain data and calls nothing that a pickle names.

Python's unpickler imports what a file names and calls it. This machine knows the opcodes of pickle by
:mod:`pickletools`, which only parses, and asks a :class:`Types` for everything that is not a number, text or a
container. A name that :class:`Types` doesn't know ends the reading with :class:`Refused`.
"""

from __future__ import annotations

import pickletools
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch

# An opcode takes a byte of a file and may make an object of a hundred. A checkpoint has some ten thousand opcodes.
MOST_OPCODES = 20_000_000
PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
IGNORED = {"PROTO", "FRAME", "STOP"}
DICTS = (dict, OrderedDict, defaultdict, Counter)
PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)


class Refused(Exception):
    """What a pickle asks for, and plain data doesn't need; the message is a noun."""


class Unknown(Refused):
    """A class or function that a pickle names, and that is on no list; the message is its name."""


@dataclass(eq=False)
class Maker:
    """What stands for a class or function that a pickle names: our own function that makes the same value.

    Attributes:
        name: what the pickle calls it.
        make: our function; it checks its arguments and raises :class:`Refused`, ``TypeError`` or ``ValueError``.
        type: the class itself, where an empty one is harmless to make, as ``defaultdict`` does.
    """

    name: str
    make: Callable[..., Any]
    type: Callable[[], Any] | None = None


@dataclass(eq=False)
class Unread:
    """The place of an object that was not made.

    Attributes:
        name: of its class or of the function that makes it, with its module.
        what: what it is, with its article.
        state: what the file says of it.
    """

    name: str
    what: str
    state: Any = None


class Types(Protocol):
    """What a machine may make beside numbers, text and containers."""

    def find(self, module: str, name: str) -> Any:
        """Return what stands for a name: a :class:`Maker`, or a value such as a dtype."""

    def persistent(self, saved: Any) -> Any:
        """Return the storage that a persistent id means."""

    def build(self, value: Any, state: Any) -> Any:
        """Give a freshly made value its state; return it, or what takes its place."""


def check_key(value: Any) -> Any:
    """Return a key of a dict or an item of a set; a nested one could take for ever to hash."""
    flat = type(value) is tuple and all(type(item) in PLAIN for item in value)
    if type(value) in PLAIN or flat or isinstance(value, np.generic):
        return value
    raise Refused(f"a {type(value).__name__} as a key")


def check_numbers(*values: Any) -> None:
    """Refuse what is no whole number from 0 on that fits into 62 bits."""
    if not all(type(value) is int and 0 <= value < 2**62 for value in values):
        raise Refused("a size that is none")


class Machine:
    """Reads one pickle. Broken ones raise ``IndexError``, ``KeyError``, ``TypeError`` or ``ValueError``.

    Args:
        types: what it may make.
    """

    def __init__(self, types: Types) -> None:
        self.types = types
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below each mark
        self.memo: dict[int, Any] = {}
        push = self._push
        self.operations: dict[str, Callable[[Any], None]] = {
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_LIST": lambda _: push([]),
            "EMPTY_DICT": lambda _: push({}),
            "EMPTY_SET": lambda _: push(set()),
            "EMPTY_TUPLE": lambda _: push(()),
            "LIST": lambda _: push(self._pop_mark()),
            "TUPLE": lambda _: push(tuple(self._pop_mark())),
            "TUPLE1": lambda _: self._tuple(1),
            "TUPLE2": lambda _: self._tuple(2),
            "TUPLE3": lambda _: self._tuple(3),
            "FROZENSET": lambda _: push(frozenset(map(check_key, self._pop_mark()))),
            "DICT": self._dict,
            "MARK": self._mark,
            "POP": self._pop,
            "POP_MARK": self._pop_to_mark,
            "DUP": lambda _: push(self.stack[-1]),
            "APPEND": lambda _: self._extend([self.stack.pop()]),
            "APPENDS": lambda _: self._extend(self._pop_mark()),
            "ADDITEMS": lambda _: self._add(self._pop_mark()),
            "SETITEM": lambda _: self._set([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._set(self._pop_mark()),
            "GLOBAL": lambda named: push(self.types.find(*named.split(" ", 1))),
            "STACK_GLOBAL": self._stack_global,
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "BUILD": self._build,
            "BINPERSID": lambda _: push(self.types.persistent(self.stack.pop())),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(
                ("GET", "BINGET", "LONG_BINGET"), lambda key: push(self.memo[int(key)])
            ),
        }

    def run(self, source: BinaryIO) -> Any:
        """Return the value of the pickle at ``source``'s position, and leave the position behind the pickle.

        Raises:
            Refused: it names what :class:`Types` doesn't know, or is no pickle of plain data.
        """
        for count, (operation, argument, _) in enumerate(pickletools.genops(source)):
            if count > MOST_OPCODES:
                raise Refused(f"more than {MOST_OPCODES} steps to make it")
            if operation.name in PUSHED:
                self.stack.append(argument)
            elif operation.name in self.operations:
                self.operations[operation.name](argument)
            elif operation.name not in IGNORED:
                raise Refused(f"pickle's {operation.name}")
        return self.stack.pop()

    def replace(self, old: Any, new: Any) -> None:
        """Let the memo have ``new`` where it has ``old``."""
        for key, value in self.memo.items():
            if value is old:
                self.memo[key] = new

    def _mark(self, _: Any) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _pop_mark(self) -> list[Any]:
        """Return what lies above the last mark, and go on with the stack below."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _pop_to_mark(self, _: Any) -> None:
        self._pop_mark()

    def _pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _tuple(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError("too few values")
        self.stack[-count:] = [items]

    def _dict(self, _: Any) -> None:
        items = self._pop_mark()
        self.stack.append({})
        self._set(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list or type(target) is deque:
            target.extend(items)
        elif not isinstance(target, Unread):
            raise Refused(f"items of a {type(target).__name__}")

    def _add(self, items: Iterable[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not set:
            raise Refused(f"items of a {type(target).__name__}")
        target.update(map(check_key, items))

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unread):
            return
        if type(target) not in DICTS or len(items) % 2:
            raise Refused(f"items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise Refused("a name that is no text")
        self.stack.append(self.types.find(module, name))

    def _call(self, _: Any) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Maker) or type(arguments) is not tuple:
            raise Refused(f"a call of a {type(maker).__name__}")
        self.stack.append(maker.make(*arguments))

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        value = self.stack[-1]
        built = self.types.build(value, state)
        if built is not value:
            self.replace(value, built)
            self.stack[-1] = built

    def _put(self, key: Any) -> None:
        self.memo[int(key)] = self.stack[-1]
