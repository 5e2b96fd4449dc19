"""The run in this process: what the YAML's algorithms, scheduler and precision do, and what is
refused.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from composer import Trainer
from composer.callbacks import SpeedMonitor
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import get_device
from runs import write_config
from s3 import S3Server
from small_runs import EMA, SmallRuns, logged, turn_back

from alignclip.config.reading import load
from alignclip.config.schema import DataConfig, EvaluatorConfig, RunConfig, StreamConfig
from alignclip.data.streams import evaluated_on_training_data
from alignclip.errors import UserError
from alignclip.training import plugins, preflight
from alignclip.training.build import build_trainer
from alignclip.training.run import introduction


class Watch(Callback):
    """Keeps what the tests compare: gradients after clipping, weights after every step."""

    def __init__(self) -> None:
        self.gradient_norms: list[float] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def after_backward(self, state: State, logger: Logger) -> None:
        if not self.gradients:
            self.gradients = {
                n: p.grad.clone() for n, p in state.model.named_parameters() if p.grad is not None
            }

    def batch_end(self, state: State, logger: Logger) -> None:
        grads = [p.grad for p in state.model.parameters() if p.grad is not None]
        self.gradient_norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        self.weights.append({n: p.detach().clone() for n, p in state.model.named_parameters()})


def watched(folder: Path, dataset: Path, *overrides: str) -> tuple[Trainer, Watch]:
    watch = Watch()
    runs = SmallRuns(folder, dataset, None, "max_duration=8ba", "scheduler.t_warmup=5ba")
    return runs.train(*overrides, callbacks=[watch]), watch


@pytest.fixture
def fit(dataset: Path, tmp_path: Path) -> Any:
    return partial(watched, tmp_path, dataset)


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Watch]:
    """The run that others are compared with."""
    return watched(tmp_path_factory.mktemp("plain"), dataset)


def configuration(dataset: Path, folder: Path, *overrides: str) -> RunConfig:
    return load(write_config(folder, str(dataset)), ["data.num_workers=0", *overrides])


def test_what_is_logged(fit: Any) -> None:
    trainer, _ = fit()
    # the published schedule at the rates that the steps really use: (t + 1)/5 up to step 4, then
    # the cosine from step 5
    expected = [1e-3 * (t + 1) / 5 for t in range(5)]
    expected += [1e-3 * 0.5 * (1 + math.cos(math.pi * (t - 5) / 3)) for t in range(5, 8)]
    assert logged(trainer, "lr") == pytest.approx(expected, rel=1e-9)
    contrastive, separation = (
        logged(trainer, f"loss/train/{name}") for name in ("contrastive", "separation")
    )
    terms = zip(contrastive, separation, strict=True)
    assert logged(trainer) == pytest.approx([c + 0.5 * s for c, s in terms], rel=1e-6)
    assert logged(trainer, "logit_scale")[0] == pytest.approx(1 / 0.07, rel=1e-6)
    assert all(0 <= share <= 1 for share in logged(trainer, "time/data_wait_fraction"))
    assert any(isinstance(callback, SpeedMonitor) for callback in trainer.state.callbacks)


def average(trainer: Trainer, name: str) -> torch.Tensor:
    """A parameter of EMA's model."""
    (ema,) = [a for a in trainer.state.algorithms if type(a).__name__ == "EMA"]
    return ema.ema_model.named_parameters_dict[name]


@pytest.mark.parametrize("start", [6.0, 0.02])
def test_logit_scale_is_clamped_after_every_step_and_before_ema(fit: Any, start: float) -> None:
    """From above the upper bound, and from just above the lower at a rate that crosses it in one
    step.
    """
    fast = ("optimizer.lr=0.5", "scheduler.t_warmup=1ba", *EMA, "algorithms.EMA.half_life=1ba")
    trainer, watch = fit(f"model.init_logit_scale={start}", *fast)
    scales = [float(w["encoders.logit_scale"]) for w in watch.weights]
    assert all(0 <= s <= math.log(100) + 1e-6 for s in scales)
    assert any(abs(s - value) < 1e-6 for s in scales for value in (0.0, math.log(100))), scales
    assert 0 <= float(average(trainer, "encoders.logit_scale")) <= math.log(100) + 1e-6


