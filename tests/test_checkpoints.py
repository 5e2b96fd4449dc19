"""A save folder's checkpoints: whose they are, and which of them the rotation deletes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer.core import State
from composer.loggers import LoggerDestination
from s3 import S3Server
from save_folders import LATEST, Place, config_for, name_of
from small_runs import SmallRuns

from alignclip.config.reading import to_yaml
from alignclip.errors import UserError
from alignclip.training.run_identity import identity_changes
from alignclip.training.run_record import check_config, record_config
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.safe_read import read_pickled


@pytest.fixture(params=["folder", "bucket"])
def uri(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> str:
    return f"{s3.bucket()}/runs/first" if request.param == "bucket" else str(tmp_path / "runs")


def test_rotation_keeps_the_newest_and_what_latest_names(uri: str, tmp_path: Path) -> None:
    """Also of what the run saved before it was resumed, which Composer doesn't remember."""
    place = Place(tmp_path, uri, batches=())
    assert place.folder().rotate(2) == [], "no checkpoint yet"
    for batch in (100, 900, 1000, 2000, 10000):
        place.save(batch)
    others = {"config.yaml", "best-rank0.pt", "other/ep0-ba1-rank0.pt"}
    for name in others:
        place.put(name, b"run_name: first")
    assert place.folder().rotate(2) == [], "nothing goes before latest is there"
    place.point(name_of(2000))
    assert sorted(place.folder().rotate(2)) == [name_of(100), name_of(900)]
    latest = f"{LATEST}.symlink" if place.remote else LATEST
    left = {name_of(batch) for batch in (1000, 2000, 10000)}
    assert place.files.names() == left | others | {latest}


def test_another_run_under_the_same_name_is_refused(uri: str, tmp_path: Path) -> None:
    def check(*overrides: str) -> None:
        folder = SaveFolder(config_for(tmp_path, uri, *overrides))
        folder.open()
        check_config(folder)

    record_config(SaveFolder(config_for(tmp_path, uri)))
    check("loss.beta=1.0")  # no checkpoint yet: nothing to protect
    place = Place(tmp_path, uri, batches=(5,))
    with pytest.raises(UserError, match=r"loss\.beta: 0\.5 → 1\.0.*choose another run_name"):
        check("loss.beta=1.0")
    with pytest.raises(UserError, match="is the folder of run 'first', not of 'second'"):
        check("run_name=second")
    # where and how fast may change
    check("data.num_workers=7", "max_duration=50ba", "precision=fp32")
    with pytest.raises(UserError, match="holds checkpoints of run 'first' already"):
        check("autoresume=false")
    place.point(None)
    with pytest.raises(UserError, match="holds checkpoints of run 'first' already"):
        check("autoresume=false", "save_latest_filename=null")


STREAM = {"remote": "s3://x", "local": "/1"}
CLIPPING = {"GradientClipping": {"clipping_type": "norm"}}


def streams(**changes: Any) -> dict[str, Any]:
    return {"data": {"streams": {"a": STREAM | changes}}}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (streams(), streams(remote="s3://y"), ["data.streams.a.remote: s3://x → s3://y"]),
        (streams(), streams(local="/2"), []),  # a cache
        (
            streams(remote=None),
            streams(remote=None, local="/2"),
            ["data.streams.a.local: /1 → /2"],
        ),
        ({"precision": "fp32"}, {"precision": "amp_bf16"}, []),
        (
            {"algorithms": {}},
            {"algorithms": {"EMA": {"half_life": "1ba"}}},
            ["algorithms.EMA.half_life: not set → 1ba"],
        ),
        (
            {"algorithms": CLIPPING},
            {"algorithms": CLIPPING | {"EMA": None}},
            ["algorithms.EMA: not set → None"],
        ),
    ],
)
def test_what_makes_another_run(
    before: dict[str, Any], now: dict[str, Any], expected: list[str]
) -> None:
    assert identity_changes(before, now) == expected


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Settings that are new since then had what is their default now."""
    text = to_yaml(config_for(tmp_path, str(tmp_path / "runs")))
    before = yaml.safe_load(text)
    del before["model"]["vision_cfg"]["timm_pool"]
    del before["optimizer"]["layer_decay"], before["lock_image"]
    assert identity_changes(before, yaml.safe_load(text)) == []
    before["model"]["embed_dim"] = 48
    assert identity_changes(before, yaml.safe_load(text)) == ["model.embed_dim: 48 → 32"]


def test_a_place_that_cannot_be_written_is_one_line(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    bucket = s3.bucket()
    for place, says in {
        "s3://no-such-bucket-here/x": "save_folder=s3://no-such-bucket-here/x: no such bucket",
        "/proc/runs": "save_folder=/proc/runs: No such file or directory",
        str(tmp_path / "file" / "runs"): "save_folder=.*file/runs: ",
        f"{bucket}/x": "no credentials found",
    }.items():
        if place.startswith(bucket):
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(UserError, match=says):
            SaveFolder(config_for(tmp_path, place)).open()


class Copies(LoggerDestination):
    """Keeps the files that a run uploads, as WandBLogger's log_artifacts does."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def upload_file(
        self, state: State, remote_file_name: str, file_path: Path, *, overwrite: bool
    ) -> None:
        assert overwrite
        self.files[remote_file_name] = file_path.read_bytes()


@pytest.mark.slow
def test_loggers_that_keep_files_get_the_checkpoints_of_a_local_folder(
    dataset: Path, tmp_path: Path
) -> None:
    saved, copies = tmp_path / "saved", Copies()
    trainer = SmallRuns(tmp_path, dataset, saved, "save_interval=1ba").build("max_duration=2ba")
    trainer.logger.destinations = (*trainer.logger.destinations, copies)
    trainer.fit()
    trainer.close()
    paths = [saved / name_of(batch) for batch in (1, 2)]
    assert copies.files == {str(path).lstrip("/"): path.read_bytes() for path in paths}


def test_weights_alone_are_saved_without_gathering_the_optimizer(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    monkeypatch.setattr(State, "get_optim_state_dict", lambda _: pytest.fail("it is gathered"))
    runs = SmallRuns(tmp_path, dataset, tmp_path / "saved", "autoresume=false")
    runs.train("max_duration=2ba", "save_weights_only=true")
    content = read_pickled(tmp_path / "saved" / name_of(2))
    assert [*content] == ["state"]
    assert [*content["state"]] == ["model", "integrations", "metadata"]
    assert len(emptied) == 1, "GPUs have room for what ranks send when they gather"
