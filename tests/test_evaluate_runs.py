"""Evaluation end to end from a bucket: inside a sharded run of two processes, and of its
checkpoint afterwards.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from miniatures import make_idx
from miniatures import quick as classification
from runs import PRETRAIN, RECORDING, TINY, jpeg, run, steps, write_config, write_set
from s3 import S3Server
from streaming import MDSWriter

from alignclip.config.metrics import metric_named, metrics_of
from alignclip.evaluation.history import history_beside
from alignclip.evaluation.report import PLOTS

pytestmark = pytest.mark.slow

EVALUATE = PRETRAIN.with_name("evaluate.py")
TASKS = {"fashion": "zero_shot", "probe": "linear_probe"}
FSDP = "parallelism_config.fsdp2.reshard_after_forward=true"


@pytest.mark.world_size(2)
def test_during_a_sharded_run_and_after_it(s3: S3Server, tmp_path: Path) -> None:
    train, test = f"{s3.bucket()}/train", f"{s3.bucket()}/test"
    write_set(train, 64)
    write_set(test, 37, seed=1)  # no multiple of anything
    save_folder = f"{s3.bucket()}/runs/evaluated"
    labelled, root = f"{s3.bucket()}/fashion", s3.bucket()
    for split, prefix, count in (("train", "train", 60), ("test", "t10k", 23)):
        make_idx(tmp_path / "idx", prefix, count, packed=True)
        classification("fashion_mnist", tmp_path / "idx", f"{labelled}/{split}", split=split)
    sentences = [
        f"g\tf\t2012\t{i}\t{i / 2}\t{'red ' * i}\t{'blue ' * (9 - i)}" for i in range(1, 8)
    ]
    body = "\n".join(sentences).encode()
    s3.client.put_object(Bucket=root.removeprefix("s3://"), Key="sts-test.csv", Body=body)
    pairs = f"remote: {test}, local: {tmp_path}/eval-cache, batch_size: 8"
    fashion = f"remote: {labelled}/test, local: {tmp_path}/fashion-cache, batch_size: 8"
    evaluators = f"""
evaluators:
  retrieval: {{task: retrieval, interval: 2ba, {pairs}}}
  gap: {{task: gap, interval: 1ep, {pairs}}}
  fashion: {{task: zero_shot, interval: 1dur, {fashion}}}
  probe:
    {{task: linear_probe, interval: 1dur, {fashion},
      train: {{remote: {labelled}/train, local: {tmp_path}/train-cache}}}}
  sts: {{task: sts, interval: 1dur, remote: {root}/sts-test.csv}}
