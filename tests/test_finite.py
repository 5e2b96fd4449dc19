"""Numbers that are not finite end a run before anything is saved over.

Nothing starts from such numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import processes
import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.utils import get_device
from models import refused
from runs import PRETRAIN, run, write_config
from small_runs import SMALL, SmallRuns, logged
from spoiled_runs import (
    FIXED,
    NORM,
    At,
    bad,
    look_later,
    runs_on,
    sound,
    write_embeddings,
)

import alignclip
from alignclip import ranks
from alignclip.errors import NOT_FINITE, NotFiniteError, UserError
from alignclip.training import build, composer_patches
from alignclip.training.command import main
from alignclip.training.resume import StartingPoint, check_loaded
from alignclip.training.save_folder import SaveFolder

pytestmark = pytest.mark.slow  # runs in process


@pytest.fixture(params=["at once", "later"])
def looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """When the host looks at a batch: at its end, or while the device trains the next one, as with
    a GPU.
    """
    if request.param == "later":
        look_later(monkeypatch.setattr)
    return str(request.param)


def end_of(runs: SmallRuns, *overrides: str, callbacks: tuple[Callback, ...] = ()) -> str:
    """Train to the end that a number that is not finite puts to it; what is said."""
    with pytest.raises(NotFiniteError) as error:
        runs.train(*overrides, callbacks=callbacks)
    assert "\n" not in str(error.value)
    return str(error.value)


def saved(tmp_path: Path) -> list[int]:
    """The batches of the checkpoints, all of which hold finite numbers, and ``latest`` is the
    newest.
    """
    files = {int(p.name.split("-")[1][2:]): p for p in (tmp_path / "runs").glob("ep*.pt")}
    for path in files.values():
        state = torch.load(path, map_location="cpu", weights_only=False)["state"]["model"]
        assert all(bool(value.isfinite().all()) for value in state.values()), path.name
    if files:
        assert (tmp_path / "runs" / "latest-rank0.pt").resolve() == files[max(files)].resolve()
    return sorted(files)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.usefixtures("looked_at")
def test_an_embedding_that_is_not_finite_ends_the_run(tmp_path: Path, value: float) -> None:
    runs = runs_on(tmp_path, bad(value, 20, 22))  # in the second batch of 16
    said = end_of(runs, "save_num_checkpoints_to_keep=2")
    assert said.startswith("batch 2: the loss is not finite: total nan, contrastive ")
    assert (
        "separation nan; samples 'k20', 'k22' have a caption embedding ('semantic') not finite; "
        in said
    )
    assert "the gradients of " in said
    assert said.endswith(
        "The run is saved up to batch 1; the same command goes on from there, once these samples "
        "are out of the set "
        "(convert/verify.py finds all of them)"
    )
    assert saved(tmp_path) == [1]


@pytest.mark.parametrize("batch", [0, 2, 3, 4])
@pytest.mark.usefixtures("looked_at")
def test_what_was_trained_before_is_saved(tmp_path: Path, batch: int) -> None:
    """In the first batch, in the middle of an epoch, at its end and at the beginning of the next.

    Once mended, the run goes on the same.
    """

    def spoil(state: State) -> None:
        state.batch["semantic"][:] = math.nan

    settings = "max_duration=6ba", "data.shuffle=true", "save_interval=100ba"
    runs = runs_on(tmp_path, sound, *settings)
    whole = logged(runs.train(f"save_folder={tmp_path / 'whole'}"))
    said = end_of(runs, callbacks=(At("batch_start", batch, spoil),))
    assert f"The run is saved up to batch {batch}" in said
    assert saved(tmp_path) == [batch]
    assert logged(runs.train()) == whole[batch:]


@pytest.mark.usefixtures("looked_at")
def test_older_checkpoints_stay(tmp_path: Path) -> None:
    runs = runs_on(tmp_path, bad(math.nan, 50))  # in the fourth batch
    said = end_of(runs, "save_num_checkpoints_to_keep=1", "save_interval=2ba")
    assert "saved up to batch 3" in said
    assert saved(tmp_path) == [2, 3]


@pytest.mark.usefixtures("looked_at")
def test_embeddings_that_are_not_needed_are_not_looked_at(tmp_path: Path) -> None:
    runs_on(tmp_path, bad(math.nan, 20)).train("loss.beta=0", "max_duration=4ba")
    assert saved(tmp_path) == [1, 2, 3, 4]


def spoil_gradient(state: State) -> None:
    parameter = state.model.encoders.get_parameter("transformer.resblocks.0.mlp.c_fc.weight")
    parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))


def spoil_step(state: State) -> None:
    """Loss and gradients are finite: nothing else would stop this checkpoint."""
    bias = state.model.encoders.ln_final.bias
    state.optimizers[0].register_step_post_hook(lambda *_: bias.data.fill_(math.nan))


def spoil_features(state: State) -> None:
    def hook(module: Any, inputs: Any, outputs: Any) -> Any:
        image, text, scale = outputs
        image = image.clone()
        image[5] = math.nan
        return image, text, scale

    state.model.encoders.register_forward_hook(hook)


C_FC = r"\((visual\.)?transformer\.resblocks\.0\.mlp\.c_fc\.weight\)"  # is one and the same
GRADIENT = (
    rf"not finite are the gradients of 1 of .*{C_FC}; the batch begins with sample 'k32'\. "
    r".*A lower optimizer\.lr"
)


@pytest.mark.parametrize(
    ("action", "override", "says"),
    [
        (spoil_gradient, FIXED[0], GRADIENT),
        (spoil_gradient, NORM, GRADIENT),  # clipping by the norm would spread it to all others
        (spoil_step, "non_finite=skip", "after the step not finite are the weights .*ln_"),
        (spoil_features, FIXED[0], "(?!.*text features).*sample 'k37' has image features not fin"),
    ],
)
@pytest.mark.usefixtures("looked_at")
def test_what_is_not_finite_is_named(
    tmp_path: Path, action: Callable[[State], None], override: str, says: str
) -> None:
    said = end_of(runs_on(tmp_path), override, callbacks=(At("batch_start", 2, action),))
    assert re.match(f"batch 3: {says}", said), said
    assert saved(tmp_path) == [1, 2]


def test_the_latest_checkpoint_is_not_finite(tmp_path: Path) -> None:
    """As an earlier version has left it: refused in a line, and the one before is used once it
    is gone.
    """
    runs = runs_on(tmp_path)
    runs.train("max_duration=3ba")
    newest = (tmp_path / "runs" / "latest-rank0.pt").resolve()
    content = torch.load(newest, weights_only=False)
    good = content["state"]["model"]["encoders.positional_embedding"].clone()
    content["state"]["model"]["encoders.positional_embedding"][0, 0] = math.nan
    torch.save(content, newest)
    said = r"latest checkpoint \(.*ba3-rank0.pt\) holds .* not finite .*: positional_embedding"
    with refused(said):
        runs.build()
    content["state"]["model"]["encoders.positional_embedding"] = good
    moments = content["state"]["optimizers"]["AdamW"]["state"]
    next(iter(moments.values()))["exp_avg_sq"].fill_(math.inf)
    torch.save(content, newest)
    with refused("the optimizer's state in the latest checkpoint .* exp_avg_sq"):
        runs.build()


def test_zeros_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_on(tmp_path, lambda i, semantic: semantic.fill(0) if i == 20 else None)
    runs.train("max_duration=8ba")
    said = [line for line in capsys.readouterr().err.splitlines() if "zeros" in line]
    assert said == ["sample 'k20' has a caption embedding of zeros: convert it again"]


def test_the_command_ends_with_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: object) -> int:
        raise NotFiniteError("batch 7: …")

    monkeypatch.setattr("alignclip.training.run.run", run)
    write_embeddings(tmp_path / "set", sound)
    with pytest.raises(SystemExit) as status:
        main([str(write_config(tmp_path, str(tmp_path / "set")))])
    assert status.value.code == NOT_FINITE == 3
    assert capsys.readouterr().err.splitlines()[-1] == "error: batch 7: …"


@pytest.mark.slow
def test_two_ranks_end_at_the_same_batch(tmp_path: Path) -> None:
    """The bad sample is the second rank's.

    The launcher ends with the same status, and the line stands there once.
    """
    write_embeddings(tmp_path / "set", bad(math.nan, 31))
    config = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
    text = run(
        PRETRAIN, config, *SMALL, *FIXED, processes=2, cwd=tmp_path / "work", status=NOT_FINITE
    )
    lines = [line for line in text.splitlines() if line.startswith("error: batch ")]
    assert lines
    assert len(set(lines)) == 1
    assert "sample 'k31' (rank 1) has a caption embedding" in lines[0]
    assert "begins with" not in lines[0]
    assert len(saved(tmp_path)) < 12


def _looks_later(folder: Path, *overrides: str) -> str:
    """What a run on several ranks ends with; the second rank's samples of batch 2 are bad."""
    look_later()
    runs = SmallRuns(folder / str(ranks.rank()), folder / "set", folder / "runs", *FIXED)
    config = runs.config(*overrides)
    save_folder = SaveFolder(config)
    ranks.run_on_rank_zero(save_folder.open)
    trainer = build.build_trainer(config, get_device("cpu"), save_folder)
    with pytest.raises(NotFiniteError) as error:
        trainer.fit()
    composer_patches.close(trainer)
    return str(error.value)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "parallelism", ["ddp_sync_strategy=single_auto_sync", "parallelism_config.fsdp2={}"]
)
def test_two_ranks_look_later(tmp_path: Path, parallelism: str) -> None:
    """The bad batch is the second of all: its step is skipped, on both ranks and on all parts."""
    write_embeddings(tmp_path / "set", bad(math.nan, 28))
    said = processes.run(2, _looks_later, tmp_path, parallelism)
    assert said[0] == said[1]
    assert "sample 'k28' (rank 0) has a caption embedding" in said[0]
    trained = int(said[0].partition(": ")[0].removeprefix("batch ")) - 1
    assert f"The run is saved up to batch {trained}" in said[0]
    assert saved(tmp_path) == list(range(1, trained + 1))


