"""Callbacks, algorithms and loggers of a person's own, by their dotted names in the YAML."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from runs import TINY

from alignclip.config.reading import load, to_yaml
from alignclip.errors import UserError
from alignclip.training import plugins

CODE = """
import typing
from dataclasses import dataclass

from composer import Algorithm, Callback
from composer.algorithms import EMA
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

@dataclass
class Pair:
    width: int
    height: int = 2

class Sized(Callback):
    def __init__(self, pair: Pair, more: typing.Optional[typing.List[Pair]] = None):
        self.pair, self.more = pair, more

class Loose(Callback):
    def __init__(self, values: typing.Dict, other: "Nowhere.At.All" = 1):
        self.values, self.other = values, other

class Broken(Callback):
    def __init__(self, size: "1 / 0" = 1):
        raise RuntimeError("no such\\ndevice")
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
    (counter,) = plugins.instances(config, "callbacks")
    assert (type(counter).__name__, counter.every, counter.name) == ("Counter", 5, "0123")
    assert [type(one).__name__ for one in plugins.instances(config, "algorithms")] == ["Shuffle"]
    assert [type(one).__name__ for one in plugins.instances(config, "loggers")] == ["Sink"]


def test_arguments_may_be_dataclasses(yaml: Path, tmp_path: Path) -> None:
    overrides = [
        "callbacks={own_parts.parts.Sized: {pair: {width: 3}, more: [{width: 4, height: 5}]}}",
        "callbacks[own_parts.parts.Loose]={values: {a: 1}, other: 0123}",
    ]
    config = plugins.check(load(yaml, overrides))
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    for one in (config, plugins.check(config), plugins.check(load(tmp_path / "again.yaml"))):
        built = {type(made).__name__: made for made in plugins.instances(one, "callbacks")}
        sized, loose = built["Sized"], built["Loose"]
        assert (sized.pair.width, sized.pair.height, sized.more[0].height) == (3, 2, 5)
        assert (loose.values, loose.other) == ({"a": 1}, "0123")


def test_what_a_constructor_raises_is_one_line(yaml: Path) -> None:
    config = plugins.check(load(yaml, ["callbacks={own_parts.parts.Broken: {size: 3}}"]))
    with pytest.raises(UserError) as error:
        plugins.instances(config, "callbacks")
    assert str(error.value) == "callbacks.own_parts.parts.Broken: RuntimeError: no such device"


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
        (
            "callbacks[own_parts.parts.Counter].every=x",
            "Counter.every: Value 'x' is no whole number",
        ),
        (
            "callbacks={own_parts.parts.Other: {}}",
            "is none of the callbacks; it must derive from composer.core.Callback",
        ),
        (
            "loggers={own_prts.Sink: {}}",
            "loggers.own_prts.Sink: there is no module 'own_prts'; looked",
        ),
        (
            "loggers={own_parts.prts.Sink: {}}",
            "there is no module 'own_parts.prts'; looked for in /",
        ),
        (
            "callbacks={own_parts.parts.Sized: {pair: {height: 3}}}",
            "callbacks.own_parts.parts.Sized.pair: TypeError: ",
        ),
        (
            "callbacks={own_parts.parts.Loose: {values: [1]}}",
            "values' holds names with values below",
        ),
        (
            "algorithms={composer.algorithms.MixUp: {alpha: 0.2}}",
            "algorithms: composer.algorithms.MixUp is Composer's: write it as MixUp",
        ),
        (
            "algorithms={own_parts.parts.EMA: {half_life: 1ba}}",
            "algorithms: own_parts.parts.EMA is Composer's: write it as EMA",
        ),
        (
            "loggers={own_broken.Sink: {}}",
            "own_broken can't be imported: No module named 'nothing_of_that_name'",
        ),
    ],
)
def test_what_is_wrong_with_them_is_one_line(yaml: Path, override: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        plugins.check(load(yaml, [override]))
    assert says in str(error.value)
    assert "\n" not in str(error.value)
