"""Conversion from and to object storage and the web, with their troubles."""

from __future__ import annotations

import errno
import http.server
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tarballs import (
    assert_three_tars,
    contents,
    cut,
    load_json,
    pairs,
    quick,
    read_back,
    refused,
    serve,
    three_tars,
    upload,
    write_tar,
)

from alignclip.conversion.inputs import expand_inputs
from alignclip.errors import UserError
from alignclip.storage import copies, patience, temporary
from alignclip.storage.staging import LOCK, OutputFolder


def test_from_s3_to_s3(s3: Any, tmp_path: Path) -> None:
    bucket = s3.bucket()
    upload(s3, three_tars(tmp_path / "in"), f"{bucket}/raw")
    every = [f"{bucket}/raw/{i:05}.tar" for i in range(3)]
    for pattern in ("", "/", "/*.tar", "/{00000..00002}.tar"):
        assert expand_inputs([f"{bucket}/raw{pattern}"]) == every
    with pytest.raises(
        UserError, match=rf"1 of 4 inputs do not exist, the first is {bucket}/raw/00003\.tar"
    ):
        expand_inputs([bucket + "/raw/{00000..00003}.tar"])
    with pytest.raises(UserError, match="nothing matches"):
        expand_inputs([f"{bucket}/raw/x*.tar"])

    out = f"{bucket}/deep/pairs"
    counts = quick(f"{bucket}/raw", out + "/")
    assert counts.written == 15
    assert_three_tars(read_back(out, tmp_path / "cache"))
    quick(tmp_path / "in", tmp_path / "local")
    assert s3.keys(out) == sorted(f"deep/pairs/{name}" for name in contents(tmp_path / "local"))
    assert load_json(tmp_path / "cache" / "index.json")["shards"]

    name, key = bucket.removeprefix("s3://"), "deep/pairs/00001/index.json"
    kept = {"Bucket": name, "Key": "deep/pairs/00000/shard.00000.mds"}
    written = s3.client.head_object(**kept)["LastModified"]
    s3.client.delete_object(Bucket=name, Key=key)
    again = quick(f"{bucket}/raw", out)
    assert (again.written, again.resumed) == (15, 10)
    assert_three_tars(read_back(out, tmp_path / "second-cache"))
    assert s3.client.head_object(**kept)["LastModified"] == written
    message = "was begun with no --caption-key, this run has --caption-key title:"
    refused(message, f"{bucket}/raw", out, caption_key="title")


@pytest.mark.slow
def test_a_truncated_tar_in_a_bucket_is_converted_again(s3: Any, tmp_path: Path) -> None:
    source, bucket = three_tars(tmp_path / "in"), s3.bucket()
    whole = (source / "00001.tar").read_bytes()
    cut(source / "00001.tar", 4)
    upload(s3, source, f"{bucket}/raw")
    first = quick(f"{bucket}/raw", f"{bucket}/pairs")
    assert (first.written, first.broken) == (14, ["00001"])

    (source / "00001.tar").write_bytes(whole)
    upload(s3, source, f"{bucket}/raw")
    again = quick(f"{bucket}/raw", f"{bucket}/pairs")
    assert (again.written, again.resumed, again.converted, again.broken) == (15, 10, 1, [])
    assert_three_tars(read_back(f"{bucket}/pairs", tmp_path / "cache"))
    assert quick(f"{bucket}/raw", f"{bucket}/pairs").converted == 0


@pytest.mark.slow
def test_an_outage_leaves_no_index(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.1)
    store = OutputFolder(f"{s3.bucket()}/out")

    def fill(lose_the_server: bool) -> None:
        with store.staged("00000") as folder:
            (folder / "index.json").write_text("{}")
            (folder / "shard.00000.mds").write_bytes(b"data")
            if lose_the_server:
                s3.stop()

    try:
        with pytest.raises(UserError, match=r"cannot write to s3://.*/out/00000: "):
            fill(lose_the_server=True)
    finally:
        s3.start()
    assert store.listing() == set()
    fill(lose_the_server=False)
    assert store.listing() == {"00000/index.json", "00000/shard.00000.mds"}


