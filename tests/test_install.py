"""Two stacks: what the files of versions, the Makefile and docs/install.md say of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
STACKS = {"pinned": "constraints.txt", "newest": "constraints-newest.txt"}


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def versions(name: str, package: str) -> set[str]:
    """The versions of a package that are tested, for whatever Python."""
    found = [one for one in requirements(name) if one.name == package]
    return {version.version for one in found for version in one.specifier}


def make(*arguments: str) -> str:
    """What make would do."""
    done = subprocess.run(
        ["make", "--always-make", "--dry-run", "PYTHON=python", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("stack", STACKS)
def test_the_page_has_the_versions_that_were_tested(stack: str) -> None:
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {stack} \|.*", page, re.MULTILINE)
    (torch,) = versions(STACKS[stack], "torch")
    assert f"| {torch} |" in row
    pins = page[page.index("## What the pins are for") :]
    for package in ("mosaicml", "mosaicml-streaming"):
        (version,) = versions(STACKS[stack], package)
        assert f"{package} {version}" in pins


def test_every_override_lifts_a_pin_and_was_tested() -> None:
    for override in requirements("overrides-newest.txt"):
        newest = versions(STACKS["newest"], override.name)
        assert newest, override
        assert all(override.specifier.contains(version) for version in newest), override
        pinned = versions(STACKS["pinned"], override.name)
        assert not any(override.specifier.contains(version) for version in pinned), override


def test_make_installs_one_stack_or_the_other() -> None:
    newest, pinned = make("install-newest"), make("install")
    versions_of_newest = "--override overrides-newest.txt --constraint constraints-newest.txt"
    assert f"--python .venv-newest/bin/python --compile-bytecode {versions_of_newest}" in newest
    assert "--constraint constraints.txt" in pinned
    assert "newest" not in pinned


def test_make_test_newest_runs_files_that_are_there() -> None:
    (command,) = re.findall(r"^\.venv-newest/bin/python -m pytest.*", make("test-newest"), re.M)
    files = re.findall(r"tests/\S+", command)
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).is_file()] == []
