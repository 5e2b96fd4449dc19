"""A run that is killed in the middle of an epoch and goes on as another one would: with other
ranks, nodes, workers and strategies. Nothing of it is lost or doubled.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from conftest import Fuzz
from recorded_runs import RecordedRun
from runs import steps, write_set
from small_runs import EMA, SmallRuns, logged
from tracked import Points, in_file, in_tensorboard, in_wandb

from alignclip.evaluation.history import EVALUATIONS, records_in
from alignclip.evaluation.json_lines import lines_in
from alignclip.training.history import HISTORY
from alignclip.training.trackers import WANDB_ID
from alignclip.weights.safe_read import read_pickled

pytestmark = [pytest.mark.slow, pytest.mark.world_size(4)]

STEPS, EPOCH, SAMPLES, INTERVAL = 16, 8, 192, 3
FSDP = "parallelism_config.fsdp2.reshard_after_forward=true"
DROPOUT = ("model.vision_cfg.patch_dropout=0.5",)
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
FIXED = (
    f"max_duration={STEPS}ba", f"save_interval={INTERVAL}ba", "save_num_checkpoints_to_keep=-1",
    f"global_train_batch_size={SAMPLES // EPOCH}", "data.num_canonical_nodes=12",
)  # fmt: skip
# what trackers hold that doesn't depend on the clock
TIMELESS = ("loss/", "lr", "logit_scale", "metrics/", "time/batch", "time/sample", "time/epoch")


Shape = tuple[int, int, bool]


@dataclass(frozen=True)
class Start:
    """A start of a run.

    Attributes:
        ranks: of a node.
        workers: of the loader of a rank.
        fsdp: FSDP2 rather than DDP.
        nodes: launchers, all on this machine.
        dies_after: the step, from 0, after which all is killed; a float is seconds of training;
            None trains to the end.
    """

    ranks: int
    workers: int
    fsdp: bool = False
    nodes: int = 1
    dies_after: int | float | None = None

    @property
    def shape(self) -> Shape:
        """What the last digits of a run's numbers depend on."""
        return self.ranks, self.nodes, self.fsdp

    def settings(self) -> list[str]:
        return [f"data.num_workers={self.workers}", *([FSDP] if self.fsdp else [])]


ONE = Start(1, 0)


class ElasticRun(RecordedRun):
    """A run with two evaluators and all trackers."""

    def __init__(self, folder: Path, sets: Path, *settings: str) -> None:
        evaluators = {"e": "retrieval", "g": "gap"}
        more = [f"evaluators.{name}.task={task}" for name, task in evaluators.items()]
        for name in evaluators:
            more += [f"evaluators.{name}.local={sets / 'ev'}", f"evaluators.{name}.num_workers=0"]
        super().__init__(
            folder, str(sets / "set"), str(folder / "saved"), *FIXED, *more,
            "evaluators.e.interval=4ba", "evaluators.g.interval=1ep",
            f"loggers.TensorboardLogger.log_dir={folder / 'board'}",
            f"loggers.FileLogger.filename={folder}/log-{{rank}}.txt",
            "loggers.WandBLogger.project=x", "callbacks.LRMonitor={}", *settings,
        )  # fmt: skip
        self.began: list[tuple[int, Shape]] = []  # records that were there, for each start

    def start(self, start: Start) -> None:
        """Train until the start dies, or the run is done."""
        env = dict(OFFLINE)
        trained = len(self.numbers())
        self.began.append((trained, start.shape))
        if isinstance(start.dies_after, int):
            env["ALIGNCLIP_TEST_HOLD_AT"] = str(start.dies_after)
        elif start.dies_after is not None:
            env["ALIGNCLIP_TEST_STEP_SECONDS"] = "0.1"
        options = {"processes": start.ranks, "nodes": start.nodes, "env": env}
        if start.dies_after is None:
            self.run(*start.settings(), **options)
            return
        process = self.launch(*start.settings(), **options)
        if isinstance(start.dies_after, int):
            self.wait_for(lambda: start.dies_after in self.numbers()[trained:], process)
        else:
            if STEPS - 1 not in self.numbers():
                self.wait_for(lambda: len(self.numbers()) > trained, process)
                time.sleep(start.dies_after)
        process.end()

    def samples(self) -> dict[int, list[list[int]]]:
        """Step → the samples of all ranks, for each number of ranks and nodes that trained it."""
        found: dict[tuple[int, int, int], dict[int, list[int]]] = defaultdict(dict)
        for file in self.records.glob("samples-*.jsonl"):
            for line in file.read_text().splitlines():
                one = json.loads(line)
                of_rank = found[one["step"], one["ranks"], one["ranks_of_node"]]
                assert of_rank.setdefault(one["rank"], one["samples"]) == one["samples"]
        by_step: dict[int, list[list[int]]] = defaultdict(list)
        for (step, ranks, _), of_rank in found.items():
            if len(of_rank) == ranks:  # a kill may have come between two ranks
                by_step[step].append(sorted(one for part in of_rank.values() for one in part))
        return by_step

    def tracked(self) -> dict[str, Points]:
        points, ids = in_wandb(self.folder / "wandb")
        assert ids == {("x", self.store.read_text(WANDB_ID).strip())}
        assert [path.name for path in (self.folder / "board").iterdir()] == ["r"]
        return {
            "W&B": points,
            "TensorBoard": in_tensorboard(self.folder / "board" / "r"),
            "file": in_file(self.folder / "log-0.txt"),
        }


