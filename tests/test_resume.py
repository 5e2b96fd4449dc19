"""A run that goes on: from the newest whole checkpoint, bit for bit, and without executing
anything of a file.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from composer.core import Callback, State
from composer.utils import checkpoint
from s3 import S3Server
from save_folders import Damage, Place, config_for, flipped, name_of
from small_runs import SmallRuns, logged

from alignclip.errors import UserError
from alignclip.storage import open_store
from alignclip.training import composer_patches
from alignclip.training.resume import read_checkpoint, starting_point
from alignclip.training.save_folder import SaveFolder
from alignclip.training.saver import CheckpointSaver
from alignclip.weights import checkpoint_file
from alignclip.weights.safe_read import read_pickled

pytestmark = pytest.mark.slow  # runs in process

FIXED = ("max_duration=6ba", "save_interval=2ba")


@pytest.fixture(params=["folder", "bucket"])
def runs(request: pytest.FixtureRequest, dataset: Path, tmp_path: Path, s3: S3Server) -> SmallRuns:
    uri = f"{s3.bucket()}/run" if request.param == "bucket" else str(tmp_path / "runs")
    return SmallRuns(tmp_path, dataset, uri, *FIXED)


@pytest.fixture
def local(dataset: Path, tmp_path: Path) -> SmallRuns:
    return SmallRuns(tmp_path, dataset, tmp_path / "runs", *FIXED)


def change(runs: SmallRuns, tmp_path: Path, name: str, how: Damage) -> None:
    """Damage a checkpoint of a run."""
    files, made = open_store(runs.uri), tmp_path / "made.pt"
    made.write_bytes(how(files.read_bytes(name)) or b"")
    files.put(made, name)


def test_a_damaged_checkpoint_costs_an_interval_and_nothing_else(
    runs: SmallRuns,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = runs.train()
    change(runs, tmp_path, "ep1-ba6-rank0.pt", lambda data: flipped(data, 5000))
    capsys.readouterr()

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("torch.load is never called on resume")

    monkeypatch.setattr(torch, "load", refuse)
    again = runs.train()
    says = (
        "passed over ep1-ba6-rank0.pt (its checksum is wrong); the newest whole checkpoint is "
        "ep0-ba4"
    )
    assert says in capsys.readouterr().out
    assert logged(again) == logged(whole)[4:], "batches 5 and 6 once more, bit for bit"
    weights = again.state.model.state_dict()
    assert all(
        torch.equal(weights[name], value) for name, value in whole.state.model.state_dict().items()
    )
    trainer = runs.build()
    composer_patches.close(trainer)
    assert trainer.state.timestamp.batch.value == 6
    folder = runs.folder()
    assert folder.latest_target() == "ep1-ba6-rank0.pt"
    assert not Path("s3:").exists(), "nothing is downloaded into the working directory"


class Payload:
    """Pickles as a call."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def poisoned(path: Path, mark: Path, where: str, sealed: bool) -> None:
    """Put something that executes into a checkpoint, with a checksum or as an earlier version
    would have.
    """
    state = read_pickled(path)
    if where == "algorithm":  # which Composer evaluates
        text = f"BlurPool(__import__('os').system('touch {mark}'))"
        state["state"]["algorithms"] = [("BlurPool", {"repr": text})]
    elif where == "hidden":
        state["state"]["callbacks"]["SpeedMonitor"]["deep"] = [{"in": Payload(mark)}]
    else:
        state[where] = Payload(mark)
    if sealed:
        checkpoint_file.write_checkpoint(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("sealed", [True, False], ids=["with checksum", "without"])
@pytest.mark.parametrize("where", ["extra", "hidden", "algorithm"])
def test_a_run_that_goes_on_executes_nothing(
    local: SmallRuns, tmp_path: Path, where: str, sealed: bool
) -> None:
    local.train("max_duration=2ba")
    path, mark = tmp_path / "runs" / "ep0-ba2-rank0.pt", tmp_path / "executed"
    poisoned(path, mark, where, sealed)
    with pytest.raises(
        UserError, match=r"runs/ep0-ba2-rank0.pt is refused.*could run code"
    ) as raised:
        local.train()
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"ep0-ba2-rank0.pt is refused"):
        local.train(f"load_path={path}", "run_name=other", f"save_folder={tmp_path}/other")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "is_plain"),
    [
        ("BlurPool(replace_convs=True, min_channels=16)", True),
        ("BlurPool(match=Event.FIT_START)", True),
        *dict.fromkeys(["BlurPool(*[f()])", "BlurPool(a=b)", "BlurPool(a=[f()])"], False).items(),
        *dict.fromkeys(["BlurPool()()", "x.BlurPool()", "1", "("], False).items(),
    ],
)
def test_an_algorithm_that_changes_the_model_is_still_applied(
    tmp_path: Path, text: str, is_plain: bool
) -> None:
    """Composer adds to a run what its ``load_path`` was trained with; a plain call is harmless."""
    state = {"model": {}, "algorithms": [("BlurPool", {"repr": text})]}
    checkpoint_file.write_checkpoint({"state": state}, tmp_path / "a.pt")
    if is_plain:
        assert read_checkpoint(tmp_path / "a.pt", "a.pt")["state"] == state
        return
    with pytest.raises(UserError, match="could run code"):
        read_checkpoint(tmp_path / "a.pt", "a.pt")


