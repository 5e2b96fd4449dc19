"""The drawn set, the loader alone, and a run through ``composer``, on one GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import islice

import numpy as np
from conversion import picture
from gpu_work import SEMANTIC, Failed, Work
from measuring import CHECKOUT

from alignclip.conversion.mds_writer import JoinedShardWriter
from alignclip.training.build import build_data
from alignclip.training.preflight import training_device

DIFFERENT = 200  # pictures
COLUMNS = {
    "key": "str",
    "image": "bytes",
    "caption": "str",
    "semantic": f"ndarray:float16:{SEMANTIC}",
}
CAPTION_WORDS = "a photo of the small red house near an old stone bridge in heavy summer rain"
IN_HAND = 3  # batches of a worker: one that it works on, and those that it has fetched ahead


def draw_set(work: Work) -> str:
    """Draw pictures as noisy as photographs, and write a set of pairs of them."""
    count, side = work.sizes.samples
    rng, words = np.random.default_rng(0), CAPTION_WORDS.split()
    pictures = [picture(rng, side, side * 4 // 3) for _ in range(min(DIFFERENT, count))]
    start = time.perf_counter()
    with JoinedShardWriter(COLUMNS, work.set_folder, size_limit="32mb") as writer:
        for number in range(count):
            caption = " ".join(rng.choice(words, int(rng.integers(4, 70))))
            semantic = rng.standard_normal(SEMANTIC, dtype=np.float32).astype(np.float16)
            image = pictures[number % len(pictures)]
            row = {"key": str(number), "image": image, "caption": caption, "semantic": semantic}
            writer.write(row)
    size = sum(map(len, pictures)) / len(pictures) / 1024
    return f"{count:,} samples of {size:.0f} KiB in {time.perf_counter() - start:.0f} s"


def loader(work: Work) -> str:
    """Measure the loader alone with several numbers of workers."""
    rates = {count: _loader_rate(work, count) for count in work.sizes.workers}
    said = ", ".join(f"{count}: {rate:,.0f}" for count, rate in rates.items())
    said = f"samples/s by workers: {said}"
    *_, before, most = rates.values()
    if work.is_cuda and most < before:
        raise Failed(f"{said}; more workers are slower")
    return said


def _loader_rate(work: Work, workers: int) -> float:
    """Return the samples a second of a loader, once its workers have no head start."""
    size = work.sizes.loaded
    head_start = IN_HAND * workers
    batches = 3 * head_start
    config = work.config(
        f"global_train_batch_size={size}",
        f"data.num_workers={workers}",
        f"data.epoch_size={batches * size}",
        "data.num_canonical_nodes=1",
    )
    loaded = iter(build_data(config, training_device("gpu" if work.is_cuda else "cpu")))
    for _ in islice(loaded, head_start):
        pass
    start, seen, times = time.perf_counter(), 0, []
    for _ in loaded:
        seen += 1
        times.append(time.perf_counter() - start)
    rate = seen * size / times[-1]
    return work.figures.add(f"loader, {workers} workers/rate", [rate], "samples/s", "higher")


def train(work: Work) -> str:
    """Measure the recipe as people run it."""
    return _train(work, "train")


def train_regional(work: Work) -> str:
    """Measure the same with blocks compiled one by one."""
    backend = "inductor" if work.is_cuda else "aot_eager"
    words = ("compile_config.regional=true", f"compile_config.backend={backend}")
    return _train(work, "train, regional", *words)


def _train(work: Work, name: str, *overrides: str) -> str:
    """Train by the launcher, and read the rates in the log of the run."""
    total, interval = work.sizes.trained
    size, workers = work.sizes.loaded, max(work.sizes.workers)
    words = work.words(
        f"global_train_batch_size={size}",
        f"data.num_workers={workers}",
        f"data.epoch_size={total * size}",
        "data.num_canonical_nodes=1",
        f"max_duration={total}ba",
        "scheduler.t_warmup=1ba",
        f"console_log_interval={interval}ba",
        "run_name=benchmark",
        *overrides,
    )
    recipe = CHECKOUT / "yamls" / f"{work.sizes.recipe}.yaml"
    script = str(CHECKOUT / "pretrain.py")
    command = [sys.executable, "-m", "composer.cli", "-n", "1", script, str(recipe)]
    start = time.perf_counter()
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=work.folder)
    seconds = time.perf_counter() - start
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.startswith("error: ")][-1:]
        print(done.stderr, file=sys.stderr)
        raise Failed(f"the run ended with status {done.returncode}; {''.join(last)}")
    lines = re.findall(
        r"batch ([\d,]+)/.*? ([\d,]+) samples/s, data wait (\d+) %", done.stdout + done.stderr
    )
    late = [line for line in lines if int(line[0].replace(",", "")) > interval]
    if not late:
        raise Failed(f"the run's log has no rates; it ends: {done.stderr.splitlines()[-1]}")
    rates = [float(rate.replace(",", "")) for _, rate, _ in late]
    waited = [float(share) for *_, share in late]
    rate = work.figures.add(f"{name}/rate", rates, "pairs/s", "higher")
    wait = work.figures.add(f"{name}/data wait", waited, "%", "lower")
    return f"{rate:,.0f} pairs/s, data wait {wait:.0f} %, the whole command {seconds:.0f} s"
