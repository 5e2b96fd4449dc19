"""Places as they may be published with a model: no credentials, and no path of this machine."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import open_clip

from alignclip.paths import LOCAL_DIR
from alignclip.weights.locate import is_on_hub


def public_place(place: str) -> str:
    """Return a URL without credentials, a model's name as it is, the last name alone of a path."""
    place = place.removeprefix(LOCAL_DIR)
    if is_on_hub(place) or place in _published_models():
        return place
    if is_url(place):
        return _without_credentials(place)
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1].lstrip("~")


def public(value: Any) -> Any:
    """Return a setting with :func:`public_place` of every text in it that may be a place."""
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, str) and re.search(r"[/\\]|^~", value):
        return public_place(value)
    return value


def is_url(place: str) -> bool:
    """Tell whether a place lies elsewhere than on this machine."""
    return "://" in place and not place.startswith("file:")


def _without_credentials(url: str) -> str:
    """Remove user, password and what a signed URL has behind its path."""
    scheme, rest = re.split(r"[?#]", url)[0].split("://", 1)
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = host.rpartition("@")[2]
    elif "@" in path and re.search(r":(?!\d*$)", host):  # the secret has a slash in it
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{host}{slash}{path}"


@cache
def _published_models() -> frozenset[str]:
    """Return MODEL/TAG of open_clip's list, which look like paths."""
    return frozenset(f"{model}/{tag}" for model, tag in open_clip.list_pretrained())
