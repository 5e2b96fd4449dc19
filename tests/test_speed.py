"""SpeedMonitor: Composer's names and numbers, without a wait for the device at each step."""

from __future__ import annotations

import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import callbacks
from composer.core import Precision, Timestamp
from models import small_batch, small_config
from small_runs import SmallRuns, logged

from alignclip.config.schema import RunConfig
from alignclip.losses import AlignCLIPLoss
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders
from alignclip.training import plugins
from alignclip.training.speed import SpeedMonitor, peak_flops


class Log:
    """What a callback has logged, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.steps[-1] |= metrics


def steps(monitor: Any, model: AlignCLIPModel, count: int) -> list[dict[str, float]]:
    """Batches of 8 that take 2 seconds each, on captions that get shorter."""
    log: Any = Log()
    _, tokens = small_batch(8)
    device = SimpleNamespace(tensor_to_device=lambda tensor: tensor)
    for batch in range(1, count + 1):
        time = Timestamp(batch=batch, sample=8 * batch, total_wct=timedelta(seconds=2 * batch))
        text = tokens[: 9 - batch].repeat(8, 1)[:8]
        batch_of_rank = {"text": text, "semantic": torch.zeros(8, 5)}
        state: Any = SimpleNamespace(
            timestamp=time, model=model, batch=batch_of_rank, device=device
        )
        log.steps.append({})
        monitor.batch_end(state, log)
    return log.steps  # type: ignore[no-any-return]


@pytest.fixture
def model() -> AlignCLIPModel:
    model = AlignCLIPModel(build_encoders(small_config()), AlignCLIPLoss())
    model.count_flops()
    return model


@pytest.mark.parametrize("peak", [0, 1e9])
def test_names_and_numbers_are_composers(model: AlignCLIPModel, peak: float) -> None:
    ours = steps(SpeedMonitor(3, gpu_flops_available=peak), model, 6)
    composers = steps(callbacks.SpeedMonitor(3, gpu_flops_available=peak), model, 6)
    assert "throughput/device/flops_per_sec" in composers[-1]
    assert ("throughput/device/mfu" in composers[-1]) == bool(peak)
    for mine, theirs in zip(ours, composers, strict=True):
        # Composer begins to log FLOPs with the window's last batch, too
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_a_model_that_cannot_be_counted_has_no_flops(model: AlignCLIPModel) -> None:
    model.pair_flops = None
    last = steps(SpeedMonitor(3, gpu_flops_available=1e9), model, 6)[-1]
    assert not [name for name in last if "flops" in name or "mfu" in name]
    assert last["throughput/samples_per_sec"] == 4.0


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", Precision.AMP_BF16, True, 989.5e12),
        ("NVIDIA H200", Precision.FP32, True, 494.5e12),
        ("NVIDIA H200", Precision.FP32, False, 67e12),
        ("NVIDIA L4", Precision.AMP_BF16, True, 0),
    ],
)
def test_the_peak_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str, precision: Precision, tf32: bool, peak: float
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: name)
    before, matmul = torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.matmul
    matmul.allow_tf32 = tf32
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert peak_flops(precision) == peak
    finally:
        matmul.allow_tf32 = before


def test_the_yaml_gets_ours_with_the_peak_that_it_says() -> None:
    config = RunConfig(callbacks={"SpeedMonitor": {"gpu_flops_available": "1e12"}})
    (monitor,) = plugins.instances(plugins.check(config), "callbacks")
    assert type(monitor) is SpeedMonitor
    assert monitor.gpu_flops_available == 1e12


def test_a_run_logs_mfu_where_the_peak_is_given(dataset: Any, tmp_path: Any) -> None:
    given = (
        "callbacks.SpeedMonitor.gpu_flops_available=1e9",
        "callbacks.SpeedMonitor.window_size=2",
    )
    trainer = SmallRuns(tmp_path, dataset, None, *given).train("max_duration=4ba")
    mfu, flops = (logged(trainer, f"throughput/device/{n}") for n in ("mfu", "flops_per_sec"))
    assert mfu == pytest.approx([one / 1e9 for one in flops])
    assert len(mfu) == 2
