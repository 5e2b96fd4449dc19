"""The main job end to end, against a real bucket: several processes, FSDP, kills and signals,
one loss curve.
"""

from __future__ import annotations

import json
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
from recorded_runs import RecordedRun
from runs import TIMEOUT, steps, write_set
from s3 import S3Server
from warm_server import OUTLIVES

pytestmark = pytest.mark.slow

STEPS = 40
GRADIENTS = {"ALIGNCLIP_TEST_GRADIENTS": "3"}
SLOWLY = {"ALIGNCLIP_TEST_STEP_SECONDS": "0.3"}
CHUNKS = "model.encode_chunk_size=3"
FSDP = "parallelism_config.fsdp2.reshard_after_forward=true"


@pytest.fixture(scope="module")
def dataset(s3: S3Server) -> str:
    """256 samples in a bucket: 16 steps an epoch, so 40 steps end in the middle of the third."""
    remote = f"{s3.bucket()}/pairs"
    write_set(remote)
    return remote


@pytest.fixture(scope="module")
def reference(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """A run of one process that nothing ever disturbed."""
    reference = RecordedRun(tmp_path_factory.mktemp("reference"), dataset, None)
    reference.run(env=GRADIENTS)
    assert reference.numbers() == list(range(STEPS))
    return reference


def test_killed_twice_goes_on_bit_for_bit(
    s3: S3Server, dataset: str, reference: RecordedRun, tmp_path: Path
) -> None:
    save_folder = f"{s3.bucket()}/runs/killed"
    killed = RecordedRun(tmp_path, dataset, save_folder, "save_num_checkpoints_to_keep=2")
    # in the first epoch, when `latest` has moved; in the second, at once, whatever is being
    # uploaded
    for hold_at, saved in ((12, 10), (27, 0)):
        process = killed.launch(env={"ALIGNCLIP_TEST_HOLD_AT": str(hold_at)})
        killed.wait_for(lambda at=hold_at: at in killed.numbers(), process)
        killed.wait_for(lambda at=saved: killed.latest() >= at, process)
        process.end()
    output = killed.run()
    assert "run 'r' starts" in output
    assert re.search(r"run 'r' goes on after batch 10, from the latest checkpoint", output)
    assert f"run 'r' is done: 40 batches; checkpoints in {save_folder}" in output
    assert "Traceback" not in output
    recorded = killed.numbers()
    restarts = [b for a, b in pairwise(recorded) if b != a + 1]
    assert len(restarts) == 2, "each kill costs the steps since the last checkpoint, and no more"
    assert restarts[0] == 10
    assert 10 <= restarts[1] <= 25
    assert killed.losses() == reference.losses()
    assert killed.checkpoints() == ["ep2-ba35-rank0.pt", "ep2-ba40-rank0.pt"]
    assert yaml.safe_load(killed.store.read_text("config.yaml"))["run_name"] == "r"
    # the same command once more: finished, and says so
    assert "run 'r' is finished" in killed.run()
    assert killed.numbers() == recorded
    # another loss under the same name
    assert "loss.beta: 0.5 → 0.25" in killed.run("loss.beta=0.25", status=2)


def test_a_bucket_that_is_away_ends_nothing(
    s3: S3Server, dataset: str, reference: RecordedRun, tmp_path: Path
) -> None:
    """Checkpoints are written while there is no server: they wait, and so does the end of the
    run.
    """
    away = RecordedRun(tmp_path, dataset, f"{s3.bucket()}/runs/away")
    process = away.launch(env=SLOWLY)
    try:
        # then the whole set is in the cache
        away.wait_for(lambda: away.latest() >= 5, process)
        away.wait_for(lambda: len(away.numbers()) >= 18, process)
        s3.stop()
        away.wait_for(lambda: len(away.numbers()) == STEPS, process)
        time.sleep(3)
        assert process.poll() is None, "the end waits"
        s3.start()
        assert process.wait(TIMEOUT) == 0, away.output()
    finally:
        process.end()
        if not s3._answers():
            s3.start()
    assert away.losses() == reference.losses()
    assert away.latest() == STEPS
    assert len(away.checkpoints()) == 8, "each checkpoint has arrived"


@pytest.mark.world_size(2)
@pytest.mark.parametrize("how", ["", "compile_config.backend=aot_eager", FSDP])
def test_two_processes_in_chunks_are_one(
    dataset: str, reference: RecordedRun, tmp_path: Path, how: str
) -> None:
    """Over several steps: under FSDP a gathered parameter that outlived its step would be an old
    one in the next.
    """
    two = RecordedRun(tmp_path, dataset, None, CHUNKS, "max_duration=6ba", *filter(None, [how]))
    two.run(processes=2, env=GRADIENTS)
    assert {r["sharded"] for r in steps(two.records)} == {35 if how == FSDP else 0}
    # five steps of the warm-up, which doesn't depend on the run's length
    two.assert_close(reference, 5, gradients=0 if "compile" in how else 3)


@pytest.mark.world_size(2)
def test_fsdp_stopped_by_sigterm_goes_on(
    s3: S3Server, dataset: str, reference: RecordedRun, tmp_path: Path
) -> None:
    """One of two FSDP processes gets SIGTERM.

    Both save the same batch, and the run goes on from there.
    """
    settings = (FSDP, "save_interval=1000ba")
    fsdp = RecordedRun(tmp_path, dataset, f"{s3.bucket()}/runs/fsdp", *settings, processes=2)
    process = fsdp.launch(env=GRADIENTS | SLOWLY)
    fsdp.wait_for(lambda: len(fsdp.numbers()) >= 6, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGTERM)
    try:
        assert process.wait(60) == 143, fsdp.output()
    finally:
        process.end()
    stopped_after = len(fsdp.numbers())
    assert stopped_after < STEPS
    assert fsdp.latest() == stopped_after
    fsdp.run(env=GRADIENTS)
    assert fsdp.numbers() == list(range(STEPS)), "no step lost, none trained twice"
    assert all(r["sharded"] == 35 for r in steps(fsdp.records))
    fsdp.assert_close(reference, STEPS, 3)
    # what is shared is shared in the checkpoint, too
    fsdp.store.download("ep2-ba40-rank0.pt", tmp_path / "last.pt")
    weights = torch.load(tmp_path / "last.pt", weights_only=False)["state"]["model"]
    shared = [k for k in weights if k.startswith("encoders.visual.transformer.")]
    assert len(shared) == 24
    for key in shared:
        assert torch.equal(weights[key], weights[key.replace("visual.", "")])
    assert torch.equal(weights["encoders.visual.proj"], weights["encoders.text_projection"])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=["SIGTERM", "Ctrl-C", "SIGHUP"]
)
def test_a_signal_to_the_whole_group(
    s3: S3Server, dataset: str, reference: RecordedRun, tmp_path: Path, number: signal.Signals
) -> None:
    """As a scheduler ends a job, or a terminal: launcher, ranks and data workers all get the
    signal.
    """
    stopped = RecordedRun(tmp_path, dataset, f"{s3.bucket()}/runs/{number.name}")
    held = {"ALIGNCLIP_TEST_HOLD_AT": "6", OUTLIVES: "1"}
    process = stopped.launch(env=held, really=number == signal.SIGINT)
    try:
        stopped.wait_for(lambda: 6 in stopped.numbers(), process)
        stopped.wait_for(lambda: stopped.latest() == 5, process)
        (rank,) = psutil.Process(process.pid).children()
        process.signal_group(number)
        (stopped.records / "go-on").touch()
        psutil.wait_procs([rank], timeout=60)
        assert not rank.is_running()
    finally:
        process.end()
    assert len(stopped.numbers()) == 8, "the batch after the signal is the last"
    assert stopped.latest() == 8
    card = json.loads(stopped.store.read_text("run.json"))
    assert (card["status"], card["batch"], len(card["starts"])) == ("stopped by a signal", 8, 1)
    stopped.run()
    assert stopped.numbers() == list(range(STEPS))
    assert stopped.losses() == reference.losses()
    card = json.loads(stopped.store.read_text("run.json"))
    assert (card["status"], card["batch"], len(card["starts"])) == ("finished", STEPS, 2)
