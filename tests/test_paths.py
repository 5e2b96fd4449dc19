"""``~`` is home in every setting, option and class argument that is a path or a URL."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import OPTION_COMMANDS
from runs import TINY

from alignclip import paths
from alignclip.config import keys
from alignclip.config.reading import load, load_evaluation
from alignclip.config.schema import CLASSES, EvaluateConfig, RunConfig
from alignclip.config.setting import rule_of
from alignclip.errors import UserError
from alignclip.runtime.arguments import Parser
from alignclip.training import plugins

# words in the name of a setting or option that holds a path; and those that hold such a word and
# are none
PATH_WORDS = (
    "path", "folder", "file", "dir", "local", "remote", "checkpoint", "checkpoints", "out",
    "pretrained", "root", "images", "annotations", "metrics", "set", "source", "inputs", "encoder",
    "config", "classnames", "templates", "sheet",
)  # fmt: skip
NO_PATHS = {
    "data.streams.*.split", "save_filename", "save_latest_filename", "profiler", "model",
    "pretrained_shared_from", "save_metrics", "precision_config", "compile_config",
    "parallelism_config", "model.vision_cfg", "model.text_cfg", "separate_image",
    "save_num_checkpoints_to_keep",
}  # fmt: skip
NO_PATH_OPTIONS = {
    ("alignclip.conversion.cc12m", "held_out"),
    ("alignclip.weights.export_command", "to"),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def settings(schema: Any, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Every setting's name, and whether the schema marks it as a path."""
    for f in dataclasses.fields(schema):
        hint = typing.get_type_hints(schema)[f.name]
        yield f"{prefix}{f.name}", rule_of(f).place
        names = keys.named_sections(hint)
        for inner in filter(dataclasses.is_dataclass, keys.members_of(names or hint)):
            yield from settings(inner, f"{prefix}{f.name}." + ("*." if names else ""))


@pytest.mark.parametrize("schema", [RunConfig, EvaluateConfig])
def test_every_setting_that_is_a_path_is_marked_as_one(schema: type) -> None:
    for key, marked in settings(schema):
        name = key.rpartition(".")[2]
        words = set(name.split("_"))
        looks_so = bool(words & set(PATH_WORDS)) and key not in NO_PATHS and name not in NO_PATHS
        assert marked == looks_so, key


@pytest.mark.parametrize("name", OPTION_COMMANDS)
def test_every_option_that_is_a_path_expands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsers: list[argparse.ArgumentParser] = []

    def keep(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_args", keep)
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        module.main([])
    for action in parsers[0]._actions:
        if action.nargs == 0 or (name, action.dest) in NO_PATH_OPTIONS:
            continue
        if (
            set(action.dest.split("_")) & set(PATH_WORDS)
            or action.dest == "model"
            or action.metavar in ("FILE", "FOLDER", "PATH", "SET")
        ):
            assert action.type in (paths.option, paths.path_option), action.dest


def test_home_in_every_setting(tmp_path: Path) -> None:
    yaml = tmp_path / "run.yaml"
    text = TINY.replace("data: {", "data: {streams: {e: {local: ~/set, remote: file:///a%20b}}, ")
    yaml.write_text(
        f"{text}run_name: a\nsave_folder: ~/runs\nprofiler: {{torch_prof_folder: ~/t}}\n",
        encoding="utf-8",
    )
    overrides = ["load_path=~/x.pt", "evaluators.s={task: sts, local: ~/s}", "save_folder=~"]
    config = load("~/run.yaml", overrides)
    stream = config.data.streams["e"]
    assert (stream.local, stream.remote) == (f"{tmp_path}/set", "/a b")
    assert (config.load_path, config.save_folder) == (f"{tmp_path}/x.pt", str(tmp_path))
    assert config.evaluators["s"].local == f"{tmp_path}/s"
    assert config.profiler is not None
    assert config.profiler.torch_prof_folder == f"{tmp_path}/t"
    assert load(yaml, ["pretrained=local-dir:~/p"]).pretrained == f"local-dir:{tmp_path}/p"


def test_home_in_an_evaluation(tmp_path: Path) -> None:
    yaml = tmp_path / "evaluate.yaml"
    probe = "{task: linear_probe, local: ~/x, train: {local: ~/y}}"
    text = f"checkpoints: {{a: ~/a, b: s3://b/~c}}\nout: ~/out\nevaluators: {{p: {probe}}}\n"
    yaml.write_text(text, encoding="utf-8")
    config = load_evaluation(yaml)
    assert config.checkpoints == {"a": f"{tmp_path}/a", "b": "s3://b/~c"}
    assert config.out == f"{tmp_path}/out"
    assert config.evaluators["p"].settings.train.local == f"{tmp_path}/y"


def test_home_in_every_argument_of_a_class(tmp_path: Path) -> None:
    loggers = {
        "TensorboardLogger": {"log_dir": "~/tb"},
        "FileLogger": {"filename": "~/{run_name}.txt", "remote_file_name": "a~"},
        "WandBLogger": {"init_kwargs": {"dir": "~/wandb", "tags": ["~/a", "~"]}},
    }
    found = plugins.check(RunConfig(loggers=typing.cast(Any, loggers))).loggers
    assert found == {
        "TensorboardLogger": {"log_dir": f"{tmp_path}/tb"},
        "FileLogger": {"filename": f"{tmp_path}/{{run_name}}.txt", "remote_file_name": "a~"},
        "WandBLogger": {
            "init_kwargs": {"dir": f"{tmp_path}/wandb", "tags": [f"{tmp_path}/a", str(tmp_path)]}
        },
    }
    assert set(CLASSES) == {"algorithms", "callbacks", "loggers"}


def test_places_that_are_no_paths_below_home_stay(tmp_path: Path) -> None:
    for place in ("s3://bucket/~x", "a/~", "hf-hub:org/name", "", "./~"):
        assert paths.expand(place) == place
    assert paths.expand("~root") != "~root"
    assert paths.expand("file://localhost/a") == "/a"
    with pytest.raises(
        UserError, match=r"save_folder=~nobody-here/x: there is no user.*\./~nobody-here/x"
    ):
        paths.expand("~nobody-here/x", "save_folder")
    with pytest.raises(argparse.ArgumentTypeError, match="there is no user"):
        paths.option("~nobody-here")