def assert_went_on(run: ElasticRun, whole: ElasticRun) -> None:
    """A run that was killed is the one that nothing disturbed: up to rounding, and exactly as long
    as its ranks and its strategy are the same.
    """
    numbers = run.numbers()
    assert sorted({*numbers}) == list(range(STEPS))
    restarts = [(before, after) for before, after in pairwise(numbers) if after != before + 1]
    assert len(restarts) < len(run.began)
    assert all(0 <= before + 1 - after <= INTERVAL for before, after in restarts), restarts
    (_, shape), *_ = whole.began
    changed_at = next((count for count, one in run.began if one != shape), len(numbers))
    reference = {r["step"]: r for r in steps(whole.records)}
    for number, record in enumerate(steps(run.records)):
        expected: Any = reference[record["step"]]
        if number >= changed_at:
            expected = pytest.approx(expected | {"sharded": record["sharded"]}, rel=0, abs=1e-5)
        assert record == expected
    assert_same_samples(run, whole)
    assert run.checkpoints() == whole.checkpoints()
    for name in run.checkpoints():
        assert_same_checkpoint(run, whole, name, exactly=changed_at == len(numbers))
    assert_same_tracks(run, whole)


def assert_same_samples(run: ElasticRun, whole: ElasticRun) -> None:
    samples = run.samples()
    expected = {step: groups[0] for step, groups in whole.samples().items()}
    for step in range(STEPS):
        assert samples[step], f"step {step} was trained by no complete group of ranks"
        assert all(one == expected[step] for one in samples[step])
    for first in range(0, STEPS, EPOCH):
        of_epoch = [one for step in range(first, first + EPOCH) for one in samples[step][0]]
        assert sorted(of_epoch) == list(range(SAMPLES)), "each sample of the epoch once"


def assert_same_checkpoint(run: ElasticRun, whole: ElasticRun, name: str, exactly: bool) -> None:
    """Weights, AdamW's moments and averages; under Adam equal losses don't show equal gradients."""
    ours, theirs = (read_pickled(Path(one.store.at(name)))["state"] for one in (run, whole))
    for part in ("model", "optimizers", "algorithms"):
        mine, other = (dict(tensors_of(state.get(part, {}))) for state in (ours, theirs))
        assert mine.keys() == other.keys()
        for key, tensor in mine.items():
            if torch.equal(tensor, other[key]):  # as infinities of a mask are
                continue
            difference = tensor.double() - other[key].double()
            error, scale = (one.square().mean().sqrt() for one in (difference, other[key].double()))
            # AdamW's step has the size of the rate however small a gradient is, and that of the
            # keys' bias is nothing but rounding
            least = 1e-4 if part != "optimizers" else 0.0
            assert not exactly, (name, part, key)
            assert error <= 1e-4 * scale + least, (name, part, key)
    assert ours["timestamp"]["Timestamp"]["sample"] == theirs["timestamp"]["Timestamp"]["sample"]


