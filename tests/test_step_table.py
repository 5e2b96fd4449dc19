"""A step's time by part: of a real run, and of a GPU's events made up by hand."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from small_runs import SmallRuns
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from alignclip.model.encoders import IMAGE_ENCODER, TEXT_ENCODER
from alignclip.training import profiling
from alignclip.training.step_table import (
    AGAIN,
    BACKWARD,
    CHECKPOINT,
    DATA_WAIT,
    FORWARD,
    LOSS,
    OPTIMIZER,
    TO_DEVICE,
    measure,
    table_text,
)

# one layer, because Composer writes each event of a step into four JSON files
PROFILED = (
    "profiler.warmup=1", "profiler.active=3", "max_duration=4ba", "progress_bar=false",
    "model.vision_cfg.layers=1", "model.text_cfg.layers=1",
)  # fmt: skip
ROW = re.compile(r"\| (?P<name>\S.*?) +\| +(?P<ms>[\d.,]+) \| +(?P<share>[\d.]+) % \|")


class Slow(Callback):
    """Takes its time at each step."""

    def batch_start(self, state: State, logger: Logger) -> None:
        """Take it."""
        time.sleep(0.05)


@pytest.fixture
def rows(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The milliseconds of each part of a run in chunks that saves at each batch."""
    monkeypatch.chdir(tmp_path)
    settings = ("model.encode_chunk_size=8", "save_interval=1ba", *PROFILED)
    runs = SmallRuns(tmp_path, dataset, tmp_path / "runs", *settings)
    runs.train(callbacks=[Slow()])
    traces = tmp_path / "r" / "torch_traces"
    assert (traces / "rank0.4.pt.trace.json").exists()
    text = (traces / "rank0.4.step.md").read_text(encoding="utf-8")
    assert text.startswith(
        "# Where a step's time goes: run r, rank 0, up to batch 4\n\nA step takes "
    )
    assert "the mean of 2" in text
    parts, _, operators = text.partition("| operator")
    assert "aten::" in operators
    return {row["name"]: float(row["ms"].replace(",", "")) for row in ROW.finditer(parts)}


@pytest.mark.slow
def test_a_run_is_measured_part_by_part(rows: dict[str, float]) -> None:
    every = rows.pop("all")
    assert sum(rows.values()) == pytest.approx(every, rel=0.01)
    expected = {
        DATA_WAIT, TO_DEVICE, FORWARD, IMAGE_ENCODER, TEXT_ENCODER, LOSS, BACKWARD, AGAIN,
        OPTIMIZER, CHECKPOINT, "callback Slow", "the profiler itself", "the rest",
    }  # fmt: skip
    assert expected <= rows.keys()
    assert rows["callback Slow"] >= 50.0
    assert all(milliseconds >= 0 for milliseconds in rows.values())


def test_a_table_that_fails_costs_the_table_alone(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no room left")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "measure", fail)
    with caplog.at_level(logging.WARNING):
        short = ("profiler.active=1", "profiler.torch_prof_profile_memory=false")
        trainer = SmallRuns(tmp_path, dataset, None, *PROFILED, *short).train()
    assert trainer.state.timestamp.batch == 4
    assert "no table of a step's time: no room left" in caplog.text


def event(
    name: str, start: float, end: float, thread: int = 1, on_gpu: bool = False, **more: Any
) -> FunctionEvent:
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    more |= {"device_type": kind, "use_device": "cuda", "stack": []}
    return FunctionEvent(0, name, thread, start, end, **more)


def events_of_a_gpu() -> EventList:
    """Two steps of 1,000 µs: the host is done early, and waits at the end for the GPU."""
    found = []
    for at in (0, 1000, 2000):
        step = event("ProfilerStep*", at, at + 1000, is_user_annotation=True)
        image = event(IMAGE_ENCODER, at + 100, at + 200, is_user_annotation=True)
        backward = event(BACKWARD, at + 200, at + 300, is_user_annotation=True)
        product = event("aten::mm", at + 110, at + 120)
        product.append_kernel("gemm", 0, 200)
        gradient = event("aten::mm", at + 210, at + 220, thread=2)
        gradient.append_kernel("gemm", 0, 400)
        update = event("Optimizer.step#AdamW.step", at + 300, at + 350, is_user_annotation=True)
        fused = event("aten::_fused_adamw_", at + 310, at + 320)
        fused.append_kernel("adam", 0, 100)
        wait = event("cudaStreamSynchronize", at + 400, at + 950)
        found += [step, image, backward, product, gradient, update, fused, wait]
        # the kernels themselves, two of which overlap, and what a range looks like on the GPU
        found += [
            event("gemm", at + 150, at + 350, 7, on_gpu=True),
            event("gemm", at + 340, at + 740, 8, on_gpu=True),
            event("adam", at + 740, at + 840, 7, on_gpu=True),
            event(BACKWARD, at + 150, at + 990, 7, on_gpu=True, is_user_annotation=True),
        ]
    events = EventList(found, use_device="cuda")
    events._build_tree()
    return events


def test_the_time_of_a_gpu() -> None:
    events = events_of_a_gpu()
    table = measure(events, events.key_averages())
    assert table is not None
    assert (table.steps, table.milliseconds) == (2, 1.0)
    host = {part.name: pytest.approx(part.host) for part in table.parts}
    assert host == {IMAGE_ENCODER: 0.1, BACKWARD: 0.1, OPTIMIZER: 0.05, "the rest": 0.75}
    device = {part.name: part.device for part in table.parts if part.device}
    # kernels of autograd's own thread are the backward pass
    assert device == pytest.approx({IMAGE_ENCODER: 0.2, BACKWARD: 0.4, OPTIMIZER: 0.1})
    assert table.busy == pytest.approx(0.69)
    assert table.waits == pytest.approx((1.0, 0.55))
    operators = {one.name: (one.calls, one.milliseconds) for one in table.operators}
    assert operators["aten::mm"] == pytest.approx((2.0, 0.6))
    text = table_text(table, "title", "the device limits: precision=amp_bf16")
    assert "The GPU works 69 % of the time; the host waits for it 1.0 times a step, 0.6 ms." in text
    assert "| backward" in text
    assert "| all            | 1.00 | 100.0 % |   0.70 |    70.0 % |" in text
    assert "\nThe device limits: precision=amp_bf16.\n" in text


def test_without_a_whole_step_there_is_no_table() -> None:
    assert measure([event("aten::mm", 0, 1)], []) is None
