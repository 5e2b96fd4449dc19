"""The callback that ends a run at a batch with numbers that are not finite, before anything of the batch is saved."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from alignclip.data.dataset import ImageTextDataset
from alignclip.errors import NotFiniteError, few
from alignclip.training.callbacks import Rotation
from alignclip.weights.finite import local_part, not_finite, short_name

# fp16's scaler skips a batch whose gradients overflow and halves its scale. Below this scale it never recovers;
# fairseq ends at the same number (fairseq/optim/dynamic_loss_scaler.py, min_loss_scale).
LEAST_SCALE = 1e-4


@dataclass
class Findings:
    """What is not finite in a batch, on one rank or on all.

    Attributes:
        losses: its terms, where one is not finite.
        semantic: keys of the samples with such a caption embedding.
        image: keys of the samples with such image features.
        text: keys of the samples with such text features.
        gradients: names of the parameters with such a gradient.
        weights: names of the parameters with such a value.
    """

    losses: dict[str, float] = field(default_factory=dict)
    semantic: list[str] = field(default_factory=list)
    image: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)


class FiniteCheck(Callback):
    """Ends a run, on all ranks at the same batch, whose loss, gradients or weights are not finite.

    Loss and gradients are looked at before the optimizer's step: the weights are still those of the batch before, and
    are saved with what was trained since the last checkpoint. (The Trainer reads the loss before the step as well, so
    that the check adds no wait for the device.) The weights are looked at after the step. This must be the first
    callback: no checkpoint, no evaluation and no rotation then sees the batch.

    Gradients are looked at before they are clipped, because clipping by the norm spreads one NaN to all of them.
    Under fp16 the Trainer's scaler skips a batch whose gradients overflow; such a batch ends the run only when the
    scale has fallen below :data:`LEAST_SCALE`.
    """

    def __init__(self, dataset: ImageTextDataset) -> None:
        self._dataset = dataset
        self._names: list[str] = []
        self._largest: Tensor | None = None

    def after_backward(self, state: State, logger: Logger) -> None:
        """Keep the largest magnitude of each gradient, on the device."""
        named = [
            (name, local_part(p.grad))
            for name, p in state.model.named_parameters()
            if p.grad is not None
        ]
        named = [(name, gradient.detach()) for name, gradient in named if gradient.numel()]
        self._names = [name for name, _ in named]
        norms = [torch.linalg.vector_norm(gradient, torch.inf).float() for _, gradient in named]
        self._largest = torch.stack(norms) if norms else None

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Look at loss and gradients.

        Raises:
            NotFiniteError: on every rank; the batches before are saved.
        """
        assert isinstance(state.loss, dict)
        losses = torch.stack([loss.detach().float().mean() for loss in state.loss.values()])
        gradients = torch.zeros(1) if self._largest is None else self._largest
        bad_loss, bad_gradients = _anywhere(
            state, ~losses.isfinite().all(), ~gradients.isfinite().all()
        )
        if bad_gradients and not bad_loss and state.precision == Precision.AMP_FP16:
            assert state.scaler is not None
            bad_gradients = state.scaler.get_scale() < LEAST_SCALE
        if bad_loss or bad_gradients:
            terms = dict(zip(state.loss, losses.tolist(), strict=True)) if bad_loss else {}
            found = _together(self._findings(state, terms))
            saved = self._save(state, logger)
            raise NotFiniteError(_describe(state, found, saved))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Look at the weights.

        Raises:
            NotFiniteError: on every rank.
        """
        weights = [
            w
            for p in state.model.parameters()
            if p.requires_grad and (w := local_part(p.detach())).numel()
        ]
        largest = torch.nn.utils.get_total_norm(weights, torch.inf) if weights else torch.zeros(())
        if _anywhere(state, ~largest.isfinite())[0]:
            names = [short_name(name) for name in not_finite(dict(state.model.named_parameters()))]
            raise NotFiniteError(_describe(state, _together(Findings(weights=names)), None))

    def _save(self, state: State, logger: Logger) -> int | None:
        """Save what was trained before this batch; on every rank.

        Returns:
            the number of batches in the newest checkpoint, None where nothing is saved.
        """
        if state.timestamp.batch_in_epoch == 0:
            self._dataset.next_epoch -= (
                1  # the loader has begun the epoch, and the checkpoint is of its beginning
            )
        for rotation in (c for c in state.callbacks if isinstance(c, Rotation)):
            rotation.end()  # the older checkpoints are from longer before the trouble
        batch = state.timestamp.batch
        for saver in (c for c in state.callbacks if isinstance(c, CheckpointSaver)):
            if batch not in (saver.last_checkpoint_batch, saver.start_batch) or batch == 0:
                saver.save_interval = lambda *_: True
                saver.batch_checkpoint(state, logger)
                saver.fit_end(state, logger)  # in a bucket `latest` follows the upload
            return batch.value
        return None

    def _findings(self, state: State, losses: dict[str, float]) -> Findings:
        """What is not finite in this rank's batch, before the step."""
        found = Findings(losses=losses)
        if self._largest is not None:
            finite = self._largest.isfinite().tolist()
            found.gradients = [
                short_name(name) for name, ok in zip(self._names, finite, strict=True) if not ok
            ]
        batch, (image, text, _) = state.batch, state.outputs
        for name, rows in (("semantic", batch.get("semantic")), ("image", image), ("text", text)):
            if rows is None:
                continue
            bad = ~rows.isfinite().all(dim=1)
            if (
                name == "semantic" or not bad.all()
            ):  # all of them: the weights are at fault, not the samples
                getattr(found, name).extend(
                    self._dataset.key_of(i) for i in batch["sample"][bad].tolist()
                )
        return found


