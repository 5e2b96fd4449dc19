"""What evaluation costs, in time and in memory, beside the plain way to the same numbers.

1. ``classifier``: ImageNet's zero-shot classifier, 80 prompts a class, from class names to vectors, tokenising
   included. Ours packs the prompts of all classes, sorts them by length and computes a batch up to its longest. The
   plain way is ``open_clip.build_zero_shot_classifier``, a class at a time, on a stock ``open_clip.CLIP`` of the same
   weights, which computes all 77 positions of every prompt. The weights are random: that changes neither cost nor
   whether the two agree. Fails where an entry of the two classifiers differs by ``LIMIT`` or more.
2. ``retrieval``: recall@1, 5 and 10 in both directions, 5 captions an image, of random features in which a caption
   resembles its image a little. Ours holds a block of its rows at a time. The plain way holds the whole matrix
   and takes the ten best of each row and column. Fails where a recall differs.

Every run is a process of its own, the two ways in turn, and is timed after a small warm-up; what is shown are medians.
CPU seconds are those of all threads: they say more than the clock where other programs run at the same time.
Peak memory is what a run adds to its process after imports, model, inputs and warm-up: resident memory on the CPU (as
``ru_maxrss``, but from Linux's ``/proc``, because a new process inherits the parent's ``ru_maxrss``), with what the C
library keeps of freed memory; PyTorch's allocations on a GPU.

    python benchmarks/evaluation.py                     # a few minutes on 2 cores, 20 of the classes
    python benchmarks/evaluation.py --classes 1000      # ImageNet's whole classifier
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.conversion.class_names import benchmark_lists, choose_templates
from alignclip.errors import UserError, one_line_errors

# alignclip's encoders are imported where they are used: open_clip takes seconds that retrieval does without

CAPTIONS = 5  # an image
DIM = 512  # of the features in retrieval
KS = (1, 5, 10)
LIMIT = {
    "fp32": 1e-5,
    "amp_bf16": 1e-2,
}  # bf16 rounds to three digits, a little differently in another batch

EXAMPLES = """examples:
  python benchmarks/evaluation.py
  python benchmarks/evaluation.py --only classifier --classes 1000 --width 512 --layers 12 --precision amp_bf16
  python benchmarks/evaluation.py --only retrieval --block 64 --repeats 5
  python benchmarks/evaluation.py --classes 5 --width 64 --layers 2 --images 200 --repeats 1    # does it run?"""


