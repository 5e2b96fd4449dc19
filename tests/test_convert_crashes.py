"""Kills, outages and interruptions: the same command goes on, and the set becomes what it would
have been.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import socketserver
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from conversions import Command, Undisturbed, download, picture, relative, said
from s3 import _free_port
from tarballs import (
    contents,
    load_json,
    pairs,
    quick,
    refused,
    stage,
    three_tars,
    upload,
    write_tar,
)

from alignclip.errors import UserError
from alignclip.storage import StorageError, open_store, patience, patiently
from alignclip.storage.staging import OutputFolder

FIXTURES = Path(__file__).parent / "fixtures"


def kill(command: Command, victim: str, rng: random.Random) -> None:
    """SIGKILL to what is running of a command, and what follows from it."""
    workers = command.workers()
    assert len(workers) == 2
    assert command.driver.poll() is None
    if victim == "worker":
        rng.choice(workers).kill()
        *before, line = said(command.finish(2, 60))
        assert len(before) <= 1
        assert all(" holds " in one for one in before), "what is there already"
        assert line.startswith("error: a worker process was killed")
    else:
        for process in [command.driver, *(workers if victim == "all" else [])]:
            with suppress(psutil.NoSuchProcess):  # a worker ends when it sees the driver's end
                process.kill()
        assert command.driver.wait(10) == -signal.SIGKILL
    command.assert_workers_end()


def convert_under_fire(
    start: Callable[[], Command],
    listing: Callable[[], set[str]],
    victims: list[str],
    tars: int,
    seed: int,
) -> int:
    """Kill and start again until the command finishes by itself.

    Return the kills during the conversion.

    The time of a kill is told in files, not in seconds, so that it is in mid-conversion on any
    machine; of the inputs there must be enough that none of these runs comes to its end before it
    is killed.
    """
    rng = random.Random(seed)
    rng.shuffle(victims)
    landed = 0
    for victim in victims:
        with start() as command:
            # before there are workers the command removes what a kill has left, which changes
            # files, too
            command.wait_for(lambda command=command: len(command.workers()) == 2)  # type: ignore[misc]
            command.wait_for_changes(listing, rng.randint(1, 12))
            time.sleep(rng.uniform(0, 0.03))  # some 150 inputs a second
            kill(command, victim, rng)
        landed += 1
        left = tars - sum(name.endswith("/counts.json") for name in listing())
        assert left >= 8, (
            f"only {left} of {tars} inputs are left after {landed} kills: too few to be in the "
            f"middle"
        )
        assert "index.json" not in listing(), "there is an index before the set is complete"

    def is_complete() -> bool:
        names = [name for name in listing() if name.endswith("/counts.json")]
        return sum(name[0] != "." for name in names) == tars

    # before there is anything to see, while workers start; and around the index
    for condition, pause in ((lambda: True, 1.0), (is_complete, 0.3)):
        with start() as command:
            command.wait_for(condition)
            time.sleep(rng.uniform(0, pause))
            command.workers()
            command.driver.kill()
            command.assert_workers_end()
    with start() as command:
        command.finish()
    return landed


def kill_and_finish(s3: Any, tmp_path: Path, to: str, victims: list[str], seed: int) -> None:
    """Kill a conversion so often, into a bucket or a folder, and compare what it becomes in the
    end.
    """
    tars = 8 + 7 * len(victims)
    undisturbed = Undisturbed(tmp_path, tars=tars, samples=8)
    out = f"{s3.bucket()}/deep/pairs" if to == "bucket" else str(tmp_path / "out")

    def start() -> Command:
        return Command(tmp_path / "run", undisturbed.tars, out)

    def listing() -> set[str]:
        if to == "folder":
            return relative(Path(out))
        return {key.removeprefix("deep/pairs/") for key in s3.keys(out)}

    assert convert_under_fire(start, listing, victims, tars, seed) == len(victims)
    if to == "folder":
        assert not list(Path(out).glob(".partial-*"))
    undisturbed.assert_same(Path(out) if to == "folder" else download(s3, out, tmp_path / "got"))


@pytest.mark.slow
def test_three_kills_of_a_conversion(s3: Any, tmp_path: Path, fuzz: Any) -> None:
    """All points of the protocol: see test_convert_faults."""
    kill_and_finish(s3, tmp_path, "bucket", ["driver", "worker", "all"], fuzz.seed)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("to", ["bucket", "folder"])
def test_twenty_kills_of_a_conversion(s3: Any, tmp_path: Path, fuzz: Any, to: str) -> None:
    victims = ["driver"] * 7 + ["worker"] * 7 + ["all"] * 6
    kill_and_finish(s3, tmp_path, to, victims, fuzz.seed)


def go_away(s3: Any, command: Command) -> None:
    """Stop the server until a command has said that it waits, and long enough for all its
    processes to say so, too.
    """
    s3.stop()
    try:
        command.wait_for(lambda: "can't be reached" in command.errors)
        time.sleep(5)
        assert command.driver.poll() is None
    finally:
        s3.start()


@pytest.mark.slow
def test_storage_that_is_away_for_a_while(s3: Any, tmp_path: Path) -> None:
    undisturbed = Undisturbed(tmp_path, tars=24, samples=12)
    out = f"{s3.bucket()}/pairs"
    with Command(tmp_path / "run", undisturbed.tars, out) as command:
        command.wait_for_changes(lambda: set(s3.keys(out)), 30)
        go_away(s3, command)
        errors = command.finish()
    # said once, not by each process
    waits, back = said(errors)
    assert waits.startswith(f"{out} can't be reached (")
    assert waits.endswith("); waiting, up to 10 minutes")
    assert back == f"{out} is back"
    undisturbed.assert_same(download(s3, out, tmp_path / "got"))


@pytest.mark.slow
def test_inputs_that_are_away_for_a_while(s3: Any, tmp_path: Path) -> None:
    """The bucket that is read from, in the middle of a conversion into a folder."""
    undisturbed = Undisturbed(tmp_path, tars=16, samples=12)
    raw, out = f"{s3.bucket()}/raw", tmp_path / "out"
    upload(s3, undisturbed.tars, raw)
    with Command(tmp_path / "run", raw, out) as command:
        command.wait_for_changes(lambda: relative(out) if out.exists() else set(), 20)
        go_away(s3, command)
        waits, back = said(command.finish())
    assert waits.startswith(f"{raw}/")
    assert waits.endswith("); waiting, up to 10 minutes")
    assert back.endswith(" is back")
    assert (out / "index.json").read_bytes() == (undisturbed.out / "index.json").read_bytes()
    for path in undisturbed.out.glob("*/*.mds"):
        assert (out / path.relative_to(undisturbed.out)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("{tars}", "s3://bucket/x", "cannot reach s3://bucket/x: can't connect: "),
        ("s3://bucket/a.tar", "{tars}/out", "cannot (list|reach) s3://bucket: can't connect: "),
        ("http://no-such-host.invalid/a.tar", "{tars}/out", "cannot fetch {source}: "),
        ("http://127.0.0.1:{port}/a.tar", "{tars}/out", "cannot fetch {source}: "),
    ],
)
def test_a_place_where_nothing_listens_is_not_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    out: str,
    message: str,
) -> None:
    """Whoever mistypes it waits for seconds, and not for the minutes of an outage."""
    port, tars = _free_port(), three_tars(tmp_path / "in")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    start, source = time.monotonic(), source.format(tars=tars, port=port)
    refused("^" + message.format(source=source), source, out.format(tars=tmp_path))
    assert time.monotonic() - start < 30
    assert capsys.readouterr().err == ""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When a test's request was made; the tries that boto3 makes by itself are off."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    return []


def head(calls: list[float], port: int) -> Callable[[], Any]:
    """A request for an object that isn't there."""
    client = boto3.session.Session().client("s3", endpoint_url=f"http://127.0.0.1:{port}")

    def request() -> Any:
        calls.append(time.monotonic())
        return client.head_object(Bucket="none", Key="none")

    return request


