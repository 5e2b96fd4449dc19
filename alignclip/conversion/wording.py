"""Words that several messages share: lists that are cut short, numbers with their nouns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from alignclip.errors import nearest

MAX_NAMES = 20  # names in a message: columns, entries, endings
LONGEST_SHOWN = 60  # characters


def first_few(names: Sequence[str], number: int = 3) -> str:
    """Return the first names, with ``…`` where there are more."""
    return ", ".join([*names[:number], *(["…"] if names[number:] else [])])


def listable(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that fit into a line of a message; a broken file's can be anything."""
    good = (name for name in names if name.isprintable() and len(name) <= LONGEST_SHOWN)
    return tuple(islice(good, MAX_NAMES))


def listing(names: Sequence[str]) -> str:
    """Return names for a line of a message: printable, short, not too many; ``none`` for none."""
    unique = list(dict.fromkeys(names))
    plain = [name for name in unique if name.isprintable() and 0 < len(name) <= LONGEST_SHOWN]
    plain = plain or [ascii(name[:40]) for name in unique]
    return first_few(plain, MAX_NAMES) or "none"


def did_you_mean_one(name: str, valid: Iterable[str]) -> str:
    """End a message with the nearest name, where one is near."""
    hint = nearest(name, valid)
    return f"; {hint}" if hint.startswith("did you") else ""


def inputs_in_words(number: int) -> str:
    """Return ``1 input`` or ``1,234 inputs``."""
    return "1 input" if number == 1 else f"{number:,} inputs"


def are_them(number: int) -> tuple[str, str]:
    """Return the verb and the pronoun for so many things."""
    return ("is", "it") if number == 1 else ("are", "them")


def counted(numbers: dict[str, int]) -> str:
    """Return ``reason 12, other reason 3``, in the order of the reasons."""
    return ", ".join(f"{what} {number:,}" for what, number in sorted(numbers.items()))
