"""Checkpoints that are not as they were written: passed over when a run goes on, and not counted
by the rotation.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import refused
from refusing import RefusingS3
from s3 import S3Server
from save_folders import LATEST, Damage, Place, config_for, content, flipped, name_of

from alignclip.storage import StorageError
from alignclip.training.resume import choose_checkpoint
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file, weight_files
from alignclip.weights.safe_read import read_pickled

DAMAGES: dict[str, Damage] = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "its end is missing": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped in a tensor": lambda data: flipped(data, len(data) // 3),
    "flipped in the checksum": lambda data: flipped(data, len(data) - 5),
    "other bytes": lambda data: bytes(len(data)),
    "deleted": lambda data: None,
}
every_damage = pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Place:
    uri = f"{s3.bucket()}/runs/first" if request.param == "bucket" else str(tmp_path / "runs")
    return Place(tmp_path, uri)


@pytest.fixture
def choose(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Choose a checkpoint of the place: its name, and what was said."""

    def choose() -> tuple[str | None, str]:
        capsys.readouterr()
        name = choose_checkpoint(place.folder(), tmp_path / "download.pt")
        return name, capsys.readouterr().out

    return choose


def tensor(values: Any) -> torch.Tensor:
    return values["state"]["model"]["encoders.a"]


def damaged(path: Path, positions: range, lengths: Any) -> Iterator[tuple[int, bool]]:
    """For a file with a flipped bit at each position, then cut at each length: is the damage
    seen?
    """
    data, file = path.read_bytes(), path.with_name("b.pt")
    assert checkpoint_file.damage(path) is None
    for length in lengths:
        file.write_bytes(data[:length])
        assert checkpoint_file.damage(file) is not None, length
    for position in positions:
        file.write_bytes(flipped(data, position))
        yield position, checkpoint_file.damage(file) is not None


@pytest.mark.slow
def test_every_byte_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint_file.write_checkpoint(content(1), path)
    data = path.read_bytes()
    size = len(data)
    lengths = [*range(0, size, 13), *range(size - 120, size)]
    assert [one for one, seen in damaged(path, range(size), lengths) if not seen] == []
    # by hand: head -c -64 FILE | sha256sum
    assert hashlib.sha256(data[:-64]).hexdigest() == data[-64:].decode()
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(tensor(mapped), tensor(content(1)))


def test_every_byte_of_an_earlier_versions_tensors_counts(tmp_path: Path) -> None:
    """Without a checksum of its own: what a flipped bit doesn't change in a value may stay
    unseen.
    """
    path = tmp_path / "a.pt"
    torch.save(content(1), path)
    size = path.stat().st_size
    unseen = 0
    for _, seen in damaged(path, range(0, size, 3), range(0, size, 11)):
        if not seen:
            unseen += 1
            assert torch.equal(tensor(read_pickled(tmp_path / "b.pt")), tensor(content(1)))
    assert unseen < size / 20


def test_what_is_damaged_is_not_loaded(tmp_path: Path) -> None:
    """By ``alignclip.load`` and whatever else reads weights."""
    path = tmp_path / "a.pt"
    checkpoint_file.write_checkpoint(content(1), path)
    assert weight_files.read(path, "a.pt").values["rng"] == [1, 2.5]
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 3))
    with refused(r"a\.pt is damaged: its checksum is wrong"):
        weight_files.read(path, "a.pt")


@every_damage
def test_the_newest_whole_checkpoint_is_used(
    place: Place, choose: Any, how: Damage, tmp_path: Path
) -> None:
    place.damage(6, how)
    name, said = choose()
    assert name == place.latest() == name_of(4), "latest is mended"
    assert said.count("\n") == 1
    assert f"{place.uri}: passed over {name_of(6)} (" in said
    assert f"the newest whole checkpoint is {name_of(4)}" in said
    if place.remote:
        assert read_pickled(tmp_path / "download.pt")["state"]["batch"] == 4
    assert choose() == (name_of(4), ""), "once more: nothing is left to say"


@pytest.mark.parametrize(
    ("damages", "latest", "chosen", "told"),
    [
        ({6: "truncated", 4: "empty"}, name_of(6), 2, f"{name_of(4)} (it is empty)"),
        ({6: "flipped in a tensor"}, None, 4, ""),
        ({6: "empty"}, "ep9-ba99-rank0.pt", 4, "passed over ep9-ba99-rank0.pt (it is not there)"),
        ({}, name_of(2), 2, ""),  # latest was turned back
        ({}, None, 6, f"there was no {LATEST}; the newest whole checkpoint is {name_of(6)}"),
    ],
)
def test_the_newest_whole_one_wherever_latest_points(
    place: Place, choose: Any, damages: dict[int, str], latest: str | None, chosen: int, told: str
) -> None:
    for batch, how in damages.items():
        place.damage(batch, DAMAGES[how])
    place.point(latest)
    name, said = choose()
    assert name == place.latest() == name_of(chosen)
    assert told in said


def test_no_whole_checkpoint_is_one_line(place: Place, choose: Any) -> None:
    for batch in (2, 4, 6):
        place.damage(batch, DAMAGES["truncated"])
    with refused(r"no checkpoint in .* is whole: ep0-ba6-rank0.pt \(.*start anew"):
        choose()
    place.point(None)  # as a run of an earlier version leaves it that was killed in its first save
    name, said = choose()
    assert name is None
    assert "the run starts anew" in said
    for batch in (2, 4, 6):
        place.put(name_of(batch), None)
    place.point(name_of(6))
    name, said = choose()
    assert name is None
    assert "points at ep0-ba6-rank0.pt, which is gone; the run starts anew" in said


