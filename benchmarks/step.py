"""Whole training steps on this machine's CPU: SharedCLIP and AlignCLIP beside open_clip's CLIP.

A step is forward pass, loss, backward pass and AdamW. open_clip's CLIP has its own loss, two towers
of the same sizes, and captions of the full context; ours trims the captions to the batch's longest.
Captions have 12 words in the middle, drawn. The models of a size stand in one process and step in
turn; the tables have medians over the rounds. Clocks are fooled by other work on the machine, CPU
seconds hardly. Chunks are a process each, for their memory.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import open_clip
import torch
from measuring import (
    MEBIBYTE,
    Figures,
    Timing,
    in_a_process,
    in_turn,
    parser_of,
    this_machine,
    timed,
)
from open_clip.loss import ClipLoss

from alignclip.config.schema import (
    ModelConfig,
    OptimizerConfig,
    SharedConfig,
    TextConfig,
    VisionConfig,
)
from alignclip.data.batch import Batch, longest_text
from alignclip.data.transforms import normalize
from alignclip.losses import AlignCLIPLoss
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.encoders import build_encoders
from alignclip.model.optimization import build_optimizer

STEP_EXAMPLES = """\
  python benchmarks/step.py                              # all rows, half an hour
  python benchmarks/step.py --only small/fp32 --repeats 5
  python benchmarks/step.py --only chunks --chunks 64
"""
WORDS = ["a", "the", "in", "with", "red", "old", "man", "dog", "house", "beach", "photo", "flower"]
MIDDLE, SPREAD, MOST = 12, 0.35, 60  # words of a caption: median, deviation of the logarithm
FIRST_STEP = 8  # pairs of a first step, which makes what every step needs
MINILM_WIDTH = 384  # numbers of a caption embedding by all-MiniLM-L6-v2
EVERYTHING = SharedConfig(blocks=-1, ln_final=True, projection=True)

TrainStep = Callable[[Batch], None]
OPEN_CLIP, SHARED, ALIGN = "open_clip", "SharedCLIP", "AlignCLIP"
CHUNKS = "chunks"


@dataclass(frozen=True)
class Size:
    """A model's sizes, and the pairs of its batch."""

    model: ModelConfig
    batch: int


def square(layers: int) -> ModelConfig:
    """Return a small model: 64 px in patches of 8, 192 wide."""
    return ModelConfig(
        192,
        VisionConfig(image_size=64, patch_size=8, width=192, layers=layers),
        TextConfig(width=192, heads=3, layers=layers),
        EVERYTHING,
    )


VIT_B_16 = ModelConfig(768, VisionConfig(), TextConfig(width=768, heads=12), EVERYTHING)
SIZES = {"small": Size(square(4), 256), "ViT-B-16": Size(VIT_B_16, 16)}
PRECISIONS = ("fp32", "bf16")
MODEL_ROWS = [f"{size}/{precision}" for size in SIZES for precision in PRECISIONS]


def drawn_batch(config: ModelConfig, pairs: int) -> Batch:
    """Draw pixels, captions as token ids, and caption embeddings."""
    draw = random.Random(0)
    torch.manual_seed(0)
    captions = [
        " ".join(
            draw.choice(WORDS)
            for _ in range(min(MOST, max(1, round(draw.lognormvariate(math.log(MIDDLE), SPREAD)))))
        )
        for _ in range(pairs)
    ]
    side, text = config.vision_cfg.image_size, open_clip.tokenize(captions)
    return {
        "image": torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8),
        "text": text,
        "text_length": longest_text(text),
        "semantic": torch.randn(pairs, MINILM_WIDTH),
    }


def open_clips_step(config: ModelConfig, bf16: bool) -> TrainStep:
    """Make a step of open_clip's CLIP with its own loss, and with AdamW as torch makes it."""
    torch.manual_seed(0)
    sizes = {"vision_cfg": asdict(config.vision_cfg), "text_cfg": asdict(config.text_cfg)}
    model, loss = open_clip.CLIP(config.embed_dim, **sizes), ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            image, text, scale = model(normalize(batch["image"]), batch["text"])
            total = loss(image, text, scale)
        total.backward()
        optimizer.step()

    return step


def our_step(config: ModelConfig, beta: float, bf16: bool = False, chunk: int = 0) -> TrainStep:
    """Make a step of a run's own model, loss and optimizer."""
    torch.manual_seed(0)
    encoders = build_encoders(config)
    model = AlignCLIPModel(encoders, AlignCLIPLoss(beta=beta), chunk, cpu_bf16=bf16)
    optimizer = build_optimizer(OptimizerConfig(lr=1e-4), encoders)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        model.loss(model(batch), batch)["total"].backward()
        optimizer.step()

    return step


def steps_of(model: ModelConfig, bf16: bool) -> dict[str, TrainStep]:
    """Make a step of each variant."""
    return {
        OPEN_CLIP: open_clips_step(model, bf16),
        SHARED: our_step(model, 0.0, bf16),
        ALIGN: our_step(model, 0.5, bf16),
    }


