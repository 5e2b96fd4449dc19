"""The callback that ends a run at numbers that are not finite, before they are saved."""

from __future__ import annotations

import torch
from composer.core import Callback, Precision, State
from composer.loggers import Logger
from torch import Tensor

from alignclip.data.dataset import ImageTextDataset
from alignclip.errors import NotFiniteError, few
from alignclip.ranks import gather, gather_objects, true_on_any_rank
from alignclip.training.saver import CheckpointSaver
from alignclip.weights.finite import local_part, not_finite, short_name

# fp16's scaler skips a batch whose gradients overflow and halves its scale. Below this scale it
# never recovers; fairseq ends at the same number (fairseq/optim/dynamic_loss_scaler.py,
# min_loss_scale).
HOPELESS_SCALE = 1e-4
# what a sample may have that is not finite, and its words
OF_SAMPLES = {
    "semantic": "a caption embedding ('semantic')",
    "image": "image features",
    "text": "text features",
}


# Names by what is not finite: parameters of "gradients" and "weights", else keys of samples
Names = dict[str, list[str]]


class FiniteCheck(Callback):
    """Ends a run, on all ranks at the same batch, whose loss, gradients or weights are not finite.

    Loss and gradients are checked before the optimizer's step: the weights are still those of the
    batch before, and are saved with what was trained since the last checkpoint. (The Trainer reads
    the loss before the step as well, so the check adds no wait for the device.) The weights are
    checked after the step. This must be the first callback: no checkpoint, no evaluation and no
    rotation then sees the batch.

    Gradients are checked before they are clipped, because clipping by the norm spreads one NaN to
    all of them. Under fp16 the Trainer's scaler skips a batch whose gradients overflow; such a
    batch ends the run only when the scale has fallen below :data:`HOPELESS_SCALE`.
    """

    def __init__(self, dataset: ImageTextDataset) -> None:
        self._dataset = dataset
        self._largest: dict[str, Tensor] = {}

    def after_backward(self, state: State, logger: Logger) -> None:
        """Keep the largest magnitude of each gradient, on the device."""
        gradients = {
            name: local_part(p.grad).detach()
            for name, p in state.model.named_parameters()
            if p.grad is not None
        }
        self._largest = {
            name: torch.linalg.vector_norm(gradient, torch.inf).float()
            for name, gradient in gradients.items()
            if gradient.numel()
        }

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Check loss and gradients.

        Raises:
            NotFiniteError: on every rank; the batches before are saved.
        """
        assert isinstance(state.loss, dict)
        losses = torch.stack([loss.detach().float().mean() for loss in state.loss.values()])
        gradients = torch.stack(list(self._largest.values()) or [torch.zeros(())])
        flags = [~losses.isfinite().all(), ~gradients.isfinite().all()]
        bad_loss, bad_gradients = _on_any_rank(state, flags)
        if bad_gradients and not bad_loss and state.precision == Precision.AMP_FP16:
            assert state.scaler is not None
            bad_gradients = state.scaler.get_scale() < HOPELESS_SCALE
        if bad_loss or bad_gradients:
            means = gather(losses).mean(dim=0).tolist()
            terms = dict(zip(state.loss, means, strict=True)) if bad_loss else {}
            names = _of_all_ranks(self._names_before_step(state))
            saved = self._save(state, logger)
            raise NotFiniteError(_describe(state, terms, names, saved))

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the weights.

        Raises:
            NotFiniteError: on every rank.
        """
        weights = [local_part(p.detach()) for p in state.model.parameters() if p.requires_grad]
        weights = [weight for weight in weights if weight.numel()]
        largest = torch.nn.utils.get_total_norm(weights, torch.inf) if weights else torch.zeros(())
        if _on_any_rank(state, [~largest.isfinite()])[0]:
            names = [short_name(name) for name in not_finite(dict(state.model.named_parameters()))]
            found = _of_all_ranks({"weights": names})
            raise NotFiniteError(_describe(state, {}, found, None))

    def _save(self, state: State, logger: Logger) -> int | None:
        """Save what was trained before this batch; on every rank.

        Returns:
            the number of batches in the newest checkpoint, None where nothing is saved.
        """
        if state.timestamp.batch_in_epoch == 0:
            # the loader has begun the epoch, and the checkpoint is of the epoch's beginning
            self._dataset.next_epoch -= 1
        batch = state.timestamp.batch
        for saver in (c for c in state.callbacks if isinstance(c, CheckpointSaver)):
            saver.keep = -1  # the older checkpoints are from longer before the trouble
            if batch not in (saver.last_checkpoint_batch, saver.start_batch) or batch == 0:
                saver.save_now(state, logger)
            return batch.value
        return None

    def _names_before_step(self, state: State) -> Names:
        """Name the gradients and samples of this rank's batch that are not finite."""
        found = {"gradients": [short_name(n) for n, x in self._largest.items() if not x.isfinite()]}
        batch, (image, text, _) = state.batch, state.outputs
        values = {"semantic": batch.get("semantic"), "image": image, "text": text}
        for kind, rows in values.items():
            if rows is None:
                continue
            bad = ~rows.isfinite().all(dim=1)
            # features of all samples: the weights are at fault, not the samples
            if kind == "semantic" or not bad.all():
                found[kind] = [self._dataset.key_of(i) for i in batch["sample"][bad].tolist()]
        return found


def _on_any_rank(state: State, flags: list[Tensor]) -> list[bool]:
    device = state.device.tensor_to_device
    return true_on_any_rank(torch.stack([device(flag) for flag in flags]))


def _of_all_ranks(mine: Names) -> Names:
    """Join the names of all ranks, each name once."""
    joined: dict[str, dict[str, None]] = {}
    for one in gather_objects([mine]):
        for kind, names in one.items():
            joined.setdefault(kind, {}).update(dict.fromkeys(names))
    return {kind: list(names) for kind, names in joined.items()}


def _describe(state: State, losses: dict[str, float], names: Names, saved: int | None) -> str:
    """Say in one line what is not finite in which batch, what is saved, and what to do."""
    parts = []
    gradients, weights = names.get("gradients"), names.get("weights")
    of_samples = {kind: keys for kind in OF_SAMPLES if (keys := names.get(kind))}
    if losses:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        parts.append(f"the loss is not finite: {terms}")
    for kind, keys in of_samples.items():
        whose = f"samples {few(map(repr, keys))} have"
        if len(keys) == 1:
            whose = f"sample '{keys[0]}' has"
        parts.append(f"{whose} {OF_SAMPLES[kind]} not finite")
    if gradients:
        total = sum(1 for p in state.model.parameters() if p.requires_grad)
        which = f"{len(gradients)} of {total} parameters ({few(gradients)})"
        parts.append(f"not finite are the gradients of {which}")
    batch = state.timestamp.batch.value + (not weights)  # after a step it is counted
    way_out = ""
    if saved is not None:
        way_out = f"The run is saved up to batch {saved}; the same command goes on from there"
    if weights:
        parts.append(f"after the step not finite are the weights {few(weights)}")
        way_out = (
            "Nothing of this batch is saved; the same command goes on from the last checkpoint"
        )
    if "semantic" in of_samples:
        way_out += ", once these samples are out of the set (convert/verify.py finds all of them)"
    elif of_samples:
        way_out += ", once these samples are out of the set, or fit"
    else:
        way_out += (
            ". A lower optimizer.lr, a longer warm-up or precision=fp32, in a run of another name, "
            "may help"
        )
    return f"batch {batch}: {'; '.join(parts)}. {way_out.strip(', .')}"
