"""The bytes that a rank gets over the network in a step, by part.

By rings, as NCCL and gloo send large tensors: a gather brings a rank the parts of all others, and a
sum over ranks moves each number twice. docs/scaling.md has the formulas with measured values.
"""

from __future__ import annotations

from dataclasses import dataclass

FP32 = 4  # bytes


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a rank gets in a step.

    Attributes:
        features: of the other ranks, and the gradients of its own from these.
        captions: embeddings of the other ranks.
        parameters: gradients under DDP; parameters, twice, and gradients under FSDP2.
    """

    features: float
    captions: float
    parameters: float

    @property
    def all(self) -> float:
        """Add the parts up."""
        return self.features + self.captions + self.parameters


def step_bytes(
    parameters: int, *, ranks: int, pairs: int, width: int, semantic: int, fsdp: bool
) -> StepBytes:
    """Compute the bytes that a rank gets in a step.

    Args:
        parameters: numbers that are trained.
        ranks: W.
        pairs: n, of a rank.
        width: d, of a feature.
        semantic: e, of a caption's embedding; 0 without such.
        fsdp: whether FSDP2 spreads the parameters, and frees them after the forward pass.
    """
    others = ranks - 1
    share = others / ranks
    return StepBytes(
        features=2 * others * pairs * 2 * width * FP32,
        captions=others * pairs * semantic * FP32,
        parameters=(3 if fsdp else 2) * share * parameters * FP32,
    )
