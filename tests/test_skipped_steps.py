"""``non_finite=skip``: a run goes on without the step of a batch that is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from composer import Trainer
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import get_device
from models import refused
from small_runs import EMA, SmallRuns, logged
from spoiled_runs import FIXED, NORM, bad, look_later, runs_on, sound, write_embeddings
from torch import Tensor

from alignclip import ranks
from alignclip.errors import NotFiniteError
from alignclip.ranks import local_part
from alignclip.training import build, composer_patches
from alignclip.training.batch_check import IN_A_ROW, SKIPPED, FiniteCheck
from alignclip.training.save_folder import SaveFolder
from alignclip.training.trainer import Trainer as OurTrainer

pytestmark = pytest.mark.slow  # runs in process

SKIP = ("non_finite=skip", "max_duration=6ba")
# without shuffling, of the first and the third batch of 16; the second epoch has the same batches
BAD_SAMPLES, BAD_BATCHES = (3, 40), (0, 2, 4)


def kept(state: State) -> Iterator[Tensor]:
    """All that a step changes: weights, the optimizer's state, averages; in a fixed order."""
    parameters = list(state.model.parameters())
    yield from parameters
    yield from state.model.buffers()
    (optimizer,) = state.optimizers
    for parameter in parameters:
        for _, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield value
    for algorithm in state.algorithms:
        if (model := getattr(algorithm, "ema_model", None)) is not None:
            yield from model.named_parameters_dict.values()


class Undone(Callback):
    """Takes the steps of some batches back, by copies of all that they change."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches
        self.copies: list[Tensor] = []
        self.has_state = False
        self.counts: list[Any] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        """Make copies."""
        self.has_state = bool(state.optimizers[0].state)
        self.copies = [one.detach().clone() for one in kept(state)]
        self.counts = [deepcopy(group.get("step")) for group in state.optimizers[0].param_groups]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Put the copies back."""
        if state.timestamp.batch.value - 1 not in self.batches:
            return
        if not self.has_state:
            state.optimizers[0].state.clear()
        for group, count in zip(state.optimizers[0].param_groups, self.counts, strict=True):
            group.pop("step", None)
            group |= {} if count is None else {"step": count}
        with torch.no_grad():
            for one, copy in zip(kept(state), self.copies, strict=True):
                one.copy_(copy)


def content(trainer: Trainer) -> list[Tensor]:
    return [local_part(one.detach()) for one in kept(trainer.state)]


def same(a: list[float], b: list[float], without: tuple[int, ...]) -> bool:
    """Whether two curves are equal but for some batches, where the first one is not finite."""
    assert [i for i, one in enumerate(a) if not math.isfinite(one)] == list(without)
    return all(i in without or a[i] == b[i] for i in range(max(len(a), len(b))))


