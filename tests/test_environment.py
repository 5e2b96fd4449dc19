"""What a run was started with, and its record beside the checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from runs import RECORDING, run, steps, write_config, write_set
from s3 import S3Server

from alignclip.config import reading
from alignclip.config.schema import RunConfig
from alignclip.errors import UserError
from alignclip.runtime.environment import Git, Start, checkout, versions
from alignclip.training.run_identity import FREE_SETTINGS, IDENTITY_SECTIONS
from alignclip.training.run_record import add_start, record_config, starts_of
from alignclip.training.save_folder import SaveFolder


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_commit_of_the_checkout_that_the_code_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "repository" / "code"
    code.mkdir(parents=True)
    (code / "a.py").write_text("1")
    (code.parent / "pyproject.toml").write_text("")
    assert checkout(code) is None
    git(code.parent, "init")
    assert checkout(code) is None, "no commit yet"
    git(code.parent, "add", "code/a.py")
    git(code.parent, "commit", "-m", "first")
    commit = git(code, "rev-parse", "HEAD")
    (code.parent / "runs").mkdir()
    (code / "untracked.txt").write_text("")
    assert checkout(code) == Git(commit, dirty=False)
    (code / "a.py").write_text("2")
    assert checkout(code) == Git(commit, dirty=True)
    # an environment that lies in somebody's repository
    installed = code.parent / ".venv" / "alignclip"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("1")
    assert checkout(installed) is None
    # in a container, of another user's
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
        with pytest.raises(subprocess.CalledProcessError):
            git(code, "status")
        assert checkout(code) == Git(commit, dirty=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout(code) is None, "no git"


def test_a_start_names_the_commit_of_this_code() -> None:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("the tests are no checkout")
    found = Start(0, 1, "cpu").git
    assert found is not None
    assert found.commit == git(root, "rev-parse", "HEAD")


@pytest.mark.parametrize("owner", ["0", "1"])
@pytest.mark.parametrize("below", ["somebody's", "project's", "installed"])
def test_nothing_of_a_repository_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str, owner: str
) -> None:
    """What git would start for a repository's configuration, in one above an environment and in the
    project's own.
    """
    foreign, ran = tmp_path / "repository", tmp_path / "ran"
    code = foreign / {"somebody's": ".venv/src/alignclip", "installed": ".venv/alignclip"}.get(
        below, "alignclip"
    )
    code.mkdir(parents=True)
    (code / "a.py").write_text("1")
    (foreign / "other.py").write_text("1")
    if below != "installed":
        (code.parent / "pyproject.toml").write_text("")
    git(foreign, "init")
    git(foreign, "add", "other.py", *(["alignclip"] if below == "project's" else []))
    git(foreign, "commit", "-m", "first")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch '{ran}'\ncat\n")
    program.chmod(0o755)
    git(foreign, "config", "core.fsmonitor", str(program))
    git(foreign, "status")
    assert ran.exists(), "nothing would be run"
    ran.unlink()
    if (
        below != "project's"
    ):  # in the project's own repository git may clean files, as its person does
        git(foreign, "config", "filter.x.clean", str(program))
        (foreign / ".git" / "info").mkdir(exist_ok=True)
        (foreign / ".git" / "info" / "attributes").write_text("*.py filter=x\n")
        (foreign / "other.py").write_text("2")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", owner)
    found = checkout(code)
    assert (found is not None) == (below == "project's")
    assert not ran.exists()


def test_versions() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"mosaicml", "mosaicml-streaming", "timm", "open_clip_torch"} <= found.keys()


@pytest.mark.parametrize("place", ["local", "s3"])
def test_every_start_is_recorded(
    s3: S3Server, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = str(tmp_path / "runs") if place == "local" else f"{s3.bucket()}/runs"
    config = reading.load(write_config(tmp_path, str(tmp_path / "set"), uri), ["run_name=first"])
    folder = SaveFolder(config)
    folder.open()
    first = Start(0, 8, "NVIDIA H200")
    add_start(folder, first)
    add_start(folder, Start(5, 2, "cpu", git=None))
    assert capsys.readouterr().out == ""
    changed = {**first.versions, "torch": "9.9", "new": "1"}
    add_start(folder, Start(10, 2, "cpu", versions=changed))
    changes = f"new: not set → 1; torch: {first.versions['torch']} → 9.9"
    assert (
        capsys.readouterr().out
        == f"since the last start other versions were installed: {changes}\n"
    )
    written = json.loads(folder.files.read_text_optional("starts.json") or "")
    assert [(s["batch"], s["world_size"], s["device"]) for s in written] == [
        (0, 8, "NVIDIA H200"), (5, 2, "cpu"), (10, 2, "cpu"),
    ]  # fmt: skip
    assert written[0]["versions"] == first.versions
    assert written[2]["versions"] == changed
    assert written[1]["git"] is None
    assert written[0]["command"] == first.command
    assert datetime.now(timezone.utc) - datetime.fromisoformat(written[0]["time"]) < timedelta(
        minutes=10
    )
    # an entry that doesn't say what was installed
    git = {"commit": "c", "dirty": False, "branch": "of a later version"}
    early_start = {"batch": 0, "world_size": 2, "device": "cpu", "git": git}
    folder.files.write_text("starts.json", json.dumps([early_start]))
    add_start(folder, Start(15, 2, "cpu"))
    assert capsys.readouterr().out == ""
    early, last = starts_of(folder)
    assert (early.versions, early.command, last.changed) == ({}, "", [])
    for broken in ("[{", '{"a": 1}', "[1]"):
        folder.files.write_text("starts.json", broken)
        with pytest.raises(
            UserError, match=r"runs/starts\.json is no list of this run's starts; move it away"
        ):
            add_start(folder, first)
    if place == "local":
        assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["starts.json"]


@pytest.mark.slow
def test_a_run_is_run_again_from_what_it_left_in_the_bucket(s3: S3Server, tmp_path: Path) -> None:
    """Settings of the command line and of the file alike.

    The second one's losses are the first one's to the bit.
    """
    dataset, runs = f"{s3.bucket()}/pairs", f"{s3.bucket()}/runs"
    write_set(dataset, 64)
    config = write_config(tmp_path, dataset, f"{runs}/{{run_name}}")
    settings = [
        "max_duration=6ba",
        "save_interval=4ba",
        "loss.alpha=0.75",
        "optimizer.lr=0.002",
        "seed=3",
    ]
    settings += [
        "algorithms.EMA.half_life=2ba",
        "model.vision_cfg.patch_dropout=0.25",
        "model.shared.blocks=0",
    ]
    run(RECORDING, tmp_path / "first", config, "run_name=first", *settings, cwd=tmp_path / "a")
    config.unlink()
    arguments = [RECORDING, tmp_path / "again", f"{runs}/first/config.yaml"]
    said = run(*arguments, "run_name=again", cwd=tmp_path / "b")
    assert "run 'again' starts" in said
    first, again = steps(tmp_path / "first"), steps(tmp_path / "again")
    assert [record["step"] for record in first] == list(range(6))
    assert first == again
    # the record grows with a start that goes on
    run(*arguments, "run_name=again", "max_duration=8ba", cwd=tmp_path / "b")
    bucket, _, prefix = runs.removeprefix("s3://").partition("/")
    content = s3.client.get_object(Bucket=bucket, Key=f"{prefix}/again/starts.json")["Body"].read()
    starts = json.loads(content)
    assert [(start["batch"], start["world_size"], start["device"]) for start in starts] == [
        (0, 1, "cpu"),
        (6, 1, "cpu"),
    ]
    assert all("first/config.yaml run_name=again" in start["command"] for start in starts)
    assert starts[0]["versions"] == versions()


def test_a_configuration_in_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    bucket = s3.bucket()
    path = write_config(tmp_path, str(tmp_path / "set"))
    name = bucket.removeprefix("s3://")
    s3.client.put_object(Bucket=name, Key="tiny.yaml", Body=path.read_bytes())
    assert reading.load(f"{bucket}/tiny.yaml", ["seed=5"]) == reading.load(path, ["seed=5"])
    s3.client.put_object(Bucket=name, Key="a.yaml", Body=b"model: [")
    s3.client.put_object(Bucket=name, Key="weights.pt", Body=b"\xff\xfe\x00")
    for url, words in {
        f"{bucket}/none.yaml": (
            "can't read s3://.*/none.yaml: not found; check the bucket and the path"
        ),
        f"{bucket}/a.yaml": "a.yaml is not a YAML file",
        f"{bucket}/weights.pt": "weights.pt is no text file",
        f"s3:/{name}/tiny.yaml": f"has one slash; did you mean '{bucket}/tiny.yaml'",
        "sss://x/tiny.yaml": "can't read sss://x/tiny.yaml: ",
        f"data.streams.a.remote={bucket}/set": "the first argument is the YAML file",
    }.items():
        with pytest.raises(UserError, match=words):
            reading.load(url)


def test_a_start_keeps_what_has_changed(tmp_path: Path) -> None:
    """Settings that a run may change, evaluators included; and the machine."""

    def start(batch: int, world_size: int, *overrides: str) -> list[str]:
        path = write_config(tmp_path, str(tmp_path / "set"), str(tmp_path / "runs"))
        folder = SaveFolder(reading.load(path, ["run_name=first", *overrides]))
        folder.open()
        add_start(folder, Start(batch, world_size, "cpu"))
        record_config(folder)
        changed: list[str] = json.loads(
            (tmp_path / "runs" / "starts.json").read_text(encoding="utf-8")
        )[-1]["changed"]
        return changed

    assert start(0, 1) == []
    assert start(5, 1) == []
    more = ("max_duration=80ba", "precision=amp_bf16", "evaluators.e={task: retrieval, local: set}")
    changed = start(10, 2, *more)
    assert {"max_duration: 40ba → 80ba", "precision: fp32 → amp_bf16", "world_size: 1 → 2"} <= set(
        changed
    )
    assert "evaluators.e.task: not set → retrieval" in changed
    assert not any(
        line.startswith(("model", "loss", "data", "optimizer", "seed")) for line in changed
    )
    assert start(20, 2, *more) == []


def test_what_a_run_may_change_stands_in_the_documents() -> None:
    """Every setting is either another run's, or is one of those that docs/resume.md names."""
    page = (Path(__file__).parent.parent / "docs" / "resume.md").read_text(encoding="utf-8")
    may = page[page.index("These settings may change") : page.index("Anything else makes another")]
    named = {
        "`max_duration`": {"max_duration"},
        "`precision`": {"precision", "precision_config"},
        "`non_finite`": {"non_finite"},
        "evaluators": {"evaluators", "keep_best"},
        "callbacks and loggers": {
            "callbacks", "loggers", "auto_log_hparams", "log_traces", "profiler", "save_metrics",
        },
        "how often losses are logged": {"batch_log_interval"},
        "what is shown": {
            "progress_bar", "log_to_console", "console_log_interval", "python_log_level",
            "load_progress_bar",
        },
        "checkpoints": {"autoresume"} | {
            name for name in vars(RunConfig()) if name.startswith(("save_", "load_"))
        },
        "how the run computes": {
            "device", "parallelism_config", "ddp_sync_strategy", "dist_timeout",
            "deterministic_mode", "compile_config", "spin_dataloaders",
        },
    }  # fmt: skip
    for words in named:
        assert words in may, words
    free = set(vars(RunConfig())) - set(IDENTITY_SECTIONS) - {"run_name"}
    assert free == set().union(*named.values())
    for key in FREE_SETTINGS:
        assert key.startswith("data.") or f"`{key}`" in may, key
