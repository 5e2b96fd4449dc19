"""What evaluate.py makes of its results."""

from __future__ import annotations

import json
import math
import weakref
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import small_config

from alignclip.config.schema import EvaluateConfig, EvaluatorConfig
from alignclip.device import autocast_dtype, choose_device
from alignclip.errors import UserError
from alignclip.evaluation import comparison, plots
from alignclip.evaluation.command import main
from alignclip.evaluation.comparison import _without_failing, finish, read_checkpoints
from alignclip.evaluation.curves import gap_curves
from alignclip.evaluation.history import (
    EvaluationRecord,
    EvaluationRecords,
    history_beside,
    records_in,
    run_folder,
)
from alignclip.evaluation.json_lines import text_of
from alignclip.evaluation.report import PLOTS, Compared, ComparisonReport, table
from alignclip.evaluation.tasks import clustering
from alignclip.model.encoders import build_encoders
from alignclip.weights.digest import weights_digest

GAP = {
    "centroid_distance": 0.05, "alignment_score": 0.955, "wrong_pairs_cosine": 0.95,
    "margin": 0.005, "effective_rank_image": 1.3, "effective_rank_text": 2.4,
}  # fmt: skip
RECALL = {
    f"{side}_retrieval_recall@{k}": k / 1000 for side in ("image", "text") for k in (1, 5, 10)
}
CHANCE = {name: value / 2 for name, value in RECALL.items()}
GOOD = GAP | {"margin": 0.9, "effective_rank_image": 9.0, "effective_rank_text": 9.0}
GOOD |= dict.fromkeys(RECALL, 0.5)


def report(
    out: Path,
    checkpoints: dict[str, str],
    evaluators: tuple[str, ...] | dict[str, EvaluatorConfig] = ("gap",),
    batches: tuple[int | None, ...] = (),
    **more: Any,
) -> ComparisonReport:
    """A comparison whose weights are called as their places are, of what is in their folders."""
    if not isinstance(evaluators, dict):
        evaluators = {
            name: EvaluatorConfig(task="gap", local=f"sets/{name}") for name in evaluators
        }
    weights = more.pop("weights", {})
    compared = {
        name: Compared(place, weights.get(name, f"xxh3:{place}"), batch, history_beside(place))
        for (name, place), batch in zip_longest(checkpoints.items(), batches)
    }
    return ComparisonReport(
        EvaluateConfig(checkpoints=checkpoints, evaluators=evaluators, out=str(out), **more),
        compared,
    )


