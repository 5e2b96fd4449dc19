"""The callback that ends a run at a batch with numbers that are not finite, before anything of the batch is saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from alignclip.data import ImageTextDataset
from alignclip.errors import NotFiniteError
from alignclip.fetching import few
from alignclip.finite import local_part, not_finite, short_name

# fp16's scaler skips a batch whose gradients overflow and halves its scale. Below this scale it never recovers;
# fairseq ends at the same number (fairseq/optim/dynamic_loss_scaler.py, min_loss_scale).
LEAST_SCALE = 1e-4


@dataclass
class Findings:
    """What is not finite on one rank after a batch.

    Attributes:
        semantic: keys of the samples with such a caption embedding.
        image: keys of the samples with such image features.
        text: keys of the samples with such text features.
        gradients: names of the parameters with such a gradient.
        weights: names of the parameters with such a value.
    """

    semantic: list[str] = field(default_factory=list)
    image: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)


class FiniteCheck(Callback):
    """Ends a run, on all ranks at the same batch, whose loss, gradients or weights are not finite.

    Raises :class:`NotFiniteError` at the end of the batch. It must be the first callback: then no checkpoint, no
    evaluation and no rotation sees the batch. The host waits for the device at the end of each batch anyway, so that
    the check adds no wait to the step itself. Gradients are looked at before they are clipped, because clipping by
    the norm spreads one NaN to all of them. Under fp16 the Trainer's scaler skips a batch whose gradients overflow;
    such a batch ends the run only when the scale has fallen below :data:`LEAST_SCALE`.
    """

    def __init__(self, dataset: ImageTextDataset) -> None:
        self._dataset = dataset
        self._names: list[str] = []
        self._largest: Tensor | None = None

    def after_backward(self, state: State, logger: Logger) -> None:
        """Keep the largest magnitude of each gradient, on the device."""
        named = [(name, local_part(p.grad)) for name, p in state.model.named_parameters() if p.grad is not None]
        named = [(name, gradient) for name, gradient in named if gradient.numel()]
        self._names = [name for name, _ in named]
        self._largest = (
            torch.stack([torch.linalg.vector_norm(gradient.detach(), torch.inf).float() for _, gradient in named])
            if named
            else None
        )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the batch.

        Raises:
            NotFiniteError: on every rank.
        """
        bad_gradients, bad_weights = self._bad(state)
        losses = {name.rpartition("/")[2]: float(value) for name, value in (state.total_loss_dict or {}).items()}
        bad_losses = not torch.tensor(list(losses.values())).isfinite().all()
        if bad_gradients and not (bad_losses or bad_weights) and state.precision == Precision.AMP_FP16:
            assert state.scaler is not None
            bad_gradients = state.scaler.get_scale() < LEAST_SCALE
        if not (bad_losses or bad_gradients or bad_weights):
            return
        everybodys: list[Findings] = dist.all_gather_object(self._findings(state))
        merged = Findings(
            **{
                name: list(dict.fromkeys(one for found in everybodys for one in getattr(found, name)))
                for name in vars(Findings())
            }
        )
        total = sum(1 for p in state.model.parameters() if p.requires_grad)
        raise NotFiniteError(_describe(state.timestamp.batch.value, losses if bad_losses else {}, merged, total))

    def _bad(self, state: State) -> tuple[bool, bool]:
        """Whether any rank's gradients or weights are not finite: one wait for the device."""
        weights = [w for p in state.model.parameters() if p.requires_grad and (w := local_part(p.detach())).numel()]
        largest = torch.nn.utils.get_total_norm(weights, torch.inf) if weights else torch.zeros(())
        gradients = torch.zeros(1) if self._largest is None else self._largest
        flags = state.device.tensor_to_device(torch.zeros(2, dtype=torch.int32))
        flags[0] = (~gradients.isfinite()).any()
        flags[1] = ~largest.isfinite()
        dist.all_reduce(flags, reduce_operation="MAX")
        bad = flags.tolist()
        return bool(bad[0]), bool(bad[1])

    def _findings(self, state: State) -> Findings:
        found = Findings()
        if self._largest is not None:
            found.gradients = [n for n, finite in zip(self._names, self._largest.isfinite().tolist(), strict=True)
                               if not finite]  # fmt: skip
        found.gradients = [short_name(name) for name in found.gradients]
        found.weights = [short_name(name) for name in not_finite(dict(state.model.named_parameters()))]
        batch, (image, text, _) = state.batch, state.outputs
        for name, rows in (("semantic", batch.get("semantic")), ("image", image), ("text", text)):
            if rows is None:
                continue
            bad = ~rows.isfinite().all(dim=1)
            if name == "semantic" or not bad.all():  # all of them: the weights are at fault, not the samples
                getattr(found, name).extend(self._dataset.key_of(i) for i in batch["sample"][bad].tolist())
        return found


def _describe(batch: int, losses: Mapping[str, float], found: Findings, parameters: int) -> str:
    """One line: what is not finite in which batch, and what to do."""
    parts = []
    if losses:
        parts.append("the loss is not finite: " + ", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    for what, keys in (
        ("a caption embedding ('semantic')", found.semantic),
        ("image features", found.image),
        ("text features", found.text),
    ):
        if keys:
            whose = f"sample '{keys[0]}' has" if len(keys) == 1 else f"samples {few(map(repr, keys))} have"
            parts.append(f"{whose} {what} not finite")
    if found.gradients:
        parts.append(f"not finite are the gradients of {len(found.gradients)} of {parameters} parameters "
                     f"({few(found.gradients)})")  # fmt: skip
    if found.weights and not parts:
        parts.append(f"after the step not finite are the weights {few(found.weights)}")
    way_out = "Nothing of this batch is saved; the same command goes on from the last checkpoint"
    if found.semantic:
        way_out += ", once these samples are out of the set (convert/verify.py finds all of them)"
    elif found.image or found.text:
        way_out += "; look at these samples"
    else:
        way_out += "; a lower optimizer.lr, a longer warm-up or precision=fp32 (in a run of another name) may help"
    return f"batch {batch}: {'; '.join(parts)}. {way_out}"