def test_all_that_runs_have_is_plain(local: SmallRuns) -> None:
    """Every algorithm and callback that keeps a state of its own goes on."""
    more = (
        "algorithms.EMA={half_life: 2ba, update_interval: 1ba}",
        "algorithms.GradientClipping={clipping_type: norm, clipping_threshold: 1.0}",
        "algorithms.WeightStandardization={}",
        "callbacks.LRMonitor={}",
        "callbacks.MemoryMonitor={}",
        "callbacks.RuntimeEstimator={}",
        "callbacks.SpeedMonitor={window_size: 2}",
        "callbacks.OptimizerMonitor={}",
        "train_subset_num_batches=4",
        "progress_bar=true",
    )
    local.train("max_duration=2ba", *more)
    assert len(logged(local.train(*more))) == 4


@pytest.mark.parametrize(
    ("setting", "left_out"),
    [
        ("save_ignore_keys=[state/optimizers, rng]", {"optimizers", "rng"}),
        ("save_weights_only=true", {"optimizers", "rng", "timestamp", "callbacks", "algorithms"}),
    ],
)
def test_what_a_checkpoint_leaves_out(
    local: SmallRuns, tmp_path: Path, setting: str, left_out: set[str]
) -> None:
    local.train("max_duration=2ba", "autoresume=false", setting)
    content = read_pickled(tmp_path / "runs" / "ep0-ba2-rank0.pt")
    assert {"model", "metadata"} <= content["state"].keys()
    assert not left_out & (content.keys() | content["state"].keys())


def test_load_path_is_read_whole_or_not_at_all(
    runs: SmallRuns, dataset: Path, tmp_path: Path
) -> None:
    runs.train("max_duration=2ba")
    second = SmallRuns(tmp_path / "b", dataset, tmp_path / "second", *FIXED)
    for place in (f"{runs.uri}/ep0-ba2-rank0.pt", f"{runs.uri}/latest-rank0.pt"):
        trainer = second.build(f"load_path={place}")
        composer_patches.close(trainer)
        assert trainer.state.timestamp.batch.value == 2
        assert trainer.state.load_path == place
    for how in (lambda data: data[:-1000], lambda data: data[:9000] + b"\0\0\0\0" + data[9004:]):
        change(runs, tmp_path, "ep0-ba2-rank0.pt", how)
        with pytest.raises(
            UserError, match=r"load_path=.*ep0-ba2-rank0.pt is no whole checkpoint: it"
        ):
            second.build(f"load_path={runs.uri}/ep0-ba2-rank0.pt")


def _start(folder: Path, uri: str) -> str:
    config = config_for(folder, uri)
    try:
        with starting_point(config, SaveFolder(config)) as start:
            assert start.path is not None
            return f"{start.place} {read_pickled(start.path)['state']['batch']}"
    except UserError as error:
        return str(error)


def test_rank_0_decides_for_all(runs: SmallRuns, tmp_path: Path) -> None:
    place = Place(tmp_path, runs.uri, batches=(2, 4))
    place.damage(4, lambda data: data[:-9])
    found = processes.run(2, _start, tmp_path, runs.uri)
    assert found == [f"{runs.uri}/{name_of(2)} 2"] * 2
    place.put(name_of(2), b"")
    found = processes.run(2, _start, tmp_path, runs.uri)
    assert found[0] == found[1]
    assert "no checkpoint in" in found[0]


def test_what_is_expected_of_composer() -> None:
    """A newer Composer with other names or arguments would save and load past our functions."""
    assert next(iter(inspect.signature(checkpoint.load_checkpoint).parameters)) == "path"
    load_source = inspect.getsource(checkpoint.load_checkpoint)
    assert "= download_checkpoint(" in load_source
    assert "= safe_torch_load(" in inspect.getsource(checkpoint._restore_checkpoint)
    from composer.core.engine import Engine

    assert "atexit.register(self._close" in inspect.getsource(Engine.__init__)


class Failing(Callback):
    """Fails at a batch, as a bug or a device would."""

    def batch_end(self, state: State, logger: object) -> None:
        if state.timestamp.batch.value == 3:
            raise ZeroDivisionError("the third batch")


def test_what_was_saved_before_an_error_arrives(
    runs: SmallRuns, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also into a bucket, with ``latest``.

    Closing again says nothing, not even where no thread can be started.
    """
    point_latest = SaveFolder.point_latest

    def slowly(folder: SaveFolder, name: str) -> None:
        time.sleep(0.5)  # the run fails meanwhile
        point_latest(folder, name)

    monkeypatch.setattr(SaveFolder, "point_latest", slowly)
    trainer = runs.build("save_num_checkpoints_to_keep=2")
    trainer.state.callbacks.append(Failing())
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    composer_patches.close(trainer)
    assert runs.folder().latest_target() == "ep0-ba2-rank0.pt"
    for callback in trainer.state.callbacks:
        callback.post_close()
    assert not caplog.text


def test_rotation_after_python_has_begun_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saver = CheckpointSaver(SaveFolder(config_for(tmp_path, str(tmp_path / "runs"))))
    saver._delivery.finish()  # as threading's own end does
    saver.post_close()
    saver.post_close()
    assert caplog.text == ""


@pytest.mark.slow
def test_the_error_is_the_last_thing_on_the_screen(local: SmallRuns, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from composer.core import Callback\n"
        "from alignclip.training import build\n"
        "from alignclip.training.command import main\n"
        "class Failing(Callback):\n"
        "    def batch_end(self, state, logger):\n"
        "        if state.timestamp.batch.value == 3: raise ZeroDivisionError('the third batch')\n"
        "made = build.build_callbacks\n"
        "build.build_callbacks = lambda *args: [*made(*args), Failing()]\n"
        "sys.exit(main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    command = [
        sys.executable,
        script,
        local.yaml,
        *local.settings,
        "save_num_checkpoints_to_keep=2",
    ]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("ZeroDivisionError: the third batch"), ended.stderr[
        -3000:
    ]
    assert ended.stderr.count("Traceback") == 1
    assert "post_close" not in ended.stderr
