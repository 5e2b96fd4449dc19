"""A round of the soak in which a run is trained."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from processes import Started
from recorded_runs import RecordedRun
from runs import TIMEOUT, write_set
from soak_troubles import (
    PASSING,
    Round,
    Trouble,
    freeze_store,
    kill_all,
    kill_child,
    kill_grandchild,
    stop_store,
    strike,
    terminate,
    terminate_child,
)

from alignclip.errors import BAD_INPUT
from alignclip.evaluation.history import EVALUATIONS, records_in
from alignclip.evaluation.json_lines import lines_in
from alignclip.training.history import HISTORY
from alignclip.weights import checkpoint_file

STEPS = 40
SLOWLY = {"ALIGNCLIP_TEST_STEP_SECONDS": "0.1"}
LATEST_STRIKE = 9.0  # seconds: from the start of the ranks to the last step
MOST_STRIKES = 6
EMA = ("algorithms.EMA.half_life=2ba", "algorithms.EMA.update_interval=1ba")
EVALUATOR = (
    "evaluators.e.task=retrieval",
    "evaluators.e.num_workers=0",
    "evaluators.e.interval=10ba",
)
BEST = ("keep_best.metric=e/image_retrieval_recall@5",)
FSDP = "parallelism_config.fsdp2.reshard_after_forward=true"
TROUBLES: list[Trouble] = [
    kill_all, kill_all, kill_child, kill_grandchild, terminate, terminate_child, stop_store,
    freeze_store,
]  # fmt: skip
# what a run may leave beside its checkpoints
LEFT = re.compile(
    r"(ep\d+-ba\d+-rank0\.pt|best-rank0\.pt|latest-rank0\.pt\.symlink|config\.yaml|starts\.json|"
    r"run\.(json|md)|curves\.(html|png)|history\.jsonl|evaluations\.jsonl)"
)


def train_round(here: Round) -> None:
    """Train a run through its troubles, and compare it with one that nothing disturbed.

    Raises:
        AssertionError: something was lost, or a command hung.
    """
    rng = here.rng
    ranks = rng.choice((1, 1, 2))
    way = [FSDP] if ranks == 2 and rng.random() < 0.5 else []
    chunks = ["model.encode_chunk_size=3"] if rng.random() < 0.25 else []
    ema = list(EMA) if rng.random() < 0.5 and not way else []  # FSDP2 refuses EMA
    evaluates = rng.random() < 0.5
    dataset = _dataset(here)
    evaluation = [*EVALUATOR, f"evaluators.e.local={here.shared['evaluated']}"]
    interval = rng.choice((2, 3, 5, 7))
    keep = rng.choice((1, 2, 3))
    numbers = [*way, *chunks, *ema, *(evaluation if evaluates else [])]
    settings = [
        *numbers,
        *(BEST if evaluates else ()),
        f"save_interval={interval}ba",
        f"save_num_checkpoints_to_keep={keep}",
        f"data.num_workers={rng.choice((0, 1, 2))}",
    ]
    words = [f"{ranks} ranks", *(["FSDP2"] if way else []), *(["chunks"] if chunks else [])]
    words += [*(["EMA"] if ema else []), *(["evaluator"] if evaluates else [])]
    here.what = f"{', '.join(words)}, every {interval}ba, {keep} kept"
    reference = _reference(here, dataset, ranks, numbers)
    save_folder = f"{here.bucket()}/run"
    run = RecordedRun(here.folder / "run", dataset, save_folder, *settings, processes=ranks)
    _train(run, here)
    assert set(run.numbers()) == set(range(STEPS))
    assert run.losses() == reference.losses()
    assert_whole(run, keep)


def assert_whole(run: RecordedRun, keep: int) -> None:
    """The save folder has what it should have, each step once, and nothing half-written."""
    assert run.latest() == STEPS
    path = run.folder / "checked.pt"
    whole = [name for name in run.checkpoints() if damage_of(run, name, path) is None]
    assert len(whole) == keep, run.checkpoints()  # a cut one is left to whoever has cut it
    strange = [name for name in run.store.names() if not LEFT.fullmatch(name)]
    assert not strange, strange
    lines = lines_in(run.store.read_text(HISTORY))
    kept = [line["batch"] for line in lines if "losses" in line]
    assert all(before < after for before, after in pairwise(kept)), kept
    assert kept[-1] == STEPS
    records = records_in(run.store.read_text_optional(EVALUATIONS) or "")
    evaluated = [(one["evaluator"], one["batch"]) for one in records]
    assert len(evaluated) == len({*evaluated}), evaluated


def damage_of(run: RecordedRun, name: str, path: Path) -> str | None:
    run.store.download(name, path)
    return checkpoint_file.damage(path)


def _train(run: RecordedRun, here: Round) -> None:
    """Repeat the command until it is done, with a trouble each time for the first times."""
    while True:
        here.starts += 1
        before, trained = len(here.struck), len(run.numbers())
        process = run.launch(env=SLOWLY)
        try:
            status = _status(process, here)
        finally:
            process.end()
        if status == 0:
            return
        struck = here.struck[before:]
        assert struck, f"ended with {status} by itself: {run.output()}"
        if struck[-1] in {one.__name__ for one in PASSING}:
            # a start says at once that it can't reach the store; a run at work waits
            has_trained = len(run.numbers()) > trained
            assert status == BAD_INPUT, run.output()
            assert not has_trained, run.output()
        assert here.starts <= 2 * MOST_STRIKES, "the run doesn't come to its end"
        _cut_off_newest(run, here)


def _status(process: Started, here: Round) -> int:
    while len(here.struck) < MOST_STRIKES and here.rng.random() < 0.8:
        status = strike(process, here, TROUBLES, LATEST_STRIKE)
        if status is not None:
            return status
    return process.wait(TIMEOUT)


def _cut_off_newest(run: RecordedRun, here: Round) -> None:
    """Now and then, leave half of the newest checkpoint, where an older one is there."""
    names = sorted(run.checkpoints(), key=lambda name: int(name.split("-ba")[1].split("-")[0]))
    if len(names) < 2 or here.rng.random() > 0.15:
        return
    here.struck.append("cut_off_newest")
    path = here.folder / "cut.pt"
    run.store.download(names[-1], path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    run.store.put(path, names[-1])


def _dataset(here: Round) -> str:
    if "pairs" not in here.shared:
        here.shared["pairs"] = f"{here.server.bucket()}/pairs"
        write_set(here.shared["pairs"])
        here.shared["evaluated"] = here.folder.parent / "evaluated"
        write_set(str(here.shared["evaluated"]), 64)
    return str(here.shared["pairs"])


def _reference(here: Round, dataset: str, ranks: int, numbers: list[str]) -> RecordedRun:
    """Return the run of these settings that nothing disturbed, trained once."""
    known: dict[Any, RecordedRun] = here.shared.setdefault("references", {})
    key = (ranks, *numbers)
    if key not in known:
        folder = here.folder.parent / f"reference-{len(known)}"
        known[key] = RecordedRun(folder, dataset, None, *numbers, processes=ranks)
        known[key].run()
        assert known[key].numbers() == list(range(STEPS))
    return known[key]
