"""The converter's command as processes: started, watched, killed; and what it left."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from processes import Forked, python
from tarballs import contents, quick, read_back, write_tar

from alignclip.storage.clouds import BUCKET_PROBE

COMMAND = Path(__file__).parent.parent / "convert" / "cc12m.py"
SIZE_LIMIT = "80kb"  # of a shard: a few pictures
TIMEOUT = 240.0  # seconds, for a step that takes ten on a quiet machine


def picture(seed: int, size: tuple[int, int] = (1600, 1200)) -> bytes:
    """A JPEG of some 30 kB that takes 10 ms to decode."""
    blocks = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def write_tars(folder: Path, tars: int, samples: int) -> Path:
    """A folder of so many tars of so many different pictures."""
    for tar in range(tars):
        members = []
        for i in range(tar * samples, (tar + 1) * samples):
            members += [(f"{i:05}.jpg", picture(i)), (f"{i:05}.txt", f"picture {i}".encode())]
        write_tar(folder / f"{tar:05}.tar", members)
    return folder


class Undisturbed:
    """Tars, and what they become where nothing happens: in this process, one after the other.

    Attributes:
        tars: the folder of inputs.
        out: the finished set, a local folder.
        samples: how many there are.
    """

    def __init__(self, folder: Path, tars: int, samples: int) -> None:
        self.tars = write_tars(folder / "in", tars, samples)
        self.out = folder / "undisturbed"
        self.samples = tars * samples
        assert quick([self.tars], self.out, size_limit=SIZE_LIMIT).written == self.samples
        assert len(list(self.out.glob("00000/*.mds"))) > 2

    def assert_same(self, out: Path) -> None:
        """Every file of the set in ``out`` is there, byte for byte, and none besides.

        The samples are the tars'.
        """
        found, wanted = contents(out), contents(self.out)
        assert found.keys() == wanted.keys()
        for name, data in wanted.items():
            assert found[name] == data, name
        rows = read_back(None, out)
        assert list(rows) == [f"{i:05}" for i in range(self.samples)]
        for i, row in enumerate(rows.values()):
            assert row == {"key": f"{i:05}", "image": picture(i), "caption": f"picture {i}"}


def relative(folder: Path) -> set[str]:
    """All files below, some of which may come and go meanwhile."""
    return {
        os.path.relpath(Path(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
    }


def download(s3: Any, uri: str, folder: Path) -> Path:
    """All objects under ``s3://bucket/prefix``."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for key in s3.keys(uri):
        path = folder / key.removeprefix(prefix).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.client.download_file(bucket, key, str(path))
    return folder


def peak_memory(imports: str, expression: str) -> tuple[int, int]:
    """The number that an expression has in a process of its own, and the bytes that it takes.

    The bytes of the imports don't count.
    """
    code = f"""
from pathlib import Path
import pyarrow.parquet, PIL.Image
{imports}

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

PIL.Image.init()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
print({expression}, status("VmHWM") - before)
"""
    done = python("-c", code, cwd=COMMAND.parents[1])
    assert done.returncode == 0, done.stderr
    number, peak = map(int, done.stdout.split())
    return number, peak


class Command:
    """``python convert/cc12m.py …``, running; nothing of it is left after the ``with`` block.

    Attributes:
        driver: the process that was started.
        temporary: its TMPDIR.
    """

    def __init__(
        self,
        folder: Path,
        inputs: str | Path,
        out: str | Path,
        *more: str,
        processes: int = 2,
        scheduler: str = "",
    ) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self._error = folder / "stderr.txt"
        self._error.write_bytes(b"")
        self.driver = Forked(
            sys.executable,
            COMMAND,
            *("--inputs", inputs, "--out", out, "--processes", str(processes)),
            *("--no-semantic", "--size-limit", SIZE_LIMIT, *more),
            *(["--scheduler", scheduler] if scheduler else []),
            output=folder / "stdout.txt",
            errors=self._error,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.end()

    @property
    def errors(self) -> str:
        """What it has said so far."""
        return self._error.read_text(errors="replace")

    def workers(self) -> list[psutil.Process]:
        """Its pool's processes: the children of the copy that forks them."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.driver.pid).children():
                with suppress(psutil.NoSuchProcess):
                    found += child.children()
        self._seen.update(found)
        return found

    def wait_for(self, condition: Callable[[], bool], pause: float = 0.05) -> None:
        """Until it holds; a command that ends before is an error."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.driver.poll() is None, f"ended too early: {self.errors}"
            assert time.monotonic() < deadline, f"waited too long: {self.errors}"
            time.sleep(pause)

    def wait_for_changes(self, listing: Callable[[], set[str]], number: int) -> None:
        """Until so many files have come or gone since now, besides the trial of the place."""

        def written() -> set[str]:
            return {name for name in listing() if not name.startswith(BUCKET_PROBE)}

        before = written()

        def enough() -> bool:
            nonlocal before, number
            now = written()
            number -= len(now ^ before)
            before = now
            return number <= 0

        self.wait_for(enough, pause=0.01)

    def assert_workers_end(self, seconds: float = 10) -> None:
        """All of them, by themselves."""
        _, alive = psutil.wait_procs(self._seen, timeout=seconds)
        assert not alive, f"{len(alive)} workers live on"

    def finish(self, status: int = 0, seconds: float = TIMEOUT) -> str:
        """Wait for its end; return what it has said, of which nothing may be a stack trace."""
        try:
            code = self.driver.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:.0f} s: {self.errors}") from None
        assert code == status, f"exit status {code}: {self.errors}"
        assert "Traceback" not in self.errors, self.errors
        return self.errors


def said(errors: str) -> list[str]:
    """The lines without those of the progress bar, which a line may follow on the same one."""
    lines = (
        line.rpartition("]")[2] if line.startswith("converting:") else line
        for line in errors.splitlines()
    )
    return [line for line in lines if line.strip()]
