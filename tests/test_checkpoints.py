from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from runs import write_config
from s3 import S3Server

from alignclip.config.reading import load, to_yaml
from alignclip.config.schema import RunConfig
from alignclip.errors import UserError
from alignclip.training.run_identity import identity_changes
from alignclip.training.save_folder import SaveFolder
from alignclip.weights.checkpoint_file import save


def config_for(folder: Path, save_folder: str, *overrides: str) -> RunConfig:
    return load(
        write_config(folder, str(folder / "set"), save_folder), ["run_name=first", *overrides]
    )


def put(s3: S3Server, uri: str, body: str | bytes) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    s3.client.put_object(
        Bucket=bucket, Key=key, Body=body.encode() if isinstance(body, str) else body
    )


def whole(folder: Path, batch: int) -> bytes:
    """The bytes of a checkpoint; the rotation counts whole ones only."""
    path = folder / "made" / f"{batch}.pt"
    save({"state": {"batch": batch}}, path)
    return path.read_bytes()


def test_rotation_keeps_the_newest_and_what_latest_names(s3: S3Server, tmp_path: Path) -> None:
    uri = f"{s3.bucket()}/runs/first"
    folder = SaveFolder(config_for(tmp_path, uri.replace("first", "{run_name}")))
    folder.open()
    assert folder.rotate(2) == [], "no checkpoint yet"
    for batch in (100, 900, 1000, 2000, 10000):
        put(s3, f"{uri}/ep0-ba{batch}-rank0.pt", whole(tmp_path, batch))
    put(s3, f"{uri}/config.yaml", "run_name: first")
    put(s3, f"{s3.bucket()}/ep0-ba1-rank0.pt", "somebody else's")
    assert folder.rotate(2) == [], "nothing goes before latest is there"
    put(s3, f"{uri}/latest-rank0.pt.symlink", "runs/first/ep0-ba2000-rank0.pt")
    assert sorted(folder.rotate(2)) == ["ep0-ba100-rank0.pt", "ep0-ba900-rank0.pt"]
    left = [key.rpartition("/")[2] for key in s3.keys(uri)]
    assert left == [
        "config.yaml", "ep0-ba1000-rank0.pt", "ep0-ba10000-rank0.pt", "ep0-ba2000-rank0.pt", "latest-rank0.pt.symlink",
    ]  # fmt: skip


