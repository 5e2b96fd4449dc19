"""Places as people write them: ``~`` is home, ``file:///data`` is ``/data``."""

from __future__ import annotations

import argparse
import os.path
import urllib.parse
from pathlib import Path
from typing import Any

from alignclip.errors import UserError

LOCAL_DIR = "local-dir:"  # open_clip's prefix of a folder


def expand(place: str, what: str = "path") -> str:
    """Replace ``~`` and ``~user`` by home folders, and take ``file://`` away; a URL stays as it is.

    Args:
        place: path or URL.
        what: the setting or option that holds it, for messages.

    Raises:
        UserError: there is no such user.
    """
    if place.startswith(LOCAL_DIR):
        return LOCAL_DIR + expand(place.removeprefix(LOCAL_DIR), what)
    if place.startswith("file://"):
        place = urllib.parse.unquote(place.removeprefix("file://").removeprefix("localhost"))
    if not place.startswith("~"):
        return place
    # pathlib raises where this leaves ~nobody as it is
    expanded = os.path.expanduser(place)  # noqa: PTH111
    if expanded.startswith("~"):
        user = place[1:].partition("/")[0]
        why = (
            f"there is no user '{user}'"
            if user
            else "the home folder is not known (HOME is not set)"
        )
        raise UserError(f"{what}={place}: {why}; a folder of that name is ./{place}")
    return expanded


def option(place: str) -> str:
    """Expand a command's option that is a path or URL; argparse calls it as the option's type."""
    try:
        return expand(place)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_option(place: str) -> Path:
    """Expand an option that is a path on this machine, as :func:`option`."""
    return Path(option(place))


def expand_all(value: Any, what: str) -> Any:
    """Expand the paths among a class's arguments: all texts that are ``~`` or begin with ``~/``."""
    if isinstance(value, dict):
        return {key: expand_all(inner, f"{what}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [expand_all(inner, what) for inner in value]
    if isinstance(value, str) and (value == "~" or value.startswith(("~/", "file:///"))):
        return expand(value, what)
    return value
