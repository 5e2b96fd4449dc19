"""What each command says and does where a store refuses: a right that is missing, an expired
key, a full quota.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusing import RefusingS3
from tarballs import pairs, quick, write_tar

from alignclip.config.schema import RunConfig, SetConfig
from alignclip.conversion.inputs import expand_inputs
from alignclip.data.streams import read_index
from alignclip.errors import UserError
from alignclip.evaluation.sets import read_classes
from alignclip.storage import StorageError, open_store, read_text
from alignclip.storage.staging import OutputFolder, list_remote
from alignclip.training.preflight import check_start
from alignclip.training.run_record import check_config, record_config
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.export_command import ExportOptions, run_export
from alignclip.weights.fetch import fetch
from alignclip.weights.locate import CARD, text_beside

RUN = {
    "config.yaml": b"model: {}",
    "latest-rank0.pt.symlink": b"runs/r/ep1-ba5-rank0.pt",
    "ep1-ba5-rank0.pt": b"weights",
}
EXPORT = {"open_clip_config.json": b"{}", "open_clip_model.safetensors": b"weights"}
WORDS = {  # answer → what is said of it
    (400, "ExpiredToken"): "the key has expired",
    (403, "RequestTimeTooSkewed"): "clock",
    (403, "InvalidAccessKeyId"): "AWS_ACCESS_KEY_ID",
    (404, "NoSuchBucket"): "no such bucket",
}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits: what is refused for good is told at once."""
    monkeypatch.setattr("alignclip.storage.patience._say", lambda *_: pytest.fail("somebody waits"))


