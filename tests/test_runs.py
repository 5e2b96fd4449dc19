"""The main job end to end, against a real bucket: several processes, FSDP, kills and signals, one loss curve."""

from __future__ import annotations

import os
import re
import signal
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from runs import (
    RECORDING,
    TIMEOUT,
    gradient_error,
    launch,
    run,
    steps,
    wait_for,
    write_config,
    write_set,
)
from s3 import S3Server

pytestmark = pytest.mark.slow

STEPS = 40
GRADIENTS = {"ALIGNCLIP_TEST_GRADIENTS": "3"}
SLOWLY = {"ALIGNCLIP_TEST_STEP_SECONDS": "0.3"}
FSDP = "parallelism_config.fsdp2.reshard_after_forward=true"


@pytest.fixture(scope="module")
def dataset(s3: S3Server) -> str:
    """256 samples in a bucket: 16 steps an epoch, so 40 steps end in the middle of the third."""
    remote = f"{s3.bucket()}/pairs"
    write_set(remote)
    return remote


@pytest.fixture(scope="module")
def reference(s3: S3Server, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a run of one process that nothing ever disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    config = write_config(folder, dataset)
    run(RECORDING, folder / "records", config, "run_name=reference", cwd=folder, env=GRADIENTS)
    assert [r["step"] for r in steps(folder / "records")] == list(range(STEPS))
    return folder / "records"


def losses(records: Path) -> dict[int, tuple[float, ...]]:
    """Step → everything recorded; a step that was trained twice must have come out the same twice."""
    found: dict[int, tuple[float, ...]] = {}
    for r in steps(records):
        values = tuple(v for k, v in sorted(r.items()) if k not in ("step", "sharded"))
        assert found.setdefault(int(r["step"]), values) == values, (
            f"step {r['step']} differs when trained again"
        )
    return found


def assert_close(ours: Path, theirs: Path, tolerance: float) -> None:
    a, b = losses(ours), losses(theirs)
    assert a.keys() == b.keys() == set(range(STEPS))
    worst = max(abs(x - y) for step in a for x, y in zip(a[step], b[step], strict=True))
    assert worst <= tolerance


def latest(s3: S3Server, save_folder: str) -> int:
    """The batch that the bucket's ``latest`` names; 0 where there is none."""
    bucket, _, prefix = save_folder.removeprefix("s3://").partition("/")
    keys = s3.keys(save_folder)
    name = f"{prefix}/latest-rank0.pt.symlink"
    if name not in keys:
        return 0
    target = s3.client.get_object(Bucket=bucket, Key=name)["Body"].read().decode()
    assert target in keys, "latest names a checkpoint that isn't there"
    return int(target.rpartition("-ba")[2].split("-")[0])


def test_killed_twice_goes_on_bit_for_bit(
    s3: S3Server, dataset: str, reference: Path, tmp_path: Path
) -> None:
    save_folder = f"{s3.bucket()}/runs/killed"
    config = write_config(tmp_path, dataset, save_folder)
    arguments = (
        RECORDING,
        tmp_path / "records",
        config,
        "run_name=killed",
        "save_num_checkpoints_to_keep=2",
    )
    # in the first epoch, when `latest` has moved; in the second, at once, whatever is being uploaded
    for hold_at, saved in ((12, 10), (27, 0)):
        process = launch(*arguments, cwd=tmp_path, env={"ALIGNCLIP_TEST_HOLD_AT": str(hold_at)})
        wait_for(
            lambda at=hold_at: any(r["step"] == at for r in steps(tmp_path / "records")),
            process,
            tmp_path,
        )
        wait_for(lambda at=saved: latest(s3, save_folder) >= at, process, tmp_path)
        process.end()
    output = run(*arguments, cwd=tmp_path)
    assert "run 'killed' starts" in output
    assert re.search(r"run 'killed' goes on after batch 10, from the latest checkpoint", output)
    assert f"run 'killed' is done: 40 batches; checkpoints in {save_folder}" in output
    assert "Traceback" not in output
    recorded = [int(r["step"]) for r in steps(tmp_path / "records")]
    restarts = [b for a, b in pairwise(recorded) if b != a + 1]
    assert len(restarts) == 2, (
        "each kill should have cost the steps since the last checkpoint, and no more"
    )
    assert restarts[0] == 10
    assert 10 <= restarts[1] <= 25
    assert losses(tmp_path / "records") == losses(reference)
    names = [key.rpartition("/")[2] for key in s3.keys(save_folder)]
    assert sorted(n for n in names if n.endswith(".pt")) == [
        "ep2-ba35-rank0.pt",
        "ep2-ba40-rank0.pt",
    ]
    assert yaml.safe_load(_object(s3, save_folder, "config.yaml"))["run_name"] == "killed"
    # the same command once more: finished, and says so
    output = run(*arguments, cwd=tmp_path)
    assert "run 'killed' is finished" in output
    assert len(steps(tmp_path / "records")) == len(recorded)
    # another loss under the same name
    output = run(*arguments, "loss.beta=0.25", cwd=tmp_path, status=2)
    assert "loss.beta: 0.5 → 0.25" in output


def test_a_bucket_that_is_away_ends_nothing(
    s3: S3Server, dataset: str, reference: Path, tmp_path: Path
) -> None:
    """Checkpoints are written while there is no server for 20 seconds: they wait, and so does the end of the run."""
    save_folder = f"{s3.bucket()}/runs/away"
    config = write_config(tmp_path, dataset, save_folder)
    arguments = (RECORDING, tmp_path / "records", config, "run_name=away")
    process = launch(*arguments, cwd=tmp_path, env=SLOWLY)
    try:
        # then the whole set is in the cache, and the uploaders are there
        wait_for(lambda: latest(s3, save_folder) >= 5, process, tmp_path)
        wait_for(lambda: len(steps(tmp_path / "records")) >= 18, process, tmp_path)
        s3.stop()
        time.sleep(20)
        s3.start()
        assert process.wait(TIMEOUT) == 0, (tmp_path / "output.txt").read_text()[-6000:]
    finally:
        process.end()
        if not s3._answers():
            s3.start()
    assert losses(tmp_path / "records") == losses(reference)
    assert latest(s3, save_folder) == STEPS
    names = [key.rpartition("/")[2] for key in s3.keys(save_folder)]
    assert len([n for n in names if n.startswith("ep")]) == 8, "each checkpoint has arrived"


def _object(s3: S3Server, folder: str, name: str) -> str:
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    return s3.client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read().decode()


@pytest.mark.world_size(2)
def test_two_processes_are_one(dataset: str, reference: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, dataset)
    arguments = (
        RECORDING,
        tmp_path / "records",
        config,
        "run_name=two",
        "model.encode_chunk_size=3",
    )
    run(*arguments, processes=2, cwd=tmp_path, env=GRADIENTS)
    assert_close(tmp_path / "records", reference, 1e-5)
    for step in range(3):
        assert gradient_error(tmp_path / "records", reference, step) <= 1e-5


@pytest.mark.world_size(2)
def test_two_compiled_processes_in_chunks(dataset: str, reference: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, dataset)
    arguments = (
        RECORDING,
        tmp_path / "records",
        config,
        "run_name=compiled",
        "model.encode_chunk_size=3",
    )
    run(
        *arguments,
        "max_duration=6ba",
        "compile_config.backend=aot_eager",
        processes=2,
        cwd=tmp_path,
    )
    ours, theirs = losses(tmp_path / "records"), losses(reference)
    for step in range(5):  # of the warm-up, which doesn't depend on how long the run is
        assert ours[step] == pytest.approx(theirs[step], abs=1e-5)


@pytest.mark.world_size(2)
def test_fsdp_in_chunks(dataset: str, reference: Path, tmp_path: Path) -> None:
    """Over several steps: a gathered parameter that outlived its step would be an old one in the next."""
    config = write_config(tmp_path, dataset)
    arguments = (
        RECORDING,
        tmp_path / "records",
        config,
        "run_name=chunks",
        FSDP,
        "model.encode_chunk_size=3",
    )
    run(*arguments, "max_duration=6ba", processes=2, cwd=tmp_path, env=GRADIENTS)
    assert all(r["sharded"] == 35 for r in steps(tmp_path / "records"))
    ours, theirs = losses(tmp_path / "records"), losses(reference)
    for step in range(5):  # of the warm-up, which doesn't depend on how long the run is
        assert ours[step] == pytest.approx(theirs[step], abs=1e-5)
    for step in range(3):
        assert gradient_error(tmp_path / "records", reference, step) <= 1e-5


@pytest.mark.world_size(2)
def test_fsdp_stopped_by_sigterm_goes_on(
    s3: S3Server, dataset: str, reference: Path, tmp_path: Path
) -> None:
    """One of two FSDP processes gets SIGTERM; both save the same batch, and the run goes on from there."""
    save_folder = f"{s3.bucket()}/runs/fsdp"
    config = write_config(tmp_path, dataset, save_folder)
    arguments = (
        RECORDING,
        tmp_path / "records",
        config,
        "run_name=fsdp",
        FSDP,
        "save_interval=1000ba",
    )
    process = launch(*arguments, processes=2, cwd=tmp_path, env=GRADIENTS | SLOWLY)
    wait_for(lambda: len(steps(tmp_path / "records")) >= 6, process, tmp_path)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGTERM)
    try:
        assert process.wait(60) == 143, (tmp_path / "output.txt").read_text()[-4000:]
    finally:
        process.end()
    stopped_after = len(steps(tmp_path / "records"))
    assert stopped_after < STEPS
    assert latest(s3, save_folder) == stopped_after
    run(*arguments, processes=2, cwd=tmp_path, env=GRADIENTS)
    records = steps(tmp_path / "records")
    assert [r["step"] for r in records] == list(range(STEPS)), "no step lost, none trained twice"
    assert all(r["sharded"] == 35 for r in records)
    assert_close(tmp_path / "records", reference, 1e-5)
    for step in range(3):
        assert gradient_error(tmp_path / "records", reference, step) <= 1e-5
    # what is shared is shared in the checkpoint, too
    bucket, _, prefix = save_folder.removeprefix("s3://").partition("/")
    s3.client.download_file(bucket, f"{prefix}/ep2-ba40-rank0.pt", str(tmp_path / "last.pt"))
    weights = torch.load(tmp_path / "last.pt", weights_only=False)["state"]["model"]
    shared = [k for k in weights if k.startswith("encoders.visual.transformer.")]
    assert len(shared) == 24
    for key in shared:
        assert torch.equal(weights[key], weights[key.replace("visual.", "")])
    assert torch.equal(weights["encoders.visual.proj"], weights["encoders.text_projection"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_the_whole_group(
    s3: S3Server, dataset: str, reference: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """As a scheduler ends a job, or a terminal: launcher, ranks, data workers and uploaders all get the signal."""
    save_folder = f"{s3.bucket()}/runs/{number.name}"
    config = write_config(tmp_path, dataset, save_folder)
    arguments = (RECORDING, tmp_path / "records", config, "run_name=preempted")
    process = launch(*arguments, cwd=tmp_path, env={"ALIGNCLIP_TEST_HOLD_AT": "6"}, really=True)
    # from then on the uploaders are there: the launcher gives 30 s, and on a busy machine they need that to start
    wait_for(lambda: latest(s3, save_folder) == 5, process, tmp_path)
    (rank,) = psutil.Process(process.pid).children()
    process.signal_group(number)
    (tmp_path / "records" / "go-on").touch()
    psutil.wait_procs([rank], timeout=60)
    assert not rank.is_running()
    process.end()
    assert len(steps(tmp_path / "records")) == 8, "the batch after the signal is the last"
    assert latest(s3, save_folder) == 8
    run(*arguments, cwd=tmp_path)
    assert [r["step"] for r in steps(tmp_path / "records")] == list(range(STEPS))
    assert losses(tmp_path / "records") == losses(reference)
