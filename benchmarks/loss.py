"""Time and memory of the loss, forward and backward, on one process.

Beside it stand the formulas of the paper written out. Every figure is a process of its own, the
variants in turn; the table has medians over the rounds. Memory is the peak above what the process
had when the features lay there, in matrices of N × N numbers, too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measuring import Figures, Timing, in_a_process, in_turn, parser_of, this_machine, timed
from torch import Tensor

from alignclip.losses import AlignCLIPLoss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
MEBIBYTE = 2**20
FIRST = 64  # pairs of a first pass, which makes what every pass needs
EXAMPLES = """\
  python benchmarks/loss.py                            # N = 8,192 and d = 768, fp32
  python benchmarks/loss.py --batch 4096 --repeats 5
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
    return AlignCLIPLoss()(image, text, scale, semantic)["total"]


def clip(image: Tensor, text: Tensor, scale: Tensor, semantic: Tensor) -> Tensor:
    """Compute CLIP's loss alone."""
    return AlignCLIPLoss(beta=0.0)(image, text, scale)["total"]


LOSSES: dict[str, Loss] = {"written out": written_out, "alignclip": alignclip, "clip": clip}


def one_pass(name: str, batch: int, width: int) -> Timing:
    """Measure a forward and a backward pass."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(batch, width), dim=1) for _ in range(2))
    image.requires_grad_(), text.requires_grad_()
    scale, semantic = torch.tensor([14.0], requires_grad=True), torch.randn(batch, width)
    loss = LOSSES[name]
    loss(image[:FIRST], text[:FIRST], scale, semantic[:FIRST]).backward()
    return timed(lambda: loss(image, text, scale, semantic).backward())


def main() -> None:
    """Measure and print a table."""
    numbers = {
        "batch": (8192, "pairs of the global batch, N"),
        "width": (768, "of the features, d"),
        "repeats": (3, "of each variant"),
    }
    quick = {"batch": 4096}
    options = parser_of("loss.py", str(__doc__), EXAMPLES, numbers, quick).parse_args()
    figures = Figures("loss", options)
    print(f"{this_machine()}, torch {torch.__version__}")
    matrix = options.batch**2 * 4 / MEBIBYTE
    print(f"N = {options.batch:,}, d = {options.width}; a matrix is {matrix:,.0f} MiB")
    measure = partial(in_a_process, one_pass)
    found = in_turn(
        LOSSES, options.repeats, lambda name: measure(name, options.batch, options.width)
    )
    print(f"{'':16}{'seconds':>10}{'MiB':>10}{'matrices':>10}")
    for name, timings in found.items():
        seconds = figures.add(f"{name}/time", [one.seconds for one in timings], "s", "lower")
        memory = [one.peak / MEBIBYTE for one in timings]
        ours = name != "written out"
        peak = figures.add(f"{name}/memory", memory, "MiB", "lower", compared=ours)
        print(f"{name:16}{seconds:10.2f}{peak:10,.0f}{peak / matrix:10.2f}")
    for name in ("alignclip", "clip"):
        figures.add_ratio(f"{name}/time", "written out/time")
    figures.write()


if __name__ == "__main__":
    main()
