"""What a person did wrong, said in one line."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input from the person who runs the program: its message is one line of what, where and what instead."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error sentence: the valid name closest to ``name``, or all of them where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(names)}"


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a :class:`UserError` as one line and exit with status 2; everything else keeps its stack trace."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
