"""A loss that jumps and a model that has collapsed are said, once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from composer.core import State
from spoiled_runs import At, runs_on, sound

from alignclip.training import alarms
from alignclip.training.alarms import ENOUGH, EQUAL, LASTING, WINDOW, Alarms

APART: dict[str, float | None] = {"image": 0.5, "text": 0.5}


def said(losses: list[float]) -> list[str]:
    alarm = Alarms()
    return [line for i, one in enumerate(losses, 1) for line in alarm.look(i, one, APART)]


def curve(batches: int, noise: float = 0.05) -> list[float]:
    """A loss that falls from 6 to 2, with noise."""
    rng = random.Random(0)
    return [2 + 4 * 0.99**i + rng.gauss(0, noise) for i in range(batches)]


def test_a_jump_is_said_once() -> None:
    losses = curve(600)
    losses[400:420] = [5.0] * 20  # one jump, of 20 batches
    losses[500] = 7.0  # another one
    found = said(losses)
    assert [line[:52] for line in found] == [
        "batch 401: the loss has jumped to 5; the median of t",
        "batch 501: the loss has jumped to 7; the median of t",
    ]
    assert f"the {WINDOW} batches before is 2.1" in found[0]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_an_ordinary_curve_says_nothing(noise: float) -> None:
    """Nor one near zero, nor one that leaves a plateau, nor the first batches."""
    assert said(curve(2000, noise)) == []
    rng = random.Random(0)
    assert said([abs(rng.gauss(0.01, 0.004)) for _ in range(2000)]) == []
    assert said([1.0] * (ENOUGH - 1) + [9.0]) == []


def test_a_new_level_becomes_usual() -> None:
    assert len(said([1.0] * 100 + [4.0] * 400)) == 1


def test_a_collapse_is_said_once() -> None:
    alarm, found = Alarms(), []
    spreads = [0.5] * 10 + [EQUAL / 10] * 300 + [0.5] + [EQUAL / 10] * (LASTING - 1)
    for i, one in enumerate(spreads, 1):
        found += alarm.look(i, 1.0, {"image": one, "text": None})
    assert len(found) == 1
    assert found[0].startswith(f"batch {10 + LASTING}: COLLAPSED: for {LASTING} batches the image ")


def test_images_that_look_alike_have_not_collapsed() -> None:
    alarm, alike = Alarms(), EQUAL / 2
    spreads = [alike] * 300 + [alike / 10] * LASTING
    found = [
        line for i, one in enumerate(spreads, 1) for line in alarm.look(i, 1.0, {"image": one})
    ]
    assert [line[:20] for line in found] == [f"batch {300 + LASTING}: COLLAPSED"[:20]]


def test_a_run_says_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(alarms, "ENOUGH", 3)
    monkeypatch.setattr(alarms, "LASTING", 3)

    def equal_images(state: State) -> None:
        state.batch["image"][:] = state.batch["image"][0]

    def large_scale(state: State) -> None:
        state.model.encoders.logit_scale.data.fill_(4.6)

    runs_on(tmp_path, sound, "optimizer.lr=1e-5").train(
        callbacks=[
            At("batch_start", 4, large_scale),
            *(At("batch_start", batch, equal_images) for batch in range(6, 12)),
        ]
    )
    found = [line[:30] for line in capsys.readouterr().out.splitlines() if line[:5] == "batch"]
    assert found == ["batch 5: the loss has jumped t", "batch 9: COLLAPSED: for 3 batc"]
