"""A run that goes on: from the newest whole checkpoint, bit for bit, and without executing anything of a file."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import InMemoryLogger
from composer.utils import checkpoint, get_device
from runs import write_config, write_set
from s3 import S3Server

from alignclip.config.reading import load
from alignclip.errors import UserError
from alignclip.training import composer_patches
from alignclip.training.build import build_trainer
from alignclip.training.callbacks import Rotation
from alignclip.training.resume import starting_point
from alignclip.training.save_folder import SaveFolder
from alignclip.weights import checkpoint_file
from alignclip.weights.safe_read import read_pickled

FIXED = (
    "run_name=r",
    "max_duration=6ba",
    "save_interval=2ba",
    "data.num_workers=0",
    "scheduler.t_warmup=1ba",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "set"
    write_set(str(folder), 64)
    return folder


class Runs:
    """Runs of a tiny model in one save folder, in this process."""

    def __init__(self, dataset: Path, tmp_path: Path, save_folder: str) -> None:
        self.yaml, self.uri = write_config(tmp_path, str(dataset), save_folder), save_folder
        self.losses: list[list[float]] = []

    def build(self, *overrides: str) -> tuple[SaveFolder, Trainer]:
        config = load(self.yaml, [*FIXED, "loggers.InMemoryLogger={}", *overrides])
        folder = SaveFolder(config)
        folder.open()
        folder.check_config()
        return folder, build_trainer(config, get_device("cpu"), folder)

    def train(self, *overrides: str) -> dict[str, torch.Tensor]:
        """Train to the end and return the weights."""
        folder, trainer = self.build(*overrides)
        folder.write_config()
        try:
            trainer.fit()
        finally:
            composer_patches.close(trainer)
        (memory,) = [d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger)]
        self.losses.append([float(value) for _, value in memory.data["loss/train/total"]])
        return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


@pytest.fixture(params=["folder", "bucket"])
def runs(request: pytest.FixtureRequest, dataset: Path, tmp_path: Path, s3: S3Server) -> Runs:
    return Runs(
        dataset,
        tmp_path,
        f"{s3.bucket()}/run" if request.param == "bucket" else str(tmp_path / "runs"),
    )


def change(runs: Runs, s3: S3Server, name: str, how: Callable[[bytes], bytes]) -> None:
    if "://" not in runs.uri:
        path = Path(runs.uri, name)
        path.write_bytes(how(path.read_bytes()))
        return
    bucket = runs.uri.removeprefix("s3://").partition("/")[0]
    data = s3.client.get_object(Bucket=bucket, Key=f"run/{name}")["Body"].read()
    s3.client.put_object(Bucket=bucket, Key=f"run/{name}", Body=how(data))


def test_a_damaged_checkpoint_costs_an_interval_and_nothing_else(
    runs: Runs, s3: S3Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.train()
    change(
        runs,
        s3,
        "ep1-ba6-rank0.pt",
        lambda data: data[:5000] + bytes([data[5000] ^ 4]) + data[5001:],
    )
    capsys.readouterr()

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("torch.load is never called on resume")

    monkeypatch.setattr(torch, "load", refuse)
    again = runs.train()
    said = capsys.readouterr().out
    assert (
        "passed over ep1-ba6-rank0.pt (its checksum is wrong); the newest whole checkpoint is ep0-ba4"
        in said
    )
    assert runs.losses[1] == runs.losses[0][4:], "batches 5 and 6 once more, bit for bit"
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    folder, trainer = runs.build()
    composer_patches.close(trainer)
    assert trainer.state.timestamp.batch.value == 6
    assert folder.latest_target() == "ep1-ba6-rank0.pt"
    assert not Path("s3:").exists(), "nothing is downloaded into the working directory"


class Payload:
    """Pickles as a call."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def poisoned(path: Path, mark: Path, where: str, sealed: bool) -> None:
    """Put something that executes into a checkpoint, with a checksum or as an earlier version would have."""
    state = read_pickled(path)
    if where == "algorithm":  # which Composer evaluates
        text = f"BlurPool(__import__('os').system('touch {mark}'))"
        state["state"]["algorithms"] = [("BlurPool", {"repr": text})]
    elif where == "hidden":
        state["state"]["callbacks"]["SpeedMonitor"]["deep"] = [{"in": Payload(mark)}]
    else:
        state[where] = Payload(mark)
    if sealed:
        checkpoint_file.save(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("sealed", [True, False], ids=["with checksum", "without"])
@pytest.mark.parametrize("where", ["extra", "hidden", "algorithm"])
def test_a_run_that_goes_on_executes_nothing(
    dataset: Path, tmp_path: Path, where: str, sealed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(dataset, tmp_path, str(tmp_path / "runs"))
    runs.train("max_duration=2ba")
    mark = tmp_path / "executed"
    poisoned(tmp_path / "runs" / "ep0-ba2-rank0.pt", mark, where, sealed)
    with pytest.raises(
        UserError, match=r"runs/ep0-ba2-rank0.pt is refused.*could run code"
    ) as raised:
        runs.train()
    assert "\n" not in str(raised.value)
    assert not mark.exists()
    # nor with load_path
    with pytest.raises(UserError, match=r"ep0-ba2-rank0.pt is refused"):
        runs.train(
            f"load_path={tmp_path}/runs/ep0-ba2-rank0.pt",
            "run_name=other",
            f"save_folder={tmp_path}/other",
        )
    assert not mark.exists()


def test_an_algorithm_that_changes_the_model_is_still_applied(
    dataset: Path, tmp_path: Path
) -> None:
    """Composer adds to a run what its ``load_path`` was trained with; a plain call is harmless."""
    path = tmp_path / "a.pt"
    state = {
        "state": {
            "algorithms": [("BlurPool", {"repr": "BlurPool(replace_convs=True, min_channels=16)"})]
        }
    }
    checkpoint_file.save(state, path)
    assert composer_patches.read_checkpoint(path, "a.pt")["state"]["algorithms"][0][0] == "BlurPool"
    for text in (
        "BlurPool(*[f()])",
        "BlurPool(a=b)",
        "BlurPool(a=[f()])",
        "BlurPool()()",
        "x.BlurPool()",
        "1",
        "(",
    ):
        checkpoint_file.save({"state": {"algorithms": [("BlurPool", {"repr": text})]}}, path)
        with pytest.raises(UserError, match="could run code"):
            composer_patches.read_checkpoint(path, "a.pt")


def test_all_that_runs_have_is_plain(dataset: Path, tmp_path: Path) -> None:
    """Every algorithm and callback that keeps a state of its own goes on."""
    runs = Runs(dataset, tmp_path, str(tmp_path / "runs"))
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
    runs.train("max_duration=2ba", *more)
    runs.train(*more)
    assert len(runs.losses[1]) == 4


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "bucket"])
def test_load_path_is_read_whole_or_not_at_all(
    dataset: Path, tmp_path: Path, s3: S3Server, remote: bool
) -> None:
    first = Runs(
        dataset, tmp_path / "a", f"{s3.bucket()}/run" if remote else str(tmp_path / "runs")
    )
    first.train("max_duration=2ba")
    second = Runs(dataset, tmp_path / "b", str(tmp_path / "second"))
    for place in (f"{first.uri}/ep0-ba2-rank0.pt", f"{first.uri}/latest-rank0.pt"):
        _, trainer = second.build(f"load_path={place}")
        composer_patches.close(trainer)
        assert trainer.state.timestamp.batch.value == 2
        assert trainer.state.load_path == place
    for how in (lambda data: data[:-1000], lambda data: data[:9000] + b"\0\0\0\0" + data[9004:]):
        change(first, s3, "ep0-ba2-rank0.pt", how)
        with pytest.raises(
            UserError, match=r"load_path=.*ep0-ba2-rank0.pt is no whole checkpoint: it"
        ):
            second.build(f"load_path={first.uri}/ep0-ba2-rank0.pt")