def test_ema_is_the_running_mean_of_the_weights(fit: Any) -> None:
    trainer, watch = fit(*EMA)
    smoothing = math.exp(-math.log(2) / 2)
    name = "encoders.visual.transformer.resblocks.0.mlp.c_fc.weight"
    # Composer starts the average at the weights of the first update
    expected = copy.deepcopy(watch.weights[0][name])
    for weights in watch.weights[1:]:
        expected = smoothing * expected + (1 - smoothing) * weights[name]
    assert torch.allclose(average(trainer, name), expected, atol=1e-6)
    assert not torch.allclose(average(trainer, name), watch.weights[-1][name], atol=1e-6)


def test_gradients_are_clipped(fit: Any, plain: tuple[Trainer, Watch]) -> None:
    assert max(plain[1].gradient_norms) > 0.05
    _, clipped = fit("algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 0.05}")
    assert clipped.gradient_norms == pytest.approx([0.05] * 8, rel=1e-3)


@pytest.mark.parametrize("size", [3, 16, 100])
def test_chunks_give_the_gradients_of_the_whole_batch(
    fit: Any, plain: tuple[Trainer, Watch], size: int
) -> None:
    whole, chunked = plain[1].gradients, fit(f"model.encode_chunk_size={size}")[1].gradients
    assert whole.keys() == chunked.keys()
    for name, gradient in whole.items():
        assert (chunked[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_bf16_on_a_cpu(fit: Any, plain: tuple[Trainer, Watch]) -> None:
    half, _ = fit("precision=amp_bf16")
    assert next(half.state.model.parameters()).dtype == torch.float32
    assert logged(half) != logged(plain[0])
    assert logged(half) == pytest.approx(logged(plain[0]), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interval", "first", "more"),
    [
        ("1ep", 4, ()),
        ("4ba", 4, ()),
        ("3ba", 3, ()),
        ("3ba", 3, EMA),
        ("3ba", 3, ("model.vision_cfg.patch_dropout=0.5", "model.shared.blocks=0")),
    ],
    ids=["between epochs", "both", "inside an epoch", "EMA", "patch dropout"],
)
def test_goes_on_from_a_checkpoint(
    dataset: Path, tmp_path: Path, interval: str, first: int, more: tuple[str, ...]
) -> None:
    """Two epochs of four batches; the second trainer starts from the first one's first
    checkpoint.
    """
    settings = ("max_duration=2ep", f"save_interval={interval}", *more)
    runs = SmallRuns(tmp_path, dataset, tmp_path / "saved", *settings)
    whole = runs.train()
    averages = [copy.deepcopy(a.ema_model.named_parameters_dict) for a in whole.state.algorithms]
    assert len(logged(whole)) == 8
    (name,) = [path.name for path in (tmp_path / "saved").glob(f"*-ba{first}-*")]
    turn_back(tmp_path / "saved", name)
    again = runs.train()
    assert logged(again) == logged(whole)[first:]
    for before, algorithm in zip(averages, again.state.algorithms, strict=True):
        now = algorithm.ema_model.named_parameters_dict
        assert before.keys() == now.keys()
        assert all(torch.equal(before[name], now[name]) for name in now)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["max_duration=2ep", "scheduler.t_warmup=8ba"],
            "shorter than max_duration=2ep (8 batches, 4 an epoch)",
        ),
        (["optimizer.opt=adamv"], "did you mean 'adam'?"),
        (
            ["global_train_batch_size=65"],
            "fewer than one batch; lower global_train_batch_size to 64 or less (it is 65)",
        ),
        (["data.epoch_size=some"], "data: "),
    ],
)
def test_what_only_building_shows_is_one_line(
    dataset: Path, tmp_path: Path, overrides: list[str], says: str
) -> None:
    config = configuration(dataset, tmp_path, "max_duration=8ba", *overrides)
    with pytest.raises(UserError) as error:
        build_trainer(config, get_device("cpu"), None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stream", "evaluator", "found"),
    [
        ({"local": "a/set"}, {"local": "./a/set/"}, True),
        ({"local": "a", "split": "set"}, {"local": "a/set"}, True),
        ({"remote": "s3://b/set", "local": "c"}, {"remote": "s3://b/set/", "local": "d"}, True),
        (
            {"remote": "s3://b/set", "local": "c"},
            {"local": "c"},
            True,
        ),  # the cache of the training set
        (
            {"remote": "s3://b/set", "local": "c"},
            {"remote": "s3://b/test", "local": "c/test"},
            False,
        ),
        ({"local": "a", "split": "train"}, {"local": "a", "split": "val"}, False),
        ({"local": "a"}, {"local": "b"}, False),
    ],
)
def test_an_evaluator_on_training_data_is_known(
    stream: dict[str, str], evaluator: dict[str, str], found: bool
) -> None:
    streams = {"other": StreamConfig(local="elsewhere"), "e": StreamConfig(**stream)}
    evaluators = {"c": EvaluatorConfig(task="gap", **evaluator)}
    config = RunConfig(data=DataConfig(streams=streams), evaluators=evaluators)
    assert evaluated_on_training_data(config) == ({"c": "e"} if found else {})


