"""What evaluate.py makes of its results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from alignclip.config import EvaluateConfig
from alignclip.evaluation.command import gap_points, main, table, write, write_results

GAP = {"centroid_distance": 0.5, "alignment_score": 0.25}
RECALL = {f"{side}_retrieval_recall@{k}": k / 100 for side in ("image", "text") for k in (1, 5, 10)}


def test_table_has_a_column_for_each_checkpoint() -> None:
    lines = table({"a": {"coco": {"acc1": 0.5}}, "a longer name": {"coco": {"acc1": 0.25}}}).splitlines()
    assert [line.split() for line in lines] == [["a", "a", "longer", "name"], ["coco"], ["acc1", "0.5000", "0.2500"]]
    assert len({len(line) for line in lines}) == 1


def test_gap_against_step_takes_the_batch_from_the_name() -> None:
    checkpoints = {
        "x": "s3://b/runs/first/ep1-ba200-rank0.pt",
        "y": "runs/first/latest-rank0.pt",
        "z": "ep0-ba7-rank0.pt",
    }
    results = {name: {"coco": GAP, "cifar10": {"acc1": 0.5}} for name in checkpoints}
    assert list(gap_points(checkpoints, results)) == [("first · coco", 200, GAP), ("run · coco", 7, GAP)]


def test_runs_of_one_name_in_two_places_are_two_lines() -> None:
    checkpoints = {"x": "s3://a/runs/first/ep1-ba20-rank0.pt", "y": "s3://b/runs/first/ep1-ba30-rank0.pt"}
    found = list(gap_points(checkpoints, {name: {"gap": GAP} for name in checkpoints}))
    assert [run for run, _, _ in found] == ["s3://a/runs/first · gap", "s3://b/runs/first · gap"]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    config = EvaluateConfig(checkpoint="x", out=str(tmp_path))
    write_results(config, {"model": {"sts": {"spearman": math.nan}, "gap": {"rmg": 0.5}}}, {}, complete=False)
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert content["results"]["model"] == {"sts": {"spearman": None}, "gap": {"rmg": 0.5}}
    assert content["complete"] is False


def test_everything_is_written_and_a_plot_that_fails_takes_nothing_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {f"ba{batch}": f"runs/first/ep0-ba{batch}-rank0.pt" for batch in (10, 20)}
    results = {name: {"gap": GAP, "coco": RECALL} for name in places}
    features = torch.randn(2, 30, 8)
    config = EvaluateConfig(checkpoints=places, out=str(tmp_path / "out"))
    write(config, results, dict.fromkeys(places, (features[0], features[1])), {"cars": "no MDS set"})
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"results.json", "cosines.png", "embeddings.png", "spectra.png", "recall.png", "gap.png"}
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (content["results"], content["failed"]) == (results, {"cars": "no MDS set"})
    config.out = str(tmp_path / "nan")
    write(config, results, dict.fromkeys(places, (features[0] * torch.nan, features[1])), {})
    assert {path.name for path in (tmp_path / "nan").iterdir()} == {"results.json", "recall.png", "gap.png"}
    assert "cosines.png could not be drawn" in capsys.readouterr().out


def test_a_missing_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.yaml").write_text("evaluators: {a: {task: gap, local: x}}\ndevice: cpu\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "e.yaml"), f"checkpoint={tmp_path / 'nowhere.pt'}"])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "nowhere.pt" in said