def test_a_run_with_a_damaged_latest_never_starts_anew(
    refusing: RefusingS3, tmp_path: Path
) -> None:
    """A key that may not list the bucket sees no older checkpoint.

    Starting anew would save over them.
    """
    path = tmp_path / "made.pt"
    checkpoint_file.write_checkpoint(content(4), path)
    refusing.objects |= {
        ("b", f"r/{LATEST}.symlink"): f"r/{name_of(4)}".encode(),
        ("b", f"r/{name_of(4)}"): flipped(path.read_bytes(), path.stat().st_size // 3),
    }
    refusing.without_right("list")
    folder = SaveFolder(config_for(tmp_path, "s3://b/r"))
    with refused(r"no checkpoint in s3://b/r is whole: ep0-ba4-rank0.pt \(its checksum"):
        choose_checkpoint(folder, tmp_path / "download.pt")


def test_what_cannot_be_read_may_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only checkpoint on a drive that is away for the moment is nothing to start anew over."""
    place = Place(tmp_path, str(tmp_path / "runs"), batches=(4,))
    place.point(None)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "_digest", lambda *_: (tmp_path / "gone").read_text())
        with refused(r"ep0-ba4-rank0.pt \(it can't be read"):
            choose_checkpoint(place.folder(), tmp_path / "download.pt")


def test_nothing_is_deleted_before_what_stays_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, str(tmp_path / "runs"))
    written: dict[str, list[str]] = {}
    monkeypatch.setattr(
        "alignclip.training.save_folder.to_disk",
        lambda path: written.update({path.name: place.names()}),
    )
    names = place.names()
    assert place.folder().rotate(2) == [name_of(2)]
    assert written == dict.fromkeys([name_of(6), name_of(4), "runs"], names)


def test_a_checkpoint_of_an_earlier_version_is_used(place: Place, choose: Any) -> None:
    torch.save(content(6), place.made)
    place.put(name_of(6), data := place.made.read_bytes())
    assert choose()[0] == name_of(6)
    place.put(name_of(6), flipped(data, len(data) // 3))
    assert choose()[0] == name_of(4)


def test_other_names_of_checkpoints_are_found(tmp_path: Path) -> None:
    runs, pattern = tmp_path / "runs", "save_filename='{run_name}-step{batch}-of-{epoch}.pt'"
    folder = SaveFolder(config_for(tmp_path, str(runs), "run_name=a.b", pattern))
    for batch in (9, 10):
        checkpoint_file.write_checkpoint(content(batch), runs / f"a.b-step{batch}-of-0.pt")
    (runs / "aXb-step99-of-0.pt").write_bytes(b"another's")
    assert choose_checkpoint(folder, tmp_path / "download.pt") == "a.b-step10-of-0.pt"


def test_the_first_level_of_a_local_folder_has_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Iterator[Any]:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(tmp_path / "runs"))

    runs = tmp_path / "runs"
    folder = SaveFolder(config_for(tmp_path, str(runs)))
    monkeypatch.setattr(os, "walk", fail)  # data sets and logs may lie below
    assert folder.checkpoints() == {}, "the folder isn't made yet"
    (runs / "ep1-ba5").mkdir(parents=True)  # as Composer saves what is sharded
    checkpoint_file.write_checkpoint(content(4), runs / name_of(4))
    checkpoint_file.write_checkpoint(content(6), runs / "wandb" / name_of(6))
    assert folder.checkpoints() == {"ep1-ba5": 5, name_of(4): 4}
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(StorageError, match=f"can't list {runs}: .*[Ii]nput/output error"):
        folder.has_checkpoint()


def test_latest_in_a_folder_of_its_own_is_a_link_from_the_first_save_on(tmp_path: Path) -> None:
    name = "save_latest_filename='links/latest-rank{rank}.pt'"
    folder = SaveFolder(config_for(tmp_path, str(tmp_path / "runs"), name))
    checkpoint_file.write_checkpoint(content(4), tmp_path / "runs" / name_of(4))
    folder.point_latest(name_of(4))
    assert (tmp_path / "runs" / "links" / LATEST).is_symlink()
    assert folder.latest_target() == name_of(4)


def test_a_folder_that_was_copied_with_its_links_followed(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    folder = SaveFolder(config_for(tmp_path, str(runs)))
    for name in (name_of(4), name_of(5), LATEST):
        checkpoint_file.write_checkpoint(content(5), runs / name)
    assert choose_checkpoint(folder, tmp_path / "download.pt") == LATEST
    (runs / LATEST).write_bytes(b"half a copy")
    assert choose_checkpoint(folder, tmp_path / "download.pt") == name_of(5)
    assert (runs / LATEST).readlink() == Path(name_of(5))


@pytest.mark.slow
@every_damage
def test_the_rotation_counts_whole_checkpoints_only(place: Place, how: Damage) -> None:
    place.damage(6, how)
    assert place.folder().rotate(1) == [name_of(2)], "4 is the only whole one that is kept"
    place.save(8)
    place.point(name_of(8))
    assert place.folder().rotate(2) == [], "two are whole: 4 and 8"
    place.save(10)
    place.point(name_of(10))
    assert name_of(4) in place.folder().rotate(2)
    assert place.names() == [name_of(10), name_of(8)]


def test_the_rotation_sees_what_is_damaged_later(place: Place) -> None:
    """Also where the same process has read the checkpoint before."""
    folder = place.folder()
    assert folder.rotate(2) == [name_of(2)]
    place.damage(6, DAMAGES["truncated"])
    place.save(8)
    place.point(name_of(8))
    assert folder.rotate(2) == [], "of 4, 6 and 8 two are whole"
    assert place.names() == [name_of(4), name_of(6), name_of(8)]