"""
    config = write_config(tmp_path, train, save_folder, TINY + evaluators)
    settings = ["run_name=evaluated", "max_duration=6ba", "save_interval=6ba", FSDP]
    settings += ["keep_best.metric=retrieval/image_retrieval_recall@10"]
    arguments = [RECORDING, tmp_path / "records", config, *settings]
    output = run(*arguments, processes=2, cwd=tmp_path)
    assert all(r["sharded"] for r in steps(tmp_path / "records"))
    assert re.findall(r"batch (\d+), (\w+): ", output) == [
        ("2", "retrieval"), ("4", "retrieval"), ("4", "gap"), ("6", "retrieval"), ("6", "gap"),
        ("6", "fashion"), ("6", "probe"), ("6", "sts"),
    ]  # fmt: skip
    assert "Traceback" not in output
    names = [key.rpartition("/")[2] for key in s3.keys(save_folder)]
    assert "best-rank0.pt" in names
    yaml = tmp_path / "evaluate.yaml"
    yaml.write_text(f"precision: fp32\ndevice: cpu\n{evaluators}")
    found = {}
    for processes, place in ((1, save_folder), (2, f"{save_folder}/latest-rank0.pt")):
        out = tmp_path / f"evaluation-{processes}"
        arguments = [EVALUATE, yaml, f"checkpoints.last={place}", f"out={out}"]
        printed = run(*arguments, processes=processes, cwd=out)
        found[processes] = json.loads((out / "results.json").read_text())["results"]["last"]
        assert "image_retrieval_recall@10" in printed
        pictures = {path.name for path in out.glob("*.png")}
        assert pictures == {f"{name}.png" for name in PLOTS}, (
            "the curves are of the evaluations in training"
        )
    for evaluator, metrics in found[1].items():
        assert found[2][evaluator] == pytest.approx(metrics, abs=1e-6)
    # the last line of the run's own evaluation is of the same weights
    records = {
        record["evaluator"]: record
        for record in history_beside(save_folder)
        if record["batch"] == 6
    }
    for evaluator, metrics in found[1].items():
        (line,) = re.findall(rf"batch 6, {evaluator}: (.*)", output)
        kept = records[evaluator]["metrics"]
        assert kept.keys() == metrics.keys() == set(metrics_of(TASKS.get(evaluator, evaluator)))
        for name, value in kept.items():
            assert value == pytest.approx(metrics[name], abs=1e-4), (evaluator, name)
        shown = dict(re.findall(r"([\w@]+) [↑↓] (-?[\d.]+)", line))
        assert shown == {name: f"{kept[name]:.4f}" for name in metrics if metric_named(name).watch}


BAD = {  # evaluator -> what it is told
    "missing": "no MDS set at",
    "folder": "no MDS set at",
    "empty": "contains no samples",
    "captionless": "lacks the columns ['caption']",
    "classes": "lie in [0, 3], but there are 3",
    "sts": "there is no ",
}


@pytest.mark.world_size(2)
def test_what_is_bad_is_told_and_the_others_are_evaluated(tmp_path: Path) -> None:
    """On two ranks: none waits for the other where a set can't be opened."""
    write_set(str(tmp_path / "train"), 16)
    write_set(str(tmp_path / "pairs"), 12, seed=1)
    columns = {"key": "str", "image": "bytes", "label": "int"}
    with MDSWriter(out=str(tmp_path / "labelled"), columns=columns) as writer:
        for i in range(8):
            writer.write({"key": f"k{i}", "image": jpeg(np.random.default_rng(i)), "label": i % 4})
    (tmp_path / "labelled" / "classes.json").write_text(
        '{"classnames": ["a", "b", "c"], "templates": ["a {c}"]}'
    )
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "index.json").write_text('{"version": 2, "shards": []}')
    config = write_config(tmp_path, str(tmp_path / "train"), str(tmp_path / "runs"))
    run(
        PRETRAIN, config, "run_name=bad", "max_duration=1ba", "scheduler.t_warmup=0ba", cwd=tmp_path
    )
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    yaml = f"""
precision: fp32
device: cpu
evaluators:
  missing: {{task: zero_shot, local: {tmp_path}/nowhere}}
  folder: {{task: retrieval, local: {tmp_path}}}
  empty: {{task: gap, local: {tmp_path}/nothing}}
  captionless: {{task: retrieval, local: {tmp_path}/labelled}}
  classes: {{task: zero_shot, local: {tmp_path}/labelled}}
  sts: {{task: sts, local: {tmp_path}/sts.csv}}
  good: {{task: retrieval, local: {tmp_path}/pairs, batch_size: 4}}
"""
    (tmp_path / "e.yaml").write_text(yaml)
    arguments = [
        EVALUATE,
        tmp_path / "e.yaml",
        f"checkpoint={tmp_path}/runs",
        f"out={tmp_path}/out",
    ]
    output = run(*arguments, processes=2, cwd=tmp_path, status=1)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["results"]["model"].keys() == {"good"}
    assert found["failed"].keys() == BAD.keys()
    for name, why in found["failed"].items():
        assert BAD[name] in why
        assert "\n" not in why
        assert f"not evaluated: {name}: {why}" in output
    assert "Traceback" not in output
