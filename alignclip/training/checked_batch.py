"""A batch whose gradients are computed: its figures, on their way to the host, and the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from composer.core import State, Timestamp
from torch import Tensor

from alignclip.training import composer_patches

# of a batch's rows, those that the model computes
FEATURES = ("image", "text")
Buffers = list[tuple[Tensor, Tensor]]  # each with its values from before the batch


@dataclass(frozen=True)
class BatchFigures:
    """The figures of a batch that the host hears, from the ranks where they are worst.

    Attributes:
        bad_loss: whether a loss term is not finite on any rank.
        bad_gradients: whether a gradient is not finite on any rank.
        loss: the largest total of a rank.
        spreads: the variance of each modality's features, of the rank that has the largest; 0 where
            all of a rank's features are equal, None where a rank has a single sample.
    """

    bad_loss: bool
    bad_gradients: bool
    loss: float
    spreads: dict[str, float | None]


@dataclass
class CheckedBatch:
    """A batch whose gradients are computed, with what is needed to name what is not finite.

    Attributes:
        time: the run's clock before the batch; the schedulers and the rates likewise.
        losses: of this rank, by ``terms``.
        gradients: the largest magnitude of each.
        rows: by the keys of :data:`alignclip.training.not_finite_words.OF_SAMPLES`, of this rank.
        samples: ids of this rank's samples.
        buffers: that the forward pass has changed.
        before_step: :meth:`figures` of all ranks.
        after_step: whether a weight is not finite on any rank.
    """

    time: Timestamp
    schedulers: list[dict[str, Any]]
    rates: list[float]
    terms: list[str]
    losses: Tensor
    gradients: dict[str, Tensor]
    rows: dict[str, Tensor]
    samples: Tensor
    buffers: Buffers
    before_step: Arriving | None = field(default=None)
    after_step: Arriving | None = field(default=None)

    @staticmethod
    def of(state: State, gradients: dict[str, Tensor], buffers: Buffers) -> CheckedBatch:
        """Note the batch that the Trainer is at."""
        assert isinstance(state.loss, dict)
        image, text, _ = state.outputs
        rows = {"semantic": state.batch.get("semantic"), "image": image, "text": text}
        return CheckedBatch(
            time=state.timestamp,
            schedulers=[scheduler.state_dict() for scheduler in state.schedulers],
            rates=[group["lr"] for group in state.optimizers[0].param_groups],
            terms=list(state.loss),
            losses=torch.stack([loss.detach().float().mean() for loss in state.loss.values()]),
            gradients=gradients,
            rows={kind: one.detach() for kind, one in rows.items() if one is not None},
            samples=state.batch["sample"],
            buffers=buffers,
        )

    @property
    def number(self) -> int:
        """The batch's number in the run, from 1."""
        return self.time.batch.value + 1

    def figures(self, state: State) -> Tensor:
        """Compute this rank's :class:`BatchFigures`; the largest ones of all ranks count.

        The device computes them, and nothing is read.
        """
        gradients = torch.stack(list(self.gradients.values()) or [torch.zeros(())])
        numbers = [
            ~self.losses.isfinite().all(),
            ~gradients.isfinite().all(),
            self.losses[self.terms.index("total")],
            *(self.rows[kind].float().var(dim=0, correction=0).sum() for kind in FEATURES),
        ]
        return torch.stack([state.device.tensor_to_device(one.float()) for one in numbers])

    def arrived(self) -> BatchFigures:
        """Return the figures of all ranks, once the device has come so far."""
        assert self.before_step is not None
        bad_loss, bad_gradients, loss, *spreads = self.before_step.values()
        says_nothing = len(self.samples) == 1
        return BatchFigures(
            bad_loss=bad_loss > 0,
            bad_gradients=bad_gradients > 0,
            loss=loss,
            spreads={
                kind: None if says_nothing else one
                for kind, one in zip(FEATURES, spreads, strict=True)
            },
        )

    def restore_buffers(self, flag: Tensor | None = None) -> None:
        """Take the forward pass's changes of buffers back; with a flag where it is more than 0."""
        for buffer, before in self.buffers:
            buffer.copy_(before if flag is None else torch.where(flag > 0, before, buffer))

    def turn_back(self, state: State) -> None:
        """Have the run be where it was before the batch, whose step was skipped."""
        state.timestamp = self.time
        for scheduler, before in zip(state.schedulers, self.schedulers, strict=True):
            scheduler.load_state_dict(before)
        (optimizer,) = state.optimizers
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        composer_patches.skip_step(optimizer, None)


class Arriving:
    """Numbers on their way from the device; the host waits for them only when it asks.

    Args:
        numbers: on the device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._arrival: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def values(self) -> list[float]:
        """Return the numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        found: list[float] = self._numbers.tolist()
        return found
