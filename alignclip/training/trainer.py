"""Composer's Trainer, whose host doesn't wait for the device in a step that logs nothing.

Composer's own asks all ranks through the device, several times a batch, and reads each answer:
whether every rank has a batch, how many samples the batches have, how long the batch took, what the
losses are. The host then stands still until the device has done everything before.

Written for mosaicml 0.32.1; ``tests/test_contracts.py`` has the private names.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import composer
import torch
from composer.algorithms.sam.sam import SAMOptimizer
from composer.core import Algorithm, Event
from composer.trainer.trainer import TrainerMode
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from alignclip.data import workers
from alignclip.ranks import raise_on_all_ranks, rank, sum_over_ranks, true_on_any_rank, world_size
from alignclip.runtime import attendance


@dataclass(frozen=True)
class LoggedBatches:
    """The batches whose losses are read from the device.

    Attributes:
        interval: every so many batches, and the first and the last one.
        total: batches of the whole run.
    """

    interval: int
    total: int

    def has(self, batch: int) -> bool:
        """Say whether the losses of a batch, counted from 1, are logged."""
        return batch % self.interval == 0 or batch in (1, self.total)


EVERY_BATCH = LoggedBatches(interval=1, total=0)


class Trainer(composer.Trainer):
    """Composer's Trainer for one microbatch a batch, and for as many samples on each rank.

    Args:
        logged: the batches whose losses are logged.
        explained: makes a context in which a batch is trained, which explains its errors.
        skips_step: says whether the batch's step is to be left out, once gradients are computed.
        **arguments: of Composer's Trainer.
    """

    def __init__(
        self,
        logged: LoggedBatches,
        explained: Callable[[], AbstractContextManager[None]] = nullcontext,
        skips_step: Callable[[], bool] = lambda: False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._logged = logged
        self._explained = explained
        self._skips_step = skips_step
        self.engine.register_pass(self._without_averages)

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        """Yield batches until one rank has no more; the hosts ask one another.

        Raises:
            Exception: of one rank's loader, or of its saver, which hears of uploads here; on every
                rank, see :func:`alignclip.ranks.raise_on_all_ranks`.
        """
        loader, trains = self.state.dataloader, trainer_mode == TrainerMode.TRAIN
        assert loader is not None
        length = self.state.dataloader_len
        batches = iter(loader) if length is None else itertools.islice(loader, length.value)
        is_over = False
        while not is_over:
            number = self.state.timestamp.batch.value + 1
            attendance.note(f"waits for the data of batch {number}", "its storage and workers")
            batch, failure = None, None
            try:
                if trains:
                    self.engine.run_event(Event.BEFORE_DATALOADER)
                with workers.deaths_explained():
                    batch = next(batches, None)
            except Exception as error:
                failure = error
            attendance.note(f"trains batch {number}")
            if batch is None and trains:
                self.engine.run_marker_only_event(Event.AFTER_DATALOADER)
            is_over, has_failed = true_on_any_rank(
                torch.tensor([batch is None, failure is not None])
            )
            if has_failed:
                raise_on_all_ranks(failure)
            if not is_over:
                yield batch

    def _train_batch(  # type: ignore[override]  # Composer allows None where it calls this
        self, use_grad_scaling: bool
    ) -> dict[str, Tensor] | None:
        """Train on a batch.

        Composer has the optimizer run the forward and the backward pass, and reads the loss before
        the step. Only SAM needs that.

        Returns:
            the losses of this rank, which Composer reads and logs; None where they are not logged.
        """
        (optimizer,) = self.state.optimizers
        with self._explained():
            if isinstance(optimizer, SAMOptimizer):
                losses: dict[str, Tensor] = super()._train_batch(use_grad_scaling)
            else:
                losses = self._step(optimizer, use_grad_scaling)
        return losses if self._logged.has(self.state.timestamp.batch.value + 1) else None

    def _step(self, optimizer: Optimizer, use_grad_scaling: bool) -> dict[str, Tensor]:
        """Compute the gradients of a batch, and have the optimizer step once."""
        losses: dict[str, Tensor] = {}
        self._train_microbatches([self.state.batch], losses)
        if self._skips_step():
            pass
        elif use_grad_scaling:
            assert self.state.scaler is not None
            self.state.scaler.step(optimizer)
        else:
            optimizer.step()
        size = self.state.device_train_microbatch_size
        self.logger.log_metrics({"trainer/device_train_microbatch_size": size or 0})
        self.first_train_batch_complete = True
        return losses

    def _train_microbatches(
        self, microbatches: Sequence[Any], total_loss_dict: dict[str, Tensor], ddp_sync: bool = True
    ) -> Tensor:
        """Compute the gradients of a batch.

        Composer counts the samples of all ranks through the device, to weigh microbatches.

        Args:
            microbatches: one.
            total_loss_dict: gets the losses.
            ddp_sync: whether DDP averages the gradients.

        Returns:
            the loss.
        """
        state, spec = self.state, self._train_data_spec
        assert spec is not None
        unsynchronized: AbstractContextManager[None] = nullcontext()
        if not ddp_sync and isinstance(state.model, DistributedDataParallel):
            unsynchronized = state.model.no_sync()
        with unsynchronized:
            self.engine.run_event(Event.BEFORE_TRAIN_BATCH)
            (optimizer,), (given,) = state.optimizers, microbatches
            optimizer.zero_grad()
            scales = self._use_grad_scaling(state.precision, state.scaler)
            before, state.batch = state.batch, state.device.batch_to_device(given)
            state.batch = spec.microbatch_transforms(state.batch)
            losses = self._train_microbatch(scales, spec.get_num_samples_in_batch(given), True)
            total_loss_dict |= {f"loss/train/{name}": loss[None] for name, loss in losses.items()}
            state.batch = before
            if scales:
                assert state.scaler is not None
                state.scaler.unscale_(optimizer)
            self.engine.run_event(Event.AFTER_TRAIN_BATCH)
        return total_loss_dict["loss/train/total"]

    def _without_averages(self, algorithms: Sequence[Algorithm], event: Event) -> list[Algorithm]:
        """Return the algorithms of an event: none average weights where no step was taken."""
        has_no_step = event == Event.BATCH_END and self._skips_step()
        return [] if has_no_step else list(algorithms)

    def _accumulate_time_across_ranks(
        self, num_samples: float, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        """Count samples and tokens of all ranks, and take the first rank's time, by the hosts."""
        seconds = batch_time.total_seconds() if rank() == 0 else 0.0
        samples, tokens = int(num_samples) * world_size(), num_tokens * world_size()
        return samples, tokens, datetime.timedelta(seconds=sum_over_ranks([seconds])[0])