def row(name: str, options: argparse.Namespace, figures: Figures) -> None:
    """Measure a size in a precision, and print its lines."""
    kind, _, precision = name.partition("/")
    size = SIZES[kind]
    if options.batch and kind == "small":
        size = Size(size.model, options.batch)
    batch, steps = drawn_batch(size.model, size.batch), steps_of(size.model, precision == "bf16")
    for step in steps.values():
        step(batch)
    found = in_turn(steps, options.repeats, lambda variant: timed(partial(steps[variant], batch)))
    print(f"\n{name}, batch {size.batch}")
    print(f"{'':14}{'pairs/s':>10}{'CPU s':>10}{'÷ open_clip':>13}{'by CPU':>10}")
    for variant, timings in found.items():
        of = f"{name}/{variant}"
        rate = figures.add(
            f"{of}/rate", [size.batch / one.seconds for one in timings], "pairs/s", "higher"
        )
        cpu = figures.add(f"{of}/cpu", [one.cpu for one in timings], "s", "lower")
        line = f"{variant:14}{rate:10.2f}{cpu:10.2f}"
        if variant != OPEN_CLIP:
            beside = f"{name}/{OPEN_CLIP}"
            faster = figures.add_ratio(f"{of}/rate", f"{beside}/rate")
            by_cpu = 1 / figures.add_ratio(f"{of}/cpu", f"{beside}/cpu")
            line += f"{faster:13.2f}{by_cpu:10.2f}"
        print(line)
    ratio = figures.add_ratio(f"{name}/{ALIGN}/rate", f"{name}/{SHARED}/rate")
    print(f"{ALIGN} ÷ {SHARED}: {ratio:.2f}")


def chunked_step(pairs: int, chunk: int) -> Timing:
    """Measure a step of a small model of 6 layers, in chunks."""
    config = square(6)
    batch, step = drawn_batch(config, pairs), our_step(config, 0.5, chunk=chunk)
    step(drawn_batch(config, FIRST_STEP))
    return timed(lambda: step(batch))


def chunks(options: argparse.Namespace, figures: Figures) -> None:
    """Measure time and memory of chunks beside the whole batch."""
    pairs = options.batch or 256
    sizes = [0, *(chunk for chunk in options.chunks if chunk < pairs)]
    found = in_turn(sizes, options.repeats, lambda chunk: in_a_process(chunked_step, pairs, chunk))
    print(f"\nmodel.encode_chunk_size, batch {pairs}, width 192, 6 layers, fp32")
    print(f"{'':8}{'seconds':>10}{'CPU s':>10}{'MiB':>10}{'÷ whole':>10}{'by CPU':>10}")
    for chunk, timings in found.items():
        of = f"{CHUNKS}/{chunk or 'whole'}"
        seconds = figures.add(f"{of}/time", [one.seconds for one in timings], "s", "lower")
        cpu = figures.add(f"{of}/cpu", [one.cpu for one in timings], "s", "lower")
        peak = [one.peak / MEBIBYTE for one in timings]
        memory = figures.add(f"{of}/memory", peak, "MiB", "lower")
        line = f"{chunk or 'whole'!s:8}{seconds:10.2f}{cpu:10.2f}{memory:10,.0f}"
        if chunk:
            slower = figures.add_ratio(f"{of}/time", f"{CHUNKS}/whole/time")
            line += f"{slower:10.2f}{figures.add_ratio(f'{of}/cpu', f'{CHUNKS}/whole/cpu'):10.2f}"
        print(line)


def main() -> None:
    """Measure and print the tables."""
    numbers = {"repeats": (3, "of each variant")}
    quick = {"batch": 64, "repeats": 2, "only": ["small/fp32", CHUNKS], "chunks": [16]}
    parser = parser_of("step.py", str(__doc__), STEP_EXAMPLES, numbers, quick)
    rows = [*MODEL_ROWS, CHUNKS]
    parser.add_argument("--only", nargs="+", choices=rows, default=rows, help="some of the rows")
    text = "pairs of the small model's batch and of the chunks' (default: 256)"
    parser.add_argument("--batch", type=int, metavar="N", help=text)
    text = "pairs of a chunk (default: 128 64 32)"
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 64, 32], help=text)
    options = parser.parse_args()
    figures = Figures("step", options)
    print(f"{this_machine()}, torch {torch.__version__}")
    lengths = drawn_batch(square(4), 256)["text"].argmax(dim=1) + 1
    middle = statistics.median(lengths.tolist())
    print(f"tokens of a caption: {middle:.0f} in the middle, {int(lengths.max())} at most")
    for name in options.only:
        if name == CHUNKS:
            chunks(options, figures)
        else:
            row(name, options, figures)
    figures.write()


if __name__ == "__main__":
    main()