def fill(refusing: RefusingS3, folder: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        refusing.objects["b", f"{folder}/{name}"] = content


@pytest.mark.slow
@pytest.mark.parametrize("rights", [(), ("list",), ("list", "write", "delete")])
def test_a_model_is_opened_by_a_key_that_may_only_read(
    refusing: RefusingS3, tmp_path: Path, rights: tuple[str, ...]
) -> None:
    fill(refusing, "runs/r", RUN)
    fill(refusing, "exports/e", EXPORT)
    refusing.without_right(*rights)
    places = ("", "/", "/latest-rank0.pt", "/latest", "/ep1-ba5-rank0.pt")
    for place in (*(f"s3://b/runs/r{name}" for name in places), "s3://b/exports/e"):
        downloads = tmp_path / place.replace("/", "-")
        downloads.mkdir()
        assert fetch(place, downloads).read_bytes() == b"weights"
        assert (downloads / "config.yaml").is_file() is ("runs" in place)
    assert text_beside("s3://b/runs/r/ep1-ba5-rank0.pt", CARD) is None
    assert read_text("s3://b/runs/r/config.yaml") == "model: {}"


@pytest.mark.parametrize(
    ("place", "rights", "words"),
    [
        ("none", (), r"^no latest-rank0\.pt at s3://b/none; check the bucket and the path$"),
        (
            "none",
            ("list",),
            r"^no .* at s3://b/none: access denied: .*or it isn't there and the key",
        ),
        ("none", ("read",), r"access denied: the key may not read it \(s3:GetObject\)"),
        ("r", ("list",), r"points to s3://b/runs/r/gone\.pt: access denied: .*or it isn't there"),
        ("r", (), r"points to s3://b/runs/r/gone\.pt, which is not there, or is a sharded"),
    ],
)
def test_a_model_that_is_not_there_or_may_not_be_read(
    refusing: RefusingS3, tmp_path: Path, place: str, rights: tuple[str, ...], words: str
) -> None:
    fill(refusing, "r", {"latest-rank0.pt.symlink": b"runs/r/gone.pt"})
    refusing.without_right(*rights)
    with pytest.raises(UserError, match=words):
        fetch(f"s3://b/{place}", tmp_path)


READERS: dict[str, Callable[[Path], Any]] = {
    "model": lambda path: fetch("s3://b/set", path),
    "config": lambda path: read_text("s3://b/set/config.yaml"),
    "config, if any": lambda path: open_store("s3://b/set").read_text_optional("config.yaml"),
    "set": lambda path: read_index(
        "data.streams.a", SetConfig(remote="s3://b/set", local=str(path)), str(path)
    ),
    "classes": lambda path: read_classes(SetConfig(remote="s3://b/set", local=str(path))),
    "input": lambda path: quick(["s3://b/set/a.tar"], path / "out"),
    "listing": lambda path: list_remote("s3://b/set"),
    "folder of inputs": lambda path: expand_inputs(["s3://b/set"]),
    "conversion": lambda path: OutputFolder("s3://b/set").listing(),
    "load_path": lambda path: check_start("s3://b/set/latest-rank0.pt"),
}


@pytest.mark.slow
@pytest.mark.parametrize("answer", WORDS, ids=lambda answer: answer[1])
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_names_what_is_wrong_with_the_key(
    refusing: RefusingS3, tmp_path: Path, reader: str, answer: tuple[int, str], no_waiting: None
) -> None:
    refusing.answer(*answer)
    with pytest.raises(UserError, match=WORDS[answer]) as raised:
        READERS[reader](tmp_path)
    assert "\n" not in str(raised.value)
    assert "s3://b/set" in str(raised.value)


@pytest.mark.parametrize("reader", ["config", "set", "classes", "load_path"])
def test_a_needed_file_with_a_key_that_may_not_list(
    refusing: RefusingS3, tmp_path: Path, reader: str
) -> None:
    refusing.without_right("list")
    with pytest.raises(UserError, match=r"s3://b/set.*or it isn't there and the key may not list"):
        READERS[reader](tmp_path)


@pytest.mark.parametrize(
    ("command", "right"),
    [("conversion", right) for right in ("list", "read", "write")]
    + [("export", right) for right in ("list", "write")],
)
def test_an_output_is_tried_before_the_work_begins(
    refusing: RefusingS3,
    tmp_path: Path,
    command: str,
    right: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_tar(tmp_path / "in" / "a.tar", pairs(0, 4))
    commands: dict[str, Callable[[], object]] = {
        "conversion": lambda: quick([tmp_path / "in"], "s3://b/out"),
        "export": lambda: run_export(ExportOptions("nothing", "open_clip", "s3://b/out")),
    }
    refusing.without_right(right)
    for work in ("conversion.dataset.convert_all", "weights.export.open_model"):
        monkeypatch.setattr(f"alignclip.{work}", lambda *_, **__: pytest.fail("it has begun"))
    with pytest.raises(UserError, match=rf"^cannot (reach|write to) s3://b/out: .*may not {right}"):
        commands[command]()
    assert refusing.keys("out/") == []


def test_an_export_tries_a_local_output_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^cannot write to .*/file/out: "):
        run_export(ExportOptions("nothing", "open_clip", str(tmp_path / "file" / "out")))


def test_a_conversion_needs_no_right_to_delete(refusing: RefusingS3, tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", pairs(0, 4))
    refusing.without_right("delete")
    for _ in range(2):
        assert quick([tmp_path / "in"], "s3://b/out").written == 4


def test_a_quota_that_is_used_up_in_the_middle_of_a_conversion(
    refusing: RefusingS3, tmp_path: Path, no_waiting: None
) -> None:
    """It ends at once, and the same command goes on when there is room."""
    for number, name in enumerate("ab"):
        write_tar(tmp_path / "in" / f"{name}.tar", pairs(10 * number, 4))

    def refuse(request: Any) -> tuple[int, str] | None:
        full = request.right == "write" and refusing.keys("out/a/counts")
        return (403, "QuotaExceeded") if full else None

    refusing.refuse = refuse
    words = r"^cannot write to s3://b/out/.*: the bucket's quota is used up \(QuotaEx"
    with pytest.raises(UserError, match=words):
        quick([tmp_path / "in"], "s3://b/out", processes=1)
    refusing.refuse = lambda request: None
    assert quick([tmp_path / "in"], "s3://b/out", processes=1).written == 8


def test_a_store_without_checksums_is_converted_into(
    refusing: RefusingS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "in" / "a.tar", pairs(0, 4))
    refusing.refuse_checksums()
    assert quick([tmp_path / "in"], "s3://b/out").written == 4
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    with pytest.raises(UserError, match=r"AWS_REQUEST_CHECKSUM_CALCULATION=when_required$"):
        quick([tmp_path / "in"], "s3://b/other")


def upload(path: Path, overwrite: bool = True, name: str = "ep1-ba2.pt") -> None:
    path.write_bytes(b"a checkpoint")
    save_folder().bring(path, name, overwrite)


# a refusal for good → its words; of an upload, and of a save folder that is tried
FOR_GOOD = {
    (403, "AccessDenied"): "may not write",
    (403, "QuotaExceeded"): "quota is used up",
    (501, "NotImplemented"): "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
    (400, "ExpiredToken"): "the key has expired",
    (404, "NoSuchBucket"): "no such bucket",
    (507, "XMinioStorageFull"): "quota is used up",
}
of_good = pytest.mark.parametrize("answer", FOR_GOOD, ids=lambda answer: answer[1])


@of_good
def test_a_checkpoint_that_can_never_arrive_is_uploaded_once(
    refusing: RefusingS3, tmp_path: Path, answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    refusing.answer(*answer, "write")
    words = rf"^can't write s3://b/runs/r/ep1-ba2\.pt: .*{FOR_GOOD[answer]}"
    with pytest.raises(StorageError, match=words):
        upload(tmp_path / "a")
    assert refusing.requests.count(("PUT", "runs/r/ep1-ba2.pt")) == 1


@pytest.mark.parametrize("name", ["ep1-ba2.pt", "sub/ep1-ba2.pt", "newest.pt"])
@pytest.mark.parametrize("rights", [(), ("list",)], ids=["", "no list"])
def test_a_checkpoint_that_is_there_and_may_not_be_replaced_stays(
    refusing: RefusingS3, tmp_path: Path, no_waiting: None, name: str, rights: tuple[str, ...]
) -> None:
    fill(refusing, "runs/r", {name: b"another one"})
    refusing.without_right(*rights)
    with pytest.raises(StorageError, match=rf"^can't write s3://b/runs/r/{name}: it is there"):
        upload(tmp_path / "a", overwrite=False, name=name)
    upload(tmp_path / "a", overwrite=False, name="another.pt")
    assert save_folder().files.read_bytes(name) == b"another one"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests")]
)
def test_a_checkpoint_waits_for_a_store_in_trouble(
    refusing: RefusingS3,
    tmp_path: Path,
    status: int,
    code: str,
    overwrite: bool,
    short_pauses: None,
) -> None:
    refusing.answer_in_turn([(status, code)] * 2)
    upload(tmp_path / "a", overwrite)
    assert refusing.keys() == ["runs/r/ep1-ba2.pt"]


def save_folder(**settings: Any) -> SaveFolder:
    return SaveFolder(RunConfig(run_name="r", save_folder="s3://b/runs/{run_name}", **settings))


@pytest.mark.parametrize("rights", [("list",), ("delete",), ("list", "delete")])
def test_a_run_starts_with_a_key_that_may_only_read_and_write(
    refusing: RefusingS3, rights: tuple[str, ...]
) -> None:
    refusing.without_right(*rights)
    folder = save_folder()
    folder.open()
    check_config(folder)
    assert not folder.has_checkpoint()
    record_config(folder)
    assert "runs/r/config.yaml" in refusing.keys("runs/r/config")


@of_good
def test_a_save_folder_is_tried_before_anything_is_built(
    refusing: RefusingS3, answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
    refusing.answer(*answer, "write")
    with pytest.raises(UserError, match=rf"^save_folder=s3://b/runs/r: .*{FOR_GOOD[answer]}"):
        save_folder().open()


def test_a_save_folder_has_to_be_read(refusing: RefusingS3) -> None:
    refusing.without_right("read")
    with pytest.raises(UserError, match=r"^save_folder=.*may write, and may not read \(s3:GetOb"):
        save_folder().open()


@pytest.mark.parametrize(
    "place", ["r", "r/", "r/latest-rank0.pt", "r/latest-rank0.pt.symlink", "r/ep1-ba5-rank0.pt"]
)
@pytest.mark.parametrize("rights", [(), ("list",)])
def test_a_load_path_in_a_bucket(refusing: RefusingS3, place: str, rights: tuple[str, ...]) -> None:
    fill(refusing, "runs/r", RUN)
    refusing.without_right(*rights)
    check_start(f"s3://b/runs/{place}")
    with pytest.raises(
        UserError, match=r"^load_path=s3://b/runs/q/latest-rank0\.pt: (not found|access denied)"
    ):
        check_start("s3://b/runs/q/latest-rank0.pt")
