"""Callbacks, algorithms and loggers of a person's own, by their dotted names in the YAML."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from runs import TINY

from alignclip.config.reading import load
from alignclip.errors import UserError
from alignclip.training import plugins

CODE = """
from composer import Algorithm, Callback
from composer.loggers import LoggerDestination

class Counter(Callback):
    def __init__(self, every: int, name: str = "n"):
        self.every, self.name = every, name

class Shuffle(Algorithm):
    def match(self, event, state): return False
    def apply(self, event, state, logger): pass

class Sink(LoggerDestination):
    pass

class Other:
    pass
"""


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("own_parts", "own_parts.parts", "own_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "own_parts").mkdir()
    (tmp_path / "own_parts" / "__init__.py").touch()
    (tmp_path / "own_parts" / "parts.py").write_text(CODE)
    (tmp_path / "own_broken.py").write_text("import nothing_of_that_name\n")
    path = tmp_path / "run.yaml"
    text = TINY.replace("data: {", "data: {streams: {e: {local: somewhere}}, ")
    path.write_text(
        text + "autoresume: false\n"
        "callbacks: {own_parts.parts.Counter: {every: 3, name: 0123}}\n"
        "algorithms: {own_parts.parts.Shuffle: {}}\n"
        "loggers: {own_parts.parts.Sink: null}\n"
    )
    return path


def test_own_classes_are_built_with_typed_arguments(yaml: Path) -> None:
    config = plugins.check(load(yaml, ["callbacks[own_parts.parts.Counter].every=5"]))
    (counter,) = plugins.build(config, "callbacks")
    assert (type(counter).__name__, counter.every, counter.name) == ("Counter", 5, "0123")
    assert [type(one).__name__ for one in plugins.build(config, "algorithms")] == ["Shuffle"]
    assert [type(one).__name__ for one in plugins.build(config, "loggers")] == ["Sink"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "callbacks={own_parts.parts.Countr: {every: 3}}",
            "callbacks: no class 'Countr' in own_parts.parts; did you mean 'Counter'?",
        ),
        (
            "callbacks[own_parts.parts.Counter].evry=3",
            "unknown key 'callbacks.own_parts.parts.Counter.evry'; did you mean 'every'?",
        ),
        ("callbacks[own_parts.parts.Counter].every=x", "Counter.every: Value 'x' is no whole number"),
        (
            "callbacks={own_parts.parts.Other: {}}",
            "is none of the callbacks; it must derive from composer.core.Callback",
        ),
        ("loggers={own_prts.Sink: {}}", "loggers.own_prts.Sink: there is no module 'own_prts'; looked"),
        ("loggers={own_parts.prts.Sink: {}}", "there is no module 'own_parts.prts'; looked for in /"),
        (
            "loggers={own_broken.Sink: {}}",
            "own_broken can't be imported: No module named 'nothing_of_that_name'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_them_is_one_line(yaml: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        plugins.check(load(yaml, [override]))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