@pytest.mark.parametrize(
    ("when", "settings"),
    [
        ("at once", (*EMA, NORM)),
        ("at once", ("model.encode_chunk_size=4",)),
        ("at once", ("optimizer.opt=lamb", "optimizer.betas=[0.9, 0.99]")),  # counts in its groups
        ("later", (NORM,)),
        ("later", ("model.encode_chunk_size=4",)),
    ],
)
def test_a_skipped_step_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    when: str,
    settings: tuple[str, ...],
) -> None:
    """The run, killed and gone on with, equals one whose steps are taken back at these batches."""
    if when == "later":
        look_later(monkeypatch.setattr)
    spoiled = runs_on(tmp_path / "a", bad(math.nan, *BAD_SAMPLES), *SKIP, *settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler")
        first = spoiled.train("max_duration=3ba")
    second = spoiled.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    expected = runs_on(tmp_path / "b", sound, *SKIP, *settings).train(
        callbacks=[Undone(*BAD_BATCHES)]
    )
    assert same(logged(first) + logged(second), logged(expected), BAD_BATCHES)
    for one, other in zip(content(second), content(expected), strict=True):
        assert torch.equal(one, other)
    assert logged(first, SKIPPED) + logged(second, SKIPPED) == [1, 2, 3]
    assert [line[:9] for line in said] == ["batch 1: ", "batch 3: ", "batch 5: "]
    assert "; sample 'k40' has a caption embedding" in said[1]
    assert said[1].endswith(". Its step is skipped (2 of this run so far)")


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """The same command goes on from there, and ends after as many again."""
    runs = runs_on(tmp_path, bad(math.nan, *range(0, 64, 4)), *SKIP, "max_duration=40ba")
    for trained in (IN_A_ROW - 1, 2 * (IN_A_ROW - 1)):
        with pytest.raises(NotFiniteError) as error:
            runs.train()
        said = f"{IN_A_ROW} batches in a row are not finite; batch {trained + 1}: the loss is not "
        assert str(error.value).startswith(said)
        assert f"The run is saved up to batch {trained}; the same command goes on" in str(
            error.value
        )


@pytest.mark.parametrize("when", ["at once", "later"])
def test_buffers_are_those_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """A batch norm's statistics take a batch up in the forward pass."""
    if when == "later":
        look_later(monkeypatch.setattr)
    trainer = runs_on(tmp_path, bad(math.nan, *BAD_SAMPLES), *SKIP).build()
    encoders = trainer.state.model.encoders
    encoders.register_buffer("seen", torch.zeros(()))
    encoders.register_forward_pre_hook(lambda *_: setattr(encoders, "seen", encoders.seen.add_(1)))
    trainer.fit()
    composer_patches.close(trainer)
    assert encoders.seen == 6 - len(BAD_BATCHES)


def test_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss is finite the scaler skips on its own; one that is not finite is said."""
    monkeypatch.setattr(OurTrainer, "_use_grad_scaling", lambda *_: True)
    trainer = runs_on(tmp_path, bad(math.nan, 40), *SKIP).build()
    state = trainer.state
    state.scaler, state._precision = torch.amp.GradScaler("cpu"), Precision.AMP_FP16
    copies: list[list[Tensor]] = []

    class Copying(Callback):
        def batch_end(self, state: State, logger: Logger) -> None:
            copies.append([one.detach().clone() for one in kept(state)])

    state.callbacks.append(Copying())
    spoil = state.model.encoders.ln_final.bias.register_hook
    hooks = [spoil(lambda gradient: gradient * (math.inf if len(copies) == 4 else 1))]
    trainer.fit()
    composer_patches.close(trainer)
    assert hooks
    taken = [not all(map(torch.equal, before, after)) for before, after in pairwise(copies)]
    assert taken == [True, False, True, False, True]
    assert logged(trainer, SKIPPED) == [1]
    assert state.scaler.get_scale() == 65536 / 4


def test_sam_is_refused(tmp_path: Path) -> None:
    with refused("non_finite=skip skips no step of algorithms.SAM"):
        runs_on(
            tmp_path, sound, "non_finite=skip", "algorithms.SAM={}", "autoresume=false"
        ).config()


def _trained(folder: Path, looks_later: bool, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a skipping run on several ranks has, and one whose steps are taken back."""
    if looks_later:
        look_later()
    found = []
    for name, callbacks in (("bad", []), ("good", [Undone(*BAD_BATCHES)])):
        runs = SmallRuns(
            *(folder / f"{name}{ranks.rank()}", folder / name, folder / f"{name}-runs"),
            *FIXED,
            *SKIP,
        )
        config = runs.config(*overrides)
        save_folder = SaveFolder(config)
        ranks.run_on_rank_zero(save_folder.open)
        trainer = build.build_trainer(config, get_device("cpu"), save_folder, callbacks)
        trainer.fit()
        composer_patches.close(trainer)
        found.append(trainer)
    bad_run, good_run = found
    (check,) = [c for c in bad_run.state.callbacks if isinstance(c, FiniteCheck)]
    return {
        "skipped": check.skipped,
        "losses": same(logged(bad_run), logged(good_run), BAD_BATCHES),
        "content": all(map(torch.equal, content(bad_run), content(good_run))),
        "number": len(content(bad_run)) - len(content(good_run)),
    }


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("later", "overrides"),
    [
        (False, ("ddp_sync_strategy=single_auto_sync", *EMA, NORM)),
        (True, ("ddp_sync_strategy=single_auto_sync", NORM, "model.encode_chunk_size=4")),
        (False, ("parallelism_config.fsdp2={}",)),
        (True, ("parallelism_config.fsdp2={}", NORM, "model.encode_chunk_size=4")),
    ],
)
def test_two_ranks_skip_alike(tmp_path: Path, later: bool, overrides: tuple[str, ...]) -> None:
    """A bad sample is one rank's, and no rank takes the step."""
    write_embeddings(tmp_path / "bad", bad(math.nan, *BAD_SAMPLES))
    write_embeddings(tmp_path / "good", sound)
    expected = {"skipped": 3, "losses": True, "content": True, "number": 0}
    assert processes.run(2, _trained, tmp_path, later, overrides) == [expected] * 2
