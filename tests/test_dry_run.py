"""``--dry-run``: the run is checked and described, and nothing of it is left."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import PRETRAIN, run, write_config, write_set
from s3 import S3Server
from small_runs import EMA, SmallRuns

from alignclip.config.reading import load
from alignclip.config.schema import DataConfig, OptimizerConfig
from alignclip.errors import UserError
from alignclip.losses import AlignCLIPLoss
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders
from alignclip.runtime.arguments import read_arguments
from alignclip.storage import open_store
from alignclip.training.dry_run import dry_run
from alignclip.training.dry_run_steps import seconds_of_loader
from alignclip.training.footprint import (
    Footprint,
    Whole,
    activations,
    empty_batch,
    footprint,
    kept_bytes,
    state_ratio,
)

CPU = torch.device("cpu")
WRITE = "write --dry-run or --dry-run=3; composer pretrain.py takes it"


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def runs(dataset: Path, tmp_path: Path) -> SmallRuns:
    return SmallRuns(tmp_path, dataset, tmp_path / "runs" / "{run_name}", "max_duration=6ba")


def test_a_run_is_described_and_nothing_is_left(
    runs: SmallRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, config = files_below(tmp_path), runs.config()
    assert dry_run(config, 0) == 0
    printed = capfd.readouterr().out
    configuration, _, report = printed.partition("dry run of 'r'")
    (tmp_path / "again.yaml").write_text(configuration)
    assert load(str(tmp_path / "again.yaml"), []) == config
    (tmp_path / "again.yaml").unlink()
    assert "64 samples in" in report
    assert re.search(r"the whole run +6 batches \(6ba\), 96 samples", report)
    assert "no checkpoint is there" in report
    assert "measured" not in report
    assert files_below(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_steps_are_measured_and_the_hours_follow(
    runs: SmallRuns, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = files_below(tmp_path)
    # more batches than an epoch has, and a warm-up that the short run would not hold
    config = runs.config("max_duration=20000ba", "scheduler.t_warmup=10000ba", *EMA)
    assert dry_run(config, 3) == 0
    report = capfd.readouterr().out.partition("measured, median of 3 batches")[2]
    step = float(re.search(r"a step +(\S+) s,", report)[1])  # type: ignore[index]
    minutes = 20000 * step / 60
    said = re.search(r"the run +(?:(\d+) h )?(\d+) (min|s) for the 20,000 batches left", report)
    assert said is not None
    told = int(said[1] or 0) * 60 + int(said[2]) / (60 if said[3] == "s" else 1)
    assert told == pytest.approx(minutes, rel=0.05, abs=1)
    assert files_below(tmp_path) == before


def test_a_run_that_has_begun_is_left_as_it_is(
    runs: SmallRuns, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.train("max_duration=4ba", "save_interval=2ba")
    folder = Path(runs.folder().uri)
    (folder / ".ep0-ba3-rank0.pt.partial").write_bytes(b"of a run that is at work")
    before = files_below(folder)
    assert dry_run(runs.config(), 2) == 0
    text = capfd.readouterr().out
    assert re.search(r"go on from ep\d-ba4-rank0\.pt: 4 of 6 batches are trained", text)
    assert re.search(r"the run +\d+ s for the 2 batches left", text)
    assert files_below(folder) == before


def test_a_run_that_has_begun_needs_no_starting_weights(runs: SmallRuns, tmp_path: Path) -> None:
    runs.train("max_duration=2ba", "run_name=first")
    start = tmp_path / "start.pt"
    start.write_bytes(Path(runs.folder("run_name=first").uri, "latest-rank0.pt").read_bytes())
    runs.train("max_duration=4ba", f"pretrained={start}")
    start.unlink()
    assert dry_run(runs.config(f"pretrained={start}"), 1) == 0


def test_what_a_run_would_refuse_is_refused(runs: SmallRuns, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be shorter than max_duration=6ba"):
        dry_run(runs.config("scheduler.t_warmup=7ba"), 0)
    with pytest.raises(UserError, match="no MDS set at"):
        dry_run(runs.config("data.streams.e.local=nowhere"), 0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_command_leaves_no_cache_and_no_object(
    s3: S3Server, tmp_path: Path, processes: int
) -> None:
    bucket = s3.bucket()
    write_set(f"{bucket}/pairs")
    config = write_config(tmp_path, f"{bucket}/pairs", f"{bucket}/runs/r")
    words = (PRETRAIN, config, "run_name=r", "--dry-run=2")
    text = run(*words, cwd=tmp_path / "here", processes=processes)
    assert text.count("dry run of 'r'") == text.count("measured, median of 2 batches") == 1
    assert not (tmp_path / "cache").exists()
    assert open_store(f"{bucket}/runs").names() == set()
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"output.txt"}


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["a.yaml", "lr=1"], None),
        (["a.yaml", "lr=1", "--dry-run"], 0),
        (["--dry-run", "a.yaml", "lr=1"], 0),
        (["a.yaml", "--dry-run=3", "lr=1"], 3),
    ],
)
def test_the_flag_stands_anywhere(words: list[str], steps: int | None) -> None:
    asked = read_arguments(words, "x", "", "", has_dry_run=True)
    assert (asked.config, asked.overrides, asked.dry_run) == ("a.yaml", ["lr=1"], steps)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a.yaml", "--dry-run=few"], "--dry-run: 'few' is no number of steps; write --dry-run=3"),
        (["a.yaml", "--dry-run", "3"], "--dry-run 3: write --dry-run=3"),
        (["--dry-run", "3", "a.yaml"], "--dry-run 3: write --dry-run=3"),
        (["a.yaml", "--dry_run=3"], WRITE),
        (["a.yaml", "--dry"], WRITE),
    ],
)
def test_a_flag_that_is_not_quite_that(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        read_arguments(words, "x", "", "", has_dry_run=True)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {says}\n"


def model_of(runs: SmallRuns, *overrides: str) -> AlignCLIPModel:
    config = runs.config(*overrides)
    loss = AlignCLIPLoss(**vars(config.loss))
    return AlignCLIPModel(build_encoders(config.model), loss, config.model.encode_chunk_size)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_activations_are_those_of_the_whole_batch(runs: SmallRuns, precision: str) -> None:
    settings = ("global_train_batch_size=16", f"precision={precision}")
    config, model = runs.config(*settings), model_of(runs, *settings)
    known = {one.untyped_storage().data_ptr() for one in model.parameters()}
    batch = empty_batch(config, 16, CPU, 0)
    direct = kept_bytes(lambda: model(batch), known, config, CPU)
    assert activations(config, model, CPU) == direct


def test_a_chunk_keeps_less_than_the_batch(runs: SmallRuns) -> None:
    whole = activations(runs.config(), model_of(runs), CPU)
    chunked = "model.encode_chunk_size=4"
    model = model_of(runs, chunked)
    part = activations(runs.config(chunked), model, CPU)
    assert whole is not None
    assert part is not None
    assert part < whole / 3
    assert model.encode_chunk_size == 4


def test_the_parts_of_a_rank(runs: SmallRuns) -> None:
    config, model = runs.config(*EMA), model_of(runs)
    weights = sum(one.numel() for one in [*model.parameters(), *model.buffers()]) * 4
    trained = sum(one.numel() for one in model.parameters()) * 4
    found = footprint(config, model, Whole.of(config, model), CPU, dimension=16)
    assert (found.weights, found.gradients, found.algorithms) == (weights, trained, weights)
    assert found.optimizer == 2 * trained
    image, text = 3 * 32**2, 77 * 8
    assert found.batch == 16 * (image + text + 8 + 16 * 2)
    whole = Footprint(1, 2, 3, 4, 5, None, 6)
    assert whole.total == 21
    assert replace(whole, activations=7).total == 28


@pytest.mark.parametrize(("opt", "ratio"), [("adamw", 2), ("sgd", 1), ("lion", 1)])
def test_the_state_of_an_optimizer(opt: str, ratio: float) -> None:
    config = OptimizerConfig(opt=opt, eps=1e-6, layer_decay=0.9)
    assert state_ratio(config) == pytest.approx(ratio, rel=1e-3)


def test_an_epoch_too_short_for_the_loader_is_not_known() -> None:
    config = DataConfig(num_workers=4, prefetch_factor=2)
    assert seconds_of_loader(range(15), config) == 0.0
    assert seconds_of_loader(range(16), config) > 0.0
    assert seconds_of_loader(range(99), DataConfig(num_workers=0)) == 0.0


def test_what_is_prepared_ahead_does_not_count_for_the_loader() -> None:
    def batches() -> Iterator[int]:
        for i in range(60):
            time.sleep(0 if i < 12 else 0.05)
            yield i

    config = DataConfig(num_workers=4, prefetch_factor=2)
    assert seconds_of_loader(batches(), config) == pytest.approx(0.05, rel=0.3)
