"""What evaluate.py makes of its results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from alignclip.config.schema import EvaluateConfig, EvaluatorConfig
from alignclip.errors import UserError
from alignclip.evaluation.command import _told, finish, gap_curves, main
from alignclip.evaluation.history import (
    EvaluationRecords,
    Record,
    first_before,
    history_beside,
    records_in,
    run_folder,
)
from alignclip.evaluation.report import Report, table

GAP = {
    "centroid_distance": 0.05, "alignment_score": 0.955, "wrong_pairs_cosine": 0.95, "margin": 0.005,
    "effective_rank_image": 1.3, "effective_rank_text": 2.4,
}  # fmt: skip
RECALL = {
    f"{side}_retrieval_recall@{k}": k / 1000 for side in ("image", "text") for k in (1, 5, 10)
}
CHANCE = {name: value / 2 for name, value in RECALL.items()}


def report(
    out: Path, checkpoints: dict[str, str], evaluators: tuple[str, ...] = ("gap",), **more: Any
) -> Report:
    """A comparison whose weights are called as their places are."""
    tasks = {name: EvaluatorConfig(task="gap", local=f"sets/{name}") for name in evaluators}
    weights = more.pop("weights", {name: f"xxh3:{place}" for name, place in checkpoints.items()})
    return Report(
        EvaluateConfig(checkpoints=checkpoints, evaluators=tasks, out=str(out), **more), weights
    )


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (out / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    return found


def test_table_has_a_column_for_each_checkpoint_and_says_which_way_is_up(tmp_path: Path) -> None:
    both = report(tmp_path, {"a": "x", "a longer name": "y"})
    both.add("a", "coco", {"acc1": 0.5, "fpr95": 0.1, "C": 1.0}, {"acc1": 0.1})
    both.add("a longer name", "coco", {"acc1": 0.25, "fpr95": math.nan, "C": 1.0}, {"acc1": 0.1})
    lines = table(both).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["a", "a", "longer", "name", "chance"], ["coco"], ["↑", "acc1", "0.5000", "0.2500", "0.1000"],
        ["↓", "fpr95", "0.1000", "nan"], ["C", "1.0000", "1.0000"],
    ]  # fmt: skip
    assert "* the numbers to watch" in lines[6]


def test_table_ends_in_a_verdict_that_calls_a_collapse_a_collapse(tmp_path: Path) -> None:
    one = report(tmp_path, {"model": "x"})
    one.add("model", "gap", GAP | RECALL, CHANCE)
    text = table(one)
    assert any(line.split()[:4] == ["*", "↑", "margin", "0.0050"] for line in text.splitlines())
    assert (
        "gap: COLLAPSED: the gap is closed (0.05), but retrieval is near chance (mean R@5 0.005, 2.0 × chance)"
        in text
    )
    found = content(tmp_path)
    verdict = found["verdicts"]["model"]["gap"]
    assert verdict["collapsed"]
    assert not verdict["success"]
    assert verdict["text"].startswith("COLLAPSED")
    assert found["better"]["margin"] == "higher"
    assert found["better"]["centroid_distance"] == "lower"
    assert found["chance"] == {"gap": CHANCE}


def test_the_verdict_is_against_the_first_evaluation_of_the_run(tmp_path: Path) -> None:
    history = EvaluationRecords(None)
    first = history.add(10, "gap", GAP | {"centroid_distance": 1.1, "margin": 0.0} | CHANCE, CHANCE)
    config = EvaluateConfig(
        checkpoint="x", evaluators={"gap": EvaluatorConfig(task="gap")}, out=str(tmp_path)
    )
    good = GAP | {"margin": 0.9, "effective_rank_image": 9.0, "effective_rank_text": 9.0}
    good |= dict.fromkeys(RECALL, 0.5)
    for chance, words in (
        (
            CHANCE,
            "the gap closed (from 1.10 at batch 10 to 0.05), and retrieval rose (mean R@5 0.500, 200.0 × chance, 0.003",
        ),
        (
            RECALL,
            "the gap is closed (0.05), and retrieval works",
        ),  # the first evaluation was of another set
    ):
        one = Report(config, {"model": "w"}, {"model": {"gap": first}})
        one.add("model", "gap", good, chance)
        verdict = one.verdicts()["model"]["gap"]
        assert verdict.text.startswith(words)
        assert verdict.success


def test_curves_are_of_runs_and_of_checkpoints_whose_names_tell_the_batch(tmp_path: Path) -> None:
    checkpoints = {
        "x": "s3:/b/runs/first/ep1-ba200-rank0.pt",
        "y": "runs/first/latest-rank0.pt",
        "z": "ep0-ba7-rank0.pt",
    }
    one = report(tmp_path, checkpoints)
    for name in checkpoints:
        one.add(name, "coco", GAP, {})
        one.add(name, "cifar10", {"acc1": 0.5}, {})
    curves = gap_curves(one)
    assert {name: [point.batch for point in points] for name, points in curves.items()} == {
        "x (first) · coco": [200], "y · coco": [None], "z (.) · coco": [7],
    }  # fmt: skip


def test_runs_of_one_name_in_two_places_are_two_curves(tmp_path: Path) -> None:
    one = report(
        tmp_path, {"x": "a/runs/first/ep1-ba20-rank0.pt", "y": "b/runs/first/ep1-ba30-rank0.pt"}
    )
    for name in ("x", "y"):
        one.add(name, "gap", GAP, {})
    assert gap_curves(one).keys() == {"x (a/runs/first) · gap", "y (b/runs/first) · gap"}


def keep_history(run: Path, batches: Sequence[int]) -> list[Record]:
    """A run's record of its evaluations, as training writes it."""
    run.mkdir(parents=True)
    history = EvaluationRecords(None)
    for batch in batches:
        history.add(batch, "gap", GAP | CHANCE, CHANCE)
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in history.records)
    (run / "evaluations.jsonl").write_text(text, encoding="utf-8")
    return history.records