def test_no_bucket_and_no_credentials(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, bucket = three_tars(tmp_path / "in"), s3.bucket()

    refused("cannot reach s3://not-there/x: no such bucket", source, "s3://not-there/x")
    refused(r"cannot fetch s3://not-there/a\.tar: ", "s3://not-there/a.tar", tmp_path / "out")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused(f"cannot reach {bucket}: access denied", source, bucket)
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    refused("no credentials found", source, bucket)


class Troubled(http.server.BaseHTTPRequestHandler):
    """Serves ``body``, after the troubles of ``left`` one by one: an HTTP status, ``cut`` or
    ``stall``.
    """

    body = b""
    left: tuple[Any, ...] = ()

    def do_GET(self) -> None:
        trouble, *rest = type(self).left or (200,)
        type(self).left = tuple(rest)
        self.send_response(trouble if isinstance(trouble, int) else 200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if trouble == "stall":
            time.sleep(3)
        elif trouble == "cut":
            self.wfile.write(self.body[:-3000])
        else:
            self.wfile.write(self.body)


@pytest.mark.slow
def test_http_that_fails_for_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "HTTP_TIMEOUT", 0.5)
    monkeypatch.setattr(Troubled, "body", write_tar(tmp_path / "a.tar", pairs(0, 5)).read_bytes())
    with serve(Troubled) as url:
        monkeypatch.setattr(Troubled, "left", (503, "cut", "stall"))
        counts = quick([f"{url}/a.tar"], tmp_path / "out")
        assert (counts.written, counts.skipped, Troubled.left) == (5, {}, ())

        monkeypatch.setattr(patience, "PATIENCE", 0.1)
        size = len(Troubled.body)
        for trouble, message in (
            ("cut", f"the connection broke after {size - 3000} of {size} bytes"),
            ("stall", "timed out"),
            (503, "HTTP Error 503"),
        ):
            monkeypatch.setattr(Troubled, "left", (trouble,) * 9)
            refused(rf"cannot fetch {url}/b\.tar: {message}", f"{url}/b.tar", tmp_path / "none")


def test_folders_that_go_are_those_of_dead_processes_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TMPDIR may be shared with other machines, whose process ids say nothing here."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours, theirs = f"alignclip-{temporary.HOST}", "alignclip-0badcafe"
    names = [
        f"{ours}-{dead.pid}-old",
        f"{ours}-{dead.pid}-new",
        f"{ours}-{os.getpid()}-old",
        f"{theirs}-{dead.pid}-old",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        if name.endswith("old"):
            os.utime(tmp_path / name, (time.time() - 4000,) * 2)
    temporary.remove_stale_folders.cache_clear()
    with temporary.temporary_folder() as made:
        there = {path.name for path in tmp_path.iterdir()}
    assert there == {*names[1:], made.name}


def test_a_machine_without_room_for_temporary_files_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def find() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", find)
    message = "^cannot write to any temporary folder: No usable temporary directory found in"
    with pytest.raises(UserError, match=message), temporary.temporary_folder():
        raise AssertionError("there is none")


def test_a_prefix_of_other_objects_is_no_output_and_a_set_there_is_read_by_its_index(
    s3: Any, tmp_path: Path
) -> None:
    source, bucket = three_tars(tmp_path / "in"), s3.bucket()
    upload(s3, source, f"{bucket}/raw")
    message = rf"^{bucket}/raw holds other files \(00000\.tar, .*\); give --out a new or empty"
    refused(message, source, f"{bucket}/raw")
    assert sorted(OutputFolder(f"{bucket}/raw").listing()) == [f"{i:05}.tar" for i in range(3)]
    quick(source / "00000.tar", f"{bucket}/set")
    message = (
        rf"^{bucket}/set holds MDS, which is read by its index: name {bucket}/set/index\.json$"
    )
    refused(message, f"{bucket}/set", tmp_path / "out")


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without ``-o flock`` answers ENOSYS: a conversion goes on, and so does the next
    one.
    """

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    for _ in range(2):
        with OutputFolder(str(tmp_path / "out")).locked():
            assert (tmp_path / "out" / LOCK).exists()
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out" / LOCK).touch()  # a killed conversion has left it
    with OutputFolder(str(tmp_path / "out")).locked():
        pass
