"""A bucket that refuses or goes away in the middle of a run, while checkpoints travel: the run
ends in one line and with a status of its own, nothing half-written has a checkpoint's name, and the
same command goes on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from refusing import Refusal, RefusingS3, Request
from small_runs import SmallRuns, logged

from alignclip.errors import NOT_SAVED, one_line_errors
from alignclip.storage import patience
from alignclip.training import composer_patches

pytestmark = pytest.mark.slow  # runs in process

SHORT = ("max_duration=8ba", "save_interval=2ba")
LATEST = "runs/latest-rank0.pt.symlink"


@pytest.fixture
def runs(refusing: RefusingS3, dataset: Path, tmp_path: Path) -> SmallRuns:
    return SmallRuns(tmp_path, dataset, "s3://b/runs", *SHORT)


@pytest.fixture
def whole(dataset: Path, tmp_path: Path) -> list[float]:
    """The losses of a run that nothing disturbs."""
    return logged(SmallRuns(tmp_path / "whole", dataset, None, *SHORT).train())


def ended(runs: SmallRuns, refusing: RefusingS3, refuse: Any, after: int) -> int:
    """Train, and have the bucket refuse once a checkpoint has arrived; return the exit status."""
    trainer = runs.build("save_num_checkpoints_to_keep=2")
    is_there = f"ep0-ba{after}-rank0.pt".encode()

    def later(request: Request) -> Refusal:
        latest = refusing.objects.get(("b", LATEST), b"")
        return refuse(request) if latest.endswith(is_there) else None

    refusing.refuse = later
    try:
        with pytest.raises(SystemExit) as status, one_line_errors():
            trainer.fit()
    finally:
        composer_patches.close(trainer)
        refusing.refuse = lambda request: None
    return int(status.value.code or 0)


def assert_goes_on(runs: SmallRuns, whole: list[float], after: int) -> None:
    folder = runs.folder()
    assert folder.latest_target() == f"ep0-ba{after}-rank0.pt"
    assert not any(folder.damage(name) for name in folder.checkpoints())
    assert logged(runs.train()) == whole[after:], "bit for bit"
    assert runs.folder().latest_target().startswith("ep")
    assert runs.folder().batch_of(runs.folder().latest_target()) == 8


REFUSALS = {
    "the credentials expire": ("", (400, "ExpiredToken"), "the key has expired"),
    "the clock goes wrong": ("", (403, "RequestTimeTooSkewed"), "clock and the store's differ"),
    "the bucket is deleted": ("", (404, "NoSuchBucket"), "no such bucket"),
    "the bucket becomes read-only": ("PUT", (403, "AccessDenied"), "may not write"),
    "the quota is used up": ("PUT", (507, "XMinioStorageFull"), "quota is used up"),
    "latest can't be moved": (LATEST, (403, "AccessDenied"), "may not write"),
}


@pytest.mark.parametrize("how", REFUSALS)
def test_a_bucket_that_refuses_in_the_middle_of_a_run(
    refusing: RefusingS3,
    runs: SmallRuns,
    whole: list[float],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(patience, "_say", lambda *_: pytest.fail("somebody waits"))
    what, answer, words = REFUSALS[how]

    def refuse(request: Request) -> Refusal:
        return answer if what in ("", request.command) or request.key == what else None

    assert ended(runs, refusing, refuse, 2) == NOT_SAVED
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: can't write s3://b/runs/")
    assert words in line
    assert "the same command goes on from there" in line
    assert_goes_on(runs, whole, 2)


def test_checkpoints_that_queue_wait_for_a_bucket_together(
    refusing: RefusingS3,
    runs: SmallRuns,
    whole: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three of them: each by itself would wait for as long as the first."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    monkeypatch.setattr(patience, "PATIENCE", 6.0)
    began = time.monotonic()
    assert ended(runs, refusing, lambda request: (503, "SlowDown"), 2) == NOT_SAVED
    assert time.monotonic() - began < 18
    said = capsys.readouterr().err
    assert said.count("can't be reached") == 1
    assert said.count("error: can't write s3://b/runs/ep0-ba4-rank0.pt: the store is busy") == 1
    assert_goes_on(runs, whole, 2)


@pytest.mark.parametrize("answer", [(503, "SlowDown"), (500, "InternalError"), (429, "Too")])
def test_a_start_waits_for_its_checkpoint(
    refusing: RefusingS3,
    runs: SmallRuns,
    whole: list[float],
    answer: tuple[int, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.01)
    runs.train()
    for name in ("ep0-ba6", "ep1-ba8", "ep0-ba8"):
        refusing.objects.pop(("b", f"runs/{name}-rank0.pt"), None)
    refusing.objects["b", LATEST] = b"runs/ep0-ba4-rank0.pt"
    answers = iter([answer] * 2)
    refusing.refuse = lambda request: (
        next(answers, None) if request.key.endswith("ba4-rank0.pt") else None
    )
    assert logged(runs.train()) == whole[4:]
    assert "s3://b/runs is back" in capsys.readouterr().err