@pytest.mark.parametrize(("secret", "status"), [("testsecret123", 404), ("wrong", 403)])
def test_what_is_wrong_for_good_is_not_tried_again(
    s3: Any,
    calls: list[float],
    secret: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(ClientError) as raised:
        patiently(head(calls, s3.port), "the bucket")
    assert raised.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    assert len(calls) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_patience_ends(
    s3: Any, calls: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 4.0)
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    start = time.monotonic()
    with pytest.raises(EndpointConnectionError):
        patiently(head(calls, _free_port()), "the bucket")
    assert len(calls) > 2
    assert 3 < time.monotonic() - start < 20
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "the bucket can't be reached (can't connect: Could not connect to the endpoint URL"
    )


def test_a_key_press_is_no_outage(calls: list[float]) -> None:
    """Python links it to the connection's error where it comes while that one is handled."""

    def request() -> None:
        calls.append(time.monotonic())
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            if len(calls) > 1:
                raise KeyboardInterrupt from None
            raise

    with pytest.raises(KeyboardInterrupt):
        patiently(request, "the bucket")
    assert len(calls) == 2


def test_time_in_which_bytes_came_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long transfer that breaks again and again is tried as often as a short one, but not for
    ever.
    """
    now, tries = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def transfer(seconds: float, succeeds: int = 10**6) -> None:
        nonlocal tries
        tries += 1
        sleep(seconds)
        if tries < succeeds:
            raise ConnectionResetError

    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    monkeypatch.setattr(patience, "_silences", patience._Silences())
    patiently(lambda: transfer(500.0, succeeds=5), "the bucket")
    assert tries == 5
    # a server that never answers is no transfer: boto3 gives it up after three minutes
    for seconds, most in ((0.1, 700), (180.0, 900), (500.0, 5_000), (5_000.0, 40_000)):
        now, tries = now + 3600, 0
        begun = now
        with pytest.raises(ConnectionResetError):
            patiently(lambda seconds=seconds: transfer(seconds), "the bucket")
        assert patience.PATIENCE <= now - begun < most
        assert tries > (3 if seconds == 180 else 5)
    begun = now
    with pytest.raises(ConnectionResetError):  # the next one of a queue
        patiently(lambda: transfer(1.0), "the bucket")
    assert now == begun + 1


@pytest.mark.parametrize("is_known", [False, True])
def test_a_host_without_an_address_is_a_typo_unless_it_has_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_known: bool
) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def nothing(*_: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(patience, "_outage", patience._Outage())
    monkeypatch.setattr(patience, "_silences", patience._Silences())
    monkeypatch.setattr(socket, "getaddrinfo", nothing)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://s3.eu-cental-1.example")
    store = open_store("s3://b/raw")
    if is_known:
        patience.answered(store.place)
    with pytest.raises(StorageError, match=r"can't connect: .*S3_ENDPOINT_URL"):
        patiently(lambda: store.read_bytes("a"), store.place)
    limit = patience.PATIENCE if is_known else patience.UNKNOWN_HOST_PATIENCE
    assert limit < now < limit + patience.LONGEST_PAUSE + 2
    assert ("10 minutes" if is_known else "30 seconds") in capsys.readouterr().err


class HandsOn(socketserver.StreamRequestHandler):
    """Hands requests on to an S3 server and its answers back, byte by byte."""

    port = 0
    left = 0  # times that a subclass gets in the way

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port)) as server, suppress(OSError):
            threading.Thread(target=self.hand_back, args=(server,), daemon=True).start()
            while data := self.request.recv(65536):
                self.ask(server, data)

    def ask(self, server: socket.socket, data: bytes) -> None:
        server.sendall(data)

    def hand_back(self, server: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                self.request.sendall(data)


class RefusesToDelete(HandsOn):
    """Answers a number of DELETEs itself: it is busy."""

    def ask(self, server: socket.socket, data: bytes) -> None:
        if data.startswith(b"DELETE ") and type(self).left:
            type(self).left -= 1
            self.request.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n")
        else:
            super().ask(server, data)


class CutsBodies(HandsOn):
    """Breaks a number of connections in the middle of what they fetch."""

    def hand_back(self, server: socket.socket) -> None:
        given = 0
        with suppress(OSError):
            while data := server.recv(4096):
                given += len(data)
                if given > 20_000 and type(self).left:
                    type(self).left -= 1
                    self.request.shutdown(socket.SHUT_RDWR)
                    return
                self.request.sendall(data)


class Proxy(socketserver.ThreadingTCPServer):
    daemon_threads = True  # boto3 keeps its connections


@contextmanager
def between(
    handler: type[HandsOn], port: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Have S3's clients ask through a handler that gets in the way so many times."""
    monkeypatch.setattr(handler, "port", port)
    monkeypatch.setattr(handler, "left", left)
    with Proxy(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        yield
        proxy.shutdown()


@pytest.mark.slow
def test_a_complete_part_is_not_mixed_with_a_new_one(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the old counts.json to stay because storage is busy, a kill would leave a mixture
    that seems complete.
    """
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    out, files = f"{s3.bucket()}/out", ("index.json", "counts.json")
    stage(OutputFolder(out), "shard.00000.mds", "shard.00001.mds", *files)
    with between(RefusesToDelete, s3.port, 3, monkeypatch):
        store = OutputFolder(out)
        with pytest.raises(UserError, match=r"cannot write to s3://.*/out/00000: "):
            stage(store, "shard.00000.mds", "shard.00001.mds/", *files)  # no upload of a folder
    assert RefusesToDelete.left == 0
    assert s3.keys(out) == ["out/00000/shard.00000.mds"]


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [8, 10**6])
def test_bodies_that_break_midway(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuts: int
) -> None:
    """boto3 fetches a body anew five times and then gives up, with an error of its own."""
    if cuts > 8:
        monkeypatch.setattr(patience, "PATIENCE", 1.0)
    raw, out = f"{s3.bucket()}/raw", tmp_path / "out"
    upload(s3, write_tar(tmp_path / "in" / "a.tar", pairs(0, 40)).parent, raw)
    with between(CutsBodies, s3.port, cuts, monkeypatch):
        if cuts == 8:
            assert quick(f"{raw}/a.tar", out).written == 40
            assert CutsBodies.left == 0
        else:
            refused(rf"^cannot fetch {raw}/a\.tar: ", f"{raw}/a.tar", out)


@pytest.fixture(scope="module")
def long_tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars, each of which takes half a minute at least."""
    folder = tmp_path_factory.mktemp("long")
    image = picture(0, (3000, 2000))
    members = []
    for i in range(400):
        members += [(f"{i:05}.jpg", image), (f"{i:05}.txt", b"a picture")]
    os.link(write_tar(folder / "00000.tar", members), folder / "00001.tar")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "processes", "send", "when"),
    [
        ("folder", 2, "Ctrl-C to all", "converting"),
        ("folder", 2, "Ctrl-C to all", "starting"),
        ("bucket", 2, "SIGINT", "converting"),
        ("folder", 1, "Ctrl-C to all", "converting"),
        ("folder", 2, "SIGTERM", "converting"),
    ],
)
def test_an_interrupted_command_ends_at_once_and_leaves_nothing(
    s3: Any, tmp_path: Path, long_tars: Path, to: str, processes: int, send: str, when: str
) -> None:
    """A terminal sends Ctrl-C to all processes, ``kill`` and a notebook to one."""
    out = f"{s3.bucket()}/out" if to == "bucket" else str(tmp_path / "out")
    resize = ("--resize", "1500")
    with Command(tmp_path, long_tars, out, *resize, processes=processes) as command:
        if processes > 1:
            command.wait_for(lambda: len(command.workers()) == processes)
        if when == "converting":  # each worker has a folder in the making
            made = tmp_path / "out" if to == "folder" else command.temporary
            pattern = ".partial-*" if to == "folder" else "alignclip-*/alignclip-*"
            command.wait_for(lambda: len(list(made.glob(pattern))) == processes)
        time.sleep(1)
        if send == "SIGTERM":
            command.driver.terminate()
        else:
            kill_one = os.kill if send == "SIGINT" else os.killpg
            kill_one(command.driver.pid, signal.SIGINT)
        start = time.monotonic()
        errors = command.finish(130)
        assert time.monotonic() - start < 10
        assert said(errors) == ["interrupted; the same command goes on from here"]
        command.assert_workers_end(1)
    assert not list(command.temporary.glob("alignclip-*")), (
        "copies of inputs or outputs stay behind"
    )
    assert not list((tmp_path / "out").glob(".*"))