def test_of_two_checkpoints_one_of_which_was_not_evaluated_in_training_both_are_drawn(
    tmp_path: Path,
) -> None:
    keep_history(tmp_path / "second", (5, 10))
    checkpoints = {
        "clip": f"{tmp_path}/first",
        "alignclip": f"{tmp_path}/second",
        "openai": "hf-hub:openai/clip",
    }
    one = report(tmp_path / "out", checkpoints)
    one.batches = {"clip": 30, "alignclip": 10, "openai": None}
    for name in checkpoints:
        one.add(name, "gap", GAP, CHANCE)
    curves = gap_curves(one)
    assert {name: [point.batch for point in points] for name, points in curves.items()} == {
        "clip (first) · gap": [30], "alignclip (second) · gap": [5, 10], "openai · gap": [None],
    }  # fmt: skip
    assert next(iter(curves)) == "clip (first) · gap", (
        "in the order, and so in the colours, of the other plots"
    )
    finish(one, {})
    assert (tmp_path / "out" / "gap.png").exists()


def test_an_evaluator_of_one_name_on_another_set_is_another_curve(tmp_path: Path) -> None:
    keep_history(tmp_path / "run", (5, 10))
    one = report(tmp_path / "out", {"model": f"{tmp_path}/run"})
    one.batches = {"model": 10}
    one.add("model", "gap", GAP, RECALL)
    assert {name: [point.batch for point in points] for name, points in gap_curves(one).items()} == {
        "gap": [5, 10], "gap on another set (2)": [10],
    }  # fmt: skip


@pytest.mark.parametrize(("batch", "first"), [(10, 5), (6, 5), (5, None), (3, None), (None, None)])
def test_a_checkpoint_is_compared_with_an_earlier_evaluation_alone(
    tmp_path: Path, batch: int | None, first: int | None
) -> None:
    records = keep_history(tmp_path / "run", (5, 10))
    found = first_before(records, batch)
    assert [record["batch"] for record in found.values()] == ([] if first is None else [first])
    config = EvaluateConfig(checkpoint=str(tmp_path / "run" / "best"), out=str(tmp_path))
    one = Report(config, {"model": "w"}, {"model": found})
    one.add("model", "gap", GAP | RECALL, CHANCE)
    text = one.verdicts()["model"]["gap"].text
    assert ("at batch 5" in text) == (first is not None)


def test_training_compares_with_an_earlier_evaluation_alone() -> None:
    history = EvaluationRecords(None)
    records = [history.add(batch, "gap", GAP | RECALL, CHANCE) for batch in (5, 5, 10)]
    assert ["at batch 5" in str(record["verdict"]) for record in records] == [False, False, True]


