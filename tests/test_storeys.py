"""Imports go down the storeys only, and each foreign package has its place."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"checked_json", "errors", "near", "paths", "ranks", "device", "runtime"}
# each storey, and the storeys that it may import besides its own
STOREYS: dict[str, set[str]] = dict.fromkeys(GROUND, GROUND)
STOREYS["storage"] = GROUND
STOREYS["config"] = GROUND | {"storage"}
STOREYS["data"] = GROUND | {"storage", "config"}
STOREYS["losses"] = GROUND | {"config"}
STOREYS["model"] = GROUND | {"config", "data", "losses"}
STOREYS["weights"] = GROUND | {"storage", "config", "data", "model"}
STOREYS["evaluation"] = GROUND | {"storage", "config", "data", "losses", "model", "weights"}
STOREYS["training"] = STOREYS["evaluation"] | {"evaluation"}
STOREYS["conversion"] = GROUND | {"storage", "config", "data"}
STOREYS["verification"] = GROUND | {"storage", "config", "data", "conversion"}
STOREYS["search"] = STOREYS["quickstart"] = {*STOREYS} | {"search"}
STOREYS["alignclip"] = {*STOREYS}  # its public names, imported when they are asked for

COMPOSER = ("alignclip/training/", "alignclip/model/composer_model.py")
# The seam for Streaming: data/ reads, mds_writer.py writes, and clouds.py reaches by Streaming's
# own clients what training reads by them. One benchmark measures the writer beside Streaming's,
# another one simulates Streaming's order on many nodes.
STREAMING = (
    "alignclip/data/", "alignclip/conversion/mds_writer.py", "alignclip/storage/clouds.py",
    "benchmarks/conversion.py", "benchmarks/scaling.py",
)  # fmt: skip

# what the moves have left; each mend takes its line out
NOT_YET: set[tuple[str, str]] = set()


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, anywhere in it, names that are modules themselves
    included.
    """
    return tuple(imports_of(path.read_text(encoding="utf-8")))


def imports_of(code: str) -> Iterator[str]:
    """The modules that this code imports."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def storey(module: str) -> str:
    """The storey of a module of ours: the name below the package."""
    return ([*module.split("."), "alignclip"])[1]


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted((ROOT / "alignclip").rglob("*.py"))
# beside the package: scripts, examples, benchmarks
SCRIPTS = sorted(
    {*ROOT.glob("*.py"), *(path for name in ("convert", "examples", "benchmarks")
                           for path in (ROOT / name).rglob("*.py"))}
)  # fmt: skip


def upward() -> set[tuple[str, str]]:
    """Every import of ours that isn't allowed: the file's module, and the storey that it reaches
    for.
    """
    found = set()
    for path in FILES:
        own = storey(module_of(path))
        for name in imports(path):
            if not name.startswith("alignclip."):
                continue
            if (other := storey(name)) in STOREYS and other not in STOREYS[own] | {own}:
                found.add((module_of(path), other))
    return found


def foreign(
    package: str, places: tuple[str, ...], files: Iterable[Path] = FILES
) -> set[tuple[str, str]]:
    """Every one of the files that imports a package outside of its places."""
    return {
        (module_of(path), package)
        for path in files
        if not str(path.relative_to(ROOT)).startswith(places)
        and any(name.split(".")[0] == package for name in imports(path))
    }


def test_every_module_has_a_storey() -> None:
    assert {storey(module_of(path)) for path in FILES} <= {*STOREYS}


def test_imports_go_down_and_foreign_packages_stay_in_their_places() -> None:
    """New ones are told; one that has gone has to leave the list, too."""
    found = upward() | foreign("composer", COMPOSER)
    found |= foreign("streaming", STREAMING, [*FILES, *SCRIPTS])
    assert found - NOT_YET == set()
    assert NOT_YET - found == set()


def test_storage_uses_the_clients_of_streaming_alone() -> None:
    names = {*imports(ROOT / "alignclip/storage/clouds.py")}
    assert all(
        name.startswith("streaming.base.storage") for name in names if name.startswith("streaming")
    )


def test_temporary_folders_are_made_in_one_place() -> None:
    """A folder that another module makes stays after a kill, and may hold a checkpoint."""
    found = {module_of(path) for path in FILES if "tempfile" in imports(path)}
    assert found == {
        "alignclip.storage.temporary",
        "alignclip.storage.whole",  # removes its probes itself
        "alignclip.training.delivery",  # makes folders below one of storage.temporary
        # the type, and where TMPDIR is
        *("alignclip.conversion.formats.lines", "alignclip.conversion.workers"),
        *("alignclip.data.shared_memory", "alignclip.data.streams"),
    }


def test_the_reading_of_imports_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import alignclip.a\nfrom alignclip import b\ndef f():\n    from alignclip.c import d\n"
    )
    assert {"alignclip.a", "alignclip.b", "alignclip.c", "alignclip.c.d"} <= {*imports(file)}


@pytest.mark.parametrize("name", ["cc12m", "classification", "retrieval", "verify", "checkpoint"])
def test_scripts_are_thin(name: str) -> None:
    lines = (ROOT / "convert" / f"{name}.py").read_text().splitlines()
    assert len(lines) < 15