def content(out: Path) -> dict[str, Any]:
    text = (out / "results.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    return found


def keep_history(
    run: Path, *batches: int, more: str = "", figures: dict[str, float] = GAP | CHANCE
) -> list[EvaluationRecord]:
    """A run's record of its evaluations, as training writes it."""
    run.mkdir(parents=True)
    history = EvaluationRecords(None)
    for batch in batches:
        history.add(batch, "gap", figures | {"rmg": math.nan}, CHANCE)
    (run / "evaluations.jsonl").write_text(text_of(history.records) + more, encoding="utf-8")
    return history.records


def batches_of(one: ComparisonReport) -> dict[str, list[int | None]]:
    return {name: [point.batch for point in points] for name, points in gap_curves(one).items()}


# --- the table and results.json -------------------------------------------------------------------


def test_table_has_a_column_for_each_checkpoint_and_says_which_way_is_up(tmp_path: Path) -> None:
    both = report(tmp_path, {"a": "x", "a longer name": "y"})
    both.add("a", "coco", {"acc1": 0.5, "fpr95": 0.1, "C": 1.0}, {"acc1": 0.1})
    both.add("a longer name", "coco", {"acc1": 0.25, "fpr95": math.nan, "C": 1.0}, {"acc1": 0.1})
    lines = table(both).splitlines()
    assert [line.split() for line in lines[:5]] == [
        ["a", "a", "longer", "name", "chance"], ["coco"],
        ["↑", "acc1", "0.5000", "0.2500", "0.1000"], ["↓", "fpr95", "0.1000", "nan"],
        ["C", "1.0000", "1.0000"],
    ]  # fmt: skip
    assert "* the numbers to watch" in lines[6]


def test_the_figures_of_a_column_have_one_format_and_the_file_has_all_digits(
    tmp_path: Path,
) -> None:
    shown = {
        "margin": (0.000264131, "0.0003"), "alignment_std": (0.0013, "0.0013"),
        "acc1": (0.0, "0.0000"), "rmg": (-0.000264131, "-0.0003"), "C": (1e-6, "1e-06"),
        "aupr": (0.5, "0.5000"),
    }  # fmt: skip
    one = report(tmp_path, {"a": "x"})
    one.add("a", "coco", {name: value for name, (value, _) in shown.items()}, {})
    found = dict(line.split()[-2:] for line in table(one).splitlines()[2:8])
    assert found == {name: text for name, (_, text) in shown.items()}
    one.add("a", "sts", {"spearman": math.nan}, {"spearman": 0.0})  # no number is null
    results = content(tmp_path)["results"]["a"]
    assert results["coco"] == {name: value for name, (value, _) in shown.items()}
    assert results["sts"] == {"spearman": None}


def test_table_ends_in_a_verdict_that_calls_a_collapse_a_collapse(tmp_path: Path) -> None:
    one = report(tmp_path, {"model": "x"})
    one.add("model", "gap", GAP | RECALL, CHANCE)
    text = table(one)
    assert any(line.split()[:4] == ["*", "↑", "margin", "0.0050"] for line in text.splitlines())
    assert (
        "gap: COLLAPSED: the gap is closed (0.05), but retrieval is near chance (mean R@5 0.005, "
        "2.0 × chance)" in text
    )
    found = content(tmp_path)
    verdict = found["verdicts"]["model"]["gap"]
    assert (verdict["collapsed"], verdict["success"]) == (True, False)
    assert verdict["text"].startswith("COLLAPSED")
    assert found["better"]["margin"] == "higher"
    assert found["better"]["centroid_distance"] == "lower"
    assert found["chance"] == {"gap": CHANCE}
    assert found["complete"] is False


@pytest.mark.parametrize(
    ("chance", "words"),
    [
        (
            CHANCE,
            "the gap closed (from 1.10 at batch 10 to 0.05), and retrieval rose (mean R@5 0.500, "
            "200.0 × chance, 0.003",
        ),
        # the first evaluation was of another set
        (RECALL, "the gap is closed (0.05), and retrieval works"),
    ],
)
def test_the_verdict_is_against_the_first_evaluation_of_the_run(
    tmp_path: Path, chance: dict[str, float], words: str
) -> None:
    before = GAP | {"centroid_distance": 1.1, "margin": 0.0} | CHANCE
    keep_history(tmp_path / "run", 10, figures=before)
    one = report(tmp_path, {"model": f"{tmp_path}/run"}, batches=(20,))
    one.add("model", "gap", GOOD, chance)
    verdict = one.verdicts()["model"]["gap"]
    assert verdict.text.startswith(words)
    assert verdict.success


@pytest.mark.parametrize(("batch", "first"), [(10, 5), (6, 5), (5, None), (3, None), (None, None)])
def test_a_checkpoint_is_compared_with_an_earlier_evaluation_alone(
    tmp_path: Path, batch: int | None, first: int | None
) -> None:
    keep_history(tmp_path / "run", 5, 10)
    one = report(tmp_path, {"model": f"{tmp_path}/run/best"}, batches=(batch,))
    one.add("model", "gap", GAP | RECALL, CHANCE)
    assert ("at batch 5" in one.verdicts()["model"]["gap"].text) == (first is not None)


def test_training_compares_with_an_earlier_evaluation_alone() -> None:
    history = EvaluationRecords(None)
    records = [history.add(batch, "gap", GAP | RECALL, CHANCE) for batch in (5, 5, 10)]
    assert ["at batch 5" in str(record["verdict"]) for record in records] == [False, False, True]


def test_what_is_particular_about_a_set_is_said_below_the_table_and_kept(tmp_path: Path) -> None:
    note = "1,500 sentence pairs"

    def evaluate(note: str | None, *evaluators: str) -> ComparisonReport:
        one = report(tmp_path, {"model": "x"}, evaluators)
        if "sts" in evaluators:
            one.add("model", "sts", {"spearman": 0.5}, {"spearman": 0.0}, note)
        if "coco" in evaluators:
            one.add("model", "coco", {"acc1": 0.5}, {})
        return one

    assert table(evaluate(note, "sts", "coco")).splitlines()[-1] == f"sts: {note}"
    evaluate(None, "coco")
    assert content(tmp_path)["notes"] == {"sts": note}, "with the figures that are kept"
    evaluate(None, "sts", "coco")
    assert content(tmp_path)["notes"] == {}


# --- curves and plots -----------------------------------------------------------------------------


def test_curves_are_of_runs_and_of_checkpoints_whose_batch_is_known(tmp_path: Path) -> None:
    places = {
        "x": "s3:/b/runs/first/ep1-ba200-rank0.pt",
        "y": "runs/first/latest-rank0.pt",
        "z": "ep0-ba7-rank0.pt",
    }
    one = report(tmp_path, places, batches=(200, None, 7))
    for name in places:
        one.add(name, "coco", GAP, {})
        one.add(name, "cifar10", {"acc1": 0.5}, {})
    assert batches_of(one) == {"x (first) · coco": [200], "y · coco": [None], "z (.) · coco": [7]}
    # runs of one name in two places are two curves
    of_one_name = {name: f"{name}/runs/first/latest-rank0.pt" for name in ("a", "b")}
    two = report(tmp_path, of_one_name, batches=(20, 20))
    for name in ("a", "b"):
        two.add(name, "gap", GAP, {})
    assert gap_curves(two).keys() == {"a (a/runs/first) · gap", "b (b/runs/first) · gap"}


def test_of_checkpoints_some_of_which_were_not_evaluated_in_training_all_are_drawn(
    tmp_path: Path,
) -> None:
    keep_history(tmp_path / "second", 5, 10)
    places = {
        "clip": f"{tmp_path}/first",
        "alignclip": f"{tmp_path}/second",
        "openai": "hf-hub:a/b",
    }
    one = report(tmp_path / "out", places, batches=(30, 10, None))
    for name in places:
        one.add(name, "gap", GAP, CHANCE)
    # in the order, and so in the colours, of the other plots
    assert list(batches_of(one).items()) == [
        ("clip (first) · gap", [30]), ("alignclip (second) · gap", [5, 10]),
        ("openai · gap", [None]),
    ]  # fmt: skip
    finish(one, {})
    assert (tmp_path / "out" / "gap.png").exists()


def test_an_evaluator_of_one_name_on_another_set_is_another_curve(tmp_path: Path) -> None:
    keep_history(tmp_path / "run", 5, 10)
    one = report(tmp_path / "out", {"model": f"{tmp_path}/run"}, batches=(10,))
    one.add("model", "gap", GAP, RECALL)
    assert batches_of(one) == {"gap": [5, 10], "gap on another set (2)": [10]}


def test_evaluations_made_in_training_are_in_the_plot(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    records = keep_history(run, 10, 20, 30, more='{"batch": 4')
    for place in (run, run / "latest-rank0.pt", run / "best", run / "ep0-ba30", f"{run}/"):
        assert run_folder(str(place)) == str(run)
        assert history_beside(str(place)) == records
    assert history_beside(str(tmp_path)) == []
    assert records_in("3\n[]\nnull\n") == []
    one = report(tmp_path / "out", {"model": str(run)})
    one.add("model", "gap", GAP, CHANCE)
    finish(one, {})
    assert batches_of(one) == {"gap": [10, 20, 30]}
    assert (tmp_path / "out" / "gap.png").exists()


@pytest.mark.parametrize("drawn", [True, False])
def test_everything_is_written_and_a_plot_that_fails_takes_nothing_with_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    drawn: bool,
) -> None:
    def full(*_: Any) -> None:
        raise UserError("the disk is full")

    places = {f"ba{batch}": f"runs/first/ep0-ba{batch}-rank0.pt" for batch in (10, 20)}
    pairs = dict.fromkeys(places, tuple(torch.randn(2, 30, 8)))
    one = report(tmp_path, places, batches=(10, 20))
    for name in places:
        one.add(name, "gap", GAP, {})
        one.add(name, "coco", RECALL, CHANCE)
        one.add(name, "cifar10", {"mean_per_class_recall": 0.5}, {})
    one.failed["cars"] = "no MDS set"
    if not drawn:
        monkeypatch.setattr(plots, "cosine_histograms", full)
    finish(one, pairs)
    written = {path.name for path in tmp_path.iterdir()} - {"results.json"}
    pictures = {f"{name}.png" for name in PLOTS}
    assert written == (pictures if drawn else pictures - {"cosines.png"})
    found = content(tmp_path)
    assert (found["results"], found["failed"]) == (one.results, {"cars": "no MDS set"})
    assert found["complete"] is True
    said = capsys.readouterr().out
    assert ("cosines.png could not be drawn: the disk is full" in said) != drawn
    assert "not evaluated: cars: no MDS set" in said


# --- a folder that holds an earlier evaluation ----------------------------------------------------


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
    said = f"{tmp_path} holds results of the same weights: coco kept, cifar10 measured again\n"
    assert capsys.readouterr().out == said
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
    (name,) = one.checkpoints
    one.add(name, "gap", {"rmg": 0.2}, {})
    said = capsys.readouterr().out
    earlier = tmp_path / "earlier-1"
    assert earlier.exists() == bool(why), "another evaluator of the same weights is added"
    if why:
        held = f"{tmp_path} held the results of another comparison ({why})"
        assert said == f"{held}: they are in {earlier} now\n"
        assert content(earlier) == before
        assert (earlier / "gap.png").read_bytes() == b"theirs"
        assert not (tmp_path / "gap.png").exists()
        assert (tmp_path / "mine.txt").exists()
        assert content(tmp_path)["results"] == {name: {"gap": {"rmg": 0.2}}}


def test_an_evaluator_of_one_name_on_another_set_is_another_comparison(tmp_path: Path) -> None:
    report(tmp_path, {"a": "x"}).add("a", "gap", {"rmg": 0.1}, {})
    # where a remote set is cached makes no difference
    for cache in ("cache", "elsewhere"):
        of_a_bucket = {"gap": EvaluatorConfig(task="gap", remote="s3://b/c", local=cache)}
        again = report(tmp_path, {"a": "x"}, evaluators=of_a_bucket)
        again.add("a", "gap", {"rmg": 0.2}, {})
    assert content(tmp_path / "earlier-1")["results"] == {"a": {"gap": {"rmg": 0.1}}}
    assert not (tmp_path / "earlier-2").exists()


def test_settings_of_a_task_are_in_the_results(tmp_path: Path) -> None:
    def entries(**settings: int) -> dict[str, Any]:
        one = EvaluatorConfig(
            task="clustering", local="x", settings=clustering.Settings(**settings)
        )
        again = report(tmp_path, {"a": "x"}, evaluators={"clusters": one})
        again.add("a", "clusters", {"ari": 0.2}, {})
        found: dict[str, Any] = content(tmp_path)["evaluators"]
        return found

    ours = {"task": "clustering", "remote": None, "local": "x", "split": None}
    settings = {"n_init": 3, "random_state": 0}
    assert entries(n_init=3) == {"clusters": ours | settings}
    # earlier versions did not write the settings: the folder is of the same comparison
    old = content(tmp_path) | {"evaluators": {"clusters": ours}}
    (tmp_path / "results.json").write_text(json.dumps(old), encoding="utf-8")
    assert entries(n_init=3) == {"clusters": ours | settings}
    assert not (tmp_path / "earlier-1").exists()


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"results": {"model": {}}}'])
def test_what_an_earlier_version_or_a_person_left_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    (tmp_path / "earlier-1").mkdir()
    report(tmp_path, {"a": "x"}).add("a", "gap", {"rmg": 0.1}, {})
    assert (tmp_path / "earlier-2" / "results.json").read_text(encoding="utf-8") == text


