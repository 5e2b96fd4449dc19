"""Errors that a person can mend, told in one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

BAD_INPUT = 2  # exit status of a command that a person has to change
NOT_FINITE = 3  # exit status of a run that met numbers which are not finite
NOT_SAVED = 4  # exit status of a run that couldn't save a checkpoint; it goes on once there is room
NOT_READ = 5  # exit status of a run that can't read its data any more; it goes on once it can
RANK_LOST = 6  # exit status of a run that lost a rank or a data worker; it goes on


class UserError(Exception):
    """Bad input from a person: the message is one line of what, where and what instead.

    ``status`` is the exit status of a command that ends with this error.
    """

    status = BAD_INPUT

    def __str__(self) -> str:
        return printable(super().__str__())


class NotFiniteError(UserError):
    """A batch whose loss, gradients or weights are NaN or infinite."""

    status = NOT_FINITE


class NotReadError(UserError):
    """Data that can't be read any more: a store that refuses or is away, a damaged shard.

    Args:
        text: one line; or what PyTorch makes of the line in a data worker, which begins with a
            stack trace and ends with the line.
    """

    status = NOT_READ

    def __init__(self, text: str) -> None:
        super().__init__(text.strip().rpartition("\n")[2].rpartition("NotReadError: ")[2])


class WorkerDiedError(UserError):
    """A data worker that was killed; the same command goes on."""

    status = RANK_LOST


class RankLostError(UserError):
    """Another rank that has died, or that the ranks no longer wait for."""

    status = RANK_LOST


# What other programs call a thing, and what it is called here
SYNONYMS = {
    "amp": "amp_fp16",
    "amp_bfloat16": "amp_bf16",
    "bf16": "amp_bf16",
    "bfloat16": "amp_bf16",
    "fp16": "amp_fp16",
    "float16": "amp_fp16",
    "float32": "fp32",
    "cuda": "gpu",
    "learning_rate": "lr",
}


def nearest(name: str, valid: Iterable[str]) -> str:
    """End an error sentence with the valid name closest to ``name``, or with all valid names."""
    names = {valid_name.lower(): valid_name for valid_name in sorted(valid)}
    close = [SYNONYMS.get(name.lower(), "")]
    if close[0] not in names:
        close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return (
        f"did you mean '{names[close[0]]}'?"
        if close
        else f"valid: {', '.join(names.values()) or 'none'}"
    )


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message as :func:`printable` has it, or its name."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


# What a line can't show, or shows as if it were another one: control characters, halves of
# surrogate pairs, ends of lines and paragraphs; and marks that turn the direction of writing
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_PASSWORD = re.compile(r"(://[^/\s@:'\"]*):[^/\s@'\"]+@")
_SECRET_NAME = (
    r"(?:password|passwd|secret|token|api_?key|signature|credential|sig|(?:secret_)?access_?key"
    r"(?:_?id)?)"
)
_SIGNED = re.compile(rf"(https?://[^\s?'\"]+)\?[^\s'\"]*{_SECRET_NAME}=[^\s'\"]*", re.IGNORECASE)
LEAST_SECRET = 6  # characters after a ``=``: ``max_token=77`` tells no secret
_SETTING = re.compile(rf"({_SECRET_NAME}=)[^&\s'\",;}}]{{{LEAST_SECRET},}}", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """Return a text without passwords in URLs, signed queries, and values such as ``token=…``."""
    text = _PASSWORD.sub(r"\1:…@", text)
    return _SETTING.sub(r"\1…", _SIGNED.sub(r"\1?…", text))


def printable(text: str) -> str:
    """Return a text as one line that a terminal or a log can show to anybody.

    Texts of files that somebody else has written come into errors. They could begin a line of their
    own, or tell a terminal what to do. See also :func:`without_secrets`.
    """
    if not text.isprintable():
        text = "".join(map(_visible, " ".join(text.splitlines())))
    return without_secrets(text) if "=" in text or "@" in text else text


def _visible(character: str) -> str:
    turns = unicodedata.bidirectional(character) in _TURNING
    if turns or unicodedata.category(character) in _UNPRINTABLE:
        return " " if character == "\t" else ascii(character)[1:-1]
    return character


def few(names: Iterable[str]) -> str:
    """Name the first three of many, and say how many more there are."""
    first = list(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def check_place(what: str, place: str) -> None:
    """Refuse ``s3:/bucket``, which is no URL; as a path it would be a folder named ``s3:``.

    Raises:
        UserError: names ``what`` and the URL that was meant.
    """
    if found := re.match(r"([A-Za-z][A-Za-z0-9]+):/(?!/)", place):
        raise UserError(
            f"{what}={place} has one slash; did you mean '{found[1]}://{place[found.end() :]}'?"
        )


@contextmanager
def one_line_errors(interrupted: str = "") -> Iterator[None]:
    """Print a :class:`UserError` as one line, and exit with its status.

    ``interrupted``: what Ctrl-C prints, where the command ends without a stack trace then.

    Other exceptions keep their stack trace. Of several processes on a machine the first one speaks
    first: they all read the same input.
    """
    try:
        yield
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            from alignclip.runtime.launcher import is_ended_by_launcher

            if is_ended_by_launcher():  # the first one has spoken
                raise SystemExit(error.status) from None
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        if not interrupted:
            raise
        print(interrupted, file=sys.stderr)
        raise SystemExit(130) from None
