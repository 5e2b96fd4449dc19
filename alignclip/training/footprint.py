"""The memory that a rank needs on its device, by part, estimated before the run.

The forward pass of two small batches says what a pair keeps for its backward pass. The other parts
follow from the sizes of the model and the batch. Buffers of kernels and of the allocator are not
counted.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from alignclip.config.schema import OptimizerConfig, RunConfig
from alignclip.data.batch import Batch
from alignclip.device import autocast_dtype
from alignclip.errors import one_line
from alignclip.losses.tiles import CPU_TILE, GPU_TILE
from alignclip.model.composer_model import AlignCLIPModel, is_block
from alignclip.model.optimization import build_optimizer
from alignclip.ranks import world_size
from alignclip.training.device_memory import in_chunks, pairs_of_a_rank
from alignclip.training.network import FP32

log = logging.getLogger(__name__)

FEW, MORE = 2, 4  # pairs of the two batches: a BatchNorm refuses one
LOGITS_AT_ONCE = 6  # tiles, or small matrices, that the loss holds at a time
GATHERED_BLOCKS = 2  # of FSDP: the one that is computed, and the next one


@dataclass(frozen=True)
class Footprint:
    """Bytes on the device of a rank.

    Attributes:
        weights: parameters and buffers.
        gradients: with what the exchange needs, DDP's second copy or FSDP's whole ones.
        optimizer: its state.
        algorithms: what EMA and SAM keep; others' memory is not counted.
        batch: images, texts and embeddings.
        activations: kept for the backward pass; None where that can't be known before.
        loss: features of all ranks with their gradients, and a few tiles of logits.
    """

    weights: int
    gradients: int
    optimizer: int
    algorithms: int
    batch: int
    activations: int | None
    loss: int

    @property
    def total(self) -> int:
        """Add up the parts that are known."""
        return sum(one or 0 for one in dataclasses.astuple(self))


@dataclass(frozen=True)
class Whole:
    """Bytes of a model and of its optimizer's state, on all ranks together; see Footprint."""

    weights: int
    gradients: int
    optimizer: int
    algorithms: int

    @classmethod
    def of(cls, config: RunConfig, model: AlignCLIPModel) -> Whole:
        """Count the bytes of a model that is not wrapped so far."""
        weights = sum(map(tensor_bytes, [*model.parameters(), *model.buffers()]))
        trained = sum(tensor_bytes(one) for one in model.parameters() if one.requires_grad)
        buffers = sum(map(tensor_bytes, model.buffers()))
        algorithms = trained + buffers if "EMA" in config.algorithms else 0
        algorithms += trained if "SAM" in config.algorithms else 0  # the way to its second point
        return cls(weights, trained, round(trained * state_ratio(config.optimizer)), algorithms)

    def checkpoint(self, weights_only: bool) -> int:
        """Return the bytes of a checkpoint."""
        return self.weights + (0 if weights_only else self.optimizer + self.algorithms)


@dataclass(frozen=True)
class Linear:
    """Bytes of n pairs: ``fixed + pair · n``."""

    fixed: int
    pair: int

    def at(self, pairs: int) -> int:
        """Return the bytes of so many pairs."""
        return self.fixed + self.pair * pairs


def footprint(
    config: RunConfig, model: AlignCLIPModel, whole: Whole, device: torch.device, dimension: int
) -> Footprint:
    """Estimate the memory of a rank.

    Args:
        config: of the run.
        model: not wrapped so far, with its locked parts locked; it is moved to the device.
        whole: the bytes of all ranks together.
        device: of this rank.
        dimension: numbers of a caption embedding; 0 without such.
    """
    model.to(device)
    ranks = world_size()
    weights, gradients, state, algorithms = dataclasses.astuple(whole)
    if config.parallelism_config.fsdp2 is not None and ranks > 1:
        gathered = _gathered_by_fsdp(model)
        weights, gradients, state, algorithms = (
            part // ranks for part in (weights, gradients, state, algorithms)
        )
        weights += gathered
        gradients += gathered  # whole until the ranks have added them
    elif ranks > 1:
        gradients *= 2  # DDP's buckets
    pairs = pairs_of_a_rank(config)
    return Footprint(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        algorithms=algorithms,
        batch=sum(map(tensor_bytes, _tensors(empty_batch(config, 1, device, dimension)))) * pairs,
        activations=activations(config, model, device),
        loss=_loss_bytes(config, device, dimension),
    )


