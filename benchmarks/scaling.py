"""Simulate what a run on many nodes reads, keeps and sends, by Streaming's own code.

- ``nodes``: the shards that a node downloads, how many of them it needs at one time (the least
  ``cache_limit`` with which nothing is downloaded twice), how many it waits for before its first
  batch, and from how many shards a batch comes.
- ``order``: the time and the memory in which each node makes an epoch's order.
- ``network``: bytes that a rank gets in a step, counted on this machine's loopback, beside what
  :mod:`alignclip.training.network` says.

A canonical node's samples are shuffled among themselves. So a node of a run with as many canonical
nodes as nodes reads what one node reads that is alone with its share of the shards. Sets that don't
fit into this machine's memory are simulated so; ``tests/test_scaling.py`` compares both ways.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measuring import (
    CHECKOUT,
    MEBIBYTE,
    Figures,
    Timing,
    in_a_process,
    parser_of,
    this_machine,
    timed,
)
from memory_counter import RankMemory
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

SHUFFLES = ("py1e", "py1br")  # data.shuffle_algo: the default, and the fastest by blocks
SCALING_PARTS = ("nodes", "order", "network", "memory")
RANKS = 8  # of a node
WORKERS = 8  # of a rank
SEED, EPOCH = 17, 0
SMALLEST_BLOCK, BLOCKS = 2**18, 4_000_000  # Streaming's default: BLOCKS / canonical nodes, at least
ORDER_SIZES = (1_000_000, 3_000_000, 10_000_000)
NETWORK_BATCH, NETWORK_WIDTH = 512, 512
MEMORY_PAIRS = 32  # of a rank
# 38 M parameters: a model that is larger than what a process takes besides
MEMORY_MODEL = (
    "model.embed_dim=512",
    "model.vision_cfg.width=512",
    "model.vision_cfg.layers=4",
    "model.vision_cfg.head_width=64",
    "model.text_cfg.width=512",
    "model.text_cfg.layers=4",
    "model.text_cfg.heads=8",
)
SCALING_FLAGS = {"batch": (64, "pairs of a rank")}
SCALING_EXAMPLES = """examples:
  python benchmarks/scaling.py
  python benchmarks/scaling.py --only nodes --batch 128"""


SETS = {"CC12M": 10_030_127, "LAION-400M": 400_000_000, "LAION-2B": 2_000_000_000}  # samples
# pictures of 256 pixels with their captions and embeddings: 33 kB a pair
SHARD, SHARD_BYTES = 2000, 66_000_000
# nodes, canonical nodes, samples of a block; None: as Streaming chooses
RUNS: tuple[tuple[int, int, int | None], ...] = (
    (1, 64, None),
    (1, 8, None),
    (1, 1, SMALLEST_BLOCK),
    (8, 64, None),
    (128, 64, None),
    (128, 128, None),
)
LARGEST = 64_000_000  # samples that are simulated: 8 bytes each, several times


@dataclass(frozen=True)
class NodeReads:
    """The reads of a node in an epoch.

    Attributes:
        shards: that the node downloads.
        open_at_once: the most shards that have been read from and will be read from again.
        before_first: shards of the first batch of all ranks.
        of_a_batch: the median number of shards that a batch of the node comes from.
        samples: of such a batch.
    """

    shards: int
    open_at_once: int
    before_first: int
    of_a_batch: float
    samples: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = parser_of("scaling.py", str(__doc__), SCALING_EXAMPLES, SCALING_FLAGS)
    parser.add_argument(
        "--only", nargs="+", choices=SCALING_PARTS, default=SCALING_PARTS, help="of the parts"
    )
    options = parser.parse_args(arguments)
    figures = Figures("scaling", options)
    print(this_machine())
    if "nodes" in options.only:
        show_nodes(options.batch)
    if "order" in options.only:
        show_order(figures)
    if "network" in options.only:
        show_network()
    if "memory" in options.only:
        show_memory()
    figures.write()
    return 0


def show_nodes(batch: int) -> None:
    """Print what a node reads, by set, nodes and canonical nodes."""
    print(f"\n{RANKS} ranks a node, {WORKERS} workers a rank, {batch} pairs a rank and step")
    print(
        "| set | nodes | canonical nodes | block | a node downloads | of the set "
        "| least cache_limit | shards before the first batch | shards of a node's batch |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, samples in SETS.items():
        for nodes, canonical, given in RUNS:
            block = given or max(BLOCKS // canonical, SMALLEST_BLOCK)
            reads = reads_of_a_node(samples, nodes, canonical, block, batch)
            if reads is not None:
                print(
                    f"| {name} | {nodes} | {canonical} | {block:,} "
                    f"| {gb(reads.shards * SHARD_BYTES)} "
                    f"| {100 * reads.shards / math.ceil(samples / SHARD):.3g} % "
                    f"| {gb(reads.open_at_once * SHARD_BYTES)} | {reads.before_first} "
                    f"| {reads.of_a_batch:.0f} of {reads.samples} pairs |"
                )


def reads_of_a_node(
    samples: int, nodes: int, canonical: int, block: int, batch: int
) -> NodeReads | None:
    """Simulate an epoch of the first node; None where a node's share is too large for that."""
    # groups of nodes that have no shard in common
    parts = 1 if samples <= LARGEST else min(nodes, canonical)
    if samples // parts > LARGEST:
        return None
    return simulate(samples // parts, SHARD, nodes // parts, canonical // parts, block, batch)


def shard_sizes(samples: int, shard: int) -> np.ndarray:
    """Return the samples of each shard; the last one has the rest."""
    sizes = np.full(math.ceil(samples / shard), shard, np.int64)
    sizes[-1] = samples - shard * (len(sizes) - 1)
    return sizes


def simulate(
    samples: int, shard: int, nodes: int, canonical: int, block: int, batch: int
) -> NodeReads:
    """Make the order of an epoch as Streaming does, and count what the first node reads.

    Args:
        samples: of the set.
        shard: samples of a shard.
        nodes: of the run.
        canonical: nodes by which the order is made.
        block: samples among which a shard is spread.
        batch: pairs of a rank.
    """
    sizes = shard_sizes(samples, shard)
    order = get_shuffle(SHUFFLES[0], sizes, canonical, SEED, EPOCH, block)
    ids = get_partitions("relaxed", samples, canonical, nodes, RANKS, WORKERS, batch)[0]
    # [ranks, workers, batches, pairs] -> a row a step
    steps = ids.transpose(2, 1, 0, 3).reshape(-1, RANKS * batch)
    steps = steps[(steps >= 0).all(axis=1)]
    shards = order[steps] // shard
    first = np.full(len(sizes), -1)
    last = np.full(len(sizes), -1)
    numbers = np.broadcast_to(np.arange(len(shards))[:, None], shards.shape)
    last[shards.ravel()] = numbers.ravel()  # of several the last counts
    first[shards.ravel()[::-1]] = numbers.ravel()[::-1]
    read = first >= 0
    opened = np.bincount(first[read], minlength=len(shards))
    closed = np.bincount(last[read] + 1, minlength=len(shards) + 1)[: len(shards)]
    some = shards[:: max(1, len(shards) // 100)]
    return NodeReads(
        shards=int(read.sum()),
        open_at_once=int((opened - closed).cumsum().max()),
        before_first=len(np.unique(shards[0])),
        of_a_batch=statistics.median(len(np.unique(row)) for row in some),
        samples=RANKS * batch,
    )


def show_order(figures: Figures) -> None:
    """Print what making an epoch's order takes; what the machine can't hold follows by size."""
    head = "".join(f" {algorithm}, s |" for algorithm in SHUFFLES)
    print(f"\n| samples |{head} memory | bytes a sample |\n|--:|{'--:|' * len(SHUFFLES)}--:|--:|")
    sizes = [size for size in SETS.values() if size > 10 * ORDER_SIZES[-1]]
    done: list[Timing] = []
    for samples in ORDER_SIZES:
        done = [in_a_process(time_order, samples, algorithm) for algorithm in SHUFFLES]
        memory = max(one.peak for one in done)
        print(
            f"| {samples:,} |{''.join(f' {one.seconds:.1f} |' for one in done)} "
            f"{memory / MEBIBYTE:,.0f} MiB | {memory / samples:.0f} |"
        )
    rates = [one.seconds / ORDER_SIZES[-1] for one in done]
    for algorithm, rate in zip(SHUFFLES, rates, strict=True):
        name = "order/time" if algorithm == SHUFFLES[0] else f"order/time/{algorithm}"
        figures.add(name, [rate * 1e6], "µs/sample", "lower")
    of_a_sample = max(one.peak for one in done) / ORDER_SIZES[-1]
    for samples in sizes:
        print(
            f"| {samples:,} (by size) |{''.join(f' {rate * samples:,.0f} |' for rate in rates)} "
            f"{gb(of_a_sample * samples)} | |"
        )


def time_order(samples: int, algorithm: str) -> Timing:
    """Make the order of an epoch for 8 nodes, and measure it."""

    def make() -> None:
        sizes = shard_sizes(samples, SHARD)
        ids = get_partitions("relaxed", samples, 64, 8, RANKS, WORKERS, 64)
        order = get_shuffle(algorithm, sizes, 64, SEED, EPOCH, SMALLEST_BLOCK)
        ids = np.where(ids != -1, order[ids], -1)
        resampled = np.arange(samples)  # Streaming's list of what an epoch draws from the streams
        np.where(ids != -1, resampled[ids], -1)

    return timed(make)


def show_network() -> None:
    """Print the bytes of a step, counted and by the formula."""
    print("\n| ranks | strategy | MB a rank and step, counted | by the formula | ratio |")
    print("|--:|---|--:|--:|--:|")
    for ranks in (2, 4):
        for fsdp in (False, True):
            counted, formula = network_of(ranks, fsdp)
            print(
                f"| {ranks} | {'FSDP2' if fsdp else 'DDP'} | {counted / 1e6:.2f} "
                f"| {formula / 1e6:.2f} | {counted / formula:.2f} |"
            )


def show_memory() -> None:
    """Print what a rank holds, counted and by the formulas."""
    print(
        "\n| ranks | strategy | weights | gradients | AdamW | sum ÷ the table's "
        "| peak | the dry run's | peak ÷ dry run's |"
    )
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    for ranks, fsdp in ((1, False), (2, False), (2, True), (4, False), (4, True)):
        found = memory_of(ranks, fsdp)
        table = 4 * found.parameters / (ranks if fsdp else 1)
        said = found.estimated.total
        parts = (found.weights, found.gradients, found.optimizer)
        print(
            f"| {ranks} | {'FSDP2' if fsdp else 'DDP' if ranks > 1 else 'none'} | "
            + " | ".join(f"{part / MEBIBYTE:,.0f} MiB" for part in parts)
            + f" | {found.held / table:.2f} | {found.peak / MEBIBYTE:,.0f} MiB "
            f"| {said / MEBIBYTE:,.0f} MiB | {found.peak / said:.2f} |"
        )


def memory_of(ranks: int, fsdp: bool) -> RankMemory:
    """Train a larger debug recipe, and count a rank's memory."""
    batch = f"global_train_batch_size={ranks * MEMORY_PAIRS}"
    settings = ["max_duration=4ba", batch, *MEMORY_MODEL]
    return RankMemory.parse(debug_run("memory_counter.MemoryCounter", ranks, fsdp, *settings))


def network_of(ranks: int, fsdp: bool) -> tuple[float, float]:
    """Train the debug recipe on several ranks, and count a step's bytes of a rank."""
    settings = [f"global_train_batch_size={NETWORK_BATCH}", f"model.embed_dim={NETWORK_WIDTH}"]
    found = debug_run("network_counter.LoopbackBytes", ranks, fsdp, *settings)
    counted, formula = map(float, found.split())
    return counted, formula


def debug_run(callback: str, ranks: int, fsdp: bool, *settings: str) -> str:
    """Train the debug recipe on several ranks; return what a callback of this folder writes."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found")
        more = [
            "max_duration=8ba",
            "scheduler.t_warmup=1ba",
            "save_folder=null",
            "autoresume=false",
            "data.streams.scenes.repeat=40",
            f"data.streams.scenes.local={CHECKOUT / 'tests/fixtures/debug/mds'}",
        ]
        if fsdp:
            more.append("parallelism_config.fsdp2.reshard_after_forward=true")
        composer = Path(sys.executable).with_name("composer")
        debug = (CHECKOUT / "yamls/debug.yaml").read_text(encoding="utf-8")
        yaml = Path(folder, "debug.yaml")
        counter = f"callbacks: {{{callback}: {{path: {found}}}}}"
        yaml.write_text(debug.replace("callbacks: {}", counter), encoding="utf-8")
        words = [composer, "-n", ranks, CHECKOUT / "pretrain.py", yaml, *more, *settings]
        subprocess.run(
            list(map(str, words)),
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return found.read_text(encoding="utf-8")


def gb(number: float) -> str:
    """Return bytes in GB."""
    return f"{number / 1e9:,.1f} GB" if number < 1e12 else f"{number / 1e12:,.2f} TB"


if __name__ == "__main__":
    sys.exit(main())
