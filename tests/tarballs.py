"""What the converter's tests read and look at: small tars of pairs, and the shards that were
made of them.
"""

from __future__ import annotations

import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alignclip.conversion import dataset, shards
from alignclip.conversion.dataset import convert_pairs
from alignclip.conversion.inputs import expand_inputs, opened
from alignclip.conversion.options import ConvertOptions
from alignclip.conversion.records import Counts
from alignclip.conversion.samples import DEFAULT_READING, Item, Reading, Sample
from alignclip.errors import UserError
from alignclip.storage.staging import OutputFolder


def draw(seed: int, image_format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(first: int, number: int) -> list[tuple[str, bytes]]:
    """Members of good samples, as img2dataset writes them."""
    members = []
    for i in range(first, first + number):
        meta = {"caption": f"not picture {i}", "title": f"title {i}"}
        members += [
            (f"{i:05}.jpg", draw(i)),
            (f"{i:05}.json", json.dumps(meta).encode()),
            (f"{i:05}.txt", f"picture {i}".encode()),
        ]
    return members


def three_tars(folder: Path) -> Path:
    for i in range(3):
        write_tar(folder / f"{i:05}.tar", pairs(10 * i, 5))
    return folder


def write_images(folder: Path, number: int = 5) -> Path:
    """A folder with 0.jpg, 1.jpg, …"""
    folder.mkdir(exist_ok=True)
    for i in range(number):
        (folder / f"{i}.jpg").write_bytes(draw(i))
    return folder


def items_of(path: Path | str, caption_key: str | None = None, **reading: Any) -> list[Item]:
    """Everything that the reader of an input file yields."""
    how, found = Reading(caption_key, **reading), []
    for shard in expand_inputs([str(path)], how):
        with opened(shard, how) as source:
            found += source.items
    return found


def captions_of(path: Path | str, **reading: Any) -> list[str | list[str]]:
    """The captions of the samples that the reader of an input file yields."""
    return [item.caption for item in items_of(path, **reading) if isinstance(item, Sample)]


def quick(
    inputs: Any,
    out: str | Path,
    caption_key: str | None = None,
    executor: Executor | None = None,
    **changes: Any,
) -> Counts:
    """Convert inputs, a list or one, without embeddings in this process.

    ``changes`` are options, or settings of reading.
    """
    patterns = inputs if isinstance(inputs, list) else [inputs]
    options: dict[str, Any] = {"semantic": False, "progress": False, "processes": 1, **changes}
    how = {name: options.pop(name) for name in vars(DEFAULT_READING) if name in options}
    reading = options.get("reading", DEFAULT_READING)
    options["reading"] = replace(reading, caption_key=caption_key, **how)
    given = ConvertOptions([str(pattern) for pattern in patterns], str(out), **options)
    return convert_pairs(given, executor)


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(words: str, inputs: Any, out: str | Path, **changes: Any) -> None:
    """A conversion ends with an error of these words."""
    with pytest.raises(UserError, match=words):
        quick(inputs, out, **changes)


class FakeEncoder:
    """An encoder whose embeddings repeat a number of the caption; it cuts the caption ``long``."""

    def __init__(self, dimension: int, number: Callable[[str], float]) -> None:
        self.dimension, self.number = dimension, number
        self.length = 512
        self.stated: int | None = 512

    def cut(self, captions: list[str]) -> list[bool]:
        return [caption == "long" for caption in captions]

    def encode(self, captions: list[str]) -> np.ndarray:
        numbers = [[self.number(caption)] * self.dimension for caption in captions]
        return np.array(numbers, np.float16)


def give_encoder(monkeypatch: pytest.MonkeyPatch, encoder: FakeEncoder) -> FakeEncoder:
    """Have conversions take this encoder, whatever its name is."""
    monkeypatch.setattr(dataset, "find_encoder", str)
    for module in (dataset, shards):
        monkeypatch.setattr(module, "load_encoder", lambda name: encoder)
    return encoder


def read_back(remote: str | None, local: Path, **arguments: Any) -> dict[str, dict[str, Any]]:
    from streaming import StreamingDataset

    dataset = StreamingDataset(
        remote=remote,
        local=str(local),
        batch_size=1,
        shuffle=False,
        validate_hash="xxh64",
        **arguments,
    )
    rows = [dataset[i] for i in range(dataset.num_samples)]
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def assert_three_tars(made: Path | dict[str, dict[str, Any]]) -> None:
    """A set, or the rows that are read back, has the pairs of :func:`three_tars`."""
    rows = read_back(None, made) if isinstance(made, Path) else made
    numbers = [*range(5), *range(10, 15), *range(20, 25)]
    assert list(rows) == [f"{i:05}" for i in numbers]
    for i in numbers:
        assert rows[f"{i:05}"] == {"key": f"{i:05}", "image": draw(i), "caption": f"picture {i}"}


def cut(path: Path, samples: int) -> None:
    """Shorten a tar of ``pairs`` by all samples but the first ones, inside the file that
    follows.
    """
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        path.write_bytes(data[: tar.getmembers()[3 * samples].offset_data + 5])


def stage(store: OutputFolder, *names: str) -> None:
    """Fill the sub-folder 00000 with these files; a folder for a name that ends in a slash."""
    with store.staged("00000") as folder:
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("{}")


def put(s3: Any, url: str, data: bytes) -> None:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    s3.client.put_object(Bucket=bucket, Key=key, Body=data)


def upload(s3: Any, folder: Path, uri: str) -> None:
    for path in sorted(folder.iterdir()):
        put(s3, f"{uri}/{path.name}", path.read_bytes())


@contextmanager
def serve(handler: Any) -> Iterator[str]:
    """Serve what a handler answers, or a folder's files."""
    if isinstance(handler, Path):
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(handler))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
