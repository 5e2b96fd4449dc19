"""Patches of Composer and torch: functions that are replaced, and private names that are used.

Each says why. Measured with mosaicml 0.32.1 and torch 2.7.0, 2.11.0 and 2.15.0;
``tests/test_contracts.py`` fails where an upgrade has moved or changed one of the names. A function
that takes the place of one of Composer's keeps its signature. :mod:`alignclip.training.saver`
patches Composer's CheckpointSaver; all other modules use public names only.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from composer import Trainer, loggers
from composer.algorithms import EMA
from composer.core import Callback, State
from composer.core.engine import Engine
from composer.loggers import Logger
from composer.utils import checkpoint, collect_env, reproducibility
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives
from torch.optim import Optimizer

from alignclip.device import processor_name
from alignclip.ranks import world_size
from alignclip.storage import expect_plain_s3

WRAPPED = "module."  # what DDP puts before a parameter's name
GRAPHS = 64  # of a piece of code, before torch.compile leaves further ones as they are
given: list[dict[str, Any]] = []  # the content of the checkpoint that Composer loads next
_cpu_model_by_composer = collect_env.get_cpu_model


def install() -> None:
    """Have Composer load, and name the processor, by the functions of this module."""
    checkpoint.download_checkpoint = download_checkpoint
    checkpoint.safe_torch_load = take_checkpoint
    collect_env.get_cpu_model = cpu_model  # type: ignore[assignment]  # which caches
    expect_plain_s3()


# --- loading --------------------------------------------------------------------------------------


def download_checkpoint(
    path: str, node_checkpoint_folder: str, object_store: object, progress_bar: bool
) -> tuple[str, None, bool]:
    """Give Composer the file that :mod:`alignclip.training.resume` has put on this machine.

    Composer makes a symbolic link to the file in a temporary folder, and not every file system has
    links.
    """
    return path, None, False


def take_checkpoint(
    composer_states_filepath: str | Path,
    map_location: str = "cpu",
    load_monolith_rank0_only: bool = False,
) -> dict[str, Any]:
    """Give Composer the content that :mod:`alignclip.training.resume` has read.

    Composer unpickles whatever the file holds.
    """
    return given.pop()


def restore_random_state(trainer: Trainer) -> None:
    """Restore the random generators of the loaded checkpoint: patch dropout draws from them.

    In the middle of an epoch Composer restores them only for loaders that can't resume.
    """
    if trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)


def name_averages(trainer: Trainer) -> None:
    """Give EMA's averages of the loaded checkpoint the names of this start's parameters.

    DDP puts ``module.`` before each name. EMA goes by names, and passes over what it doesn't know:
    with a checkpoint of one process, several would train the averages.
    """
    model = trainer.state.model
    for algorithm in trainer.state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.ema_model is not None:
            parts = algorithm.ema_model
            _rename_averages(
                parts.named_parameters_dict, (name for name, _ in model.named_parameters())
            )
            _rename_averages(parts.named_buffers_dict, (name for name, _ in model.named_buffers()))


def _rename_averages(tensors: dict[str, Tensor], names: Iterable[str]) -> None:
    known = {name.removeprefix(WRAPPED): name for name in names}
    renamed = {known.get(name.removeprefix(WRAPPED), name): one for name, one in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def close(trainer: Trainer) -> None:
    """Close what a run has opened, once, while threads and processes can still be started.

    Composer closes a second time as Python ends, and only then where an error has ended the run.
    Then no thread can be started any more, and the resulting error hides the first one.
    """
    trainer.engine.close()
    atexit.unregister(Engine._close)


# --- the machine ----------------------------------------------------------------------------------


def cpu_model() -> str:
    """Name the processor, which checkpoints keep.

    Composer starts a Python process for the name, which takes as long as half a second, on every
    rank.
    """
    return processor_name() or str(_cpu_model_by_composer())


# --- loggers --------------------------------------------------------------------------------------


def open_for_appending(logger: loggers.FileLogger, run_name: str) -> int:
    """Open a FileLogger's file behind its content; Composer's ``init`` empties the file.

    Returns:
        the size of the content in bytes.
    """
    logger._is_newline = True
    logger._run_name = run_name  # type: ignore[assignment]
    path = Path(logger.filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    logger.file = path.open("a+", buffering=logger.buffer_size, encoding="utf-8")
    logger._flush_queue()
    return size


# --- torch ----------------------------------------------------------------------------------------


def skip_step(optimizer: Optimizer, flag: Tensor | None) -> None:
    """Have a fused optimizer skip its steps where a flag on the device is 1; None: no steps.

    torch's GradScaler tells a fused optimizer the same way: the host needs not know the flag.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]


class ReshardAfterBackward(Callback):
    """Keeps gathered parameters until the backward pass ends, under FSDP2 with chunked encoding.

    FSDP2 frees a block's parameters after a chunk's backward pass. The next chunk recomputes the
    same blocks within the backward pass, where FSDP2 gathers nothing, so its parameters must stay.
    """

    # Composer keeps a callback's state under this name: checkpoints of earlier versions have it
    __qualname__ = "WholeThroughBackward"

    def fit_start(self, state: State, logger: Logger) -> None:
        """Keep parameters during the backward pass."""
        for module in self._sharded(state):
            module.set_reshard_after_backward(False)

    def after_backward(self, state: State, logger: Logger) -> None:
        """Free parameters before the optimizer's step: the next forward pass gathers them anew."""
        for module in self._sharded(state):
            module.reshard()

    @staticmethod
    def _sharded(state: State) -> list[FSDPModule]:
        return [module for module in state.model.modules() if isinstance(module, FSDPModule)]


def average_fsdp_gradients_on_gloo() -> bool:
    """Make FSDP2's gradients on CPU the average over ranks; call this on every rank.

    FSDP2 asks for reduce-scatter(AVG), and gloo of torch 2.7 sums: gradients come out world size
    times too large, which Adam hides. A probe decides, so that a mended gloo is left alone: that of
    torch 2.11 and later averages.

    Returns:
        whether anything had to be mended.
    """
    world = world_size()
    share = torch.empty(1)
    dist.reduce_scatter_tensor(share, torch.ones(world), op=dist.ReduceOp.AVG)
    if share.item() == 1:
        return False
    # the factors that FSDP2 divides by before and after a plain sum
    _fsdp_collectives._get_gradient_divide_factors = lambda *args, **kwargs: (1.0, float(world))
    return True


def compile_whole_graphs() -> None:
    """Keep torch.compile from splitting graphs for DDP, and from giving up after eight graphs.

    Splitting fails where chunks are recomputed, and blocks that are compiled one by one are split
    already. A block has a graph each for images and texts, for all tokens and one, for gradients
    and none; and more where towers differ in width.
    """
    torch._dynamo.config.cache_size_limit = max(GRAPHS, torch._dynamo.config.cache_size_limit)
    torch._dynamo.config.optimize_ddp = False
