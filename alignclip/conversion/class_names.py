"""Class names and prompt templates: clip_benchmark's, or files that a person gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from alignclip.checked_json import has_type
from alignclip.conversion.evaluation_sets import INSTALL, read_option_file
from alignclip.conversion.wording import did_you_mean_one
from alignclip.data.templates import fill_template
from alignclip.errors import UserError

GENERIC = "imagenet1k"  # whose templates clip_benchmark takes for sets that have none


def package_folder(package: str) -> Path | None:
    """Return where a package is installed, without its import; None if it isn't installed."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def benchmark_folder() -> Path | None:
    """Return where clip_benchmark keeps its lists; None if it isn't installed."""
    folder = package_folder("clip_benchmark")
    return folder and folder / "datasets"


def benchmark_lists(file: str) -> dict[str, list[str]]:
    """Read one of clip_benchmark's JSON files: dataset -> class names or templates.

    Raises:
        UserError: clip_benchmark is not installed.
    """
    folder = benchmark_folder()
    if folder is None:
        raise UserError(
            f"class names and templates are clip_benchmark's, which is not installed: {INSTALL}"
        )
    lists: dict[str, list[str]] = json.loads((folder / file).read_text(encoding="utf-8"))
    return lists


def choose_templates(name: str, path: str | None) -> list[str]:
    """Return a file's prompt templates, or clip_benchmark's: ImageNet's for a set without own ones.

    Raises:
        UserError: the file is no list of templates, or clip_benchmark is needed and not installed.
    """
    if path is None:
        lists = benchmark_lists("en_zeroshot_classification_templates.json")
        return lists.get(name, lists[GENERIC])
    templates = read_option_file("--templates", Path(path))
    if not has_type(templates, list[str]) or not templates:
        raise UserError(
            f'--templates {path} must be a JSON list of strings such as "a photo of a {{c}}."'
        )
    for text in templates:
        try:
            fill_template(text, "")
        except UserError as error:
            raise UserError(f"--templates {path}: {error}") from None
    return list(templates)


def choose_classnames(names: list[str], path: str | None) -> list[str]:
    """Return a set's own names, or a file's: a list in the same order, or an object from own names.

    Raises:
        UserError: the file is neither, or has names for fewer or more classes.
    """
    if path is None:
        return names
    given = read_option_file("--classnames", Path(path))
    if isinstance(given, dict):
        if missing := [name for name in names if name not in given]:
            hint = did_you_mean_one(missing[0], given)
            lacks = f"lacks {len(missing):,} of {len(names):,} classes"
            raise UserError(f"--classnames {path} {lacks}, the first is '{missing[0]}'{hint}")
        given = [given[name] for name in names]
    if not has_type(given, list[str]) or not all(name.strip() for name in given):
        raise UserError(
            f"--classnames {path} must be a JSON list of names, or an object from classes to names"
        )
    if len(given) != len(names):
        raise UserError(
            f"--classnames {path} has {len(given):,} names, the set has {len(names):,} classes"
        )
    return list(given)
