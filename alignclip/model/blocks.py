"""Parts of a tower: open_clip's, without copies of their tokens, the last block for one token.

CLIP pools one token of each sample: the class token of an image, the end-of-text token of a
caption. What the last block computes for the other tokens, behind its attention, is never used.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    LayerNorm,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn

# Numbers in a batch of tokens. Below, blocks run as open_clip's own: there is nothing to gain on a
# CPU. Sums are in another order above, so that the last bits differ.
SMALL = 2**18

Positions = Tensor | int  # of one token in each sample: [n], or the same in all


class Block(ResidualAttentionBlock):
    """open_clip's block, which can also compute one token a sample."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool | None = None,
        pooled: Positions | None = None,
    ) -> Tensor:
        """Compute the block.

        Args:
            q_x: ``[n, l, width]``.
            k_x, v_x, attn_mask: as open_clip's block takes them; without ``is_causal`` only.
            is_causal: whether a token attends to the tokens before it alone. None: open_clip's own
                computation.
            pooled: the token that is needed of each sample. None: all of them.

        Returns:
            ``[n, l, width]``, or ``[n, width]`` with ``pooled``.
        """
        if is_causal is None:
            result: Tensor = super().forward(q_x, k_x, v_x, attn_mask)
            return result
        attended = self._attend(self.ln_1(q_x), is_causal)
        if pooled is not None:
            q_x, attended = pick(q_x, pooled), pick(attended, pooled)
        x: Tensor = q_x + self.ls_1(self.attn.out_proj(attended))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def _attend(self, x: Tensor, is_causal: bool) -> Tensor:
        """Compute ``nn.MultiheadAttention`` up to its last projection, with the batch in front.

        ``nn.MultiheadAttention`` puts the tokens in front, which copies all of them, and back.
        """
        n, length, width = x.shape
        projected = F.linear(x, self.attn.in_proj_weight, self.attn.in_proj_bias)
        # Cut by columns: the gradients of the three are then put together by one plain copy.
        q, k, v = (
            part.view(n, length, self.attn.num_heads, -1).transpose(1, 2)
            for part in projected.chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return attended.transpose(1, 2).reshape(n, length, width)


class BlocksOfATower(Transformer):
    """open_clip's stack of blocks, which can return one token a sample."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, pooled: Positions | None = None
    ) -> Tensor:
        """Run all blocks.

        Args:
            x: ``[n, l, width]``.
            attn_mask: ``[l, l]``, the causal mask, where there is one.
            pooled: the token that is needed of each sample. None: all of them.

        Returns:
            ``[n, l, width]``, or ``[n, width]`` with ``pooled``.
        """
        if pooled is None:
            everything: Tensor = super().forward(x, attn_mask=attn_mask)
            return everything
        *first, last = self.resblocks
        is_causal = attn_mask is not None
        for block in first:
            x = block(x, is_causal=is_causal)
        result: Tensor = last(x, is_causal=is_causal, pooled=pooled)
        return result


class VisionTower(VisionTransformer):
    """open_clip's image tower, whose last block computes the class token alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return features, ``[n, embed_dim]``, of normalised pixels, ``[n, 3, size, size]``.

        A user who has set another pooling, or wants the tokens too, gets open_clip's computation.
        """
        early = self.proj is not None and self.pool_type == "tok" and self.attn_pool is None
        if not early or self.output_tokens or self.final_ln_after_pool:
            return super().forward(x)
        return pooled_tokens(self.transformer, self.ln_post, self._embeds(x), 0) @ self.proj


class PatchEmbedding(nn.Conv2d):
    """A convolution that takes each pixel once, as one product of matrices on a GPU.

    cuDNN's convolution of three channels takes four times as long. On a CPU it is the faster way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, width, rows, columns]`` of pixels, ``[n, 3, height, width]``."""
        is_cut = self.kernel_size == self.stride and self.padding == (0, 0) and self.groups == 1
        if x.device.type == "cpu" or not is_cut:
            return super().forward(x)
        return self.by_product(x)

    def by_product(self, x: Tensor) -> Tensor:
        """Compute the convolution as a product: each patch is a row, each filter a column."""
        (high, wide), (n, channels, height, width) = self.stride, x.shape
        rows, columns = height // high, width // wide
        cut = x[:, :, : rows * high, : columns * wide]
        patches = cut.reshape(n, channels, rows, high, columns, wide).permute(0, 2, 4, 1, 3, 5)
        tokens = F.linear(patches.reshape(n, rows * columns, -1), self.weight.flatten(1), self.bias)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))


class Norm(LayerNorm):
    """open_clip's layer norm, which a GPU computes without copies in fp32 under bf16 autocast.

    The kernel's sums are in fp32 all the same. It takes the weights in the type of the tokens, as
    products of matrices do. On a CPU it sums the weights' gradients in bf16: there they are copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise tokens, ``[…, width]``."""
        is_bf16 = x.device.type == "cuda" and x.dtype is torch.bfloat16
        # a compiled graph makes no copies anyway
        if not is_bf16 or not torch.is_autocast_enabled("cuda") or torch.compiler.is_compiling():
            result: Tensor = super().forward(x)
            return result
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile each block by itself ("regional compilation"); the rest of a model stays as it is.

    Blocks of equal sizes have one graph, so that compiling takes seconds, and texts are trimmed as
    without compiling: their length becomes a variable of the graph. A block keeps its class, its
    parameters and its hooks, so that DDP, FSDP2 and checkpoints know nothing of this.

    Args:
        model: open_clip's CLIP, or what holds one.
        **options: of :func:`torch.compile`.
    """
    for module in model.modules():
        if isinstance(module, ResidualAttentionBlock):
            module.compile(**options)


def pooled_tokens(
    transformer: nn.Module,
    norm: nn.Module,
    x: Tensor,
    pooled: Positions,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Run the blocks and the norm behind them: ``[n, l, width]`` → one token of each sample."""
    if not _pools_early(transformer, x):
        return pick(norm(transformer(x, attn_mask=attn_mask)), pooled)
    normed: Tensor = norm(transformer(x, attn_mask=attn_mask, pooled=pooled))
    return normed


def _pools_early(transformer: nn.Module, x: Tensor) -> bool:
    """Say whether the last block may compute one token a sample, and whether that pays.

    Blocks that are recomputed, or whose attention somebody has replaced, run as open_clip's own.
    """
    if not isinstance(transformer, BlocksOfATower) or transformer.grad_checkpointing:
        return False
    if any(type(block.attn) is not nn.MultiheadAttention for block in transformer.resblocks):
        return False
    # a graph for any size of batch can't ask for the size
    return torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() >= SMALL


def pick(x: Tensor, positions: Positions) -> Tensor:
    """Take one token of each sample: ``[n, l, width]`` → ``[n, width]``."""
    if isinstance(positions, int):
        return x[:, positions]
    return x[torch.arange(x.shape[0], device=x.device), positions]


OURS: dict[type[nn.Module], type[nn.Module]] = {
    ResidualAttentionBlock: Block,
    Transformer: BlocksOfATower,
    VisionTransformer: VisionTower,
    LayerNorm: Norm,
}


def replace_classes(model: nn.Module) -> None:
    """Have a CLIP of open_clip's compute by the classes of this module; nothing else changes."""
    for module in model.modules():
        module.__class__ = OURS.get(type(module), type(module))
        if isinstance(module, VisionTower):
            module.conv1.__class__ = PatchEmbedding