def _anywhere(state: State, *flags: Tensor) -> list[bool]:
    """Whether a flag is set on any rank; all have to ask at the same time."""
    together = state.device.tensor_to_device(torch.zeros(len(flags), dtype=torch.int32))
    for i, flag in enumerate(flags):
        together[i] = flag
    dist.all_reduce(together, reduce_operation="MAX")
    return [bool(flag) for flag in together.tolist()]


def _together(mine: Findings) -> Findings:
    """The findings of all ranks, each name once; losses are means over ranks."""
    everybodys: list[Findings] = dist.all_gather_object(mine)
    merged = Findings(
        losses={k: sum(one.losses[k] for one in everybodys) / len(everybodys) for k in mine.losses}
    )
    for name in ("semantic", "image", "text", "gradients", "weights"):
        getattr(merged, name).extend(
            dict.fromkeys(key for one in everybodys for key in getattr(one, name))
        )
    return merged


def _describe(state: State, found: Findings, saved: int | None) -> str:
    """One line: what is not finite in which batch, what is saved, and what to do."""
    parts = []
    if found.losses:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in found.losses.items())
        parts.append(f"the loss is not finite: {terms}")
    for what, keys in (
        ("a caption embedding ('semantic')", found.semantic),
        ("image features", found.image),
        ("text features", found.text),
    ):
        if keys:
            whose = (
                f"sample '{keys[0]}' has"
                if len(keys) == 1
                else f"samples {few(map(repr, keys))} have"
            )
            parts.append(f"{whose} {what} not finite")
    if found.gradients:
        total = sum(1 for p in state.model.parameters() if p.requires_grad)
        which = f"{len(found.gradients)} of {total} parameters ({few(found.gradients)})"
        parts.append(f"not finite are the gradients of {which}")
    batch = state.timestamp.batch.value + (not found.weights)  # after a step it is counted
    way_out = (
        ""
        if saved is None
        else f"The run is saved up to batch {saved}; the same command goes on from there"
    )
    if found.weights:
        parts.append(f"after the step not finite are the weights {few(found.weights)}")
        way_out = (
            "Nothing of this batch is saved; the same command goes on from the last checkpoint"
        )
    if found.semantic:
        way_out += ", once these samples are out of the set (convert/verify.py finds all of them)"
    elif found.image or found.text:
        way_out += ", once these samples are out of the set, or fit"
    else:
        way_out += ". A lower optimizer.lr, a longer warm-up or precision=fp32, in a run of another name, may help"
    return f"batch {batch}: {'; '.join(parts)}. {way_out.strip(', .')}"
