"""Which side limits a run, and what to change: only what is true for the run's settings."""

from __future__ import annotations

import re
from typing import Any

import pytest

from alignclip.config.reading import load
from alignclip.training.limits import Circumstances, MeasuredBatches, figures, verdict

RECIPE = "yamls/alignclip.yaml"
COCO = ("evaluators.coco.task=retrieval", "evaluators.coco.local=x", "evaluators.coco.interval=5ba")
FLICKR = ("evaluators.flickr.task=retrieval", "evaluators.flickr.local=y")
FSDP = "parallelism_config.fsdp2.activation_checkpointing=true"
FAST = ("compile_config.regional=true",)
GPU = {"device": "gpu", "cores": 16, "devices": 1, "fast_bf16": True}
CPU = {"device": "cpu", "cores": 16, "threads": 16}
WAITS, TRAINS = {"waiting": 0.41}, {"waiting": 0.02}
NOTHING = "the device limits: no setting is left that would make it faster"

# what was measured, settings, machine, words
CASES: list[tuple[dict[str, Any], tuple[str, ...], dict[str, Any], str]] = [
    # the loader
    (WAITS, ("data.num_workers=2",), GPU,
     "the loader limits: raise data.num_workers (2 of 16 cores used)"),
    (WAITS, ("data.num_workers=2",), GPU | {"ranks": 8},
     "the loader limits: 16 workers read on 16 cores; more cores would help"),
    (WAITS, ("data.num_workers=2",), GPU | {"ranks": 4, "stored_side": 480},
     "the loader limits: raise data.num_workers (8 of 16 cores used), or convert with --resize 256 "
     "(the images have 480 pixels)"),
    (WAITS, ("data.num_workers=16",), GPU | {"stored_side": 480},
     "the loader limits: convert with --resize 256 (the images have 480 pixels)"),
    (WAITS, ("data.num_workers=16",), GPU | {"stored_side": 300},
     "the loader limits: 16 workers read on 16 cores; more cores would help"),
    (WAITS, ("data.num_workers=16",), GPU | {"may_download": True},
     "the loader limits: wait for the next epoch, if shards are still being downloaded"),
    (WAITS, ("data.num_workers=0",), GPU,
     "the loader limits: set data.num_workers (with 0 the training reads its own data)"),
    (WAITS, ("data.num_workers=16",), CPU,
     "the loader limits: 16 workers read on 16 cores beside the training; more cores would help"),
    # neither
    ({"waiting": 0.02, "evaluation": 0.3}, (*COCO, *FLICKR),
     GPU | {"evaluators": {"flickr": 1.0, "coco": 9.0}},
     "evaluation took 30 % of the time: raise evaluators.coco.interval (it is 5ba)"),
    ({"waiting": 0.02, "checkpoints": 0.12}, ("save_interval=10ba",), GPU,
     "checkpoints took 12 % of the time: raise save_interval (it is 10ba)"),
    # the worst of several
    ({"waiting": 0.15, "evaluation": 0.6}, COCO, GPU | {"evaluators": {"coco": 9.0}},
     "evaluation took 60 % of the time: raise evaluators.coco.interval (it is 5ba)"),
    ({"waiting": 0.5, "checkpoints": 0.2}, ("data.num_workers=2",), GPU,
     "the loader limits: raise data.num_workers (2 of 16 cores used)"),
    # the device
    (TRAINS, FAST, GPU, NOTHING),
    (TRAINS, (), GPU, "the device limits: compile_config.regional=true"),
    (TRAINS, ("precision=fp32",), GPU,
     "the device limits: precision=amp_bf16, or compile_config.regional=true"),
    (TRAINS, ("precision=fp32", *FAST), GPU | {"fast_bf16": False}, NOTHING),
    (TRAINS, FAST, GPU | {"devices": 8}, "the device limits: use all 8 GPUs (composer -n 8)"),
    (TRAINS, (*FAST, "model.encode_chunk_size=64"), GPU,
     "the device limits: model.encode_chunk_size=0 if memory allows: chunks are encoded twice"),
    (TRAINS, (*FAST, FSDP), GPU,
     "the device limits: parallelism_config.fsdp2.activation_checkpointing=false if memory allows"),
    (TRAINS | {"mfu": 0.04}, FAST, GPU,
     "the device limits: see where a step's time goes (profiler={})"),
    (TRAINS | {"mfu": 0.4}, FAST, GPU, NOTHING),
    (TRAINS, ("device=cpu", "precision=fp32"), CPU, NOTHING),
    (TRAINS, ("device=cpu", "precision=fp32"), CPU | {"fast_bf16": True},
     "the device limits: precision=amp_bf16"),
    (TRAINS, ("device=cpu", "precision=amp_bf16"), CPU | {"fast_bf16": True}, NOTHING),
    (TRAINS, ("device=cpu", "precision=fp32"), CPU | {"threads": 4, "ranks": 2},
     "the device limits: raise OMP_NUM_THREADS (8 of 16 cores compute)"),
    (TRAINS, ("device=cpu", "precision=fp32"), CPU | {"devices": 1},
     "the device limits: device=gpu"),
]  # fmt: skip


@pytest.mark.parametrize(("measured", "settings", "machine", "words"), CASES)
def test_the_advice(
    measured: dict[str, Any], settings: tuple[str, ...], machine: dict[str, Any], words: str
) -> None:
    config = load(RECIPE, ["run_name=r", *settings])
    assert (
        verdict(MeasuredBatches(samples=1000.0, **measured), Circumstances(config, **machine))
        == words
    )


SETTING = re.compile(r"[\w.]+=[\w{}]+")


@pytest.mark.parametrize(
    "setting", sorted({one for *_, words in CASES for one in SETTING.findall(words)})
)
def test_what_is_advised_can_be_set(setting: str) -> None:
    load(RECIPE, ["run_name=r", setting])


def test_the_figures() -> None:
    assert figures(MeasuredBatches(1234.5, 0.413)) == "1,234 samples/s, data wait 41 %"
    assert (
        figures(MeasuredBatches(12.0, 0.02, mfu=0.312)) == "12 samples/s, data wait 2 %, MFU 31 %"
    )