def test_an_evaluator_on_training_data_is_told_at_the_start(dataset: Path, tmp_path: Path) -> None:
    config = configuration(dataset, tmp_path, "run_name=told", "global_train_batch_size=64")
    trainer = build_trainer(config, get_device("cpu"), None)
    quiet = introduction(config, trainer, None)
    assert "64 samples, 1 batch of 64 an epoch, 40ba in all" in quiet
    config.evaluators = {"c": EvaluatorConfig(task="gap", local=str(dataset))}
    told = introduction(config, trainer, None)
    trainer.close()
    (stream,) = config.data.streams
    line = f"  the figures of evaluator 'c' are on training data: its set is data.streams.{stream}"
    assert told == f"{quiet}\n{line}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("precision=amp_fp16", "precision=amp_fp16 needs a GPU"),
        ("precision=bf17", "precision=bf17: valid: "),
        ("compile_config.backend=inducter", "did you mean 'inductor'"),
        ("compile_config={mode: default, options: {x: 1}}", "options exclude each other"),
        ("compile_config={regional: true, dynamic: false}", "every length of texts anew"),
    ],
)
def test_what_does_not_fit_the_machine(
    dataset: Path, tmp_path: Path, override: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        preflight.check_parallelism(configuration(dataset, tmp_path, override), get_device("cpu"))


def test_a_checkpoint_to_load_is_looked_at_first(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    bucket = s3.bucket()
    for place, says in (
        (tmp_path / "nothing.pt", "no such file"),
        (tmp_path / "notes.txt", "is no checkpoint, or only a part of one"),
        (f"{bucket}/nothing.pt", "not found"),
    ):
        with pytest.raises(UserError, match=f"load_path={place}.*{says}"):
            preflight.check_start(str(place))
    s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key="there.pt", Body=b"x")
    preflight.check_start(f"{bucket}/there.pt")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="no credentials found"):
        preflight.check_start(f"{bucket}/there.pt")


@pytest.mark.slow
def test_the_profiler_leaves_its_traces(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("profiler.wait=1", "profiler.active=1", "max_duration=4ba")
    SmallRuns(tmp_path, dataset, None, *settings).train()
    assert list((tmp_path / "r" / "torch_traces").glob("rank0.*.pt.trace.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UserError, match="there is none on this machine"):
        preflight.training_device("gpu")


@pytest.mark.parametrize("logger", ["WandBLogger", "TensorboardLogger"])
def test_a_logger_whose_package_is_missing(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    """Known before data and model are built, with the extra that brings it."""
    package = logger.removesuffix("Logger").lower()
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes for not installed
    with pytest.raises(UserError, match=re.escape(f"pip install 'alignclip[{package}]'")):
        plugins.check(configuration(dataset, tmp_path, f"loggers.{logger}={{}}"))


@pytest.mark.slow
def test_nohup_lets_a_run_outlive_its_terminal() -> None:
    code = (
        "import os, signal\n"
        "from alignclip.training.callbacks import StopOnSignal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "StopOnSignal()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
        "raise SystemExit(signal.SIGHUP in signal.sigpending())\n"
    )
    assert processes.python("-c", code).returncode == 0


@pytest.mark.slow
def test_a_worker_that_hangs_does_not_outlive_a_run_that_fails(tmp_path: Path) -> None:
    """Data workers don't hear SIGTERM, so that a signal to all spares them until the checkpoint
    is saved.
    """
    script = tmp_path / "hangs.py"
    script.write_text(
        "import time, torch\n"
        "from alignclip.training.callbacks import StopOnSignal\n"
        "class Hangs(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i): return i if i < 4 else time.sleep(3600)\n"
        "StopOnSignal()\n"
        "for batch in torch.utils.data.DataLoader(Hangs(), batch_size=2, num_workers=2):\n"
        "    raise SystemExit(3)\n"
    )
    assert processes.python(script).returncode == 3
