"""Checkpoints that are not as they were written: passed over when a run goes on, and not counted by the rotation."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from refusing import RefusingS3
from runs import write_config
from s3 import S3Server

from alignclip.config.reading import load
from alignclip.errors import UserError
from alignclip.training.resume import choose_checkpoint
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file, weight_files

Damage = Callable[[bytes], bytes | None]
DAMAGES: dict[str, Damage] = {
    "truncated": lambda data: data[: len(data) * 2 // 3],
    "its end is missing": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped in a tensor": lambda data: flipped(data, len(data) // 3),
    "flipped in the checksum": lambda data: flipped(data, len(data) - 5),
    "other bytes": lambda data: bytes(len(data)),
    "deleted": lambda data: None,
}


def content(batch: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "state": {
            "model": {"encoders.a": torch.randn(40, 30, generator=generator)},
            "batch": batch,
        },
        "rng": [1, 2.5],
    }


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << random.Random(position).randrange(8)
    return bytes(changed)


class Place:
    """A save folder with checkpoints of batches 2, 4 and 6, in a folder or in a bucket."""

    def __init__(self, tmp_path: Path, s3: S3Server, remote: bool) -> None:
        self.tmp_path, self.s3, self.remote = tmp_path, s3, remote
        self.uri = f"{s3.bucket()}/runs/first" if remote else str(tmp_path / "runs")
        self.bucket, _, self.prefix = self.uri.removeprefix("s3://").partition("/")
        for batch in (2, 4, 6):
            self.save(batch)
        self.point(self.name(6))

    @staticmethod
    def name(batch: int) -> str:
        return f"ep0-ba{batch}-rank0.pt"

    def folder(self) -> SaveFolder:
        config = load(
            write_config(self.tmp_path, str(self.tmp_path / "set"), self.uri), ["run_name=first"]
        )
        folder = SaveFolder(config)
        folder.open()
        return folder

    def save(self, batch: int) -> None:
        path = self.tmp_path / "made.pt"
        checkpoint_file.save(content(batch), path)
        self.put(self.name(batch), path.read_bytes())

    def put(self, name: str, data: bytes | None) -> None:
        if not self.remote:
            path = Path(self.uri, name)
            path.parent.mkdir(exist_ok=True)
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
        elif data is None:
            self.s3.client.delete_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")
        else:
            self.s3.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=data)

    def get(self, name: str) -> bytes:
        if not self.remote:
            return Path(self.uri, name).read_bytes()
        return self.s3.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}")[
            "Body"
        ].read()

    def damage(self, batch: int, how: Damage) -> None:
        self.put(self.name(batch), how(self.get(self.name(batch))))

    def point(self, name: str | None) -> None:
        if self.remote:
            self.put("latest-rank0.pt.symlink", f"{self.prefix}/{name}".encode() if name else None)
            return
        link = Path(self.uri, "latest-rank0.pt")
        link.unlink(missing_ok=True)
        if name:
            link.symlink_to(name)

    def latest(self) -> str:
        return self.folder().latest_target()

    def names(self) -> list[str]:
        return sorted(self.folder().checkpoints())


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Place:
    return Place(tmp_path, s3, request.param == "bucket")


def test_every_byte_counts(tmp_path: Path) -> None:
    path, damaged = tmp_path / "a.pt", tmp_path / "b.pt"
    checkpoint_file.save(content(1), path)
    data = path.read_bytes()
    assert checkpoint_file.damage(path) is None
    missed = []
    for position in range(len(data)):
        damaged.write_bytes(flipped(data, position))
        missed += [position] * (checkpoint_file.damage(damaged) is None)
    assert missed == []
    for length in [*range(0, len(data), 13), *range(len(data) - 120, len(data))]:
        damaged.write_bytes(data[:length])
        assert checkpoint_file.damage(damaged) is not None, length
    # by hand: head -c -64 FILE | sha256sum
    assert hashlib.sha256(data[:-64]).hexdigest() == data[-64:].decode()
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(
        mapped["state"]["model"]["encoders.a"], content(1)["state"]["model"]["encoders.a"]
    )


def test_what_is_damaged_is_not_loaded(tmp_path: Path) -> None:
    """By ``alignclip.load`` and whatever else reads weights."""
    path = tmp_path / "a.pt"
    checkpoint_file.save(content(1), path)
    assert weight_files.read(path, "a.pt").values["rng"] == [1, 2.5]
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 3))
    with pytest.raises(UserError, match=r"a\.pt is damaged: its checksum is wrong"):
        weight_files.read(path, "a.pt")


def test_every_byte_of_an_earlier_versions_tensors_counts(tmp_path: Path) -> None:
    """Without a checksum of its own: what a flipped bit doesn't change in a value may stay unseen."""
    path, damaged = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(content(1), path)
    data = path.read_bytes()
    assert checkpoint_file.damage(path) is None
    unseen = []
    for position in range(0, len(data), 3):
        damaged.write_bytes(flipped(data, position))
        unseen += [position] * (checkpoint_file.damage(damaged) is None)
    for position in unseen:
        damaged.write_bytes(flipped(data, position))
        found = read(damaged)
        assert torch.equal(
            found["state"]["model"]["encoders.a"], content(1)["state"]["model"]["encoders.a"]
        )
    assert len(unseen) < len(data) / 20
    for length in range(0, len(data), 11):
        damaged.write_bytes(data[:length])
        assert checkpoint_file.damage(damaged) is not None, length


