"""Time and memory of the loss, forward and backward.

Beside it stand the formulas of the paper written out, and with ``--beside`` the loss of another
checkout. Every figure is of fresh processes, the variants in turn; the table has medians over the
rounds. Memory is the peak above what a process had when the features lay there, in matrices of
N × N numbers, too. On several ranks, time and memory are those of the rank that took most.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from measuring import MEBIBYTE, Figures, Timing, in_turn, parser_of, this_machine, timed
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WRITTEN_OUT = "written out"
FIRST_PASS = 64  # pairs of a first pass, which makes what every pass needs
LOSS_EXAMPLES = """\
  python benchmarks/loss.py                            # N = 8,192 and d = 768, fp32
  python benchmarks/loss.py --batch 16384 --only alignclip clip
  python benchmarks/loss.py --beside ../before         # a checkout of another commit
  python benchmarks/loss.py --ranks 2                  # a process each, half of the pairs each
  python benchmarks/loss.py --quick --json figures/
"""


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
    loss = importlib.import_module("alignclip.losses").AlignCLIPLoss()
    return loss(image, text, scale, semantic)["total"]


def clip(image: Tensor, text: Tensor, scale: Tensor, semantic: Tensor) -> Tensor:
    """Compute CLIP's loss alone."""
    loss = importlib.import_module("alignclip.losses").AlignCLIPLoss(beta=0.0)
    return loss(image, text, scale)["total"]


LOSSES: dict[str, Loss] = {WRITTEN_OUT: written_out, "alignclip": alignclip, "clip": clip}


@dataclass(frozen=True)
class LossVariant:
    """A loss that is measured.

    Attributes:
        loss: a name in :data:`LOSSES`.
        checkout: the folder whose code it is; this one's where None.
    """

    loss: str
    checkout: str | None = None

    def __str__(self) -> str:
        return self.loss if self.checkout is None else f"{self.loss} beside"


@dataclass(frozen=True)
class BatchSizes:
    """A global batch and its ranks, and the numbers of a tile where they are not the default."""

    batch: int
    width: int
    ranks: int
    tile: int | None = None

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"N = {self.batch:,} on {ranks}, d = {self.width}"


def measure_variant(variant: LossVariant, sizes: BatchSizes) -> Timing:
    """Measure the variant on fresh processes."""
    context = get_context("spawn")
    with TemporaryDirectory() as folder, ProcessPoolExecutor(sizes.ranks, context) as processes:
        of_ranks = [
            processes.submit(one_pass, variant, sizes, rank, f"file://{folder}/ranks")
            for rank in range(sizes.ranks)
        ]
        timings = [one.result() for one in of_ranks]
    seconds, cpu, peak = (
        max(getattr(one, name) for one in timings) for name in ("seconds", "cpu", "peak")
    )
    return Timing(seconds, cpu, peak)


def one_pass(variant: LossVariant, sizes: BatchSizes, rank: int, rendezvous: str) -> Timing:
    """Measure a forward and a backward pass on one of the ranks."""
    if variant.checkout is not None:
        for name in [name for name in sys.modules if name.split(".")[0] == "alignclip"]:
            del sys.modules[name]
        sys.path.insert(0, variant.checkout)
    elif sizes.tile is not None:
        tiles: Any = importlib.import_module("alignclip.losses.tiles")
        tiles.CPU_TILE = sizes.tile
    if sizes.ranks > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // sizes.ranks))
        dist.init_process_group("gloo", rendezvous, world_size=sizes.ranks, rank=rank)
    torch.manual_seed(rank)
    shape = sizes.batch // sizes.ranks, sizes.width
    image, text = (F.normalize(torch.randn(shape), dim=1) for _ in range(2))
    image.requires_grad_(), text.requires_grad_()
    scale, semantic = torch.tensor([14.0], requires_grad=True), torch.randn(shape)
    loss = LOSSES[variant.loss]
    loss(image[:FIRST_PASS], text[:FIRST_PASS], scale, semantic[:FIRST_PASS]).backward()
    return timed(lambda: loss(image, text, scale, semantic).backward())


def variants_of(options: argparse.Namespace) -> list[LossVariant]:
    """List what the options ask for."""
    losses = options.only or [name for name in LOSSES if options.ranks == 1 or name != WRITTEN_OUT]
    variants = [LossVariant(name) for name in losses]
    if options.beside is not None:
        beside = str(options.beside)
        variants += [LossVariant(name, beside) for name in losses if name != WRITTEN_OUT]
    return variants


def parse() -> argparse.Namespace:
    """Parse and check the arguments."""
    numbers = {
        "batch": (8192, "pairs of the global batch, N"),
        "width": (768, "of the features, d"),
        "repeats": (3, "of each variant"),
        "ranks": (1, "processes that share the batch"),
    }
    parser = parser_of("loss.py", str(__doc__), LOSS_EXAMPLES, numbers, {"batch": 4096})
    parser.add_argument("--only", nargs="+", choices=list(LOSSES), help="some of them")
    parser.add_argument("--tile", type=int, metavar="N", help="numbers of a tile")
    parser.add_argument("--beside", metavar="PATH", help="a checkout of another commit")
    options: argparse.Namespace = parser.parse_args()
    if options.batch % options.ranks:
        parser.error(f"{options.ranks} ranks cannot have equal shares of {options.batch} pairs")
    if options.ranks > 1 and WRITTEN_OUT in (options.only or []):
        parser.error(f"{WRITTEN_OUT!r} is for one rank")
    if options.beside and not Path(options.beside, "alignclip").is_dir():
        parser.error(f"{options.beside} is no checkout")
    return options


def main() -> None:
    """Measure and print a table."""
    options = parse()
    figures = Figures("loss", options)
    print(f"{this_machine()}, torch {torch.__version__}")
    matrix = options.batch**2 * 4 / MEBIBYTE
    sizes = BatchSizes(options.batch, options.width, options.ranks, options.tile)
    print(f"{sizes}; a matrix is {matrix:,.0f} MiB")
    found = in_turn(
        variants_of(options), options.repeats, lambda variant: measure_variant(variant, sizes)
    )
    print(f"{'':18}{'seconds':>10}{'CPU s':>10}{'MiB':>10}{'matrices':>10}")
    for variant, timings in found.items():
        seconds = figures.add(f"{variant}/time", [one.seconds for one in timings], "s", "lower")
        cpu = figures.add(f"{variant}/cpu", [one.cpu for one in timings], "s", "lower")
        memory = [one.peak / MEBIBYTE for one in timings]
        ours = variant.loss != WRITTEN_OUT and variant.checkout is None
        peak = figures.add(f"{variant}/memory", memory, "MiB", "lower", compared=ours)
        print(f"{variant!s:18}{seconds:10.2f}{cpu:10.2f}{peak:10,.0f}{peak / matrix:10.2f}")
    for variant in found:
        others = LossVariant(variant.loss, options.beside), LossVariant(WRITTEN_OUT)
        for other in others if variant.checkout is None else ():
            if other in found and other != variant:
                for quantity in ("time", "cpu"):
                    figures.add_ratio(f"{variant}/{quantity}", f"{other}/{quantity}")
    figures.write()


if __name__ == "__main__":
    main()
