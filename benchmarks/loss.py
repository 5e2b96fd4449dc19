"""Time and memory of the loss, forward and backward, on one process.

Beside it stand the formulas of the paper written out. Every figure is a process of its own, the
variants in turn; the table has medians over the rounds. Memory is the process's peak above what it
had when the features lay there, in matrices of N × N numbers, too.

    python benchmarks/loss.py                          # N = 8,192 and d = 768, fp32
    python benchmarks/loss.py --batch 32768 --rounds 1 --variants alignclip
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MEBIBYTE = 2**20


def written_out(image: Tensor, text: Tensor, scale: Tensor, semantic: Tensor) -> Tensor:
    """Compute the loss by the paper's formulas, each matrix whole."""
    own = torch.arange(len(image))
    q = F.normalize(semantic, dim=1)
    dissimilarity = 1 - q @ q.T
    is_own = torch.eye(len(image), dtype=torch.bool)
    positives = (image * text).sum(dim=1)
    loss = F.cross_entropy(scale * image @ text.T, own) / 2
    loss = loss + F.cross_entropy(scale * text @ image.T, own) / 2
    for side in (image, text):
        weighted = torch.where(is_own, positives[:, None], side @ side.T * dissimilarity)
        loss = loss + F.cross_entropy(scale * weighted, own) / 4
    return loss


def alignclip(image: Tensor, text: Tensor, scale: Tensor, semantic: Tensor) -> Tensor:
    """Compute the loss that a run minimises."""
    from alignclip.losses import AlignCLIPLoss

    return AlignCLIPLoss()(image, text, scale, semantic)["total"]


def clip(image: Tensor, text: Tensor, scale: Tensor, semantic: Tensor) -> Tensor:
    """Compute CLIP's loss alone."""
    from alignclip.losses import AlignCLIPLoss

    return AlignCLIPLoss(beta=0.0)(image, text, scale)["total"]


VARIANTS: dict[str, Losses] = {"written out": written_out, "alignclip": alignclip, "clip": clip}


def measure(variant: str, batch: int, width: int) -> tuple[float, float]:
    """Return the seconds of a forward and a backward pass, and the MiB above the inputs."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, width), dim=1) for _ in range(2))
    image.requires_grad_(), text.requires_grad_()
    scale, semantic = torch.tensor([14.0], requires_grad=True), torch.randn(batch, width)
    loss = VARIANTS[variant]
    loss(*(one[:64] for one in (image, text)), scale, semantic[:64]).backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    loss(image, text, scale, semantic).backward()
    seconds = time.perf_counter() - start
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024


def main() -> None:
    """Measure and print a table, or one measurement of this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8192, help="pairs of the global batch, N")
    parser.add_argument("--width", type=int, default=768, help="of the features, d")
    parser.add_argument("--rounds", type=int, default=3, help="of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--one", choices=VARIANTS, help="measure a variant in this process")
    options = parser.parse_args()
    if options.one:
        print(*measure(options.one, options.batch, options.width))
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    command = [sys.executable, __file__, "--batch", str(options.batch)]
    command += ["--width", str(options.width), "--one"]
    for _ in range(options.rounds):
        for name in options.variants:
            done = subprocess.run([*command, name], capture_output=True, text=True, check=True)
            seconds, mebibytes = map(float, done.stdout.split())
            found[name].append((seconds, mebibytes))
    matrix = options.batch**2 * 4 / MEBIBYTE
    print(f"N = {options.batch:,}, d = {options.width}; a matrix is {matrix:,.0f} MiB")
    print(f"{'':16}{'seconds':>10}{'MiB':>10}{'matrices':>10}")
    for name, figures in found.items():
        seconds, mebibytes = (statistics.median(column) for column in zip(*figures, strict=True))
        print(f"{name:16}{seconds:10.2f}{mebibytes:10,.0f}{mebibytes / matrix:10.2f}")


if __name__ == "__main__":
    main()