def activations(config: RunConfig, model: AlignCLIPModel, device: torch.device) -> int | None:
    """Estimate the bytes that a batch's forward pass keeps, with texts of full length.

    Returns:
        None where FSDP's own settings decide what is kept.
    """
    fsdp2 = config.parallelism_config.fsdp2
    if fsdp2 is not None and (fsdp2.activation_checkpointing or fsdp2.activation_cpu_offload):
        return None
    known = {one.untyped_storage().data_ptr() for one in model.parameters()}
    encoders, chunk = model.encoders, model.encode_chunk_size

    def measured(encode: Callable[[Batch], object]) -> Linear:
        def kept(pairs: int) -> int:
            batch = empty_batch(config, pairs, device, 0)
            return kept_bytes(lambda: encode(batch), known, config, device)

        few, more = kept(FEW), kept(MORE)
        pair = (more - few) // (MORE - FEW)
        return Linear(few - pair * FEW, pair)

    model.encode_chunk_size = 0
    try:
        whole = measured(model.forward)
        if not in_chunks(config):
            return whole.at(pairs_of_a_rank(config))
        # the last texts are kept, and a chunk is encoded again when these are done with
        texts = measured(lambda batch: encoders.encode_text(batch["text"]))
        images = Linear(whole.fixed, whole.pair - texts.pair)
        return max(images.at(chunk), texts.at(chunk))
    finally:
        model.encode_chunk_size = chunk


def kept_bytes(
    encode: Callable[[], object], known: set[int], config: RunConfig, device: torch.device
) -> int:
    """Count the bytes of the tensors that a forward pass keeps for its backward pass.

    Args:
        encode: the forward pass.
        known: addresses of memory that isn't counted.
        config: says the precision.
        device: that computes.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # which holds the address

    dtype = autocast_dtype(config.precision)
    autocast = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
    with autocast, saved_tensors_hooks(keep, _never):
        encode()
    return sum(one.nbytes() for address, one in kept.items() if address not in known)


def empty_batch(config: RunConfig, pairs: int, device: torch.device, dimension: int) -> Batch:
    """Make a batch of empty images, and of texts that end at their last token."""
    size, length = config.model.vision_cfg.image_size, config.model.text_cfg.context_length
    text = torch.zeros(pairs, length, dtype=torch.int64, device=device)
    text[:, -1] = config.model.text_cfg.vocab_size - 1
    batch: Batch = {
        "image": torch.zeros(pairs, 3, size, size, dtype=torch.uint8, device=device),
        "text": text,
        "sample": torch.zeros(pairs, dtype=torch.int64, device=device),
        "text_length": length,
    }
    if dimension:
        batch["semantic"] = torch.zeros(pairs, dimension, dtype=torch.float16, device=device)
    return batch


def state_ratio(config: OptimizerConfig) -> float:
    """Return the bytes of an optimizer's state by a byte of its parameters: 2 for AdamW.

    A step on a square matrix says it. Some optimizers keep less of such a matrix than of others.

    Returns:
        0 where the optimizer can't step on a CPU.
    """
    model = nn.Linear(128, 128, bias=False)
    one_rate = dataclasses.replace(config, layer_decay=None, fused=None)
    optimizer = build_optimizer(one_rate, model)
    model.weight.grad = torch.zeros_like(model.weight)
    try:
        optimizer.step()
    except Exception as error:  # of a kernel for GPUs alone, in another package
        log.warning(f"the memory of {config.opt} is not counted: {one_line(error)}")
        return 0.0
    held = (value for values in optimizer.state.values() for value in values.values())
    # a counter of steps is no matrix
    matrices = (one for one in held if isinstance(one, Tensor) and one.ndim)
    return sum(map(tensor_bytes, matrices)) / tensor_bytes(model.weight)


def _loss_bytes(config: RunConfig, device: torch.device, dimension: int) -> int:
    """Estimate the bytes of features and captions of all ranks, and of the logits."""
    rows, columns = pairs_of_a_rank(config), config.global_train_batch_size
    tile = CPU_TILE if device.type == "cpu" else GPU_TILE
    features = 2 * 2 * columns * config.model.embed_dim  # both modalities, with their gradients
    logits = LOGITS_AT_ONCE * min(rows * columns, tile)
    return FP32 * (features + columns * dimension + logits)


def _gathered_by_fsdp(model: AlignCLIPModel) -> int:
    """Return the bytes of parameters that a rank has whole: two blocks, and what is in no block."""
    blocks = {module for module in model.modules() if is_block(module)}
    inside = {id(one) for block in blocks for one in block.parameters()}
    largest = max((sum(map(tensor_bytes, block.parameters())) for block in blocks), default=0)
    outside = sum(tensor_bytes(one) for one in model.parameters() if id(one) not in inside)
    return GATHERED_BLOCKS * largest + outside


def _tensors(batch: Batch) -> Iterable[Tensor]:
    return (one for one in batch.values() if isinstance(one, Tensor))


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's numbers."""
    return tensor.numel() * tensor.element_size()


def _never(_: None) -> Tensor:
    raise AssertionError("nothing runs backward here")
