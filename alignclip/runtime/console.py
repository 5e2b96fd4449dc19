"""The output of a command, on a terminal or in a file, whatever its encoding."""

from __future__ import annotations

import codecs
import io
import os
import sys

from alignclip.runtime import broken_output

# our own typography where the terminal hasn't got it; other characters are shown as escapes
_ASCII = {
    "…": "...", "→": "->", "×": "x", "·": "-", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'",
    "’": "'", "≥": ">=", "≤": "<=", "⇄": "<->", "±": "+-", "α": "alpha", "β": "beta", "²": "^2",
    "½": "1/2",
}  # fmt: skip
_HANDLER = "alignclip.readable"


def prepare_output() -> None:
    """Let no character and no closed pipe end a command. Call it first in every command.

    What the output's encoding lacks is replaced; what nobody reads goes nowhere. Child processes
    that are forked inherit it. Composer's and tqdm's output goes through the same streams.
    """
    broken_output.survive()
    # of torch's C++, which has a stack trace for each rank that is gone; before torch is imported
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def loading(what: str) -> None:
    """Say, once a machine, what is imported now: imports take seconds, sometimes a minute."""
    if os.environ.get("LOCAL_RANK", "0") in ("", "0"):
        print(f"loading {what} …", file=sys.stderr, flush=True)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    shown = "".join(
        _ASCII.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in characters
    )
    return shown, error.end
