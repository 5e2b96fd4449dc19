"""The record of a run's start: the commit of this code, versions, machine and command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from alignclip.errors import without_secrets

PACKAGE = Path(__file__).parents[1]
GIT_TIMEOUT = 20.0  # seconds
# what losses to the last bit depend on, or the format of checkpoints and sets
PACKAGES = (
    "alignclip", "torch", "torchvision", "mosaicml", "mosaicml-streaming", "timm",
    "open_clip_torch", "numpy", "pillow",
)  # fmt: skip


@dataclass
class Git:
    """The checkout that the code ran from; ``dirty``: its tracked files were changed."""

    commit: str
    dirty: bool


@dataclass
class Start:
    """A start of a run.

    Attributes:
        batch: how many it had trained.
        world_size: processes on all machines.
        device: of rank 0, e.g. ``cpu`` or ``NVIDIA H200``.
        time: UTC.
        command: after the launcher's own arguments, without passwords and keys.
        git: None where the code is installed rather than a checkout, or there is no git.
        versions: of Python, CUDA and :data:`PACKAGES`.
        changed: settings, ranks, machine and versions that differ from the start before, as
            ``key: before → now``.
        process: of rank 0, and its machine.
        sets: the fingerprint of each stream's set, by the stream's name.
    """

    batch: int
    world_size: int
    device: str
    time: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    command: str = field(default_factory=lambda: without_secrets(shlex.join(sys.argv)))
    git: Git | None = field(default_factory=lambda: checkout(PACKAGE))
    versions: dict[str, str] = field(default_factory=lambda: versions())
    changed: list[str] = field(default_factory=list)
    process: str = field(default_factory=lambda: f"{os.getpid()} on {socket.gethostname()}")
    sets: dict[str, str] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Return the versions of what is installed here, by the packages' names."""
    import torch  # has been imported where anything runs

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        if version := _version(package):
            found[package] = version
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


@cache
def _version(package: str) -> str:
    """Return a package's version; empty for alignclip itself, where it is only on the path."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def checkout(package: Path) -> Git | None:
    """Return the git checkout that a package belongs to: the folder of its ``pyproject.toml``.

    None where the package is installed, where git doesn't know its files, or where there is no git.
    An environment may lie inside of somebody else's repository: git is told nothing that would have
    it trust another one than this, and no program that a repository's configuration names is
    started.
    """
    root = package.resolve().parent
    if not (root / "pyproject.toml").is_file():
        return None
    try:
        if not _git(root, "ls-files", "--", f"{package.name}/*.py"):
            return None
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(
            root, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return Git(commit, bool(dirty))


def _git(root: Path, *arguments: str) -> str:
    # in a container the checkout often belongs to another user, which git would refuse
    settings = (f"safe.directory={root}", "core.fsmonitor=false", "core.hooksPath=/dev/null")
    command = [
        "git",
        *(word for setting in settings for word in ("-c", setting)),
        "--no-optional-locks",
    ]
    done = subprocess.run(
        [*command, *arguments],
        cwd=root,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=GIT_TIMEOUT,
    )
    return done.stdout.strip()
