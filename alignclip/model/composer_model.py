"""The ComposerModel: DDP or FSDP wraps the encoders; the loss is computed outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from composer.models import ComposerModel
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignclip.data.batch import Batch, longest_text
from alignclip.data.transforms import normalize
from alignclip.losses import AlignCLIPLoss
from alignclip.model.encoders import CLIP
from alignclip.model.flops import PairFlops, count_pair, loss_flops
from alignclip.ranks import world_size

EncodedBatch = tuple[Tensor, Tensor, Tensor]


class AlignCLIPModel(ComposerModel):
    """CLIP, SharedCLIP or AlignCLIP, for Composer's Trainer.

    Args:
        encoders: the two towers, shared or not.
        criterion: the loss over the global batch.
        encode_chunk_size: > 0 encodes a rank's batch in recomputed chunks of that many samples.
        cpu_bf16: run the encoders in bf16 autocast on a CPU, where Composer refuses ``amp_bf16``.

    Attributes:
        pair_flops: operations of a pair, once :meth:`count_flops` has counted them.
    """

    def __init__(
        self,
        encoders: CLIP,
        criterion: AlignCLIPLoss,
        encode_chunk_size: int = 0,
        cpu_bf16: bool = False,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.criterion = criterion
        self.encode_chunk_size = encode_chunk_size
        self.cpu_bf16 = cpu_bf16
        self.pair_flops: PairFlops | None = None
        self.register_load_state_dict_pre_hook(tie_names)
        # One FSDP unit a block; Composer looks for these functions on the ComposerModel's children.
        self.encoders.fsdp_wrap_fn = is_block
        self.encoders.activation_checkpointing_fn = is_block

    def forward(self, batch: Batch) -> EncodedBatch:
        """Encode a batch of this rank.

        Args:
            batch: with images and texts.

        Returns:
            image features ``[n, d]`` and text features ``[n, d]``, both L2-normalised, and
            exp(logit_scale) ``[1]``.
        """
        autocast: AbstractContextManager[None] = (
            torch.autocast("cpu", dtype=torch.bfloat16) if self.cpu_bf16 else nullcontext()
        )
        # a compiled graph that reads a number is compiled again for another number
        length = None if torch.compiler.is_compiling() else batch.get("text_length")
        with autocast:
            return self.encoders(
                normalize(batch["image"]),
                batch["text"],
                chunk_size=self.encode_chunk_size,
                text_length=length,
            )

    def loss(  # type: ignore[override]  # Composer takes a dict as well as a tensor
        self, outputs: EncodedBatch, batch: Batch
    ) -> dict[str, Tensor]:
        """Compute ``total`` and the loss terms of this rank's rows of the global batch."""
        return self.criterion(*outputs, batch.get("semantic"))

    def count_flops(self) -> None:
        """Count the operations of a pair, with the parts that are locked by now."""
        self.pair_flops = count_pair(self.encoders)

    def flops_per_batch(self, batch: Batch) -> float:
        """Return the operations of a rank's batch, forward and backward; 0 where they aren't known.

        Args:
            batch: without ``text_length`` the texts' length isn't asked for on a device, and the
                padding counts.
        """
        if self.pair_flops is None:
            return 0.0
        text, semantic = batch["text"], batch.get("semantic")
        rows, width = len(text), self.encoders.text_projection.shape[1]
        length = batch.get("text_length")
        if length is None:
            length = longest_text(text) if text.device.type == "cpu" else text.shape[1]
        numbers = 0 if semantic is None else semantic.shape[1]
        of_loss = loss_flops(self.criterion, rows, rows * world_size(), width, numbers)
        return rows * self.pair_flops.at(length) + of_loss


def tie_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Give every name of a shared parameter the same value before a state dict is loaded.

    torch's ``set_model_state_dict`` shards a full state dict for FSDP2 under only one name of a
    shared module.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(prefix + name)
    for group in names.values():
        sharded = next((n for n in group if isinstance(state_dict.get(n), DTensor)), None)
        if sharded is not None:
            state_dict.update(dict.fromkeys(group, state_dict[sharded]))


def is_block(module: nn.Module) -> bool:
    """Say whether a module is a transformer block, the unit of sharding and checkpointing."""
    return isinstance(module, ResidualAttentionBlock)
