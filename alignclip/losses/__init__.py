"""The contrastive loss of CLIP and the separation loss of AlignCLIP (https://arxiv.org/abs/2406.17639, section 4.2).

Every rank computes its own rows of the similarity matrices against the columns of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn

from alignclip.errors import UserError


class AlignCLIPLoss(nn.Module):
    """alpha · L_clip + beta · L_sep over the global batch of N image-text pairs.

    With image features v, text features t, the scale s and S = q qᵀ, the cosine similarities of the captions'
    sentence embeddings q::

        L_clip = ½ [CE(s · v tᵀ) + CE(s · t vᵀ)]
        V      = (v vᵀ) ⊙ (1 − S), its diagonal replaced by v_i · t_i       (T likewise, from t tᵀ)
        L_sep  = ½ [separate_image · CE(s · V) + separate_text · CE(s · T)]

    where CE is the softmax cross-entropy against the diagonal, mean over rows. In words: L_sep pushes samples of one
    modality apart, less so where their captions say the same, and a sample's only positive is its own counterpart in
    the other modality. Source: https://arxiv.org/abs/2406.17639, whose weights are alpha = 1, beta = 0.5; the paper
    separates images alone, its published training script both sides.

    On W > 1 processes each computes its N/W rows and returns their mean. The mean over ranks is the loss of the global
    batch, and gradients averaged over ranks (what DDP and FSDP do) are those of a single process with all N samples.
    Every rank must hold the same number of samples.

    Args:
        alpha: weight of L_clip.
        beta: weight of L_sep; with 0 it is neither computed nor does it need sentence embeddings.
        separate_image: whether images are pushed apart.
        separate_text: whether texts are pushed apart.
        rescale: whether similarities are weighted by 1 − S. False is the paper's ablation without sentence embeddings:
            CE(s · v vᵀ) and CE(s · t tᵀ), where the positive is the sample itself.
        group: the processes that share the global batch; the default group when None.

    Raises:
        UserError: ``rescale=False`` with a side switched off, which that variant doesn't know.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.5,
        separate_image: bool = True,
        separate_text: bool = True,
        rescale: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if beta != 0 and not rescale and not (separate_image and separate_text):
            raise UserError(
                "rescale=false separates both sides: set separate_image=true and separate_text=true"
            )
        self.alpha, self.beta = alpha, beta
        self.separate_image, self.separate_text = separate_image, separate_text
        self.rescale = rescale
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        semantic_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of this rank's rows, computed in fp32 (fp64 where the features are), without autocast and TF32.

        Args:
            image_features: [n, d], this rank's, L2-normalised.
            text_features: [n, d], this rank's, L2-normalised; row i belongs to row i of the images.
            logit_scale: the exponentiated scale s, [1] or [].
            semantic_features: [n, e] sentence embeddings of the captions, of any length: they are normalised here.
                Needed only if beta, rescale and at least one side are on.

        Returns:
            ``total``, the loss to minimise; ``contrastive``, L_clip; ``separation``, L_sep: scalars [], the latter two
            without their weights.

        Raises:
            UserError: the sentence embeddings are needed and missing.
            ValueError: shapes that don't belong together.
        """
        separates = self.beta != 0 and (self.separate_image or self.separate_text)
        if separates and self.rescale and semantic_features is None:
            raise UserError(
                "the separation loss needs the captions' sentence embeddings: convert the data with caption embeddings "
                "(the 'semantic' column), or set loss.rescale=false or loss.beta=0"
            )
        _check_shapes(image_features, text_features, logit_scale, semantic_features)
        dtype = torch.promote_types(
            torch.promote_types(image_features.dtype, text_features.dtype), torch.float32
        )
        with full_precision(image_features.device.type):
            image, text, scale = (
                image_features.to(dtype),
                text_features.to(dtype),
                logit_scale.to(dtype),
            )
            all_image, all_text = _gather_features(image, text, self.group)
            # the column of each row's own sample
            own = torch.arange(len(image), device=image.device) + _rank(self.group) * len(image)
            # scaling n×d features rather than n×N similarities saves autograd a matrix each
            scaled_image, scaled_text = scale * image, scale * text
            contrastive = (
                F.cross_entropy(_matmul_transposed(scaled_image, all_text), own)
                + F.cross_entropy(_matmul_transposed(scaled_text, all_image), own)
            ) / 2
            separation = torch.zeros_like(contrastive)
            if separates:
                dissimilarity = positives = None
                if self.rescale:
                    assert semantic_features is not None
                    dissimilarity = _caption_dissimilarity(semantic_features.to(dtype), self.group)
                    positives = (scaled_image * text).sum(dim=1)
                if self.separate_image:
                    separation = (
                        separation
                        + _separation(scaled_image, all_image, own, dissimilarity, positives) / 2
                    )
                if self.separate_text:
                    separation = (
                        separation
                        + _separation(scaled_text, all_text, own, dissimilarity, positives) / 2
                    )
            total = self.alpha * contrastive + self.beta * separation
        return {"total": total, "contrastive": contrastive, "separation": separation}

    def extra_repr(self) -> str:
        """The settings, as ``print(model)`` shows them."""
        names = ("alpha", "beta", "separate_image", "separate_text", "rescale")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _separation(
    scaled: Tensor,
    everyone: Tensor,
    own: Tensor,
    dissimilarity: Tensor | None,
    positives: Tensor | None,
) -> Tensor:
    """CE of one modality's [n, N] self-similarities; with rescaling, weighted and with a positive in the diagonal."""
    logits = _matmul_transposed(scaled, everyone)
    if dissimilarity is not None and positives is not None:
        # in place: nothing upstream saved the product, so the weights are the only further matrix
        logits.mul_(dissimilarity)
        logits[torch.arange(len(own), device=own.device), own] = positives
    return F.cross_entropy(logits, own)


