"""The callback that looks for numbers that are not finite, before a step is taken or saved."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from composer.core import Precision, State
from composer.loggers import Logger
from torch import Tensor

from alignclip.data.dataset import ImageTextDataset
from alignclip.errors import NotFiniteError
from alignclip.ranks import gather, largest_of_all_ranks, local_part
from alignclip.training import composer_patches, not_finite_words
from alignclip.training.alarms import Alarms
from alignclip.training.callbacks import SettlingCallback
from alignclip.training.checked_batch import Arriving, Buffers, CheckedBatch
from alignclip.training.display import print_once
from alignclip.training.not_finite_words import FIRST_SAMPLE, OF_SAMPLES, Names
from alignclip.training.saver import CheckpointSaver
from alignclip.weights.finite import not_finite, short_name

# fp16's scaler skips a batch whose gradients overflow and halves its scale. Below this scale it
# never recovers; fairseq ends at the same number (fairseq/optim/dynamic_loss_scaler.py,
# min_loss_scale).
HOPELESS_SCALE = 1e-4
IN_A_ROW = 10  # batches that are not finite, with which a run ends that skips them
SKIPPED = "trainer/skipped_batches"  # the name in the logs


class FiniteCheck(SettlingCallback):
    """Ends a run, on all ranks at the same batch, whose loss, gradients or weights are not finite.

    Loss and gradients are checked before the optimizer's step: the weights are still those of the
    batch before, and are saved with what was trained since the last checkpoint. The weights are
    checked after the step. This must be the first callback: no checkpoint, no evaluation and no
    rotation then sees the batch.

    With ``skips`` the run goes on without the step of a batch whose loss or gradients are not
    finite. Weights, buffers, the optimizer's state and averages of weights stay as they were; the
    batch counts, and the learning rate goes on. :data:`IN_A_ROW` such batches in a row end the
    run, and so do weights that are not finite: their step was taken.

    With ``later`` the host doesn't wait for the device. The device itself skips the step of a batch
    that is not finite, so that the weights stay those of the batch before. The host looks at the
    batch while the device trains the next one, and before anything is saved or evaluated. A run
    that goes on has nothing to take back then. For a run that ends the host turns the clock back to
    before the batch, and saves.

    Gradients are checked before they are clipped, because clipping by the norm spreads one NaN to
    all of them. Under fp16 the Trainer's scaler skips a batch whose gradients overflow, and that is
    no trouble until the scale has fallen below :data:`HOPELESS_SCALE`.

    A loss that jumps and features that are all equal are said (:class:`Alarms`).

    Args:
        dataset: that the run trains on.
        later: whether the host looks at a batch while the device trains the next one. The optimizer
            must be one of torch's fused ones, and no algorithm may act between two batches.
        skips: whether the run goes on without the step.

    Attributes:
        skipped: batches whose step was skipped, of all starts.
        skips_step: whether the host has to leave out the step of the batch that is trained.
    """

    def __init__(self, dataset: ImageTextDataset, later: bool = False, skips: bool = False) -> None:
        if skips:  # the schedule counts batches, and has counted one before the first step
            said = r"Detected call of `lr_scheduler.step\(\)` before"
            warnings.filterwarnings("ignore", said, UserWarning)
        self._dataset, self._later, self._skips = dataset, later, skips
        self.skipped, self.skips_step = 0, False
        self._in_row = 0
        self._largest: dict[str, Tensor] = {}
        self._trained_buffers: list[Tensor] = []  # of batch norms
        self._buffers: Buffers = []
        self._batch: CheckedBatch | None = None  # the last one, unless it was looked at
        self._alarms = Alarms()

    def fit_start(self, state: State, logger: Logger) -> None:
        """Find the buffers that training changes: those that a checkpoint has."""
        kept = state.model.state_dict(keep_vars=True)
        self._trained_buffers = [b for name, b in state.model.named_buffers() if name in kept]

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Keep the buffers as they are before the forward pass."""
        self._buffers = [(buffer, buffer.clone()) for buffer in self._trained_buffers]

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
        self.skips_step = False
        batch = CheckedBatch.of(state, self._largest, self._buffers)
        figures = largest_of_all_ranks(batch.figures(state))
        batch.before_step = Arriving(figures)
        if self._later:
            (optimizer,) = state.optimizers
            is_bad = figures[:2].amax()
            composer_patches.skip_step(optimizer, is_bad)
            batch.restore_buffers(is_bad)
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
        flag = state.device.tensor_to_device((~largest.isfinite()).float())[None]
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
        if batch.after_step is not None and batch.after_step.values()[0] > 0:
            weights = [
                short_name(name) for name in not_finite(dict(state.model.named_parameters()))
            ]
            names = not_finite_words.of_all_ranks({"weights": weights})
            line = _line(batch, state, {}, names)
            raise NotFiniteError(f"{line}. {not_finite_words.way_out(names, None)}")

    def _look_before_step(self, batch: CheckedBatch, state: State, logger: Logger) -> None:
        """Go on, or end the run, where the loss or the gradients are not finite.

        Raises:
            NotFiniteError: on every rank.
        """
        figures = batch.arrived()
        bad_gradients = figures.bad_gradients
        if bad_gradients and not figures.bad_loss and state.precision == Precision.AMP_FP16:
            assert state.scaler is not None
            bad_gradients = state.scaler.get_scale() < HOPELESS_SCALE
        if not (figures.bad_loss or bad_gradients):
            self._in_row = 0
            for line in self._alarms.look(batch.number, figures.loss, figures.spreads):
                print_once(line)
            return
        self._in_row += 1
        if not self._later:
            batch.restore_buffers()
        means = gather(batch.losses).mean(dim=0).tolist()
        terms = dict(zip(batch.terms, means, strict=True)) if figures.bad_loss else {}
        names = not_finite_words.of_all_ranks(self._names_before_step(batch, figures.bad_loss))
        line = _line(batch, state, terms, names)
        if self._skips and self._in_row < IN_A_ROW:
            self._skip(line, logger)
            return
        batch.turn_back(state)
        saved = self._save(state, logger)
        if self._skips:
            line = f"{IN_A_ROW} batches in a row are not finite; {line}"
        raise NotFiniteError(f"{line}. {not_finite_words.way_out(names, saved)}")

    def _skip(self, line: str, logger: Logger) -> None:
        """Go on without the batch's step."""
        self.skipped += 1
        self.skips_step = not self._later
        print_once(f"{line}. Its step is skipped ({self.skipped} of this run so far)")
        logger.log_metrics({SKIPPED: self.skipped})

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

    def _names_before_step(self, batch: CheckedBatch, bad_loss: bool) -> Names:
        """Name the gradients and samples of this rank's batch that are not finite.

        Where no sample is at fault, name the first one: it says which batch this is.
        """
        largest = batch.gradients.items()
        found = {"gradients": [short_name(name) for name, x in largest if not x.isfinite()]}
        for kind, rows in batch.rows.items():
            bad = ~rows.isfinite().all(dim=1)
            # features of all samples: the weights are at fault, not the samples
            if kind == "semantic" or not bad.all():
                samples = batch.samples[bad.to(batch.samples.device)].tolist()
                found[kind] = [self._dataset.key_of(i) for i in samples]
        is_this_rank = not bad_loss or not bool(batch.losses.isfinite().all())
        if is_this_rank and not any(found.get(kind) for kind in OF_SAMPLES):
            found[FIRST_SAMPLE] = [self._dataset.key_of(int(batch.samples[0]))]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps were skipped; how many in a row is forgotten by a new start."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.skipped = state.get("skipped", 0)  # earlier versions skipped none


def _line(batch: CheckedBatch, state: State, losses: dict[str, float], names: Names) -> str:
    """Say in which batch what is not finite."""
    parameters = sum(1 for p in state.model.parameters() if p.requires_grad)
    return f"batch {batch.number}: {not_finite_words.what(losses, names, parameters)}"
