"""What docs/scaling.md says: the shares of nodes, the bytes of a step, the memory of a rank."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scaling
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

from alignclip.training.network import step_bytes

BLOCK = 4000


@pytest.mark.parametrize(("nodes", "canonical"), [(4, 4), (4, 8), (8, 4)])
def test_a_node_reads_what_one_does_that_is_alone_with_its_share(
    nodes: int, canonical: int
) -> None:
    """Of 800 shards a canonical node's end may lie in the middle of one."""
    parts = min(nodes, canonical)
    whole = scaling.simulate(160_000, 200, nodes, canonical, BLOCK, 16)
    share = scaling.simulate(160_000 // parts, 200, nodes // parts, canonical // parts, BLOCK, 16)
    assert whole.shards == pytest.approx(share.shards, abs=4)
    assert whole.open_at_once == pytest.approx(share.open_at_once, rel=0.15)
    assert whole.of_a_batch == pytest.approx(share.of_a_batch, rel=0.15)
    assert whole.samples == share.samples == 16 * scaling.RANKS


def test_what_a_node_reads_is_what_the_set_would_be_read_as() -> None:
    """Counted one sample at a time."""
    samples, shard, nodes, canonical, batch = 20_000, 50, 2, 4, 4
    found = scaling.simulate(samples, shard, nodes, canonical, BLOCK, batch)
    sizes = np.full(samples // shard, shard)
    order = get_shuffle("py1e", sizes, canonical, scaling.SEED, scaling.EPOCH, BLOCK)
    ids = get_partitions(
        "relaxed", samples, canonical, nodes, scaling.RANKS, scaling.WORKERS, batch
    )
    times: dict[int, list[int]] = {}
    for rank in ids[0]:
        for worker, batches in enumerate(rank):
            for number, one in enumerate(batches):
                step = number * scaling.WORKERS + worker
                for sample in one[one >= 0]:
                    times.setdefault(int(order[sample]) // shard, []).append(step)
    last_whole_step = max(max(steps) for steps in times.values())
    assert found.shards <= len(times) <= found.shards + 2
    open_at = [
        sum(min(steps) <= step <= max(steps) for steps in times.values())
        for step in range(0, last_whole_step, 10)
    ]
    assert max(open_at) <= found.open_at_once <= max(open_at) + 8
    assert found.before_first == sum(0 in steps for steps in times.values())


def test_the_bytes_of_a_step() -> None:
    alone = step_bytes(1000, ranks=1, pairs=64, width=32, semantic=16, fsdp=True)
    assert alone.all == 0
    two = step_bytes(1000, ranks=2, pairs=64, width=32, semantic=16, fsdp=False)
    assert two.features == 2 * (64 * 2 * 32) * 4
    assert two.captions == 64 * 16 * 4
    assert two.parameters == 2 * 0.5 * 1000 * 4
    spread = step_bytes(1000, ranks=4, pairs=32, width=32, semantic=16, fsdp=True)
    assert spread.parameters == 3 * 0.75 * 1000 * 4
    assert math.isclose(spread.all, spread.features + spread.captions + spread.parameters)


@pytest.mark.slow
@pytest.mark.alone  # others' bytes would be counted, too
@pytest.mark.parametrize("fsdp", [False, True])
def test_the_bytes_of_a_step_are_those_that_two_ranks_send(fsdp: bool) -> None:
    counted, formula = scaling.network_of(2, fsdp)
    assert counted == pytest.approx(formula, rel=0.1)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("fsdp", [False, True])
def test_the_memory_of_a_rank_is_that_of_the_table(fsdp: bool) -> None:
    found = scaling.memory_of(2, fsdp)
    parts = (found.weights, found.gradients, found.optimizer / 2)
    assert parts == pytest.approx([found.parameters / (2 if fsdp else 1)] * 3, rel=0.001)
    assert 1 < found.peak / found.estimated.total < 1.6  # what the allocator holds varies