# --- checkpoints and evaluators that can't be used ------------------------------------------------


def test_each_checkpoint_is_read_once_and_its_memory_is_free_after_its_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run may write over its latest checkpoint while others are evaluated."""
    read: list[str] = []
    alive: set[str] = set()

    def open_encoders(place: str) -> Any:
        read.append(place)
        model = build_encoders(small_config())
        alive.add(place)
        weakref.finalize(model, alive.discard, place)
        return SimpleNamespace(model=model, batch=int(place))

    monkeypatch.setattr(comparison, "open_encoders", open_encoders)
    models, compared = read_checkpoints({"a": "1", "b": "2"})
    assert [one.batch for one in compared.values()] == [1, 2]
    assert len({one.digest for one in compared.values()}) == 2
    assert all(weights_digest(models[name]) == compared[name].digest for name in models)
    for name, others in (("a", {"2"}), ("b", set())):
        del models[name]
        assert alive == others
    assert read == ["1", "2"]


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


def test_an_evaluator_that_cannot_be_run_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    failed: dict[str, str] = {}
    with _without_failing(failed, "d"):
        raise UserError("evaluators.d: the image of sample 3 has no caption")
    assert failed == {"d": "the image of sample 3 has no caption"}
    assert capsys.readouterr().err == f"error: d: {failed['d']}; without it: evaluators.d=null\n"


def test_devices_and_precisions_have_the_names_of_the_yaml() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name, there in (
        ("gpu", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    ):
        if not there:
            with pytest.raises(UserError, match=f"device={name}: there is none on this machine"):
                choose_device(name)
    assert autocast_dtype("amp_bf16") == torch.bfloat16
    assert autocast_dtype("fp32") is None
