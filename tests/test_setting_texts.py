"""What is typed as a text stays that text; what shall be a number is a decimal one, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from models import FIXTURES

from alignclip.config.reading import (
    load,
    load_evaluation,
    model_section,
    plain_values,
    to_yaml,
)
from alignclip.config.schema import CLASSES, RunConfig
from alignclip.config.yaml_text import Plain, dump, natural, parse
from alignclip.errors import UserError
from alignclip.training import plugins
from alignclip.training.run_identity import changes, identity_changes, nested, with_defaults

# what YAML 1.1, or Python, takes for a number, a boolean, a date or nothing
TEXTS = (
    "1e400000", "7e999999", "12e5407", "0123", "1_000", "2024-11-05", "2024-11-05 10:00:00", "1:30",
    "12.50", "0x1F", "0o17", "no", "yes", "on", "off", "y", "N", "True", ".inf", "-.inf", ".nan",
    "inf", "nan", "+1", ".5", "5.", "1e5", "1E-3", "16", "-0", "=", "<<", "é ü 你好", "0b11",
)  # fmt: skip
BRACES = "{run_name}x"  # which a run's own name can't hold
# what only a command line can hold without quotation marks
LINE_TEXTS = (
    "a #b", "a: b", "a, b", "[a", BRACES, "&a", "*a", "!x", "- a", "a=b", "'a' b", " a ",
    "%a", "@a", "`a", "|",
)  # fmt: skip


@pytest.mark.parametrize("text", [*TEXTS, *LINE_TEXTS])
def test_a_text_on_the_line_stays_as_it_was_typed(yaml: Path, text: str) -> None:
    name = "a" if text == BRACES else text
    config = load(
        yaml,
        [
            f"run_name={name}",
            f"save_folder={text}",
            f"data.streams.e.split={text}",
            f"data.streams.e.local={text}",
        ],
    )
    stream = config.data.streams["e"]
    assert config.run_name == name
    assert (config.save_folder, stream.split, stream.local) == (text,) * 3
    assert load(yaml, [f'run_name="{name}"']).run_name == name  # quotation marks are YAML's


@pytest.mark.parametrize("text", [t for t in TEXTS if t != "<<"])  # as a key this merges
def test_a_text_in_a_file_stays_as_it_was_typed(yaml: Path, text: str) -> None:
    with yaml.open("a", encoding="utf-8") as file:
        file.write(
            f"run_name: {text}\nsave_ignore_keys: [{text}, a]\nloggers: "
            f"{{FileLogger: {{filename: {text}}}}}\n"
        )
        file.write(f"evaluators:\n  {text}: {{task: gap, local: {text}}}\n")
    config = plugins.check(load(yaml))
    assert config.run_name == text
    assert config.save_ignore_keys == [text, "a"]
    assert config.loggers == {"FileLogger": {"filename": text}}
    assert config.evaluators.keys() == {text}
    assert config.evaluators[text].local == text


@pytest.mark.parametrize("text", [t for t in TEXTS if "." not in t and "=" not in t])
def test_names_on_the_line_are_texts(yaml: Path, text: str) -> None:
    config = load(
        yaml,
        [
            f"data.streams.{text}.local=x",
            f"evaluators.{text}.task=gap",
            f"evaluators.{text}.local=x",
        ],
    )
    assert config.data.streams.keys() == {"e", text}
    assert config.evaluators.keys() == {text}
    assert load(
        yaml, [f"data.streams.{text}.local=x", f"data.streams.{text}=null"]
    ).data.streams.keys() == {"e"}


@pytest.mark.parametrize("text", [t for t in TEXTS if t != "<<"])
def test_checkpoints_to_compare_have_the_names_that_were_typed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"checkpoints: {{ok: a, {text}: {text}}}\nevaluators: {{e: {{task: gap, local: x}}}}\n",
        encoding="utf-8",
    )
    config = load_evaluation(path, [f"out={text}"])
    assert config.checkpoints == {"ok": "a", text: text}
    assert config.out == text


@pytest.mark.parametrize(
    "text", [*TEXTS, *LINE_TEXTS, "", "null", "a\\b", 'a"b', "a\nb", "#", "a: ", "?"]
)
def test_what_a_run_leaves_reads_back_to_the_same(yaml: Path, tmp_path: Path, text: str) -> None:
    config = load(yaml)
    config.save_folder = config.data.streams["e"].split = text
    config.run_name = "a" if "\n" in text or text == BRACES else text
    config.save_ignore_keys = [text]
    config.data.streams[text] = config.data.streams["e"]
    config.loggers = {
        "WandBLogger": {"project": text, "init_kwargs": {"notes": text, "number": 3, "rate": 0.5}}
    }
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    read = load(again)
    read.loggers = natural(read.loggers)
    assert read == config
    assert identity_changes(plain_values(config), natural(parse(to_yaml(config)))) == []


def test_arguments_that_were_not_converted_are_written_as_they_were_typed(
    yaml: Path, tmp_path: Path
) -> None:
    overrides = [
        "loggers.WandBLogger={project: 0123, init_kwargs: {a: 0123, b: '5', c: 5, d: no, e: true, "
        "f: null}}"
    ]
    config = load(yaml, overrides)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load(tmp_path / "again.yaml")
    for one in (config, again):
        checked = plugins.check(one).loggers["WandBLogger"]
        kwargs = {"a": "0123", "b": "5", "c": 5, "d": "no", "e": True, "f": None}
        assert checked == {"project": "0123", "init_kwargs": kwargs}


def test_arguments_of_classes_are_what_their_annotations_say(yaml: Path) -> None:
    overrides = [
        "loggers.FileLogger={filename: 1e400000, capture_stdout: yes, buffer_size: 7}",
        "loggers.WandBLogger.tags=[1e5, no]",
        "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 1}",
        "callbacks.SpeedMonitor.window_size=50",
        "algorithms.EMA.half_life=10ba",
    ]
    config = plugins.check(load(yaml, overrides))
    assert config.loggers["FileLogger"] == {
        "filename": "1e400000",
        "capture_stdout": True,
        "buffer_size": 7,
    }
    assert config.loggers["WandBLogger"] == {"tags": ["1e5", "no"]}
    threshold = config.algorithms["GradientClipping"]["clipping_threshold"]  # type: ignore[index]
    assert isinstance(threshold, float)
    assert config.callbacks["SpeedMonitor"] == {"window_size": 50}
    assert plugins.check(config) == config


@pytest.mark.parametrize(
    "text",
    ["017", "0x1F", "1_000", "1e3", "1:30", "0b11", "16.0", "١٦", "1e400", "9" * 30, "no", "inf"],
)
def test_integers_are_decimal_or_refused(yaml: Path, text: str) -> None:
    for key in ("seed", "model.vision_cfg.width", "evaluators.a.batch_size"):
        with pytest.raises(UserError, match=rf"{key}: Value '{text}' is no whole number") as error:
            load(yaml, [f"{key}={text}"])
        assert "\n" not in str(error.value)
    path = yaml.with_name("only.yaml")
    path.write_text(f"model: {{vision_cfg: {{width: {text}}}}}", encoding="utf-8")
    with pytest.raises(UserError, match="is no whole number"):
        load(path)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        *((f"seed={text}", 16) for text in ("16", "+16", " 16 ", "'16'")),
        *((f"optimizer.lr={text}", 1e-3) for text in ("1e-3", "1E-3", ".001")),
        *((f"optimizer.lr={text}", 1.0) for text in ("1.", "+1", "1")),
        ("data.predownload=null", None),
    ],
)
def test_numbers(yaml: Path, override: str, value: float | None) -> None:
    config = load(yaml, [override])
    key = override.partition("=")[0]
    read = {"seed": config.seed, "optimizer.lr": config.optimizer.lr}
    found = read.get(key, config.data.predownload)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text", ["1e400", "-1e1000", ".inf", "nan", "1e-1000", "1:30", "0x1F", "1_0.5", "yes", "1,5"]
)
def test_numbers_are_finite_and_decimal_or_refused(yaml: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"optimizer\.lr") as error:
        load(yaml, [f"optimizer.lr={text}"])
    assert "\n" not in str(error.value)


def test_booleans_and_nulls_are_what_they_were(yaml: Path) -> None:
    for text, value in (("true", True), ("False", False), ("no", False), ("on", True)):
        assert load(yaml, [f"data.shuffle={text}"]).data.shuffle is value
        assert load(yaml, [f"progress_bar={text}"]).progress_bar is value
    for text in ("null", "~", ""):
        assert load(yaml, [f"progress_bar={text}"]).progress_bar is None
        assert load(yaml, [f"data.validate_hash={text}"]).data.validate_hash is None
    assert load(yaml, ["run_name="]).run_name == ""
    with yaml.open("a", encoding="utf-8") as file:
        file.write("load_path: ~\nsave_folder:\ncompile_config: null\n")
    config = load(yaml)
    assert (config.load_path, config.save_folder, config.compile_config) == (None, None, None)


@pytest.mark.parametrize(
    "override", ["run_name=null", "data.streams.e.split=null", "data.streams.e.local=null"]
)
def test_a_null_that_may_be_a_name_is_told_how_to_be_one(yaml: Path, override: str) -> None:
    with pytest.raises(UserError, match="quotes"):
        load(yaml, [override])
    quoted = override.replace("null", "'null'")
    config = load(yaml, [quoted])
    assert "null" in (
        config.run_name,
        config.data.streams["e"].split,
        config.data.streams["e"].local,
    )


def test_interpolation_is_omegaconfs(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "48")
    overrides = [
        "run_name=0123",
        "save_folder=runs/${run_name}",
        "global_train_batch_size=${oc.env:BATCH}",
    ]
    config = load(yaml, [*overrides, "loggers.FileLogger.filename=${save_folder}/{rank}.txt"])
    assert config.save_folder == "runs/0123"
    assert config.global_train_batch_size == 48
    assert config.loggers == {"FileLogger": {"filename": "runs/0123/{rank}.txt"}}
    with pytest.raises(UserError, match="nothing"):
        load(yaml, ["run_name=${nothing}"])


def test_interpolation_finds_defaults_below_names(yaml: Path) -> None:
    overrides = [
        "evaluators.probe={task: gap, local: x}",
        "evaluators.clusters={task: clustering, local: x, n_init: 3}",
        "evaluators.coco={task: retrieval, local: '${evaluators.probe.local}'}",
        "evaluators.coco.batch_size=${evaluators.probe.batch_size}",
        "evaluators.clusters.num_workers=${evaluators.clusters.random_state}",
        "data.streams.e.split=${data.streams.e.local}",
        "data.streams.e.repeat=${data.streams.e.choose}",
        "loss.cyclip.cross_modal=2",
        "loss.beta=${loss.cyclip.cross_modal}",
    ]
    config = load(yaml, overrides)
    coco, clusters = config.evaluators["coco"], config.evaluators["clusters"]
    assert (coco.batch_size, coco.local, clusters.num_workers) == (256, "x", 0)
    assert (config.data.streams["e"].split, config.data.streams["e"].repeat) == ("somewhere", None)
    assert config.loss.beta == 2.0


@pytest.mark.parametrize(
    "text",
    [
        "run_name: !!python/object/apply:os.system [id]", "run_name: !!binary aGk=", "a: &a [*a]",
        "a: 1\na: 2", "? [a]\n: b", "--- {}\n--- {}", "run_name: [", "<<: 3", "a: !x b",
        "a: !!seq 5", "a: !!map 5", "a: !!str [b]", "a: !!null {}",
    ],
)  # fmt: skip
def test_what_is_no_plain_yaml_is_one_line(yaml: Path, text: str) -> None:
    yaml.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="is not a YAML file") as error:
        load(yaml)
    assert "\n" not in str(error.value)


def test_anchors_and_tags_of_yaml_work(tmp_path: Path) -> None:
    text = "a: &a {x: 0123, y: !!str 5}\nb: {<<: *a, y: 7}\nc: !!int 5\nd: |\n  two\n  lines\n"
    expected = {
        "a": {"x": "0123", "y": "5"},
        "b": {"x": "0123", "y": 7},
        "c": 5,
        "d": "two\nlines\n",
    }
    assert natural(parse(text)) == expected
    assert parse("") is None
    nested_merges = "x: {<<: &m {<<: &b {k: 1}, k: 2}, z: *m}"
    assert natural(parse(nested_merges)) == {"x": {"k": 2, "z": {"k": 2}}}
    two = "a: &a {x: 1, y: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b}"
    assert natural(parse(two))["c"] == {"x": 1, "y": 2}
    with pytest.raises(ValueError, match=r"^line 2: the key 'x' is there twice$"):
        parse("x: 1\nx: 2")


@pytest.mark.parametrize(
    "text",
    [
        "a: !!map [x]",
        "a: !!map ''",
        "!!map",
        "a: !!seq {b: c}",
        "a: !!str {!!value x: y}",
        "[" * 2000,
    ],
)
def test_what_no_section_list_or_text_can_be_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_an_override_changes_one_of_the_places_of_an_anchor(yaml: Path) -> None:
    with yaml.open("a", encoding="utf-8") as file:
        file.write("evaluators:\n  a: &a {task: gap, local: x}\n  b: *a\n")
    evaluators = load(yaml, ["evaluators.a={local: y}"]).evaluators
    assert (evaluators["a"].local, evaluators["b"].local) == ("y", "x")


def test_what_is_below_a_task_or_term_has_its_types_on_the_line(yaml: Path) -> None:
    probe = "evaluators.probe={task: linear_probe, local: x, train: {local: y}}"
    train = "evaluators.probe.train"
    for text, value in (("~", str(Path.home())), ("[a]", "[a]"), ("0123", "0123")):
        config = load(
            yaml, [probe, f"{train}.remote={text}" if text == "~" else f"{train}.split={text}"]
        )
        found = config.evaluators["probe"].settings.train
        assert value in (found.remote, found.split)
    assert load(yaml, ["loss.cyclip.cross_modal= 2 "]).loss.terms["cyclip"].cross_modal == 2.0
    for override in (f"{train}.split=null", "data.streams.a={remote: x, split: null}"):
        with pytest.raises(UserError, match="for the name null put it in quotes"):
            load(yaml, [probe, override])
    assert parse("\ufeffa: 1") == {"a": "1"}


def test_the_model_beside_a_checkpoint_is_read_by_its_types(tmp_path: Path) -> None:
    text = to_yaml(RunConfig())
    assert model_section(text) == RunConfig().model
    for wrong in (
        "model: {embed_dim: 0x10}",
        "model: {embed_dims: 3}",
        "data: {}",
        "model: {embed_dim: 017}",
        "[",
    ):
        with pytest.raises(ValueError):
            model_section(wrong)


def test_a_run_of_an_earlier_version_is_the_same_run(yaml: Path) -> None:
    config: Any = load(
        yaml, ["algorithms.EMA={half_life: 100ba, update_interval: 1ba}", "run_name=inf"]
    )
    before = to_yaml(plugins.check(config)).replace(
        "run_name: 'inf'", "run_name: .inf"
    )  # as YAML writes the number
    yaml.with_name("old.yaml").write_text(before, encoding="utf-8")
    assert load(yaml.with_name("old.yaml")).run_name == ".inf"
    assert identity_changes(natural(parse(before)), natural(parse(to_yaml(config)))) == []


def test_the_configuration_that_an_earlier_version_left_is_read(tmp_path: Path) -> None:
    """That version wrote null for the sets that an evaluator's task has no use for."""
    old = FIXTURES / "config_ed913cd.yaml"
    config = load(old)
    assert [one.task for one in config.evaluators.values()] == [
        "retrieval",
        "linear_probe",
        "out_of_distribution",
    ]
    before, now = nested(old.read_text()), nested(to_yaml(config))
    assert identity_changes(before, now) == []
    assert changes(with_defaults(before), with_defaults(now)) == []
    other = load(old, ["evaluators.probe.task=zero_shot", "evaluators.probe.train=null"])
    assert other.evaluators["probe"].task == "zero_shot"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ({"a": None}, {}, []),
        ({}, {"a": None}, []),
        ({"a": None}, {"a": 3}, ["a: None → 3"]),
        ({}, {"a": 3}, ["a: not set → 3"]),
        # null leaves a class in
        ({}, {"callbacks.LRMonitor": None}, ["callbacks.LRMonitor: not set → None"]),
    ],
)
def test_null_is_the_same_as_no_such_key(
    old: dict[str, Any], new: dict[str, Any], found: list[str]
) -> None:
    assert changes(old, new) == found


def test_sections_of_classes_hold_classes_with_arguments(yaml: Path) -> None:
    for name in CLASSES:
        for wrong in (f"{name}=3", f"{name}=[EMA]", f"{name}.EMA=3", f"{name}=null"):
            with pytest.raises(UserError, match=name):
                load(yaml, [wrong])
        assert getattr(load(yaml, [f"{name}.X={{}}", f"{name}.Y=null", f"{name}.Y.z=1"]), name)[
            "Y"
        ] == {"z": Plain("1")}


def test_what_is_dumped_means_the_same_to_every_reader_of_yaml() -> None:
    from omegaconf import OmegaConf

    values = {text: text for text in (*TEXTS, *LINE_TEXTS) if text != "<<"}
    assert OmegaConf.to_container(OmegaConf.create(dump(values))) == values
