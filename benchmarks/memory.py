"""The memory of a run over epochs: of the main process and of its data workers.

Trains the model of ``yamls/debug.yaml`` on pairs whose captions have made-up words, so that each
batch brings new ones: more words in all than the tokenizer remembers. The workers live as long as
the run. Each epoch ends with an evaluation and a checkpoint. Measured is what is no file's and not
shared memory, at every eighth of an epoch; shown are medians of an epoch. What the last epoch has
more than the second one, a run of days would add epoch by epoch.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import get_device
from measuring import CHECKOUT, MEBIBYTE, Figures, parser_of, this_machine
from PIL import Image

from alignclip.config.reading import load
from alignclip.conversion.mds_writer import JoinedShardWriter
from alignclip.training import composer_patches
from alignclip.training.build import build_trainer
from alignclip.training.memory import own_bytes
from alignclip.training.save_folder import SaveFolder

LOOKS_AN_EPOCH = 8  # an epoch
NEW_WORDS = 8  # of a caption
MAIN, WORKERS = "main process", "data workers"
MEMORY_EXAMPLES = """examples:
  python benchmarks/memory.py                       # 3 epochs of 20,000 pairs
  python benchmarks/memory.py --epochs 20 --workers 4"""


class Watch(Callback):
    """Measures the processes of a run.

    Attributes:
        levels: MiB by epoch, of each kind of process.
    """

    def __init__(self, batches: int) -> None:
        self.levels: dict[str, list[list[float]]] = {MAIN: [], WORKERS: []}
        self._every = max(1, batches // LOOKS_AN_EPOCH)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Begin a list."""
        for levels in self.levels.values():
            levels.append([])

    def batch_end(self, state: State, logger: Logger) -> None:
        """Measure, where it is due."""
        if state.timestamp.batch_in_epoch.value % self._every:
            return
        workers = [process.pid for process in multiprocessing.active_children()]
        self.levels[MAIN][-1].append(own_bytes(os.getpid()) / MEBIBYTE)
        self.levels[WORKERS][-1].append(sum(own_bytes(pid or 0) for pid in workers) / MEBIBYTE)


def main() -> None:
    """Train, measure, print a table."""
    numbers = {
        "samples": (20_000, "pairs of an epoch"),
        "epochs": (3, "of the run"),
        "workers": (2, "of the loader"),
        "batch": (64, "pairs"),
    }
    parser = parser_of(
        "memory.py", str(__doc__), MEMORY_EXAMPLES, numbers, {"samples": 6000, "workers": 1}
    )
    options = parser.parse_args()
    figures = Figures("memory", options)
    print(f"{this_machine()}, torch {torch.__version__}")
    levels = train_epochs(options)
    print(f"\n{'MiB':14}" + "".join(f"{f'epoch {i + 1}':>10}" for i in range(options.epochs)))
    for whose, epochs in levels.items():
        medians = [statistics.median(epoch) for epoch in epochs]
        print(f"{whose:14}" + "".join(f"{median:10,.1f}" for median in medians))
        first, last = f"{whose}, epoch 2/memory", f"{whose}, epoch {options.epochs}/memory"
        figures.add(first, [medians[min(1, len(medians) - 1)]], "MiB", "lower")
        if options.epochs > 2:
            figures.add(last, [medians[-1]], "MiB", "lower")
            print(f"{'':14}last ÷ second {figures.add_ratio(last, first):.4f}")
    figures.write()


def train_epochs(options: Namespace) -> dict[str, list[list[float]]]:
    """Train as a run does; return MiB by epoch, of each kind of process."""
    torch.set_num_threads(1)
    watch = Watch(options.samples // options.batch)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "set")
        write_pairs(place, options.samples)
        settings = {
            "run_name": "memory",
            "save_folder": f"{folder}/saved",
            "max_duration": f"{options.epochs}ep",
            "global_train_batch_size": options.batch,
            "data.streams.scenes": "null",
            "data.streams.pairs.local": place,
            "data.num_workers": options.workers,
            "loss.beta": 0.0,  # needs no caption embeddings
            "evaluators.pairs.task": "gap",
            "evaluators.pairs.local": f"{CHECKOUT}/tests/fixtures/debug/mds",
            "evaluators.pairs.num_workers": 0,
            "progress_bar": "false",
        }
        words = [f"{name}={value}" for name, value in settings.items()]
        config = load(CHECKOUT / "yamls" / "debug.yaml", words)
        saved = SaveFolder(config)
        saved.open()
        trainer = build_trainer(config, get_device("cpu"), saved, [watch])
        try:
            trainer.fit()
        finally:
            composer_patches.close(trainer)
    return watch.levels


def write_pairs(out: Path, count: int) -> None:
    """Write a set of small pictures, and of captions whose words nobody has used before."""
    rng = random.Random(0)
    columns = {"key": "str", "image": "bytes", "caption": "str"}
    with JoinedShardWriter(columns, out, size_limit="1mb") as writer:
        for number in range(count):
            words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=7)) for _ in range(NEW_WORDS)]
            buffer = io.BytesIO()
            colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
            Image.new("RGB", (40, 40), colour).save(buffer, "JPEG")
            key = f"{number:08}"
            writer.write({"key": key, "image": buffer.getvalue(), "caption": " ".join(words)})


if __name__ == "__main__":
    main()
