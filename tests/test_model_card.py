"""What an export publishes: figures of its own weights, and no path, user or host of the
machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import EVERYTHING, drawn, refused, small_config, write_run

from alignclip.weights.digest import weights_digest
from alignclip.weights.export_command import ExportOptions, run_export
from alignclip.weights.figures import read_figures
from alignclip.weights.load import load_encoders
from alignclip.weights.publishing import public, public_place


def run_of(folder: Path, seed: int = 0, **recipe: Any) -> Path:
    """A checkpoint as a run leaves it, with its configuration beside it."""
    config = small_config(shared=EVERYTHING)
    return write_run(folder, config, drawn(config, seed), **recipe)


def write_results(path: Path, runs: dict[str, Path], with_digests: bool = True) -> str:
    """Write a ``results.json`` in which the n-th checkpoint has n tenths as its recall."""
    values = {name: round(0.1 * number, 1) for number, name in enumerate(runs, 1)}
    content: dict[str, Any] = {
        "checkpoints": {name: str(run) for name, run in runs.items()},
        "results": {
            name: {"coco": {f"recall@{k}": value for k in (10, 1, 5)} | {"loss": None}}
            for name, value in values.items()
        },
    }
    if with_digests:
        digests = {name: weights_digest(load_encoders(run)) for name, run in runs.items()}
        content["weights"] = digests
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def exported(run: Path, out: Path, metrics: str) -> str:
    """Return the model card of an export."""
    run_export(ExportOptions(str(run), "open_clip", str(out), metrics=metrics))
    return (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("digest", "words"),
    [
        ("xxh3:0", "its figures are of runs/a and runs/b, not of the weights in runs/c; "),
        ("xxh3:1", "holds no figures of runs/c yet; "),
    ],
)
def test_figures_of_other_weights_or_none_yet_are_refused(
    tmp_path: Path, digest: str, words: str
) -> None:
    runs = {"a": "runs/a", "b": "runs/b"}
    weights = {"a": "xxh3:1", "b": "xxh3:2"}
    content = {"weights": weights, "checkpoints": runs, "results": {"a": {}, "b": {}}}
    (tmp_path / "results.json").write_text(json.dumps(content), encoding="utf-8")
    way_out = r"evaluate it first \(.*checkpoint=runs/c\), or leave --metrics out$"
    with refused(words + way_out):
        read_figures(str(tmp_path / "results.json")).of(digest, "runs/c")


def test_of_several_checkpoints_the_one_that_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, other = run_of(tmp_path / "mine"), run_of(tmp_path / "other", seed=1)
    metrics = write_results(tmp_path / "results.json", {"theirs": other, "ours": mine})
    card = exported(mine, tmp_path / "out", metrics)
    assert "| | ours |\n" in card
    assert "theirs" not in card
    rows = [line for line in card.splitlines() if "recall" in line]
    assert rows == [f"| coco: recall@{k} | 0.2000 |" for k in (1, 5, 10)]
    assert "metrics:" not in capsys.readouterr().err
    # an export has the same weights, whatever its format calls them
    assert "| | ours |\n" in exported(tmp_path / "out", tmp_path / "again", metrics)


def test_figures_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = run_of(tmp_path / "mine")
    metrics = write_results(tmp_path / "results.json", {"model": mine}, with_digests=False)
    assert "| coco: recall@1 | 0.1000 |" in exported(mine, tmp_path / "out", metrics)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("metrics:")]
    assert line.endswith(
        "kept no digest of the weights: nobody can tell whether its figures are this model's"
    )


@pytest.mark.parametrize(
    "content", ["{}", "[]", "{", '{"results": {"a": {"b": {"c": "d"}}}}', '{"results": {"a": 1}}']
)
def test_what_is_no_results_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with refused(r"^--metrics .* is no results\.json of evaluate\.py: [^\n]+$"):
        read_figures(str(tmp_path / "results.json"))


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/home/ada/runs/first", "first"),
        ("/home/ada/runs/first/", "first"),
        ("../ada/first/ep1-ba5-rank0.pt", "ep1-ba5-rank0.pt"),
        ("~ada/first", "first"),
        (r"C:\Users\ada\first", "first"),
        ("local-dir:/home/ada/first", "first"),
        ("local-dir:first", "first"),
        ("file:///home/ada/first", "first"),
        ("hf-hub:org/name", "hf-hub:org/name"),
        ("ViT-B-32/openai", "ViT-B-32/openai"),
        ("s3://bucket/runs/first", "s3://bucket/runs/first"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("s3://AKIA:se/cr+et@bucket/runs", "s3://bucket/runs"),
        ("sftp://ada:secret@host:22/runs", "sftp://host:22/runs"),
        ("https://host/first.pt?X-Amz-Signature=secret#top", "https://host/first.pt"),
    ],
)
def test_what_of_a_place_is_published(place: str, shown: str) -> None:
    assert public_place(place) == shown


def test_places_anywhere_in_a_setting() -> None:
    given = {"a": ["/home/ada/x.json", "s3://k:s@b/x"], "b": {"c": "~ada", "d": None}, "n": "adamw"}
    shown = {"a": ["x.json", "s3://b/x"], "b": {"c": "ada", "d": None}, "n": "adamw"}
    assert public(given) == shown


@pytest.mark.parametrize("to", ["open_clip", "huggingface", "release", "composer"])
def test_an_export_names_nothing_of_the_machine(
    tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all its files, the graphs of ONNX too."""
    monkeypatch.setattr("socket.gethostname", lambda: "adalovelace-laptop")
    for variable in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(variable, "adalovelace")
    home = tmp_path / "users" / "adalovelace"
    streams = {
        "here": {"remote": None, "local": str(home / "set")},
        "mounted": {"remote": str(home / "set"), "local": "/tmp/adalovelace"},
        "there": {"remote": "s3://adalovelace:secret@bucket/set", "local": str(home / "cache")},
    }
    recipe = {
        "run_name": "first",
        "pretrained": str(home / "weights" / "start.pt"),
        "algorithms": {"some.Algorithm": {"table": str(home / "table.json")}},
        "data": {"streams": streams},
    }
    run = run_of(home / "run", **recipe)
    metrics = write_results(home / "results.json", {"model": run})
    out = home / "exports" / "first"
    run_export(ExportOptions(str(run), to, str(out), onnx=True, metrics=metrics))
    files = list(out.iterdir())
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        for word in ("adalovelace", str(tmp_path), str(Path(__file__).parent.parent)):
            assert word.encode() not in content, (file.name, word)
    card = (out / "README.md").read_text(encoding="utf-8")
    shown = {"here": "not published", "mounted": "not published", "there": "s3://bucket/set"}
    for name, place in shown.items():
        assert f"| data: {name} | {place} |" in card
    assert "| pretrained | start.pt |" in card
    assert "this model started from start.pt, whose licence" in card
    assert "table.json" in card
    assert "first" in card.split("## Use")[1].split("## Model")[0]