def tensors_of(content: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name.replace(".module", ""), content  # of DDP
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors_of(value, f"{name}.{key}")
    elif isinstance(content, (list, tuple)):
        for number, value in enumerate(content):
            yield from tensors_of(value, f"{name}.{number}")


def assert_same_tracks(run: ElasticRun, whole: ElasticRun) -> None:
    expected = whole.tracked()
    for name, points in run.tracked().items():
        doubled = [point for point, values in points.items() if len(values) > 1]
        assert not doubled, (name, doubled)
        ours, theirs = (
            {point: values[0] for point, values in one.items() if point[0].startswith(TIMELESS)}
            for one in (points, expected[name])
        )
        assert ours.keys() == theirs.keys(), (name, sorted(ours.keys() ^ theirs.keys()))
        differ = {p for p in ours if ours[p] != pytest.approx(theirs[p], rel=1e-3, abs=1e-5)}
        assert not {one for one in differ if "recall" not in one[0]}, name  # ranks may change
    evaluated = [
        [(one["batch"], one["evaluator"]) for one in records_in(each.store.read_text(EVALUATIONS))]
        for each in (run, whole)
    ]
    assert evaluated[0] == evaluated[1]
    lines = [line["batch"] for line in lines_in(run.store.read_text(HISTORY)) if "losses" in line]
    assert lines == list(range(1, STEPS + 1))


Wholes = Callable[..., ElasticRun]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_set(str(folder / "set"), SAMPLES)
    write_set(str(folder / "ev"), 32)
    return folder


@pytest.fixture(scope="module")
def wholes(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Wholes:
    """Runs that nothing disturbed, by their start and their settings."""
    known: dict[tuple[Any, ...], ElasticRun] = {}

    def whole(start: Start, *more: str) -> ElasticRun:
        if (start.shape, more) not in known:
            known[start.shape, more] = ElasticRun(tmp_path_factory.mktemp("whole"), sets, *more)
            known[start.shape, more].start(start)
        return known[start.shape, more]

    return whole


@pytest.mark.parametrize(
    ("starts", "more"),
    [
        pytest.param(
            [Start(1, 0, dies_after=4), Start(2, 3, fsdp=True, dies_after=9),
             Start(4, 1, dies_after=13), ONE],
            (), id="1, 2 under FSDP2, 4, 1",
        ),
        pytest.param(
            [Start(1, 1, dies_after=4), Start(2, 0, dies_after=9), Start(4, 3)], EMA,
            id="EMA on 1, 2, 4", marks=pytest.mark.full,
        ),
        pytest.param(
            [Start(1, 3, dies_after=4), Start(1, 0, nodes=3, dies_after=9),
             Start(2, 1, nodes=2, fsdp=True, dies_after=13), Start(2, 0)],
            (), id="nodes: 1, 3, 2", marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
def test_killed_and_gone_on_with_others(
    starts: list[Start], more: tuple[str, ...], sets: Path, wholes: Wholes, tmp_path: Path,
    fresh_wandb: None,
) -> None:  # fmt: skip
    run = ElasticRun(tmp_path, sets, *more)
    for start in starts:
        run.start(start)
    assert_went_on(run, wholes(ONE, *more))


def losses_until(batch: int, folder: Path, dataset: Path) -> list[float]:
    runs = SmallRuns(folder, dataset, folder / "saved", "scheduler.alpha_f=1.0", *EMA)
    return logged(runs.train(f"max_duration={batch}ba"))


def test_averages_stay_averages_on_other_ranks(dataset: Path, tmp_path: Path) -> None:
    """DDP has other names for a parameter than one process; EMA goes by names."""
    whole = losses_until(6, tmp_path / "whole", dataset)
    found = losses_until(2, tmp_path / "run", dataset)
    (of_two, _) = processes.run(2, losses_until, 4, tmp_path / "run", dataset)
    found += of_two + losses_until(6, tmp_path / "run", dataset)
    assert found == pytest.approx(whole, rel=0, abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("fsdp", "more"), [(False, EMA), (True, ())], ids=["DDP", "FSDP2"])
def test_where_nothing_changes_not_a_bit_does(
    fsdp: bool, more: tuple[str, ...], sets: Path, wholes: Wholes, tmp_path: Path, fresh_wandb: None
) -> None:
    """With random numbers on each rank, which choose the patches."""
    run = ElasticRun(tmp_path, sets, *more, *DROPOUT)
    for workers, dies_after in ((1, 4), (3, 9), (0, None)):
        run.start(Start(2, workers, fsdp, dies_after=dies_after))
    assert_went_on(run, wholes(Start(2, 0, fsdp), *more, *DROPOUT))


@pytest.mark.full
@pytest.mark.parametrize("number", range(6))
def test_killed_at_random(
    number: int, fuzz: Fuzz, sets: Path, wholes: Wholes, tmp_path: Path, fresh_wandb: None
) -> None:
    rng = fuzz.rng(number)
    more = EMA if rng.random() < 0.5 else ()
    run = ElasticRun(tmp_path, sets, *more)
    for _ in range(4):
        ranks, nodes = rng.choice([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 3)])
        fsdp = ranks * nodes > 1 and not more and rng.random() < 0.5  # FSDP2 refuses EMA
        start = Start(ranks, rng.choice((0, 1, 3)), fsdp, nodes, rng.uniform(0.1, 0.9))
        print(start)
        run.start(start)
    run.start(ONE)
    assert_went_on(run, wholes(ONE, *more))