def test_weights_to_start_from_are_looked_at(tmp_path: Path) -> None:
    """``alignclip.load`` and ``pretrained`` alike."""
    runs = runs_on(tmp_path)
    runs.train("max_duration=2ba")
    path = (tmp_path / "runs" / "latest-rank0.pt").resolve()
    content = torch.load(path, weights_only=False)
    content["state"]["model"]["encoders.ln_final.weight"][0] = math.inf
    torch.save(content, path)
    with refused(r"holds numbers that are not finite .*: .*ln_"):
        alignclip.load(path)
    with refused(r"pretrained: .* holds numbers that are not finite"):
        runs.build(f"pretrained={path}", f"save_folder={tmp_path / 'other'}")


def _check_loaded() -> str:
    """What this rank says of a checkpoint of which rank 1 has the part that is not finite, as
    under FSDP2.
    """
    model = torch.nn.Linear(2, 2)
    if torch.distributed.get_rank() == 1:
        torch.nn.init.constant_(model.weight, math.nan)
    trainer = cast("Trainer", SimpleNamespace(state=SimpleNamespace(model=model, optimizers=[])))
    try:
        check_loaded(trainer, StartingPoint(Path("a.pt"), "runs/a.pt", goes_on=True))
    except UserError as error:
        return str(error)
    return "goes on"


def test_what_one_rank_finds_in_a_checkpoint_ends_all() -> None:
    """One that went on alone would wait for the other for ever."""
    found = processes.run(2, _check_loaded)
    assert found[0] == found[1]
    assert found[0].startswith(
        "the latest checkpoint (runs/a.pt) holds numbers that are not finite"
    )
