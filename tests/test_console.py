"""Output whose encoding lacks a character; the files that are written meanwhile."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import COMMANDS
from composer.loggers import Logger

from alignclip.config.schema import RunConfig
from alignclip.runtime import console
from alignclip.training import plugins


class Streams:
    """``sys.stdout`` and ``sys.stderr`` in an encoding, as strict as Python opens them."""

    def __init__(self, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.encoding = encoding
        self._monkeypatch = monkeypatch

    def install(self) -> None:
        """In the test itself: pytest sets its own between a fixture and the test."""
        self._buffers = [io.BytesIO(), io.BytesIO()]
        for name, buffer in zip(("stdout", "stderr"), self._buffers, strict=True):
            stream = io.TextIOWrapper(buffer, encoding=self.encoding, write_through=True)
            self._monkeypatch.setattr(sys, name, stream)

    def text(self) -> str:
        return "".join(buffer.getvalue().decode(self.encoding) for buffer in self._buffers)


@pytest.fixture(params=["ascii", "latin-1", "utf-8"])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(request.param, monkeypatch)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_say_everything(name: str, streams: Streams) -> None:
    main = importlib.import_module(name).main
    streams.install()
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    print(
        "→ … × · 你好 \udcff", file=sys.stderr
    )  # a name of a file that is no UTF-8 has such characters
    assert "usage:" in streams.text()


def test_what_is_shown_instead(streams: Streams) -> None:
    streams.install()
    console.prepare_output()
    print("a → b … é 你 \udcff")
    shown = {
        "ascii": "a -> b ... \\xe9 \\u4f60 \\udcff\n",
        "latin-1": "a -> b ... é \\u4f60 \\udcff\n",
        "utf-8": "a → b … é 你 \\udcff\n",
    }
    assert streams.text() == shown[sys.stdout.encoding]


def test_loading_is_said_once_a_machine(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.install()
    console.prepare_output()
    monkeypatch.setenv("LOCAL_RANK", "1")
    console.loading("all")
    assert streams.text() == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    console.loading("all")
    assert streams.text().startswith("loading all ")


def test_the_log_file_is_utf8_whatever_the_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    original = open
    monkeypatch.setattr(
        "composer.loggers.file_logger.open",
        lambda name, mode, buffering: original(name, mode, buffering, encoding="ascii"),
        raising=False,
    )
    path = tmp_path / "log.txt"
    config = RunConfig(
        loggers={"FileLogger": {"filename": str(path), "overwrite": True, "buffer_size": "1"}}
    )
    [logger] = plugins.instances(plugins.check(config), "loggers")
    logger.write("", "before → …\n")
    logger.init(SimpleNamespace(run_name="a"), Logger.__new__(Logger))
    logger.write("", "after → … 你\n")
    logger.file.close()
    logger._closed = True  # or whatever is printed after the test would be written to the file
    assert path.read_text(encoding="utf-8") == "before → …\nafter → … 你\n"
