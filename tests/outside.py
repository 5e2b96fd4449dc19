"""Files that somebody else may have written: damaged again and again, and read each time."""

from __future__ import annotations

import io
import json
import random
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from mutations import damage, damage_json, damage_value

from alignclip.config import yaml_text
from alignclip.errors import UserError, printable

Damage = Callable[[bytes, random.Random], bytes]
SLOW = 5.0  # seconds, for one small file
LARGE = 2**29  # bytes of memory, for all of the small files
LONGEST = 2_000  # characters of a line
SHOWN = 8  # causes


class Trials:
    """Files that are damaged in turn, and what became of each.

    Args:
        rng: draws the damage.
        files: how each of the files is damaged.
        act: reads them.

    Attributes:
        ends: how many worked, and how many got a line.
        broken: what else happened, with the number of times.
    """

    def __init__(
        self, rng: random.Random, files: Mapping[Path, Damage], act: Callable[[], object]
    ) -> None:
        self.rng, self.act = rng, act
        self.files = {path: (path.read_bytes(), how) for path, how in files.items()}
        self.ends: Counter[str] = Counter()
        self.broken: Counter[str] = Counter()

    def run(self, count: int) -> None:
        """Damage a file so many times; put it back each time."""
        assert self._end(Path("undamaged")) == "works", self.broken
        peak = _Peak()
        for _ in range(count):
            path = self.rng.choice([*self.files])
            whole, how = self.files[path]
            path.write_bytes(how(whole, self.rng))
            start = time.monotonic()
            self.ends[self._end(path)] += 1
            if (seconds := time.monotonic() - start) > SLOW:
                self.broken[f"{path.name}: {seconds:.0f} s"] += 1
            path.write_bytes(whole)
        if (grown := peak.bytes()) > LARGE:
            self.broken[f"{grown:,} bytes of memory"] += 1
        assert not self.broken, "\n".join(
            f"{n}× {why}" for why, n in self.broken.most_common(SHOWN)
        )

    def _end(self, path: Path) -> str:
        try:
            self.act()
            return "works"
        except UserError as error:
            line = str(error)
            if line != printable(line) or len(line) > LONGEST:
                self.broken[f"{path.name}: no line: {line[:200]!r}"] += 1
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [one for one in frames if "alignclip/" in one.filename] or frames
            where = f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"
            self.broken[
                f"{path.name}: {type(error).__name__} at {where}: {str(error)[:200]!r}"
            ] += 1
        return "line"


class _Peak:
    """The greatest memory of this process from now on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        self._before = self._status("VmRSS")

    def bytes(self) -> int:
        """Bytes more than at the beginning."""
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def damage_lines(data: bytes, rng: random.Random) -> bytes:
    """Damage a line of JSON lines."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = damage_json(lines[at], rng) + b"\n"
    return b"".join(lines) if rng.random() < 0.8 else damage(data, rng)


def damage_yaml(data: bytes, rng: random.Random) -> bytes:
    """Damage the values of a YAML text, or its bytes."""
    if rng.random() < 0.3:
        return damage(data, rng)
    value = damage_value(yaml_text.natural(yaml_text.parse(data.decode())), rng)
    return json.dumps(value).encode()  # which is YAML, too


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Damage a checkpoint's pickle, whose checksum is right then, or any bytes."""
    if rng.random() < 0.3:
        return damage(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in held.items():
            archive.writestr(name, damage(content, rng) if name.endswith("data.pkl") else content)
    return file.getvalue()


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Damage the values of the header, or any bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return damage(data, rng)
    header = json.dumps(damage_value(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