def _origin(yaml: Path, overrides: list[str]) -> str:
    config = load(yaml, overrides)
    assert config.save_folder
    try:
        with starting_point(config, SaveFolder(config)) as origin:
            assert origin.path is not None
            return f"{origin.place} {origin.path.exists()} {read_pickled(origin.path)['state']['batch']}"
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "bucket"])
def test_rank_0_decides_for_all(tmp_path: Path, s3: S3Server, remote: bool) -> None:
    uri = f"{s3.bucket()}/run" if remote else str(tmp_path / "runs")
    yaml = write_config(tmp_path, str(tmp_path / "set"), uri)
    folder = SaveFolder(load(yaml, FIXED))
    for batch in (2, 4):
        checkpoint_file.save({"state": {"batch": batch}}, tmp_path / "made.pt")
        if batch == 4:
            (tmp_path / "made.pt").write_bytes((tmp_path / "made.pt").read_bytes()[:-9])
        folder.keep_file(tmp_path / "made.pt", f"ep0-ba{batch}-rank0.pt")
    folder.point_latest("ep0-ba4-rank0.pt")
    assert processes.run(2, _origin, yaml, list(FIXED)) == [f"{uri}/ep0-ba2-rank0.pt True 2"] * 2
    (tmp_path / "made.pt").write_bytes(b"")
    folder.keep_file(tmp_path / "made.pt", "ep0-ba2-rank0.pt")
    found = processes.run(2, _origin, yaml, list(FIXED))
    assert found[0] == found[1]
    assert "no checkpoint in" in found[0]


