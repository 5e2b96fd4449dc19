"""File systems that lack something: links, renames over a file, room.

A save is whole, or one line and nothing else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from runs import write_config
from s3 import S3Server
from small_runs import SmallRuns, ending, exit_status, logged

import alignclip
from alignclip.config.reading import load
from alignclip.errors import NOT_SAVED
from alignclip.training import composer_patches
from alignclip.training.resume import choose_checkpoint
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file
from alignclip.weights.checkpoint_file import NotSavedError

pytestmark = pytest.mark.slow  # runs in process

CONTENT = {"state": {"a": torch.zeros(100_000)}}


@pytest.fixture(params=[errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EACCES])
def no_links(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither symbolic nor hard links below ``tmp_path``."""

    def refuse(source: object, target: object, *more: object, **named: object) -> None:
        raise OSError(request.param, os.strerror(request.param), str(target))

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)


def short_runs(folder: Path, dataset: Path, save_folder: str | Path) -> SmallRuns:
    return SmallRuns(folder, dataset, save_folder, "max_duration=4ba", "save_interval=2ba")


def test_a_run_without_links(no_links: None, dataset: Path, tmp_path: Path) -> None:
    """It saves, goes on, rotates, and is found by whoever looks for its latest checkpoint."""
    place = tmp_path / "runs"
    runs = short_runs(tmp_path, dataset, place)
    assert runs.train("save_num_checkpoints_to_keep=1").state.timestamp.batch == 4
    trainer = runs.train("save_num_checkpoints_to_keep=1", "max_duration=6ba")
    assert runs.folder().latest_target() == "ep1-ba6-rank0.pt"
    assert sorted(path.name for path in place.glob("*.pt*")) == [
        "ep1-ba6-rank0.pt",
        "latest-rank0.pt.symlink",
    ]
    weights = trainer.state.model.encoders.state_dict()
    for name in (place, place / "latest-rank0.pt"):
        model, *_ = alignclip.load(name)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    # as load_path, too
    load_path = f"load_path={place}/latest-rank0.pt"
    other = short_runs(tmp_path, dataset, tmp_path / "other").build(load_path, "max_duration=8ba")
    composer_patches.close(other)
    assert other.state.timestamp.batch.value == 6


def test_a_folder_that_moves_to_where_there_are_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SaveFolder(load(write_config(tmp_path, "set", str(tmp_path / "runs")), ["run_name=r"]))
    for batch in (2, 4):
        checkpoint_file.write_checkpoint(CONTENT, tmp_path / "runs" / f"ep0-ba{batch}-rank0.pt")
    for links, batch in ((True, 2), (False, 4), (True, 2)):
        with monkeypatch.context() as patch:
            if not links:
                patch.setattr(os, "symlink", _refuse)
            folder.point_latest(f"ep0-ba{batch}-rank0.pt")
        there = {
            path.name for path in (tmp_path / "runs").iterdir() if path.name.startswith("latest")
        }
        assert there == {"latest-rank0.pt" if links else "latest-rank0.pt.symlink"}
        assert choose_checkpoint(folder, tmp_path / "download.pt") == f"ep0-ba{batch}-rank0.pt"
    (tmp_path / "runs" / "latest-rank0.pt").unlink()
    (tmp_path / "runs" / "latest-rank0.pt.symlink").write_bytes(b"\xff\0\n/../x")
    assert choose_checkpoint(folder, tmp_path / "download.pt") == "ep0-ba4-rank0.pt"