def test_what_is_particular_about_a_set_is_said_below_the_table_and_kept(tmp_path: Path) -> None:
    both = ("sts", "coco")
    one = report(tmp_path, {"model": "x"}, both)
    one.add("model", "sts", {"spearman": 0.5}, {"spearman": 0.0}, "1,500 sentence pairs")
    one.add("model", "coco", {"acc1": 0.5}, {})
    assert table(one).splitlines()[-1] == "sts: 1,500 sentence pairs"
    assert content(tmp_path)["notes"] == {"sts": "1,500 sentence pairs"}
    again = report(tmp_path, {"model": "x"}, ("coco",))
    again.add("model", "coco", {"acc1": 0.5}, {})
    assert content(tmp_path)["notes"] == {"sts": "1,500 sentence pairs"}, (
        "with the figures that are kept"
    )
    other = report(tmp_path, {"model": "x"}, both)
    other.add("model", "sts", {"spearman": 0.5}, {"spearman": 0.0})
    assert content(tmp_path)["notes"] == {}


def test_evaluations_made_in_training_are_in_the_plot(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    history = EvaluationRecords(None)
    for batch in (10, 20, 30):
        history.add(batch, "gap", GAP | {"rmg": math.nan}, CHANCE)
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in history.records)
    (run / "evaluations.jsonl").write_text(text + '{"batch": 4', encoding="utf-8")
    for place in (run, run / "latest-rank0.pt", run / "best", run / "ep0-ba30", f"{run}/"):
        assert run_folder(str(place)) == str(run)
        assert history_beside(str(place)) == history.records
    assert history_beside(str(tmp_path)) == []
    assert records_in("3\n[]\nnull\n") == []
    one = report(tmp_path / "out", {"model": str(run)})
    one.add("model", "gap", GAP, CHANCE)
    finish(one, {})
    assert [point.batch for point in gap_curves(one)["gap"]] == [10, 20, 30]
    assert (tmp_path / "out" / "gap.png").exists()


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    one = report(tmp_path, {"model": "x"}, ("sts", "gap"))
    one.add("model", "sts", {"spearman": math.nan}, {"spearman": 0.0})
    one.add("model", "gap", {"rmg": 0.5}, {})
    found = content(tmp_path)
    assert found["results"]["model"] == {"sts": {"spearman": None}, "gap": {"rmg": 0.5}}
    assert (
        found["verdicts"]["model"]["sts"]["text"]
        == "COLLAPSED: all sentence pairs are equally similar"
    )
    assert found["complete"] is False


def test_everything_is_written_and_a_plot_that_fails_takes_nothing_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {f"ba{batch}": f"runs/first/ep0-ba{batch}-rank0.pt" for batch in (10, 20)}
    features = torch.randn(2, 30, 8)
    plots = {"recall.png", "gap.png", "classes.png"}
    for out, factor in (("out", 1.0), ("nan", math.nan)):
        one = report(tmp_path / out, places)
        for name in places:
            one.add(name, "gap", GAP, {})
            one.add(name, "coco", RECALL, CHANCE)
            one.add(name, "cifar10", {"mean_per_class_recall": 0.5}, {})
        one.failed["cars"] = "no MDS set"
        finish(one, dict.fromkeys(places, (features[0] * factor, features[1])))
        written = {path.name for path in (tmp_path / out).iterdir()} - {"results.json"}
        assert written == (
            plots | {"cosines.png", "embeddings.png", "spectra.png"} if out == "out" else plots
        )
        found = content(tmp_path / out)
        assert (found["results"], found["failed"]) == (one.results, {"cars": "no MDS set"})
        assert found["complete"] is True
    assert "cosines.png could not be drawn" in capsys.readouterr().out


# --- a folder that holds an earlier evaluation ------------------------------------------------------------------


def test_the_same_comparison_is_added_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = report(tmp_path, {"a": "x", "b": "y"}, ("coco", "cifar10"))
    for name in ("a", "b"):
        first.add(name, "coco", {"rmg": 0.1}, {"rmg": 0.5})
        first.add(name, "cifar10", {"acc1": 0.1}, {"acc1": 0.01})
    capsys.readouterr()
    (tmp_path / "recall.png").write_bytes(b"of the same weights")
    second = report(tmp_path, {"a": "x", "b": "y"}, ("cifar10", "flickr"))
    second.add("a", "flickr", {"rmg": 0.2}, {})
    second.add("a", "cifar10", {"acc1": 0.3}, {"acc1": 0.01})
    assert (
        capsys.readouterr().out
        == f"{tmp_path} holds results of the same weights: coco kept, cifar10 measured again\n"
    )
    found = content(tmp_path)
    assert found["results"] == {
        "a": {"coco": {"rmg": 0.1}, "cifar10": {"acc1": 0.3}, "flickr": {"rmg": 0.2}},
        "b": {"coco": {"rmg": 0.1}, "cifar10": {"acc1": 0.1}},
    }
    assert found["chance"]["coco"] == {"rmg": 0.5}
    assert found["evaluators"].keys() == {"coco", "cifar10", "flickr"}
    assert (tmp_path / "recall.png").exists()
    assert not list(tmp_path.glob("earlier-*"))