def unpacked(archive: Path, folder: Path) -> None:
    """Unpack a fixture whose JSON files name places below ``@FOLDER@``."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for path in folder.rglob("*.json"):
        path.write_text(path.read_text().replace("@FOLDER@", str(folder)))


def test_a_conversion_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    """Commit 5e8d6ab was stopped in the fourth of five inputs, of which one is truncated."""
    unpacked(FIXTURES / "half_a_conversion_5e8d6ab.tar.gz", tmp_path)
    source, out, expected = tmp_path / "in", tmp_path / "out", tmp_path / "expected"
    truncated = load_json(out / "00001" / "counts.json")["source_modified"]
    os.utime(source / "00001.tar", ns=(truncated, truncated))
    before = {name: data for name, data in contents(out).items() if name.startswith("0")}
    inputs = [source / "more.csv", source / "{00000..00003}.tar"]
    arguments = {"held_out": 0.4, "size_limit": "4kb"}
    counts = quick(inputs, out, **arguments)
    assert (counts.converted, counts.resumed, counts.written) == (2, 8, 14)
    found = contents(out)
    assert found.items() >= before.items()
    quick(inputs, expected, **arguments)
    wanted = contents(expected)
    assert found.keys() == wanted.keys()
    for name, data in wanted.items():
        # has more entries today
        if name.endswith(("convert.json", "counts.json")) and not name.startswith("val/"):
            new, old = json.loads(data), json.loads(found[name])
            new["source_modified"] = old.get("source_modified")
            assert new | old == new
        else:
            assert found[name] == data, name
