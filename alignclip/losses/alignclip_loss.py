"""The loss that a run minimises: a weighted sum of terms over the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignclip.config.plugged import LOSS_TERMS
from alignclip.errors import UserError
from alignclip.losses.captions import gather_captions
from alignclip.losses.contrastive import contrastive_loss
from alignclip.losses.features import gather_features
from alignclip.losses.precision import full_precision
from alignclip.losses.separation import separation_loss


class AlignCLIPLoss(nn.Module):
    """alpha · L_clip + beta · L_sep + further terms, over the global batch of N image-text pairs.

    With image features v, text features t, the scale s and S = q qᵀ, the cosine similarities of
    the captions' sentence embeddings q::

        L_clip = ½ [CE(s · v tᵀ) + CE(s · t vᵀ)]
        V      = (v vᵀ) ⊙ (1 − S), its diagonal replaced by v_i · t_i    (T likewise, from t tᵀ)
        L_sep  = ½ [separate_image · CE(s · V) + separate_text · CE(s · T)]

    where CE is the softmax cross-entropy against the diagonal, mean over rows. In words: L_sep
    pushes samples of one modality apart, less so where their captions say the same, and a sample's
    only positive is its own counterpart in the other modality. Source:
    https://arxiv.org/abs/2406.17639, whose weights are alpha = 1, beta = 0.5; the paper separates
    images alone, its published training script both sides.

    On W > 1 processes each computes its N/W rows and returns their mean. The mean over ranks is
    the loss of the global batch, and gradients averaged over ranks (what DDP and FSDP do) are those
    of a single process with all N samples. Every rank must hold the same number of samples.

    Where an N/W × N matrix is large, the losses are computed in tiles, and no matrix is ever whole
    (:mod:`alignclip.losses.tiles`); values and gradients are the same.

    Args:
        alpha: weight of L_clip.
        beta: weight of L_sep; with 0 L_sep is not computed and needs no sentence embeddings.
        separate_image: whether images are pushed apart.
        separate_text: whether texts are pushed apart.
        rescale: whether similarities are weighted by 1 − S. False is the paper's ablation without
            sentence embeddings: CE(s · v vᵀ) and CE(s · t tᵀ), where the positive is the sample
            itself.
        group: the processes that share the global batch; the default group when None.
        terms: further terms by their names in :data:`alignclip.config.plugged.LOSS_TERMS`, with
            each term's ``Settings``.

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
        terms: Mapping[str, Any] | None = None,
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
        self.terms = dict(terms or {})

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        semantic_features: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of this rank's rows in fp32 (fp64 where the features are fp64).

        Neither autocast nor TF32 is used.

        Args:
            image_features: [n, d], this rank's, L2-normalised.
            text_features: [n, d], this rank's, L2-normalised; row i belongs to row i of the images.
            logit_scale: the exponentiated scale s, [1] or [].
            semantic_features: [n, e] sentence embeddings of the captions, of any length: they are
                normalised here. Needed only if beta, rescale and at least one side are on.

        Returns:
            ``total``, the loss to minimise; ``contrastive``, L_clip; ``separation``, L_sep: scalars
            [], the latter two without their weights. Then each further term by its name, weighted
            as its settings say.

        Raises:
            UserError: the sentence embeddings are needed and missing.
            ValueError: shapes that don't belong together.
        """
        separates = self.beta != 0 and (self.separate_image or self.separate_text)
        if separates and self.rescale and semantic_features is None:
            raise UserError(
                "the separation loss needs the captions' sentence embeddings: convert the data "
                "with caption embeddings (the 'semantic' column), or set loss.rescale=false or "
                "loss.beta=0"
            )
        _check_shapes(image_features, text_features, logit_scale, semantic_features)
        dtype = torch.promote_types(
            torch.promote_types(image_features.dtype, text_features.dtype), torch.float32
        )
        with full_precision(image_features.device.type):
            features = gather_features(
                image_features.to(dtype), text_features.to(dtype), logit_scale.to(dtype), self.group
            )
            contrastive = contrastive_loss(features)
            separation = torch.zeros_like(contrastive)
            if separates:
                captions = None
                if self.rescale and semantic_features is not None:
                    captions = gather_captions(semantic_features.to(dtype), self.group)
                separation = separation_loss(
                    features, captions, self.separate_image, self.separate_text
                )
            total = self.alpha * contrastive + self.beta * separation
            losses = {"contrastive": contrastive, "separation": separation}
            for name, settings in self.terms.items():
                losses[name] = import_module(LOSS_TERMS[name]).compute(features, settings)
                total = total + losses[name]
        return {"total": total} | losses

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        names = ("alpha", "beta", "separate_image", "separate_text", "rescale")
        settings = {name: getattr(self, name) for name in names} | self.terms
        return ", ".join(f"{name}={value}" for name, value in settings.items())


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
            f"semantic_features must be [{len(image)}, e], a row a caption, "
            f"not {list(semantic.shape)}"
        )
