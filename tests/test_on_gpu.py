"""What differs on a GPU; each test has a twin on the CPU, which runs where there is no GPU."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from runs import PRETRAIN, RECORDING, launch, run, steps, wait_for, write_config
from small_runs import SmallRuns, logged

from alignclip.model import blocks
from alignclip.training import device_memory
from alignclip.training.dry_run import dry_run

DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
BF16 = "precision=amp_bf16"
FSDP = "parallelism_config.fsdp2={}"
SHORT = ("max_duration=6ba", "optimizer.lr=0.01")
NEAR = {"cpu": 1e-6, "gpu": 5e-3}  # of losses; Composer lets a GPU's products be TF32


def trained(
    folder: Path, dataset: Path, device: str, *overrides: str, watch: Callback | None = None
) -> list[float]:
    """Train six batches, and return their losses."""
    runs_here = SmallRuns(folder, dataset, None, *SHORT, f"device={device}")
    watching = [watch] if watch else []
    return logged(runs_here.train("batch_log_interval=1", *overrides, callbacks=watching))


@pytest.fixture(scope="module")
def expected(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of six batches in fp32 on the CPU."""
    return trained(tmp_path_factory.mktemp("expected"), dataset, "cpu")


class Seen(Callback):
    """Keeps the first batch as the loader gives it, and as the model gets it."""

    def __init__(self) -> None:
        self.is_pinned = self.is_fused = False
        self.device = ""

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.is_pinned = state.batch["image"].is_pinned()

    def before_forward(self, state: State, logger: Logger) -> None:
        self.device = state.batch["image"].device.type

    def batch_end(self, state: State, logger: Logger) -> None:
        self.is_fused = bool(state.optimizers[0].param_groups[0].get("fused"))


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_trains_as_the_cpu_does(
    device: str, dataset: Path, tmp_path: Path, expected: list[float]
) -> None:
    """Batches are pinned for a GPU, and its optimizer is fused."""
    seen = Seen()
    found = trained(tmp_path, dataset, device, "data.pin_memory=true", watch=seen)
    assert found == pytest.approx(expected, rel=NEAR[device])
    is_gpu = device == "gpu"
    assert (seen.is_pinned, seen.is_fused) == (is_gpu, is_gpu)
    assert seen.device == ("cuda" if is_gpu else "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [0, 5])
def test_bf16_is_near_fp32(
    device: str, chunk: int, dataset: Path, tmp_path: Path, expected: list[float]
) -> None:
    found = trained(tmp_path, dataset, device, BF16, f"model.encode_chunk_size={chunk}")
    assert found == pytest.approx(expected, rel=2e-2)
    assert found != expected


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("regional", ["true", "false"])
def test_a_compiled_model_trains_as_the_plain_one(
    device: str,
    chunk: int,
    regional: str,
    dataset: Path,
    tmp_path: Path,
    expected: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels are compiled for a GPU alone: for a CPU they take a minute."""
    backend = "inductor" if device == "gpu" else "aot_eager"
    compiled = (f"compile_config.backend={backend}", f"compile_config.regional={regional}")
    monkeypatch.setattr(blocks, "SMALL", 0)  # the last block pools on a CPU, too
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    found = trained(tmp_path, dataset, device, f"model.encode_chunk_size={chunk}", *compiled)
    assert found == pytest.approx(expected, rel=max(NEAR[device], 1e-5))
    assert graphs["unique_graphs"] >= (2 if regional == "true" else 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_fused_optimizer_steps_as_the_plain_one(
    device: str, dataset: Path, tmp_path: Path
) -> None:
    fused, plain = (
        trained(
            tmp_path / way, dataset, device, "deterministic_mode=true", f"optimizer.fused={way}"
        )
        for way in ("true", "false")
    )
    assert fused == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_draws_the_same_patches(device: str, dataset: Path, tmp_path: Path) -> None:
    """Patch dropout draws from the device's own generator."""
    words = ("model.vision_cfg.patch_dropout=0.5", "deterministic_mode=true", "save_interval=3ba")
    here = (*words, f"device={device}", "batch_log_interval=1", "save_num_checkpoints_to_keep=9")
    whole = SmallRuns(tmp_path / "a", dataset, tmp_path / "whole", *SHORT, *here).train()
    runs_here = SmallRuns(tmp_path / "b", dataset, tmp_path / "parts", *SHORT, *here)
    runs_here.train(callbacks=[Ends(3)])
    resumed = runs_here.train("autoresume=true")
    assert resumed.state.timestamp.batch == 6
    assert logged(resumed) == logged(whole)[3:]


class Ends(Callback):
    """Ends a run early."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch == self.batch:
            state.stop_training()


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_on_a_device(device: str, dataset: Path, tmp_path: Path) -> None:
    """The figures are those of the CPU's; a GPU's features differ in the last digits."""
    words = (
        "evaluators.all.task=retrieval",
        f"evaluators.all.local={dataset}",
        "evaluators.all.num_workers=0",
        "optimizer.lr=1e-9",
    )
    found: dict[str, dict[str, float]] = {}
    for name in ("cpu", device):
        runs_here = SmallRuns(tmp_path, dataset, None, *SHORT, *words, f"device={name}")
        trainer = runs_here.train("max_duration=2ba")
        (memory,) = [d for d in trainer.logger.destinations if hasattr(d, "data")]
        metrics = {key: float(values[-1][1]) for key, values in memory.data.items()}
        found[name] = {key: value for key, value in metrics.items() if "metrics/" in key}
    assert found["cpu"]
    assert found[device] == pytest.approx(found["cpu"], abs=0.05)


class NoRoom(Callback):
    """Asks for more memory than a device has, at the second batch."""

    def before_forward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch != 1:
            return
        if state.device.name == "gpu":
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nMore lines")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("chunk", "advice"), [(0, 8), (12, 0)])
def test_a_batch_that_memory_has_no_room_for(
    device: str, chunk: int, advice: int, dataset: Path, tmp_path: Path
) -> None:
    """One line names what makes a batch smaller. On a GPU the memory does end."""
    yaml = write_config(tmp_path, str(dataset), str(tmp_path / "saved"))
    words = (PRETRAIN, yaml, "run_name=full", f"device={device}", "data.num_workers=0")
    callbacks = ("callbacks={test_on_gpu.NoRoom: {}}", f"model.encode_chunk_size={chunk}")
    path = {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    text = run(*words, *callbacks, cwd=tmp_path / "cwd", env=path, status=2)
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of the device's memory")
    assert (" GiB of them taken" in line) == (device == "gpu")
    assert ": 16 pairs a device" in line
    assert ("12 at a time" in line) == bool(chunk)
    assert (f"model.encode_chunk_size={advice} " in line) == bool(advice)
    assert "global_train_batch_size=8 (" in line


def test_a_smaller_batch_is_one_that_all_ranks_share(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_memory, "world_size", lambda: 4)
    runs_here = SmallRuns(tmp_path, dataset, None, "global_train_batch_size=12")
    assert "global_train_batch_size=4 (" in device_memory.advice(runs_here.config())


@pytest.fixture
def records(dataset: Path, tmp_path: Path) -> Any:
    """Train by the launcher, as people do; return the losses."""
    yaml = write_config(tmp_path, str(dataset), str(tmp_path / "saved" / "{run_name}"))

    def train(name: str, *overrides: str, really: bool = False) -> list[float]:
        words = (RECORDING, tmp_path / name, yaml, f"run_name={name}", "data.num_workers=1")
        run(*words, *overrides, cwd=tmp_path / f"{name}-cwd", really=really)
        return [step["loss/train/total"] for step in steps(tmp_path / name)]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_fsdp_trains_as_ddp_does(device: str, records: Any) -> None:
    """Under FSDP2's own mixed precision and autocast's."""
    here = (f"device={device}", BF16, *SHORT[:1], "batch_log_interval=1")
    plain = records("plain", *here, really=device == "gpu")
    sharded = records(
        "sharded", *here, FSDP, "compile_config.backend=aot_eager", "compile_config.regional=true"
    )
    assert len(plain) == 6
    assert sharded == pytest.approx(plain, rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_ended_goes_on(
    device: str, how: signal.Signals, dataset: Path, tmp_path: Path
) -> None:
    """A killed run repeats the batches since its checkpoint, to the last bit."""
    yaml = write_config(tmp_path, str(dataset), str(tmp_path / "saved"))
    words = (
        *(RECORDING, tmp_path / "records", yaml, "run_name=ended", f"device={device}", BF16),
        *("max_duration=20ba", "save_interval=5ba", "batch_log_interval=1"),
        *("deterministic_mode=true", "autoresume=true", "data.num_workers=1"),
    )
    cwd = tmp_path / "cwd"
    process = launch(*words, cwd=cwd, env={"ALIGNCLIP_TEST_STEP_SECONDS": "0.2"})
    try:
        wait_for(lambda: (tmp_path / "saved" / "latest-rank0.pt").exists(), process, cwd)
        (rank,) = psutil.Process(process.pid).children()
        rank.send_signal(how)
        status = process.wait(120)
    finally:
        process.end()
    assert status == (143 if how == signal.SIGTERM else 247)
    run(*words, cwd=cwd)
    seen: dict[int, dict[str, float]] = {}
    for step in steps(tmp_path / "records"):
        assert seen.setdefault(int(step["step"]), step) == step
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("device", DEVICES)
def test_a_dry_run_measures_the_device(
    device: str, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs_here = SmallRuns(tmp_path, dataset, None, *SHORT, f"device={device}")
    assert dry_run(runs_here.config(), 3) == 0
    report = capfd.readouterr().out.partition("dry run of")[2]
    assert "measured, median of 3 batches" in report
    name = torch.cuda.get_device_name() if device == "gpu" else "cpu"
    assert f"({name}, fp32)" in report