def test_what_is_expected_of_composer() -> None:
    """A newer Composer with other names or arguments would save and load past our functions."""
    save = inspect.getsource(checkpoint._save_checkpoint)
    assert "_write_checkpoint_file(state_dict, save_filename)" in save
    assert "assert os.path.exists(save_filename)" in save
    assert next(iter(inspect.signature(checkpoint.load_checkpoint).parameters)) == "path"
    load_source = inspect.getsource(checkpoint.load_checkpoint)
    assert "= download_checkpoint(" in load_source
    assert "= safe_torch_load(" in inspect.getsource(checkpoint._restore_checkpoint)
    assert "_torch_load_with_validation(" in inspect.getsource(composer_patches._composers_load)
    from composer.callbacks import CheckpointSaver

    saver = inspect.getsource(CheckpointSaver._save_checkpoint)
    assert "checkpoint.save_checkpoint(" in saver
    assert "self._upload_checkpoint(" in saver
    assert "self.latest_filename is not None" in saver
    from composer.core.engine import Engine

    assert "atexit.register(self._close" in inspect.getsource(Engine.__init__)


class Failing(Callback):
    """Fails at a batch, as a bug or a device would."""

    def batch_end(self, state: State, logger: object) -> None:
        if state.timestamp.batch.value == 3:
            raise ZeroDivisionError("the third batch")


def test_what_was_saved_before_an_error_arrives(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also into a bucket, with ``latest``; closing again says nothing, not even where no thread can be started."""
    folder, trainer = runs.build("save_num_checkpoints_to_keep=2")
    trainer.state.callbacks.append(Failing())
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    composer_patches.close(trainer)
    assert folder.latest_target() == "ep0-ba2-rank0.pt"
    for callback in trainer.state.callbacks:
        callback.post_close()


def test_rotation_after_python_has_begun_to_end(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = SaveFolder(load(write_config(tmp_path, str(dataset), str(tmp_path / "runs")), FIXED))
    rotation = Rotation(folder, 2)
    rotation._executor.shutdown()  # as threading's own end does
    rotation.post_close()
    rotation.post_close()
    assert caplog.text == ""


@pytest.mark.slow
def test_the_error_is_the_last_thing_on_the_screen(dataset: Path, tmp_path: Path) -> None:
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
    yaml = write_config(tmp_path, str(dataset), str(tmp_path / "runs"))
    command = [sys.executable, script, yaml, *FIXED, "save_num_checkpoints_to_keep=2"]
    ended = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 1
    assert ended.stderr.rstrip().endswith("ZeroDivisionError: the third batch"), ended.stderr[
        -3000:
    ]
    assert ended.stderr.count("Traceback") == 1
    assert "post_close" not in ended.stderr
