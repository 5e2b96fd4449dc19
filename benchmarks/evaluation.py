"""The cost of evaluation, in time and in memory, beside the plain way to the same numbers.

1. ``classifier``: ImageNet's zero-shot classifier, 80 prompts a class, from class names to vectors,
   tokenising included. Ours packs the prompts of all classes, sorts them by length and computes a
   batch up to its longest. The plain way is ``open_clip.build_zero_shot_classifier``, a class at a
   time, on a stock ``open_clip.CLIP`` of the same weights, which computes all 77 positions of every
   prompt. The weights are random: that changes neither cost nor whether the two agree. Fails where
   an entry of the two classifiers differs by ``LIMIT`` or more.
2. ``retrieval``: recall@1, 5 and 10 in both directions, 5 captions an image, of random features in
   which a caption resembles its image a little. Ours holds a block of its rows at a time. The plain
   way holds the whole matrix and takes the ten best of each row and column. Fails where a recall
   differs.

Every run is a process of its own, the two ways in turn, and is timed after a small warm-up; what is
shown are medians. CPU seconds are those of all threads: they say more than the clock where other
programs run at the same time. Peak memory is what a run adds to its process after imports, model,
inputs and warm-up: resident memory on the CPU, with what the C library keeps of freed memory;
PyTorch's allocations on a GPU.

    python benchmarks/evaluation.py                     # a few minutes on 2 cores, 20 classes
    python benchmarks/evaluation.py --classes 1000      # ImageNet's whole classifier
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Figures, Timing, in_a_process, in_turn, parser_of, this_machine, timed
from torch import Tensor

from alignclip.conversion.class_names import benchmark_lists, choose_templates

# alignclip's encoders are imported where they are used: retrieval does without open_clip's seconds

CAPTIONS = 5  # an image
DIM = 512  # of the features in retrieval
RECALL_AT = (1, 5, 10)
# bf16 rounds to three digits, a little differently in another batch
LIMIT = {"fp32": 1e-5, "amp_bf16": 1e-2}
EVALUATION_FLAGS = {
    "repeats": (3, "runs of each way"),
    "classes": (20, "of ImageNet's 1,000"),
    "width": (256, "of the text tower, k × 64"),
    "layers": (6, "of the text tower"),
    "batch-size": (256, "ours"),
    "images": (5000, "in retrieval, 5 captions each"),
    "block": (256, "rows at a time, ours"),
}
EVALUATION_QUICK = {"classes": 5, "width": 128, "layers": 3, "images": 2000}
COST_EXAMPLES = """examples:
  python benchmarks/evaluation.py
  python benchmarks/evaluation.py --only classifier --classes 1000 --width 512 --layers 12 \\
    --precision amp_bf16
  python benchmarks/evaluation.py --only retrieval --block 64 --repeats 5
  python benchmarks/evaluation.py --classes 5 --width 64 --layers 2 --images 200 --repeats 1"""

WAYS = ("ours", "plain")
WarmUpAndWork = tuple[Callable[[], Any], Callable[[], Any]]  # a warm-up, and what is timed


def prepare_classifier(options: Namespace, ours: bool) -> WarmUpAndWork:
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
    dtype = torch.bfloat16 if options.precision == "amp_bf16" else None

    if ours:
        encoder = Encoder(model.to(device), device, dtype, options.batch_size, progress=False)

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
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is not None):
                columns = open_clip.build_zero_shot_classifier(
                    stock, tokenizer, names, [t.replace("{c}", "{}") for t in templates], 1, device
                )
            return columns.T.float().cpu().numpy()

    return partial(build, names[:1], templates[:2]), partial(build, names, templates)


def prompts(options: Namespace) -> tuple[list[str], list[str]]:
    """Class names, spread over ImageNet's 1,000, and all templates."""
    names = benchmark_lists("en_classnames.json")["imagenet1k"]
    chosen = [names[i * len(names) // options.classes] for i in range(options.classes)]
    return chosen, choose_templates("imagenet1k", None)


def prepare_retrieval(options: Namespace, ours: bool) -> WarmUpAndWork:
    from alignclip.evaluation.retrieval import recall

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, DIM, generator=generator)
    # a cosine of about 0.16: half of the captions find their image among 5,000
    texts = 6 * torch.randn(options.images, CAPTIONS, DIM, generator=generator) + images[:, None]
    owner = torch.arange(options.images).repeat_interleave(CAPTIONS)
    features = [one.to(options.device) for one in (images, texts.flatten(0, 1), owner)]
    compute = partial(recall, ks=RECALL_AT, block=options.block) if ours else whole_matrix_recall
    few = [features[0][:10], *(one[: 10 * CAPTIONS] for one in features[1:])]
    return partial(compute, *few), partial(compute, *features)


@torch.no_grad()
def whole_matrix_recall(images: Tensor, texts: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Compute :func:`alignclip.evaluation.retrieval.recall` from the whole similarity matrix."""
    scores = F.normalize(texts, dim=-1) @ F.normalize(images, dim=-1).T
    nearest_images, nearest_texts = (
        matrix.topk(min(max(RECALL_AT), matrix.shape[1]), dim=1).indices
        for matrix in (scores, scores.T)
    )
    rows = torch.arange(len(images), device=images.device)
    right = {
        "image": nearest_images == image_of_text[:, None],
        "text": image_of_text[nearest_texts] == rows[:, None],
    }
    return {
        f"{way}_retrieval_recall@{k}": found[:, :k].any(1).double().mean().item()
        for way, found in right.items()
        for k in RECALL_AT
    }


PREPARE = {"classifier": prepare_classifier, "retrieval": prepare_retrieval}


def measure_task(task: str, ours: bool, options: Namespace) -> Timing:
    """Measure one way of a task, in this process."""
    warm_up, work = PREPARE[task](options, ours)
    warm_up()
    return timed(work, options.device)


def measure_both(task: str, options: Namespace) -> tuple[list[Timing], list[Timing]]:
    """Our runs and the plain ones, in turn, each in a fresh process."""

    def measure(way: str) -> Timing:
        return in_a_process(measure_task, task, way == "ours", options)

    found = in_turn(WAYS, options.repeats, measure)
    return found["ours"], found["plain"]


def print_table(
    task: str, figures: Figures, rate: str, items: float, ways: dict[str, list[Timing]]
) -> None:
    """Print medians of ours and of the plain way, and ours in relation to it.

    ``items`` a second are the rate.
    """
    for way, runs in zip(WAYS, ways.values(), strict=True):
        figures.add(f"{task}, {way}/time", [run.seconds for run in runs], "s", "lower")
        figures.add(f"{task}, {way}/CPU time", [run.cpu for run in runs], "s", "lower")
        peaks = [run.peak / 2**20 for run in runs]
        figures.add(f"{task}, {way}/memory", peaks, "MiB", "lower", compared=way == "ours")
    for quantity in ("time", "CPU time"):
        figures.add_ratio(f"{task}, ours/{quantity}", f"{task}, plain/{quantity}")
    print(f"{'':<44}{'seconds (min–max)':>22}{'CPU s':>8}{rate:>12}{'peak memory':>14}")
    medians = []
    for name, runs in ways.items():
        clock = [run.seconds for run in runs]
        seconds = statistics.median(clock)
        cpu = statistics.median(run.cpu for run in runs)
        peak = statistics.median(run.peak for run in runs) / 2**20
        medians.append((seconds, cpu, items / seconds, peak))
        spread = f"{seconds:.2f} ({min(clock):.2f}–{max(clock):.2f})"
        memory = f"{peak:,.0f} MiB"
        print(f"{name:<44}{spread:>22}{cpu:>8.2f}{items / seconds:>12,.1f}{memory:>14}")
    ratios = [f"{one / other:.2f}×" if other else "–" for one, other in zip(*medians, strict=True)]
    print(f"{'ratio':<44}{ratios[0]:>22}{ratios[1]:>8}{ratios[2]:>12}{ratios[3]:>14}")


def compare_classifier(options: Namespace, figures: Figures) -> bool:
    names, templates = prompts(options)
    ours, plain = measure_both("classifier", options)
    of = "" if options.classes == 1000 else " of 1,000"
    tower = f"text tower {options.width} wide, {options.layers} layers, {options.precision}"
    print(f"\nclassifier: {options.classes:,}{of} classes × {len(templates)} templates, {tower}")
    sort = f"all prompts sorted, batches of {options.batch_size}, trimmed"
    ways = {sort: ours, "stock open_clip, class by class": plain}
    print_table("classifier", figures, "prompts/s", len(names) * len(templates), ways)
    pairs = zip(ours, plain, strict=True)
    difference = max(float(abs(one.result - other.result).max()) for one, other in pairs)
    limit = LIMIT[options.precision]
    print(f"max abs difference {difference:.1e}, must be below {limit:.0e}", end="")
    vectors = torch.from_numpy(plain[0].result)
    if len(vectors) > 1:  # a model whose classes are all alike would agree with anything
        apart = torch.cdist(vectors, vectors, p=torch.inf).fill_diagonal_(torch.inf)
        nearest = apart.amin(1).median().item()
        print(f" (a class differs from the one most like it by {nearest:.1e}, median)", end="")
    print()
    return difference < limit


def compare_retrieval(options: Namespace, figures: Figures) -> bool:
    ours, plain = measure_both("retrieval", options)
    captions = options.images * CAPTIONS
    what = f"{options.images:,} images × {captions:,} captions, features {DIM} wide, fp32"
    print(f"\nretrieval: {what}")
    ways = {f"blocks of {options.block:,} rows": ours, "whole matrix, torch.topk": plain}
    # a pair counts once, though both directions look at it
    print_table("retrieval", figures, "M pairs/s", options.images * captions / 1e6, ways)
    expected = plain[0].result
    print("recall@k        " + "".join(f"{k:>8}" for k in RECALL_AT))
    for way in ("image", "text"):
        recalls = [expected[f"{way}_retrieval_recall@{k}"] for k in RECALL_AT]
        print(f"{way + ' retrieval':<16}" + "".join(f"{recall:>8.4f}" for recall in recalls))
    equal = all(run.result == expected for run in ours + plain)
    print("the two are equal" if equal else f"NOT EQUAL: ours {ours[0].result}, plain {expected}")
    return equal


COMPARE = {"classifier": compare_classifier, "retrieval": compare_retrieval}


def main() -> int:
    """Print the tables.

    Returns:
        0, or 1 where the two ways' results are not the same.
    """
    description = (
        "Time and memory of a zero-shot classifier and of retrieval, and of the plain way."
    )
    parser = parser_of(
        "evaluation.py", description, COST_EXAMPLES, EVALUATION_FLAGS, EVALUATION_QUICK
    )
    devices = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]
    parser.add_argument("--only", choices=list(COMPARE), help="one of the two (default: both)")
    parser.add_argument("--device", choices=devices, default=devices[-1], help="default: a GPU")
    parser.add_argument(
        "--precision", choices=list(LIMIT), default="fp32", help="of encoding (default: fp32)"
    )
    options = parser.parse_args()
    if options.width % 64:
        parser.error(f"--width {options.width} is no multiple of 64")
    if options.classes > 1000:
        parser.error(f"--classes {options.classes} is more than ImageNet's 1,000")
    print(f"torch {torch.__version__} on {this_machine(options.device)}", flush=True)
    figures = Figures("evaluation", options, options.device)
    tasks = [task for task in COMPARE if options.only in (None, task)]
    agree = [COMPARE[task](options, figures) for task in tasks]
    figures.write()
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
