"""The weight of the separation on a small set: retrieval, gap and margin by beta and batches.

Trains the model of ``yamls/quickstart.yaml`` with each beta, evaluates its checkpoints on a
held-out set, and prints a table. The sets are MDS sets of ``convert/cc12m.py``, the training set
with caption embeddings.

    python benchmarks/small_set.py --train data/train --test data/test
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from measuring import CHECKOUT

GAP_FIGURES = ("centroid_distance", "alignment_score", "margin", "effective_rank_image")
RECALL = ("image_retrieval_recall@5", "text_retrieval_recall@5")
SMALL_SET_EXAMPLES = """examples:
  python benchmarks/small_set.py --train data/train --test data/test
  python benchmarks/small_set.py --train data/train --test data/test --beta 0.5 \\
    --batch 64 256 --warmup 20 100"""


class SmallSetRun(NamedTuple):
    """A training run: weight of the separation, samples a step, steps of warm-up."""

    beta: float
    batch: int
    warmup: int

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"beta{self.beta:g}-batch{self.batch}-warmup{self.warmup}"


def main() -> None:
    """Train, evaluate, print."""
    options = parse()
    rows = []
    for each in itertools.product(options.beta, options.batch, options.warmup):
        run = SmallSetRun(*each)
        train_run(run, options)
        rows += [(run, step, evaluate_run(run, step, options)) for step in options.batches]
    shown = (*RECALL, *GAP_FIGURES)
    print(f"{'beta':>5} {'batch':>6} {'warm-up':>8} {'batches':>8}", end="")
    print("".join(f" {name:>{len(name) + 1}}" for name in shown))
    for run, step, found in rows:
        print(f"{run.beta:5g} {run.batch:6} {run.warmup:8} {step:8}", end="")
        print("".join(f" {found[name]:>{len(name) + 1}.3f}" for name in shown))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=SMALL_SET_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--train", required=True, type=Path, help="MDS set with embeddings")
    add("--test", required=True, type=Path, help="MDS set of other pairs")
    add("--beta", nargs="+", type=float, default=[0.0, 0.1, 0.5], help="weights of the separation")
    add("--batch", nargs="+", type=int, default=[256], help="samples a step")
    add("--warmup", nargs="+", type=int, default=[40], help="steps of warm-up")
    add(
        "--batches",
        nargs="+",
        type=int,
        default=[160, 320, 480],
        help="steps after which a run is evaluated",
    )
    add("--out", type=Path, default=Path("runs/small_set"), help="folder of the runs")
    return parser.parse_args()


def train_run(run: SmallSetRun, options: argparse.Namespace) -> None:
    """Train a run to the last of the steps, keeping a checkpoint of each."""
    interval = options.batches[0]
    run_command(
        "pretrain.py",
        CHECKOUT / "yamls" / "quickstart.yaml",
        f"run_name={run.name}",
        f"save_folder={options.out}/{run.name}",
        "data.streams.scenes=null",
        f"data.streams.small.local={options.train}",
        f"loss.beta={run.beta}",
        f"global_train_batch_size={run.batch}",
        f"scheduler.t_warmup={run.warmup}ba",
        f"max_duration={max(options.batches)}ba",
        f"save_interval={interval}ba",
        "save_num_checkpoints_to_keep=-1",
    )


def evaluate_run(run: SmallSetRun, step: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the metrics of a run's checkpoint after ``step`` batches."""
    (checkpoint,) = (options.out / run.name).glob(f"ep*-ba{step}-rank0.pt")
    out = options.out / run.name / f"evaluation-ba{step}"
    run_command(
        "evaluate.py",
        CHECKOUT / "yamls" / "evaluate.yaml",
        f"checkpoint={checkpoint}",
        "evaluators=null",
        "evaluators.pairs.task=gap",  # retrieval is part of the task
        f"evaluators.pairs.local={options.test}",
        "device=cpu",
        "precision=fp32",
        f"out={out}",
    )
    content = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found: dict[str, float] = content["results"]["model"]["pairs"]
    return found


def run_command(script: str, *arguments: object) -> None:
    """Run one of the project's commands."""
    words = [sys.executable, str(CHECKOUT / script), *map(str, arguments)]
    subprocess.run(words, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