@torch.no_grad()
def _caption_dissimilarity(semantic: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """1 − S: one minus the cosine similarities of this rank's [n, e] sentence embeddings with all N, [n, N]."""
    semantic = F.normalize(semantic, dim=1).contiguous()
    everyone = semantic
    if _world_size(group) > 1:
        parts = [torch.empty_like(semantic) for _ in range(_world_size(group))]
        dist.all_gather(parts, semantic, group=group)
        everyone = torch.cat(parts)
    return (semantic @ everyone.T).neg_().add_(1)


def _gather_features(
    image: Tensor, text: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Both modalities' features of all ranks, [N, d] each, in one collective that gradients flow back through."""
    if _world_size(group) == 1:
        return image, text
    # an explicit group: the collective's own default would be looked up at import time
    pairs = torch.cat(
        dist_nn.all_gather(torch.cat([image, text], dim=1), group or dist.group.WORLD)
    )
    dim = image.shape[1]
    return pairs[:, :dim], pairs[:, dim:]


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _rank(group: dist.ProcessGroup | None) -> int:
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def _check_shapes(
    image: Tensor, text: Tensor, logit_scale: Tensor, semantic: Tensor | None
) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"features must be two [n, d] matrices, not {list(image.shape)} and {list(text.shape)}"
        )
    if logit_scale.numel() != 1:
        raise ValueError(
            f"logit_scale must be a single number, not of shape {list(logit_scale.shape)}"
        )
    if semantic is not None and (semantic.ndim != 2 or len(semantic) != len(image)):
        raise ValueError(
            f"semantic_features must be [{len(image)}, e], a row a caption, not {list(semantic.shape)}"
        )


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """fp32 matrix products in fp32: no autocast, no TF32 (bf16 logits at s = 100 are off by 0.4)."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


class _MatmulTransposed(torch.autograd.Function):
    """a @ b.T whose backward, which runs outside of any context of the forward, is in full precision too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device.type):
            return a @ b.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        (grad,) = grads
        with full_precision(grad.device.type):
            return (
                grad @ b if ctx.needs_input_grad[0] else None,
                grad.T @ a if ctx.needs_input_grad[1] else None,
            )


def _matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    """[n, d], [N, d] -> a bᵀ, [n, N]."""
    product = _MatmulTransposed.apply(a, b)
    assert isinstance(product, Tensor)
    return product