def test_rotation_of_a_local_folder(tmp_path: Path) -> None:
    """Also of what the run saved before it was resumed, which Composer doesn't remember."""
    folder = SaveFolder(config_for(tmp_path, str(tmp_path / "runs")))
    folder.open()
    assert folder.rotate(2) == []
    (tmp_path / "runs").mkdir()
    for batch in (900, 1000, 2000, 10000, 100):
        (tmp_path / "runs" / f"ep0-ba{batch}-rank0.pt").write_bytes(whole(tmp_path, batch))
    (tmp_path / "runs" / "best-rank0.pt").touch()
    assert folder.rotate(2) == [], "nothing goes before latest is there"
    (tmp_path / "runs" / "latest-rank0.pt").symlink_to("ep0-ba2000-rank0.pt")
    assert sorted(folder.rotate(2)) == ["ep0-ba100-rank0.pt", "ep0-ba900-rank0.pt"]
    left = sorted(path.name for path in (tmp_path / "runs").glob("*.pt"))
    kept = ["ep0-ba1000-rank0.pt", "ep0-ba10000-rank0.pt", "ep0-ba2000-rank0.pt"]
    assert left == ["best-rank0.pt", *kept, "latest-rank0.pt"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_another_run_under_the_same_name_is_refused(
    s3: S3Server, tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    save_folder = str(tmp_path / "runs") if place == "local" else f"{s3.bucket()}/runs"
    first = SaveFolder(config_for(tmp_path, save_folder))
    first.open()
    first.write_config()
    # no checkpoint yet: nothing to protect
    changed = SaveFolder(config_for(tmp_path, save_folder, "loss.beta=1.0"))
    changed.open()
    changed.check_config()
    if place == "local":
        Path(save_folder, "ep0-ba5-rank0.pt").write_text("weights", encoding="utf-8")
        Path(save_folder, "latest-rank0.pt").symlink_to("ep0-ba5-rank0.pt")
    else:
        put(s3, f"{save_folder}/latest-rank0.pt.symlink", "runs/ep0-ba5-rank0.pt")
    with pytest.raises(UserError, match=r"loss\.beta: 0\.5 → 1\.0.*choose another run_name"):
        changed.check_config()
    other = SaveFolder(config_for(tmp_path, save_folder, "run_name=second"))
    other.open()
    with pytest.raises(UserError, match="is the folder of run 'first', not of 'second'"):
        other.check_config()
    # where and how fast may change
    faster = SaveFolder(
        config_for(
            tmp_path, save_folder, "data.num_workers=7", "max_duration=50ba", "precision=fp32"
        )
    )
    faster.open()
    faster.check_config()
    fresh = SaveFolder(config_for(tmp_path, save_folder, "autoresume=false"))
    fresh.open()
    with pytest.raises(UserError, match="holds checkpoints of run 'first' already"):
        fresh.check_config()


def test_differences_name_added_and_removed_keys() -> None:
    before = {
        "data": {"streams": {"a": {"remote": "s3://x", "local": "/1"}}},
        "algorithms": {},
        "precision": "fp32",
    }
    now = {
        "data": {"streams": {"a": {"remote": "s3://y", "local": "/2"}}},
        "algorithms": {"EMA": {"half_life": "1ba"}},
        "precision": "amp_bf16",
    }
    found = identity_changes(before, now)
    assert "data.streams.a.remote: s3://x → s3://y" in found
    assert "algorithms.EMA.half_life: not set → 1ba" in found
    assert not [line for line in found if "local" in line or "precision" in line]


def test_a_class_without_arguments_is_a_difference() -> None:
    before = {"algorithms": {"GradientClipping": {"clipping_type": "norm"}}}
    now = {"algorithms": {"GradientClipping": {"clipping_type": "norm"}, "EMA": None}}
    assert identity_changes(before, now) == ["algorithms.EMA: not set → None"]


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Settings that are new since then had what is their default now."""
    now = config_for(tmp_path, str(tmp_path / "runs"))
    before = yaml.safe_load(to_yaml(now))
    del (
        before["model"]["vision_cfg"]["timm_pool"],
        before["optimizer"]["layer_decay"],
        before["lock_image"],
    )
    assert identity_changes(before, yaml.safe_load(to_yaml(now))) == []
    before["model"]["embed_dim"] = 48
    assert identity_changes(before, yaml.safe_load(to_yaml(now))) == ["model.embed_dim: 48 → 32"]


def test_a_missing_bucket_and_missing_credentials_are_one_line(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"save_folder=s3://no-such-bucket-here/x: no such bucket"):
        SaveFolder(config_for(tmp_path, "s3://no-such-bucket-here/x")).open()
    bucket = s3.bucket()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="no credentials found"):
        SaveFolder(config_for(tmp_path, f"{bucket}/x")).open()


def test_checkpoints_without_latest_are_protected(tmp_path: Path) -> None:
    config = config_for(
        tmp_path, str(tmp_path / "runs"), "autoresume=false", "save_latest_filename=null"
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ep0-ba5-rank0.pt").write_text("weights")
    with pytest.raises(UserError, match="holds checkpoints of run 'first' already"):
        SaveFolder(config).check_config()


def test_a_local_set_is_the_set_and_a_cache_is_not() -> None:
    before = {"data": {"streams": {"a": {"remote": None, "local": "/1"}}}}
    now = {"data": {"streams": {"a": {"remote": None, "local": "/2"}}}}
    assert identity_changes(before, now) == ["data.streams.a.local: /1 → /2"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="save_folder=/proc/runs: No such file or directory"):
        SaveFolder(config_for(tmp_path, "/proc/runs")).open()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"save_folder=.*file/runs: "):
        SaveFolder(config_for(tmp_path, str(tmp_path / "file" / "runs"))).open()