def _refuse(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.ENOSYS])
def test_a_file_system_that_cannot_rename_over_a_file(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ep0-ba2-rank0.pt"
    checkpoint_file.write_checkpoint({"state": {"old": 1}}, path)

    def replace(source: Any, target: Any) -> None:
        if Path(target).exists():
            raise OSError(number, os.strerror(number), str(target))
        rename(source, target)

    rename = os.rename
    monkeypatch.setattr(os, "replace", replace)
    checkpoint_file.write_checkpoint(CONTENT, path)
    assert checkpoint_file.damage(path) is None
    assert path.stat().st_size > 400_000
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def full(monkeypatch: pytest.MonkeyPatch, number: int, after: int, only: str = "") -> None:
    """A disk that takes so many bytes of a checkpoint and no more."""
    write, taken = checkpoint_file._write_all, [0]

    def refuse(file: FileIO, data: memoryview | bytes) -> None:
        taken[0] += len(data)
        if taken[0] > after and only in str(file.name):
            write(file, bytes(data)[:10])
            raise OSError(number, os.strerror(number))
        write(file, data)

    monkeypatch.setattr(checkpoint_file, "_write_all", refuse)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "no space left in"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error"),
    ],
)
@pytest.mark.parametrize("after", [0, 5_000, 300_000, 401_000])
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str, after: int
) -> None:
    path = tmp_path / "ep0-ba2-rank0.pt"
    for before in (None, b"what was there"):
        if before is not None:
            path.write_bytes(before)
        with monkeypatch.context() as patch:
            full(patch, number, after)
            with pytest.raises(NotSavedError, match=says) as raised:
                checkpoint_file.write_checkpoint(CONTENT, path)
        text = str(raised.value)
        assert str(path) in text
        assert "\n" not in text
        if number == errno.ENOSPC:
            assert "401" in text or "402" in text, "the bytes that are needed, in kB"
            assert "free" in text
        assert [left.name for left in tmp_path.iterdir()] == ([path.name] if before else [])
        assert before is None or path.read_bytes() == before


def test_a_limit_on_the_size_of_files(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    small_files(100_000)
    with pytest.raises(NotSavedError, match="File too large"):
        checkpoint_file.write_checkpoint(CONTENT, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "bucket"])
def test_a_run_whose_disk_is_full_ends_and_goes_on(
    dataset: Path,
    tmp_path: Path,
    s3: S3Server,
    remote: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With one line and a status of its own.

    In a bucket it is the temporary folder that is full.
    """
    uri = f"{s3.bucket()}/run" if remote else str(tmp_path / "runs")
    runs = short_runs(tmp_path, dataset, uri)
    trainer = runs.build()
    with monkeypatch.context() as patch:
        full(patch, errno.ENOSPC, 20_000, "ba4")
        assert exit_status(trainer) == NOT_SAVED
    said = capsys.readouterr().err
    assert said.count("error: can't save ") == 1
    assert "ep0-ba4-rank0.pt: no space left in" in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert list(runs.folder().checkpoints()) == ["ep0-ba2-rank0.pt"]
    assert runs.folder().latest_target() == "ep0-ba2-rank0.pt"
    assert len(logged(runs.train())) == 2, "the third batch and the fourth"
    assert runs.folder().latest_target() == "ep0-ba4-rank0.pt"


def _train_on_a_full_disk(runs: SmallRuns) -> str:
    with pytest.MonkeyPatch.context() as patch:
        full(patch, errno.ENOSPC, 20_000)
        return ending(runs)


def test_all_ranks_hear_that_one_cannot_save(dataset: Path, tmp_path: Path) -> None:
    runs = short_runs(tmp_path, dataset, tmp_path / "runs")
    found = processes.run(2, _train_on_a_full_disk, runs)
    assert found[0] == found[1]
    assert found[0].startswith("NotSavedError: can't save ")


def test_what_a_killed_run_has_left_goes(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".ep0-ba2-rank0.pt.partial").write_bytes(b"half of it")
    folder = short_runs(tmp_path, dataset, tmp_path / "runs").folder()
    folder.open()
    assert list((tmp_path / "runs").iterdir()), (
        "a start that is refused later leaves another run's folder alone"
    )
    folder.remove_partial()
    assert not list((tmp_path / "runs").iterdir())
