"""Loss terms and tasks that a YAML names: found in their tables, read as strictly as all
settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from runs import write_config

from alignclip.config import plugged
from alignclip.config.reading import evaluators_of, load, to_yaml
from alignclip.config.schema import SetConfig
from alignclip.errors import UserError

TERM = """
from dataclasses import dataclass
from alignclip.config.setting import setting

@dataclass
class Settings:
    weight: float = setting(1.0, at_least=0)
    side: str = setting("both", choices=("both", "image"))
"""
TASK = """
from __future__ import annotations
from dataclasses import dataclass
from alignclip.config.schema import SetConfig
from alignclip.config.setting import setting

@dataclass
class Settings:
    other: SetConfig
    top: int = setting(5, at_least=1)
"""


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, code in (("a_term", TERM), ("a_task", TASK)):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(plugged.LOSS_TERMS, "spread", "a_term")
    monkeypatch.setitem(plugged.TASKS, "sorting", "a_task")
    return write_config(tmp_path, "somewhere")


SORTING = ["evaluators.s.task=sorting", "evaluators.s.local=x", "evaluators.s.other.local=~/y"]


def test_settings_are_typed_and_the_resolved_file_reads_back(yaml: Path) -> None:
    overrides = ["loss.spread.weight=2", *SORTING, "evaluators.s.top=3"]
    config = load(yaml, overrides)
    term, settings = config.loss.terms["spread"], config.evaluators["s"].settings
    assert (term.weight, term.side) == (2.0, "both")
    assert (settings.top, settings.other) == (3, SetConfig(local=str(Path.home() / "y")))
    again = yaml.with_name("again.yaml")
    again.write_text(to_yaml(config))
    assert load(again) == config
    assert load(again, ["loss.spread=null"]).loss.terms == {}
    assert "spread: " not in to_yaml(load(yaml))
    assert evaluators_of(config.evaluators) == config.evaluators


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["loss.spraed.weight=2"], "unknown key 'loss.spraed'; did you mean 'spread'?"),
        (["loss.spread.wieght=2"], "unknown key 'loss.spread.wieght'; did you mean 'weight'?"),
        (["loss.spread.weight=-1"], "loss.spread.weight must not be negative, but is -1.0"),
        (["loss.spread.weight=nan"], "loss.spread.weight must be a finite number"),
        (["loss.spread.side=imag"], "loss.spread.side=imag: did you mean 'image'?"),
        (["loss.spread=2"], "the command line: 'loss.spread' is a section"),
        (["loss.terms={spread: {}}"], "unknown key 'loss.terms'; valid: "),
        (
            ["evaluators.s={task: gap, local: x, top: 3, other: {local: y}, n_init: 3}"],
            "gap has no use for top",  # the first in the file
        ),
        (["model.depht=1", "model.embed_dims=1"], "unknown key 'model.depht'"),
        ([*SORTING, "evaluators.s.tpo=1"], "unknown key 'evaluators.s.tpo'; did you mean 'top'?"),
        ([*SORTING, "evaluators.s.intervall=1ep"], "did you mean 'interval'?"),
        ([*SORTING, "evaluators.s.top=0"], "evaluators.s.top must be at least 1, not 0"),
        (
            [*SORTING, "evaluators.s.other={remote: 's3:/b'}"],
            "evaluators.s.other.remote=s3:/b has one slash",
        ),
        ([*SORTING, "evaluators.s.other={split: a, local: null}"], "has neither remote nor"),
        (SORTING[:2], "evaluators.s: sorting needs other, a set of its own"),
        (
            ["evaluators.s={task: gap, local: x, top: 3}"],
            "evaluators.s: gap has no use for top",
        ),
        (
            ["evaluators.s={task: gap, local: x, other: {local: y}}"],
            "evaluators.s: gap has no use for other, a set of its own",
        ),
        (["evaluators.s={task: sortin, top: 3}"], "did you mean 'sorting'?"),
        (["evaluators.s={tsak: sorting, top: 3}"], "unknown key 'evaluators.s.tsak'"),
    ],
)  # fmt: skip
def test_settings_are_as_strict_as_all_others(yaml: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as error:
        load(yaml, overrides)
    assert says in str(error.value)


def test_a_task_that_is_not_there_is_told_with_the_nearest(yaml: Path) -> None:
    with pytest.raises(UserError, match=r"a\.task=sort: did you mean 'sorting'\?"):
        plugged.plugged(plugged.TASKS, "sort", "a.task")
