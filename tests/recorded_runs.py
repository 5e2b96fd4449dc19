"""Runs of the command that record each step, in tests and in the soak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Started
from runs import RECORDING, gradient_error, launch, run, steps, wait_for, write_config

from alignclip.storage import open_store


class RecordedRun:
    """A run that records its steps.

    Args:
        folder: of its records and its output.
        dataset: a URL.
        save_folder: a URL, or None.
        settings: of every start.
    """

    def __init__(
        self, folder: Path, dataset: str, save_folder: str | None, *settings: str, **options: Any
    ) -> None:
        self.folder, self.records, self.options = folder, folder / "records", options
        self.store = open_store(save_folder or str(folder))
        config = write_config(folder, dataset, save_folder)
        self.arguments = (RECORDING, self.records, config, "run_name=r", *settings)

    def run(self, *more: str, **options: Any) -> str:
        return run(*self.arguments, *more, cwd=self.folder, **(self.options | options))

    def launch(self, *more: str, **options: Any) -> Started:
        return launch(*self.arguments, *more, cwd=self.folder, **(self.options | options))

    def wait_for(self, condition: Callable[[], bool], process: Started) -> None:
        wait_for(condition, process, self.folder)

    def output(self) -> str:
        return (self.folder / "output.txt").read_text()[-6000:]

    def numbers(self) -> list[int]:
        return [int(record["step"]) for record in steps(self.records)]

    def losses(self) -> dict[int, tuple[float, ...]]:
        """Step → everything recorded; a step that was trained twice must have come out the same
        twice.
        """
        found: dict[int, tuple[float, ...]] = {}
        for r in steps(self.records):
            values = tuple(v for k, v in sorted(r.items()) if k not in ("step", "sharded"))
            assert found.setdefault(int(r["step"]), values) == values, f"step {r['step']} differs"
        return found

    def latest(self) -> int:
        """The batch that the bucket's ``latest`` names; 0 where there is none."""
        if (target := self.store.read_text_optional("latest-rank0.pt.symlink")) is None:
            return 0
        name = target.rpartition("/")[2]
        assert name in self.store.names(), "latest names a checkpoint that isn't there"
        return int(name.rpartition("-ba")[2].split("-")[0])

    def checkpoints(self) -> list[str]:
        return sorted(name for name in self.store.names() if name.startswith("ep"))

    def assert_close(self, reference: RecordedRun, count: int, gradients: int = 0) -> None:
        """The same first steps, and gradients of some, up to rounding."""
        ours, theirs = self.losses(), reference.losses()
        for step in range(count):
            assert ours[step] == pytest.approx(theirs[step], rel=0, abs=1e-5)
        for step in range(gradients):
            assert gradient_error(self.records, reference.records, step) <= 1e-5
