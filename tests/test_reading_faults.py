"""A store in trouble while a run reads: waited for within one bound and said once, or named."""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import RecordedRun
from refusing import RefusingS3, Request
from runs import TIMEOUT, write_set
from s3 import S3Server

from alignclip.config.schema import DataConfig, StreamConfig
from alignclip.data.dataset import ImageTextDataset, build_dataloader
from alignclip.errors import NOT_READ, NotReadError
from alignclip.storage import clouds, patience

SAMPLES, BATCH, BOUND = 64, 8, 30.0


@pytest.fixture
def shard(refusing: RefusingS3, tmp_path: Path, short_pauses: None) -> str:
    """A set in ``s3://b/pairs``; the name of a shard in its middle."""
    write_set(str(tmp_path / "made"), SAMPLES)
    for path in (tmp_path / "made").iterdir():
        refusing.objects["b", f"pairs/{path.name}"] = path.read_bytes()
    shards = [key for key in refusing.keys("pairs/") if key.endswith(".mds")]
    return shards[len(shards) // 2]


def read(cache: Path, remote: str | None = "s3://b/pairs", **settings: Any) -> None:
    """Read the whole set."""
    stream = StreamConfig(remote=remote, local=str(cache))
    config = DataConfig(
        {"s": stream}, num_canonical_nodes=1, shuffle=False, **{"num_workers": 0} | settings
    )
    dataset = ImageTextDataset(
        config, batch_size=BATCH, image_size=16, context_length=12, semantic=False
    )
    try:
        batches = list(build_dataloader(dataset, config, pin_memory=False))
        assert len(batches) == SAMPLES // BATCH
    finally:
        dataset._locals_shm.cleanup()  # or the next one has "another's" cache


FOR_GOOD = {
    (404, "NoSuchKey"): "not found; check the bucket and the path",
    (403, "AccessDenied"): "access denied: the key may not read it",
    (401, "Unauthorized"): "the store doesn't accept these credentials",
    (400, "ExpiredToken"): "the key has expired",
    (403, "RequestTimeTooSkewed"): "this machine's clock and the store's differ too much; set the",
    (501, "NotImplemented"): "NotImplemented",
}


@pytest.mark.parametrize("answer", FOR_GOOD, ids=lambda answer: answer[1])
def test_what_a_person_has_to_mend_is_told_at_once(
    refusing: RefusingS3, shard: str, tmp_path: Path, answer: tuple[int, str]
) -> None:
    refusing.answer_in_turn(itertools.repeat(answer), lambda request: request.key == shard)
    began = time.monotonic()
    with pytest.raises(NotReadError, match=f"^can't read s3://b/{shard}: .*{FOR_GOOD[answer]}"):
        read(tmp_path / "cache")
    assert time.monotonic() - began < BOUND
    assert len([key for _, key in refusing.requests if key == shard]) <= 4, "no patience"


@pytest.mark.parametrize("answer", [(500, "InternalError"), (503, "SlowDown"), (429, "Too")])
def test_a_store_in_trouble_is_waited_for(
    refusing: RefusingS3,
    shard: str,
    tmp_path: Path,
    answer: tuple[int, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    refusing.answer_in_turn([answer] * 3, lambda request: request.key == shard)
    read(tmp_path / "cache")
    assert [re.sub(r"\(.*\)", "", line) for line in capsys.readouterr().err.splitlines()] == [
        "s3://b/pairs can't be reached ; waiting, up to 10 minutes",
        "s3://b/pairs is back",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_stays_away_ends_the_reading_with_its_last_word(
    refusing: RefusingS3,
    shard: str,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 2.0)
    refusing.refuse = lambda request: (503, "SlowDown") if request.key.endswith(".mds") else None
    began = time.monotonic()
    with pytest.raises(NotReadError, match=r"^can't read s3://b/pairs/shard\..*busy or in trouble"):
        read(tmp_path / "cache", num_workers=workers)
    assert time.monotonic() - began < BOUND
    assert capfd.readouterr().err.count("can't be reached") == 1, "workers say it once together"


@pytest.mark.parametrize("times", [1, 10])
def test_a_shard_that_arrives_damaged_is_fetched_once_more(
    refusing: RefusingS3,
    shard: str,
    tmp_path: Path,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, left = refusing.objects["b", shard], times

    def give(request: Request, data: bytes) -> None:
        nonlocal left
        if request.key == shard and left:
            left -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        give_as_it_is(request, data)

    give_as_it_is = Request._give
    monkeypatch.setattr(Request, "_give", give)
    if times == 1:
        read(tmp_path / "cache")
        assert (tmp_path / "cache" / Path(shard).name).read_bytes() == whole
        return
    with pytest.raises(NotReadError, match=f"^s3://b/{shard} is damaged, fetched twice: its xxh"):
        read(tmp_path / "cache")
    assert not (tmp_path / "cache" / Path(shard).name).exists()


def test_a_shard_of_a_set_without_a_remote_is_named_at_once(tmp_path: Path) -> None:
    write_set(str(tmp_path / "cache"), SAMPLES)
    (tmp_path / "cache" / "shard.00001.mds").unlink()
    began = time.monotonic()
    with pytest.raises(NotReadError, match=r"shard\.00001\.mds is not there, and the set has no "):
        read(tmp_path / "cache", None)
    assert time.monotonic() - began < BOUND


def test_a_slow_store_is_said_once_and_ends_nothing(
    refusing: RefusingS3,
    shard: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The shards come at 20 kB/s."""
    monkeypatch.setattr(patience, "SLOW", 0.2)
    answer = Request._answer

    def trickle(request: Request, status: int, body: bytes = b"", headers: Any = None) -> None:
        if request.key.endswith(".mds"):
            time.sleep(len(body) / 20_000)
        answer(request, status, body, headers)

    monkeypatch.setattr(Request, "_answer", trickle)
    read(tmp_path / "cache")
    assert capsys.readouterr().err.splitlines() == [
        "s3://b/pairs is slow, or silent: a read takes more than 0 seconds"
    ]


@contextmanager
def frozen(server: S3Server, seconds: float) -> Iterator[None]:
    """Freeze a server now, and let it go on after some seconds."""
    assert server._process is not None
    group = server._process.pid
    os.killpg(group, signal.SIGSTOP)
    timer = threading.Timer(seconds, os.killpg, (group, signal.SIGCONT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        os.killpg(group, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3.0, pytest.param(40.0, marks=pytest.mark.full)])
def test_a_server_that_freezes_is_waited_for(
    s3: S3Server, tmp_path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For less or longer than a client waits for an answer."""
    monkeypatch.setattr(clouds, "READ_TIMEOUT", 1.0 if seconds < 10 else 60.0)
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    remote = f"{s3.bucket()}/pairs"
    write_set(remote, SAMPLES)
    clouds._s3_client.cache_clear()
    began = time.monotonic()
    with frozen(s3, seconds):
        read(tmp_path / "cache", remote)
    assert seconds < time.monotonic() - began < seconds + BOUND
    clouds._s3_client.cache_clear()


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_a_run_without_a_shard_ends_in_a_line_and_goes_on_when_it_is_back(
    s3: S3Server, tmp_path: Path
) -> None:
    remote, bucket = f"{s3.bucket()}/pairs", s3.bucket()
    write_set(remote)
    undisturbed = RecordedRun(tmp_path / "a", remote, None, "max_duration=20ba", processes=2)
    undisturbed.run()
    run = RecordedRun(tmp_path / "b", remote, f"{bucket}/r", "max_duration=20ba", processes=2)
    name, key = remote.removeprefix("s3://").split("/")[0], s3.keys(remote)[-1]
    content = s3.client.get_object(Bucket=name, Key=key)["Body"].read()
    s3.client.delete_object(Bucket=name, Key=key)
    process = run.launch()
    try:
        assert process.wait(TIMEOUT) == NOT_READ, run.output()
    finally:
        process.end()
    assert run.output().count("error: ") == 1
    assert f"error: can't read s3://{name}/{key}: not found" in run.output()
    assert "Traceback" not in run.output()
    s3.client.put_object(Bucket=name, Key=key, Body=content)
    run.run()
    assert run.losses() == undisturbed.losses()
