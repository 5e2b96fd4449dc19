"""The callback that ends a run at numbers that are not finite, before they are saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from composer.core import Precision, State, Timestamp
from composer.loggers import Logger
from torch import Tensor

from alignclip.data.dataset import ImageTextDataset
from alignclip.errors import NotFiniteError, few
from alignclip.ranks import gather, gather_objects, largest_of_all_ranks, local_part
from alignclip.training import composer_patches
from alignclip.training.callbacks import SettlingCallback
from alignclip.training.saver import CheckpointSaver
from alignclip.weights.finite import not_finite, short_name

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


class FiniteCheck(SettlingCallback):
    """Ends a run, on all ranks at the same batch, whose loss, gradients or weights are not finite.

    Loss and gradients are checked before the optimizer's step: the weights are still those of the
    batch before, and are saved with what was trained since the last checkpoint. The weights are
    checked after the step. This must be the first callback: no checkpoint, no evaluation and no
    rotation then sees the batch.

    With ``later`` the host doesn't wait for the device. The device itself skips the step of a batch
    that is not finite, so that the weights stay those of the batch before. The host looks at the
    batch while the device trains the next one, and before anything is saved or evaluated. Then the
    host turns the run's clock back to before the batch, saves, and ends the run.

    Gradients are checked before they are clipped, because clipping by the norm spreads one NaN to
    all of them. Under fp16 the Trainer's scaler skips a batch whose gradients overflow; such a
    batch ends the run only when the scale has fallen below :data:`HOPELESS_SCALE`.

    Args:
        dataset: that the run trains on.
        later: whether the host looks at a batch while the device trains the next one. The optimizer
            must be one of torch's fused ones, and no algorithm may act between two batches.
    """

    def __init__(self, dataset: ImageTextDataset, later: bool = False) -> None:
        self._dataset, self._later = dataset, later
        self._largest: dict[str, Tensor] = {}
        self._batch: _Batch | None = None  # the last one, unless it was looked at

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
        self.settle(state, logger)  # the batch before
        batch = _Batch.of(state, self._largest)
        gradients = torch.stack(list(batch.gradients.values()) or [torch.zeros(())])
        bad = [~batch.losses.isfinite().all(), ~gradients.isfinite().all()]
        flags = largest_of_all_ranks(torch.stack([_on_device(state, one) for one in bad]))
        batch.before_step = Arriving(flags)
        if self._later:
            (optimizer,) = state.optimizers
            composer_patches.skip_step(optimizer, flags.amax())
        else:
            self._look_before_step(batch, state, logger)
        self._batch = batch

    def batch_end(self, state: State, logger: Logger) -> None:
        """Check the weights.

        Raises:
            NotFiniteError: on every rank.
        """
        assert self._batch is not None
        weights = [local_part(p.detach()) for p in state.model.parameters() if p.requires_grad]
        weights = [weight for weight in weights if weight.numel()]
        largest = torch.nn.utils.get_total_norm(weights, torch.inf) if weights else torch.zeros(())
        flag = _on_device(state, ~largest.isfinite())[None]
        self._batch.after_step = Arriving(largest_of_all_ranks(flag))
        # the next epoch moves the loader on, and the clock isn't turned back over that
        is_last = state.timestamp.batch_in_epoch == state.dataloader_len
        if is_last or not self._later:
            self.settle(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Look at the last batch.

        Raises:
            NotFiniteError: on every rank.
        """
        self.settle(state, logger)

    def settle(self, state: State, logger: Logger) -> None:
        """Look at the last batch, unless that was done; on every rank.

        Raises:
            NotFiniteError: on every rank.
        """
        batch, self._batch = self._batch, None
        if batch is None:
            return
        if self._later:
            self._look_before_step(batch, state, logger)
        if batch.after_step is not None and batch.after_step.values()[0]:
            names = [short_name(name) for name in not_finite(dict(state.model.named_parameters()))]
            found = _of_all_ranks({"weights": names})
            raise NotFiniteError(_describe(state, {}, found, None))

    def _look_before_step(self, batch: _Batch, state: State, logger: Logger) -> None:
        """End the run where the loss or the gradients are not finite.

        Raises:
            NotFiniteError: on every rank.
        """
        assert batch.before_step is not None
        bad_loss, bad_gradients = batch.before_step.values()
        if bad_gradients and not bad_loss and state.precision == Precision.AMP_FP16:
            assert state.scaler is not None
            bad_gradients = state.scaler.get_scale() < HOPELESS_SCALE
        if bad_loss or bad_gradients:
            means = gather(batch.losses).mean(dim=0).tolist()
            terms = dict(zip(batch.terms, means, strict=True)) if bad_loss else {}
            names = _of_all_ranks(self._names_before_step(batch))
            batch.turn_back(state)
            saved = self._save(state, logger)
            raise NotFiniteError(_describe(state, terms, names, saved))

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

    def _names_before_step(self, batch: _Batch) -> Names:
        """Name the gradients and samples of this rank's batch that are not finite."""
        largest = batch.gradients.items()
        found = {"gradients": [short_name(name) for name, x in largest if not x.isfinite()]}
        for kind, rows in batch.rows.items():
            bad = ~rows.isfinite().all(dim=1)
            # features of all samples: the weights are at fault, not the samples
            if kind == "semantic" or not bad.all():
                samples = batch.samples[bad.to(batch.samples.device)].tolist()
                found[kind] = [self._dataset.key_of(i) for i in samples]
        return found


@dataclass
class _Batch:
    """A batch whose gradients are computed, with what is needed to name what is not finite.

    Attributes:
        time: the run's clock before the batch; the schedulers and the rates likewise.
        losses: of this rank, by ``terms``.
        gradients: the largest magnitude of each.
        rows: by the keys of :data:`OF_SAMPLES`, of this rank.
        samples: ids of this rank's samples.
        before_step: whether the loss, and whether a gradient, is not finite on any rank.
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
    before_step: Arriving | None = field(default=None)
    after_step: Arriving | None = field(default=None)

    @staticmethod
    def of(state: State, gradients: dict[str, Tensor]) -> _Batch:
        """Note the batch that the Trainer is at."""
        assert isinstance(state.loss, dict)
        image, text, _ = state.outputs
        rows = {"semantic": state.batch.get("semantic"), "image": image, "text": text}
        return _Batch(
            time=state.timestamp,
            schedulers=[scheduler.state_dict() for scheduler in state.schedulers],
            rates=[group["lr"] for group in state.optimizers[0].param_groups],
            terms=list(state.loss),
            losses=torch.stack([loss.detach().float().mean() for loss in state.loss.values()]),
            gradients=gradients,
            rows={kind: one.detach() for kind, one in rows.items() if one is not None},
            samples=state.batch["sample"],
        )

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
    """Flags on their way from the device; the host waits for them only when it asks.

    Args:
        flags: on the device; more than 0 is true.
    """

    def __init__(self, flags: Tensor) -> None:
        self._flags = flags.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._arrival: torch.cuda.Event | None = None
        if flags.device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def values(self) -> list[bool]:
        """Return the flags."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return [flag > 0 for flag in self._flags.tolist()]


def _on_device(state: State, flag: Tensor) -> Tensor:
    """Return a flag as 0 or 1, where the ranks compare flags."""
    return state.device.tensor_to_device(flag.float())


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