@dataclass(frozen=True)
class Options:
    """The command line."""

    only: str | None
    repeats: int
    device: str
    precision: str
    classes: int
    width: int
    layers: int
    batch_size: int
    images: int
    block: int

    @property
    def autocast(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "amp_bf16" else None


@dataclass(frozen=True)
class Run:
    """One timed run: ``peak`` in bytes; ``result`` without tensors, which would travel in shared memory."""

    seconds: float
    cpu_seconds: float
    peak: int
    result: Any


# the work: each returns a warm-up and what is timed


def prepare_classifier(options: Options, ours: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import open_clip

    from alignclip.config.schema import ModelConfig, TextConfig, VisionConfig
    from alignclip.evaluation.encoding import Encoder
    from alignclip.evaluation.zero_shot import build_classifier
    from alignclip.model.encoders import build_encoders

    names, templates = prompts(options)
    vision = VisionConfig(image_size=32, patch_size=32, width=64, layers=1)  # not used
    text = TextConfig(width=options.width, heads=options.width // 64, layers=options.layers)
    torch.manual_seed(0)
    model = build_encoders(ModelConfig(options.width, vision, text)).eval()
    device = torch.device(options.device)

    if ours:
        model.to(device)
        encoder = Encoder(model, device, options.autocast, options.batch_size, progress=False)

        def build(names: list[str], templates: list[str]) -> Any:
            return build_classifier(encoder.texts, names, templates).cpu().numpy()
    else:
        stock = open_clip.CLIP(options.width, vars(vision), vars(text)).eval()
        weights = model.state_dict()
        stock.load_state_dict({**weights, "logit_scale": weights["logit_scale"].squeeze()})
        del model, weights
        stock.to(device)
        tokenizer = open_clip.SimpleTokenizer(context_length=text.context_length)

        def build(names: list[str], templates: list[str]) -> Any:
            with torch.autocast(device.type, torch.bfloat16, enabled=options.autocast is not None):
                columns = open_clip.build_zero_shot_classifier(
                    stock, tokenizer, names, [t.replace("{c}", "{}") for t in templates], 1, device
                )
            return columns.T.float().cpu().numpy()

    return lambda: build(names[:1], templates[:2]), lambda: build(names, templates)


def prepare_retrieval(options: Options, ours: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    from alignclip.evaluation.retrieval import recall

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, DIM, generator=generator)
    # a cosine of about 0.16: half of the captions find their image among 5,000
    texts = 6 * torch.randn(options.images, CAPTIONS, DIM, generator=generator) + images[:, None]
    owner = torch.arange(options.images).repeat_interleave(CAPTIONS)
    images, texts, owner = (
        part.to(options.device) for part in (images, texts.flatten(0, 1), owner)
    )
    compute = partial(recall, ks=KS, block=options.block) if ours else whole_matrix_recall
    few = 10 * CAPTIONS
    return lambda: compute(images[:10], texts[:few], owner[:few]), lambda: compute(
        images, texts, owner
    )


@torch.no_grad()
def whole_matrix_recall(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor
) -> dict[str, float]:
    """What :func:`alignclip.evaluation.retrieval.recall` computes, from the whole similarity matrix."""
    scores = F.normalize(text_features, dim=-1) @ F.normalize(image_features, dim=-1).T
    images = scores.topk(min(max(KS), scores.shape[1]), dim=1).indices
    texts = scores.T.topk(min(max(KS), scores.shape[0]), dim=1).indices
    right_images = images == image_of_text[:, None]
    right_texts = image_of_text[texts] == torch.arange(len(texts), device=texts.device)[:, None]
    result = {
        f"image_retrieval_recall@{k}": right_images[:, :k].any(1).double().mean().item() for k in KS
    }
    result.update(
        {f"text_retrieval_recall@{k}": right_texts[:, :k].any(1).double().mean().item() for k in KS}
    )
    return result


def prompts(options: Options) -> tuple[list[str], list[str]]:
    """Class names, spread over ImageNet's 1,000, and all templates."""
    names = benchmark_lists("en_classnames.json")["imagenet1k"]
    chosen = [names[i * len(names) // options.classes] for i in range(options.classes)]
    return chosen, choose_templates("imagenet1k", None)


PREPARE = {"classifier": prepare_classifier, "retrieval": prepare_retrieval}


# the measurement


def measure(task: str, ours: bool, options: Options) -> Run:
    """In a process of its own."""
    warm_up, work = PREPARE[task](options, ours)
    warm_up()
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # the highest so far is now what is resident
        before = highest_resident()
    start, cpu_start = time.perf_counter(), time.process_time()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = torch.cuda.max_memory_allocated() if cuda else highest_resident()
    return Run(seconds, cpu_seconds, peak - before, result)


def highest_resident() -> int:
    """Bytes of resident memory, the highest so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def alternate(task: str, options: Options) -> tuple[list[Run], list[Run]]:
    """Our runs and the plain ones, in turn, each in a fresh process."""
    runs: dict[bool, list[Run]] = {True: [], False: []}
    for i in range(options.repeats):
        for ours in (True, False):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                run = process.submit(measure, task, ours, options).result()
            runs[ours].append(run)
            name = "ours" if ours else "plain"
            print(
                f"{task} {i + 1}/{options.repeats}, {name}: {run.seconds:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    return runs[True], runs[False]


def print_table(
    rate: str, items: int, unit: float, names: tuple[str, str], runs: tuple[list[Run], list[Run]]
) -> None:
    """Medians of ours and of the plain way, and ours in relation to it; ``items / unit`` a second are the rate."""
    seconds = [statistics.median(run.seconds for run in one) for one in runs]
    cpu = [statistics.median(run.cpu_seconds for run in one) for one in runs]
    peaks = [statistics.median(run.peak for run in one) / 2**20 for one in runs]
    rates = [items / unit / one for one in seconds]
    print(f"{'':<44}{'seconds (min–max)':>22}{'CPU s':>8}{rate:>12}{'peak memory':>14}")
    for i, one in enumerate(runs):
        spread = f"{seconds[i]:.2f} ({min(run.seconds for run in one):.2f}–{max(run.seconds for run in one):.2f})"
        print(
            f"{names[i]:<44}{spread:>22}{cpu[i]:>8.2f}{rates[i]:>12,.1f}{f'{peaks[i]:,.0f} MiB':>14}"
        )
    ratios = [one[0] / one[1] if one[1] else float("nan") for one in (seconds, cpu, rates, peaks)]
    time_, cpu_, rate_, peak_ = (f"{ratio:.2f}×" for ratio in ratios)
    print(f"{'ratio':<44}{time_:>22}{cpu_:>8}{rate_:>12}{peak_:>14}")


def compare_classifier(options: Options) -> bool:
    names, templates = prompts(options)
    ours, plain = alternate("classifier", options)
    of = "" if options.classes == 1000 else " of 1,000"
    print(
        f"\nclassifier: {options.classes:,}{of} classes × {len(templates)} templates, text tower {options.width} wide, "
        f"{options.layers} layers, {options.precision}"
    )
    labels = (
        f"all prompts sorted, batches of {options.batch_size}, trimmed",
        "stock open_clip, class by class",
    )
    print_table("prompts/s", len(names) * len(templates), 1, labels, (ours, plain))
    pairs = zip(ours, plain, strict=True)
    difference = max(float(abs(one.result - other.result).max()) for one, other in pairs)
    print(
        f"max abs difference {difference:.1e}, must be below {LIMIT[options.precision]:.0e}", end=""
    )
    vectors = torch.from_numpy(plain[0].result)
    if (
        len(vectors) > 1
    ):  # without this, a model whose classes are all alike would agree with anything
        nearest = (
            torch.cdist(vectors, vectors, p=torch.inf)
            .fill_diagonal_(torch.inf)
            .amin(1)
            .median()
            .item()
        )
        print(f" (a class differs from the one most like it by {nearest:.1e}, median)", end="")
    print()
    return difference < LIMIT[options.precision]


def compare_retrieval(options: Options) -> bool:
    ours, plain = alternate("retrieval", options)
    captions = options.images * CAPTIONS
    print(
        f"\nretrieval: {options.images:,} images × {captions:,} captions, features {DIM} wide, fp32"
    )
    labels = (f"blocks of {options.block:,} rows", "whole matrix, torch.topk")
    # a pair counts once, though both directions look at it
    print_table("M pairs/s", options.images * captions, 1e6, labels, (ours, plain))
    print("recall@k        " + "".join(f"{k:>8}" for k in KS))
    for way in ("image", "text"):
        recalls = [plain[0].result[f"{way}_retrieval_recall@{k}"] for k in KS]
        print(f"{way + ' retrieval':<16}" + "".join(f"{recall:>8.4f}" for recall in recalls))
    equal = all(run.result == plain[0].result for run in ours + plain)
    print(
        "the two are equal"
        if equal
        else f"NOT EQUAL: ours {ours[0].result}, plain {plain[0].result}"
    )
    return equal


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next(
        (line.split(": ")[1] for line in info if line.startswith("model name")),
        platform.processor(),
    )
    return (
        f"{name}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} before the start"
    )


def main() -> int:
    """Print the tables.

    Returns:
        0, or 1 where the two ways' results are not the same.
    """
    parser = argparse.ArgumentParser(
        description="Time and memory of a zero-shot classifier and of retrieval, beside the plain way to the same.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--only", choices=list(PREPARE), help="one of the two (default: both)")
    parser.add_argument(
        "--repeats", default=3, help="runs of each way (default: %(default)s)", **number
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default=cuda,
        help="default: cuda where there is one, else cpu",
    )
    parser.add_argument(
        "--precision",
        choices=list(LIMIT),
        default="fp32",
        help="of encoding (default: %(default)s)",
    )
    parser.add_argument(
        "--classes", default=20, help="of ImageNet's 1,000 (default: %(default)s)", **number
    )
    parser.add_argument(
        "--width", default=256, help="of the text tower, k × 64 (default: %(default)s)", **number
    )
    parser.add_argument(
        "--layers", default=6, help="of the text tower (default: %(default)s)", **number
    )
    parser.add_argument("--batch-size", default=256, help="ours (default: %(default)s)", **number)
    parser.add_argument(
        "--images",
        default=5000,
        help="in retrieval, 5 captions each (default: %(default)s)",
        **number,
    )
    parser.add_argument(
        "--block", default=256, help="rows at a time, ours (default: %(default)s)", **number
    )
    options = Options(**vars(parser.parse_args()))
    with one_line_errors():
        for name, value in vars(options).items():
            if isinstance(value, int) and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if options.width % 64:
            raise UserError(f"--width {options.width} is no multiple of 64")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch sees none here")
        if options.classes > 1000:
            raise UserError(f"--classes {options.classes} is more than ImageNet's 1,000")
        print(f"torch {torch.__version__} on {machine(options.device)}", flush=True)
        compare = {"classifier": compare_classifier, "retrieval": compare_retrieval}
        agree = [compare[task](options) for task in PREPARE if options.only in (None, task)]
        return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
