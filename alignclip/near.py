"""The path that a person may have meant by one that isn't there."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from pathlib import Path

_LOOKED_AT = 10_000  # names of a folder
_CHOICES = 3  # of a part of the path that isn't there: the nearest one needn't hold the rest


def nearest_path(place: str | Path, fits: Callable[[Path], bool] = Path.exists) -> Path | None:
    """Return the existing path that differs least, part by part, from one that isn't there.

    None where no path is close.

    Args:
        place: the path that isn't there.
        fits: whether a path that is there could have been meant.
    """
    path = Path(place)
    try:
        return _follow(Path(path.anchor), path.relative_to(path.anchor).parts, fits)
    except (OSError, ValueError):  # a name that no file can have
        return None


def did_you_mean(place: str | Path, fits: Callable[[Path], bool] = Path.exists) -> str:
    """End the sentence that a path isn't there with the nearest path; say nothing where none is."""
    near = nearest_path(place, fits)
    return "" if near is None else f"; did you mean '{near}'?"


def _follow(folder: Path, parts: tuple[str, ...], fits: Callable[[Path], bool]) -> Path | None:
    if not parts:
        return folder if fits(folder) else None
    first, *rest = parts
    names = [first] if first == ".." else _names_like(first, folder)
    found = (
        _follow(folder / name, tuple(rest), fits)
        for name in names
        if not rest or (folder / name).is_dir()
    )
    return next((path for path in found if path is not None), None)


def _names_like(name: str, folder: Path) -> list[str]:
    """Return the names of a folder that look like a name, the name itself and the nearest first."""
    try:
        there = [path.name for path in itertools.islice(folder.iterdir(), _LOOKED_AT)]
    except OSError:  # it may not be listed; what lies in it may be there
        return [name]
    names: dict[str, list[str]] = {}
    for one in sorted(there):
        names.setdefault(one.lower(), []).append(one)
    close = difflib.get_close_matches(name.lower(), names, n=_CHOICES, cutoff=0.6)
    like = [one for key in close for one in names[key] if one != name]
    return [name, *like] if name in there or (folder / name).exists() else like
