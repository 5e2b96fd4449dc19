"""Starts of a run: on a set that has changed, twice at a time, and with a YAML for each rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import processes
import pytest
from composer.core import Callback, State
from composer.loggers import Logger
from runs import write_set
from s3 import S3Server
from save_folders import config_for
from small_runs import SmallRuns
from test_save_faults import saver_of, wait_for_what_goes_on_beside_training

from alignclip import ranks
from alignclip.errors import UserError
from alignclip.runtime.environment import Start
from alignclip.training import composer_patches
from alignclip.training import run as training
from alignclip.training.preflight import check_inputs, check_same_settings
from alignclip.training.run import record_start
from alignclip.training.run_record import add_start
from alignclip.weights.checkpoint_file import NotSavedError


class StartedAgain(Callback):
    """Another process starts the run while this one trains the third batch."""

    def __init__(self, runs: SmallRuns) -> None:
        self.runs = runs

    def batch_end(self, state: State, logger: Logger) -> None:
        """Wait for what was saved before, and add the start."""
        if state.timestamp.batch == 3:
            wait_for_what_goes_on_beside_training(state, logger)
            add_start(self.runs.folder(), Start(0, 1, "cpu", process="7 on elsewhere"))


def test_a_set_converted_anew_is_another_run(tmp_path: Path) -> None:
    """It lies at the same place, and has as many samples."""
    runs = SmallRuns(tmp_path, tmp_path / "set", tmp_path / "saved")
    write_set(str(tmp_path / "set"), 64)
    assert training.run(runs.config("max_duration=2ba")) == 0
    check_inputs(runs.config(), runs.folder())
    shutil.rmtree(tmp_path / "set")
    write_set(str(tmp_path / "set"), 64, seed=1)
    with pytest.raises(UserError, match=r"data\.streams\.e \(.*set\) has other samples now"):
        training.run(runs.config("max_duration=4ba"))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_later_start_of_a_run_keeps_the_folder(
    s3: S3Server, tmp_path: Path, place: str
) -> None:
    """A node that was given up may still be at work: it neither moves ``latest`` nor rotates."""
    uri = str(tmp_path / "saved") if place == "local" else f"{s3.bucket()}/saved"
    write_set(str(tmp_path / "set"), 64)
    runs = SmallRuns(tmp_path, tmp_path / "set", uri, "save_interval=2ba", "max_duration=8ba")
    trainer = runs.build(callbacks=[StartedAgain(runs)])
    record_start(saver_of(trainer.state).save_folder, trainer, {})
    with pytest.raises(NotSavedError, match=r"was started again at .*, as process 7 on elsewhere"):
        trainer.fit()
    composer_patches.close(trainer)
    assert runs.folder().latest_target() == "ep0-ba2-rank0.pt"


def same_settings(folder: Path, setting: str) -> str:
    """What a rank hears whose command has one setting more than rank 0's."""
    config = config_for(folder, str(folder / "saved"), *[setting] * ranks.rank())
    try:
        check_same_settings(config)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.world_size(2)
def test_ranks_with_other_settings_don_t_train_together(tmp_path: Path) -> None:
    """As where one machine has an older YAML."""
    for setting in ("loss.beta=0.9", "save_interval=3ba"):
        for said in processes.run(2, same_settings, tmp_path, setting):
            assert "rank 1 has other settings than rank 0" in said
            assert setting.partition("=")[0] in said
    assert processes.run(2, same_settings, tmp_path, "data.num_workers=1") == ["", ""]