def read(path: Path) -> dict:
    from alignclip.weights.safe_read import read_pickled

    return read_pickled(path)


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_newest_whole_checkpoint_is_used(
    place: Place, how: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.damage(6, how)
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(4)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"{place.uri}: passed over {place.name(6)} (" in said
    assert f"the newest whole checkpoint is {place.name(4)}" in said
    assert place.latest() == place.name(4), "latest is mended"
    if place.remote:
        assert read(tmp_path / "download.pt")["state"]["batch"] == 4
    # once more: nothing is left to say
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(4)
    assert capsys.readouterr().out == ""


def test_two_damaged_ones_are_passed_over(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.damage(6, DAMAGES["truncated"])
    place.damage(4, DAMAGES["empty"])
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(2)
    assert f"{place.name(4)} (it is empty)" in capsys.readouterr().out


def test_without_latest_the_newest_whole_one_is_used(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.point(None)
    place.damage(6, DAMAGES["flipped in a tensor"])
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(4)
    assert place.latest() == place.name(4)
    place.point("ep9-ba99-rank0.pt")  # which was never there
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(4)
    assert "passed over ep9-ba99-rank0.pt (it is not there)" in capsys.readouterr().out


def test_a_latest_that_was_turned_back_is_followed(place: Place, tmp_path: Path) -> None:
    place.point(place.name(2))
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(2)


def test_no_whole_checkpoint_is_one_line(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for batch in (2, 4, 6):
        place.damage(batch, DAMAGES["truncated"])
    with pytest.raises(
        UserError, match=r"no checkpoint in .* is whole: ep0-ba6-rank0.pt \(.*start anew"
    ):
        choose_checkpoint(place.folder(), tmp_path / "download.pt")
    place.point(None)  # as a run of an earlier version leaves it that was killed in its first save
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") is None
    assert "the run starts anew" in capsys.readouterr().out
    for batch in (2, 4, 6):
        place.put(place.name(batch), None)
    place.point(place.name(6))
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") is None
    assert (
        "points at ep0-ba6-rank0.pt, which is gone; the run starts anew" in capsys.readouterr().out
    )


def test_a_run_with_a_damaged_latest_never_starts_anew(
    refusing: RefusingS3, tmp_path: Path
) -> None:
    """A key that may not list the bucket sees no older checkpoint; starting anew would save over them."""
    checkpoint_file.save(content(4), tmp_path / "made.pt")
    refusing.objects |= {
        ("b", "r/latest-rank0.pt.symlink"): b"r/ep0-ba4-rank0.pt",
        ("b", "r/ep0-ba4-rank0.pt"): DAMAGES["flipped in a tensor"](
            (tmp_path / "made.pt").read_bytes()
        ),
    }
    refusing.without_right("list")
    folder = SaveFolder(
        load(write_config(tmp_path, str(tmp_path / "set"), "s3://b/r"), ["run_name=first"])
    )
    with pytest.raises(
        UserError, match=r"no checkpoint in s3://b/r is whole: ep0-ba4-rank0.pt \(its checksum"
    ):
        choose_checkpoint(folder, tmp_path / "download.pt")


def test_what_cannot_be_read_may_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only checkpoint on a drive that is away for the moment is nothing to start anew over."""
    folder = SaveFolder(
        load(write_config(tmp_path, "set", str(tmp_path / "runs")), ["run_name=first"])
    )
    checkpoint_file.save(content(4), tmp_path / "runs" / "ep0-ba4-rank0.pt")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_file, "_digest", lambda *_: (tmp_path / "gone").read_text())
        with pytest.raises(UserError, match=r"ep0-ba4-rank0.pt \(it can't be read"):
            choose_checkpoint(folder, tmp_path / "download.pt")


def test_nothing_is_deleted_before_what_stays_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path, cast("S3Server", None), remote=False)
    written: dict[str, list[str]] = {}
    monkeypatch.setattr(
        "alignclip.training.save_folder.to_disk",
        lambda path: written.update({path.name: place.names()}),
    )
    names = place.names()
    assert place.folder().rotate(2) == [place.name(2)]
    assert written == {place.name(6): names, place.name(4): names, "runs": names}


def test_a_checkpoint_of_an_earlier_version_is_used(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "made.pt"
    torch.save(content(6), path)
    place.put(place.name(6), path.read_bytes())
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(6)
    place.put(place.name(6), flipped(path.read_bytes(), path.stat().st_size // 3))
    assert choose_checkpoint(place.folder(), tmp_path / "download.pt") == place.name(4)


def test_other_names_of_checkpoints_are_found(tmp_path: Path) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    folder = SaveFolder(
        load(yaml, ["run_name=a.b", "save_filename='{run_name}-step{batch}-of-{epoch}.pt'"])
    )
    for batch in (9, 10):
        checkpoint_file.save(content(batch), tmp_path / "runs" / f"a.b-step{batch}-of-0.pt")
    (tmp_path / "runs" / "aXb-step99-of-0.pt").write_bytes(b"another's")
    assert choose_checkpoint(folder, tmp_path / "download.pt") == "a.b-step10-of-0.pt"


def test_latest_in_a_folder_of_its_own_is_a_link_from_the_first_save_on(tmp_path: Path) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    folder = SaveFolder(
        load(yaml, ["run_name=first", "save_latest_filename='links/latest-rank{rank}.pt'"])
    )
    checkpoint_file.save(content(4), tmp_path / "runs" / "ep0-ba4-rank0.pt")
    folder.point_latest("ep0-ba4-rank0.pt")
    assert (tmp_path / "runs" / "links" / "latest-rank0.pt").is_symlink()
    assert folder.latest_target() == "ep0-ba4-rank0.pt"


def test_a_folder_that_was_copied_with_its_links_followed(tmp_path: Path) -> None:
    yaml = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    folder = SaveFolder(load(yaml, ["run_name=first"]))
    for name in ("ep0-ba4-rank0.pt", "ep0-ba5-rank0.pt", "latest-rank0.pt"):
        checkpoint_file.save(content(5), tmp_path / "runs" / name)
    assert choose_checkpoint(folder, tmp_path / "download.pt") == "latest-rank0.pt"
    (tmp_path / "runs" / "latest-rank0.pt").write_bytes(b"half a copy")
    assert choose_checkpoint(folder, tmp_path / "download.pt") == "ep0-ba5-rank0.pt"
    assert (tmp_path / "runs" / "latest-rank0.pt").readlink() == Path("ep0-ba5-rank0.pt")


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_rotation_counts_whole_checkpoints_only(place: Place, how: Damage) -> None:
    place.damage(6, how)
    assert place.folder().rotate(1) == [place.name(2)], "4 is the only whole one that is kept"
    place.save(8)
    place.point(place.name(8))
    assert place.folder().rotate(2) == [], "two are whole: 4 and 8"
    place.save(10)
    place.point(place.name(10))
    deleted = place.folder().rotate(2)
    assert place.names() == [place.name(10), place.name(8)]
    assert place.name(4) in deleted


def test_the_rotation_sees_what_is_damaged_later(place: Place) -> None:
    """Also where the same process has read the checkpoint before."""
    folder = place.folder()
    assert folder.rotate(2) == [place.name(2)]
    place.damage(6, DAMAGES["truncated"])
    place.save(8)
    place.point(place.name(8))
    assert folder.rotate(2) == [], "of 4, 6 and 8 two are whole"
    assert place.names() == [place.name(4), place.name(6), place.name(8)]
