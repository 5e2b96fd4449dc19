"""The host doesn't wait for the device in a step that logs and saves nothing.

The device here is PyTorch's "meta": its tensors have no numbers, so that whatever reads one, copies
one to the host or asks how many there are fails at once.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from composer.core import Callback, DataSpec, State
from composer.devices import Device
from composer.loggers import Logger
from models import EVERYTHING, small_batch, small_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from alignclip.config.schema import OptimizerConfig
from alignclip.data.batch import count_samples, longest_text
from alignclip.data.dataset import ImageTextDataset
from alignclip.losses import AlignCLIPLoss
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders, clamp_logit_scale_
from alignclip.model.optimization import build_optimizer
from alignclip.training import batch_check
from alignclip.training.batch_check import FiniteCheck
from alignclip.training.callbacks import StopOnSignal, TrainingMonitor
from alignclip.training.speed import SpeedMonitor
from alignclip.training.trainer import EVERY_BATCH, LoggedBatches, Trainer


class NoBatch(LoggedBatches):
    """Not even the first one."""

    def has(self, batch: int) -> bool:
        return False


NEVER = NoBatch(interval=1, total=0)


class Numberless(Device):
    """A device whose tensors have no numbers, from the first batch on."""

    dist_backend = "gloo"
    name = "meta"
    trains = False

    def module_to_device(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        return module.to("meta")

    def tensor_to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to("meta") if self.trains else tensor


class Flags:
    """Flags that say on the host that all is well, and when they were asked for."""

    asked: ClassVar[list[int]] = []
    made = 0

    def __init__(self, flags: Tensor) -> None:
        assert flags.device.type == "meta"
        self.number, Flags.made = Flags.made, Flags.made + 1

    def values(self) -> list[float]:
        Flags.asked.append(Flags.made - self.number)
        return [0.0] * 5


class Reading(Callback):
    """Reads a number of the device at a batch's end."""

    def batch_end(self, state: State, logger: Logger) -> None:
        float(state.outputs[2])


def train(
    monkeypatch: pytest.MonkeyPatch,
    logged: LoggedBatches = NEVER,
    callbacks: tuple[Callback, ...] = (),
    chunk_size: int = 0,
) -> None:
    """Three batches of 4 pairs, not the last of an epoch."""
    monkeypatch.setattr(batch_check, "Arriving", Flags)
    # the device knows no autocast, which the loss switches off
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(Flags, "asked", [])
    monkeypatch.setattr(Flags, "made", 0)
    torch.manual_seed(0)
    encoders = build_encoders(small_config(shared=EVERYTHING))
    model = AlignCLIPModel(encoders, AlignCLIPLoss(), chunk_size)
    model.count_flops()
    optimizer = build_optimizer(OptimizerConfig(), encoders)
    optimizer.register_step_post_hook(lambda *_: clamp_logit_scale_(encoders))
    _, text = small_batch(16)
    pairs = [
        {
            "image": torch.zeros(3, 32, 32, dtype=torch.uint8),
            "text": text[i],
            "semantic": torch.ones(5) * (i + 1),
            "sample": torch.tensor(i),
        }
        for i in range(16)
    ]

    def collate(samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = default_collate(samples)
        return batch | {"text_length": longest_text(batch["text"])}

    loader: DataLoader[Any] = DataLoader(cast(Any, pairs), batch_size=4, collate_fn=collate)
    device = Numberless()
    check = FiniteCheck(cast(ImageTextDataset, None), later=True)
    trainer = Trainer(
        logged,
        model=model,
        train_dataloader=DataSpec(loader, get_num_samples_in_batch=count_samples),
        optimizers=optimizer,
        max_duration="3ba",
        device=device,
        precision="fp32",
        progress_bar=False,
        log_to_console=False,
        callbacks=[check, TrainingMonitor(logged), SpeedMonitor(), *callbacks],
    )
    device.trains = True
    try:
        trainer.fit()
    finally:
        trainer.close()


@pytest.mark.parametrize("chunk_size", [0, 2])
def test_a_step_reads_nothing_of_the_device(
    monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    train(monkeypatch, chunk_size=chunk_size)
    # the flags of a batch are asked for when those of the next one are about to be made
    assert Flags.asked == [2, 1] * 3


UNREADABLE = (RuntimeError, NotImplementedError)


@pytest.mark.parametrize(
    ("logged", "callbacks"),
    [(EVERY_BATCH, ()), (NEVER, (Reading(),))],
    ids=["losses are logged", "a callback reads a number"],
)
def test_what_reads_the_device_is_found(
    monkeypatch: pytest.MonkeyPatch, logged: LoggedBatches, callbacks: tuple[Callback, ...]
) -> None:
    with pytest.raises(UNREADABLE, match="meta"):
        train(monkeypatch, logged, callbacks)


def test_a_stop_is_asked_for_among_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(flags: Tensor) -> list[bool]:
        asked.append(flags.device.type)
        return [False]

    monkeypatch.setattr("alignclip.training.callbacks.true_on_any_rank", answer)
    stop = StopOnSignal.__new__(StopOnSignal)  # without its handlers of signals
    stop._received, stop._signals = True, set()
    assert not stop.requested(cast(State, None))
    assert asked == ["cpu"]


def test_batches_whose_losses_are_logged() -> None:
    logged = LoggedBatches(interval=10, total=24)
    assert [batch for batch in range(1, 25) if logged.has(batch)] == [1, 10, 20, 24]
    assert all(map(EVERY_BATCH.has, range(1, 25)))


class Gap:
    """A gap of a GPU; nobody knows its length until the GPU has come to its end."""

    lengths: ClassVar[list[float]] = []
    known = False

    def __init__(self) -> None:
        self.length = Gap.lengths.pop(0)

    def end(self) -> None:
        """The length is known later."""

    def seconds(self) -> float | None:
        return self.length if Gap.known else None


def test_a_gpu_waits_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's wait counts only as far as the GPU stood still, and is known a batch later."""
    monkeypatch.setattr("alignclip.training.callbacks.DeviceGap", Gap)
    monkeypatch.setattr(Gap, "lengths", [0.25, 0.5])
    monitor, found = TrainingMonitor(NEVER), []
    timestamp = SimpleNamespace(batch=SimpleNamespace(value=2))
    state = cast(State, SimpleNamespace(device=SimpleNamespace(name="gpu"), timestamp=timestamp))
    logger = cast(Logger, SimpleNamespace(log_metrics=lambda metrics: None))
    for is_known in (False, True):
        monkeypatch.setattr(Gap, "known", is_known)
        monitor.before_dataloader(state, logger)
        monitor.after_dataloader(state, logger)
        monitor.batch_end(state, logger)
        found.append(monitor.waited)
    assert found == [0.0, 0.75]