@pytest.mark.parametrize(
    ("now", "why"),
    [
        ({"weights": {"a": "xxh3:trained on"}}, "of other weights"),
        ({"checkpoints": {"b": "x"}}, "of a"),
        ({"precision": "fp32"}, "in amp_bf16"),
        ({"evaluators": ("other",)}, ""),
    ],
)
def test_results_of_another_comparison_are_kept_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], now: dict[str, Any], why: str
) -> None:
    report(tmp_path, {"a": "x"}).add("a", "gap", {"rmg": 0.1}, {})
    (tmp_path / "gap.png").write_bytes(b"theirs")
    (tmp_path / "mine.txt").write_bytes(b"a person's")
    before = content(tmp_path)
    capsys.readouterr()
    one = report(tmp_path, **({"checkpoints": {"a": "x"}} | now))
    assert content(tmp_path) == before, "nothing is touched before there are results"
    one.add(next(iter(one.weights)), "gap", {"rmg": 0.2}, {})
    said = capsys.readouterr().out
    if not why:  # another evaluator of the same weights is added
        assert not list(tmp_path.glob("earlier-*"))
        return
    earlier = tmp_path / "earlier-1"
    assert (
        said
        == f"{tmp_path} held the results of another comparison ({why}): they are in {earlier} now\n"
    )
    assert content(earlier) == before
    assert (earlier / "gap.png").read_bytes() == b"theirs"
    assert not (tmp_path / "gap.png").exists()
    assert (tmp_path / "mine.txt").exists()
    assert content(tmp_path)["results"] == {next(iter(one.weights)): {"gap": {"rmg": 0.2}}}


def test_an_evaluator_of_one_name_on_another_set_is_another_comparison(tmp_path: Path) -> None:
    report(tmp_path, {"a": "x"}).add("a", "gap", {"rmg": 0.1}, {})
    config = EvaluateConfig(checkpoints={"a": "x"}, out=str(tmp_path))
    config.evaluators = {"gap": EvaluatorConfig(task="gap", remote="s3://b/other", local="cache")}
    Report(config, {"a": "xxh3:x"}).add("a", "gap", {"rmg": 0.2}, {})
    assert content(tmp_path / "earlier-1")["results"] == {"a": {"gap": {"rmg": 0.1}}}
    # where a remote set is cached makes no difference
    config.evaluators = {
        "gap": EvaluatorConfig(task="gap", remote="s3://b/other", local="elsewhere")
    }
    Report(config, {"a": "xxh3:x"}).add("a", "gap", {"rmg": 0.3}, {})
    assert not (tmp_path / "earlier-2").exists()


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"results": {"model": {}}}'])
def test_what_an_earlier_version_or_a_person_left_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    (tmp_path / "earlier-1").mkdir()
    report(tmp_path, {"a": "x"}).add("a", "gap", {"rmg": 0.1}, {})
    assert (tmp_path / "earlier-2" / "results.json").read_text(encoding="utf-8") == text


def test_a_missing_checkpoint_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text("evaluators: {a: {task: gap, local: x}}\ndevice: cpu\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "e.yaml"), f"checkpoint={tmp_path / 'nowhere.pt'}"])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "nowhere.pt" in said


def test_the_figures_of_a_column_have_one_format_and_the_file_has_all_digits(
    tmp_path: Path,
) -> None:
    metrics = {
        "margin": 0.000264131,
        "alignment_std": 0.0013,
        "rmg": -0.000264131,
        "acc1": 0.0,
        "C": 1e-6,
        "aupr": 0.5,
    }
    one = report(tmp_path, {"a": "x"})
    one.add("a", "coco", metrics, {})
    shown = dict(line.split()[-2:] for line in table(one).splitlines()[2:8])
    assert shown == {
        "margin": "0.0003", "alignment_std": "0.0013", "rmg": "-0.0003", "acc1": "0.0000", "C": "1e-06",
        "aupr": "0.5000",
    }  # fmt: skip
    assert content(tmp_path)["results"]["a"]["coco"] == metrics


def test_an_evaluator_that_cannot_be_run_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    failed: dict[str, str] = {}
    with _told(failed, "d"):
        raise UserError("evaluators.d: the image of sample 3 has no caption")
    assert failed == {"d": "the image of sample 3 has no caption"}
    assert capsys.readouterr().err == f"error: d: {failed['d']}; without it: evaluators.d=null\n"
