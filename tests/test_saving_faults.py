"""A bucket or folder that refuses or goes away in the middle of a run: the run ends in one line and
with a status of its own, nothing half-written has a checkpoint's name, and the same command goes
on.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import processes
import pytest
from refusing import Refusal, RefusingS3, Request
from small_runs import SmallRuns, ending, exit_status, logged

from alignclip.errors import NOT_SAVED
from alignclip.storage import patience

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
        return exit_status(trainer)
    finally:
        refusing.refuse = lambda request: None


def assert_goes_on(runs: SmallRuns, whole: list[float], after: int) -> None:
    folder = runs.folder()
    assert folder.latest_target() == f"ep0-ba{after}-rank0.pt"
    assert not any(folder.damage(name) for name in folder.checkpoints())
    assert logged(runs.train()) == whole[after:], "bit for bit"
    assert runs.folder().latest_target().startswith("ep")
    assert runs.folder().batch_of(runs.folder().latest_target()) == 8


def some_of(cases: Iterable[Any], *usual: Any) -> list[Any]:
    """Mark all but the usual cases for ``make test-all``."""
    return [one if one in usual else pytest.param(one, marks=pytest.mark.full) for one in cases]


BUSY = [(503, "SlowDown"), (500, "InternalError"), (429, "Too")]
REFUSALS = {
    "the credentials expire": ("", (400, "ExpiredToken"), "the key has expired"),
    "the clock goes wrong": ("", (403, "RequestTimeTooSkewed"), "clock and the store's differ"),
    "the bucket is deleted": ("", (404, "NoSuchBucket"), "no such bucket"),
    "the bucket becomes read-only": ("PUT", (403, "AccessDenied"), "may not write"),
    "the quota is used up": ("PUT", (507, "XMinioStorageFull"), "quota is used up"),
    "latest can't be moved": (LATEST, (403, "AccessDenied"), "may not write"),
}


@pytest.mark.parametrize(
    "how", some_of(REFUSALS, "the credentials expire", "latest can't be moved")
)
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


@pytest.mark.parametrize("after", [2, 8], ids=["in the middle", "at the end"])
def test_all_ranks_hear_of_an_upload_that_is_refused(
    refusing: RefusingS3, runs: SmallRuns, after: int
) -> None:
    refusing.refuse = lambda request: (
        (403, "AccessDenied") if request.key.endswith(f"ba{after}-rank0.pt") else None
    )
    found = processes.run(2, ending, runs)
    assert found[0] == found[1]
    assert found[0].startswith("NotSavedError: can't write s3://b/runs/ep")
    assert f"ba{after}-rank0.pt: access denied" in found[0]


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


@pytest.mark.parametrize("answer", [(503, "SlowDown"), (403, "AccessDenied")])
def test_deletions_that_are_refused_end_nothing(
    refusing: RefusingS3,
    runs: SmallRuns,
    whole: list[float],
    answer: tuple[int, str],
    short_pauses: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A store in trouble is waited for; without the right, old checkpoints stay."""
    refusing.answer_in_turn(
        [answer] * (2 if answer[0] == 503 else 100),
        lambda request: request.command == "DELETE" and request.key.endswith(".pt"),
    )
    assert logged(runs.train("save_num_checkpoints_to_keep=1")) == whole
    left = {runs.folder().batch_of(name) for name in runs.folder().checkpoints()}
    assert left == ({8} if answer[0] == 503 else {2, 4, 6, 8})
    assert capsys.readouterr().err.count("can't be reached") == (answer[0] == 503)
    assert ("could not remove old checkpoints" in caplog.text) == (answer[0] == 403)


LOCAL = {
    "read-only": (errno.EROFS, "Read-only file system"),
    "no right": (errno.EACCES, "Permission denied"),
    "quota": (errno.EDQUOT, "the quota of the file system of .* is used up"),
    "latest": (errno.ENOSPC, "no space left in"),
}


@pytest.mark.parametrize("how", some_of(LOCAL, "read-only", "latest"))
def test_a_folder_that_refuses_in_the_middle_of_a_run(
    dataset: Path,
    tmp_path: Path,
    whole: list[float],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fourth batch's checkpoint, or ``latest`` that shall point at it."""
    runs, (number, words) = SmallRuns(tmp_path, dataset, tmp_path / "runs", *SHORT), LOCAL[how]
    trainer, path_open = runs.build(), Path.open
    refused = "latest" if how == "latest" else "ba4"

    def refuse(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if refused in path.name and "w" in mode and len(runs.folder().checkpoints()) > 0:
            raise OSError(number, os.strerror(number), str(path))
        return path_open(path, mode, *arguments, **named)

    def no_link(source: object, target: object, *more: object, **named: object) -> None:
        if "ba4" in str(source):
            raise OSError(number, os.strerror(number), str(target))
        link(source, target, *more, **named)  # type: ignore[call-overload]

    link = os.symlink
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        patch.setattr(os, "symlink", no_link)
        assert exit_status(trainer) == NOT_SAVED
    said = capsys.readouterr().err
    assert said.count("error: can't save ") == 1
    assert re.search(words, said)
    assert "the same command goes on from there" in said
    assert_goes_on(runs, whole, 2)


@pytest.mark.parametrize("answer", some_of(BUSY, BUSY[0]))
def test_a_start_waits_for_its_checkpoint(
    refusing: RefusingS3,
    runs: SmallRuns,
    whole: list[float],
    answer: tuple[int, str],
    short_pauses: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs.train()
    for name in ("ep0-ba6", "ep1-ba8", "ep0-ba8"):
        refusing.objects.pop(("b", f"runs/{name}-rank0.pt"), None)
    refusing.objects["b", LATEST] = b"runs/ep0-ba4-rank0.pt"
    refusing.answer_in_turn([answer] * 2, lambda request: request.key.endswith("ba4-rank0.pt"))
    assert logged(runs.train()) == whole[4:]
    assert "s3://b/runs is back" in capsys.readouterr().err
