"""CyCLIP's cyclic consistency (https://arxiv.org/abs/2205.14459, section 3).

With image features v and text features t of a global batch of N pairs::

    L_in_modal    = 1/N Σ_i Σ_j (v_i·v_j − t_i·t_j)²
    L_cross_modal = 1/N Σ_i Σ_j (v_i·t_j − v_j·t_i)²

The paper divides the sum over N² pairs by N, and so does this module: its weights of 0.25 each mean
what they mean in the paper. The authors' code scales the similarities by s, then divides by s²: no
logit scale is left in the paper's loss or in this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.setting import setting

if TYPE_CHECKING:  # torch is imported with the first loss, and not with the settings
    from torch import Tensor

    from alignclip.losses.features import GlobalFeatures

ROWS = 1024  # of a block in fp64


@dataclass
class Settings:
    """in_modal · L_in_modal + cross_modal · L_cross_modal, added to the loss."""

    in_modal: float = setting(0.25, at_least=0)  # of L_in_modal
    cross_modal: float = setting(0.25, at_least=0)  # of L_cross_modal


def compute(features: GlobalFeatures, settings: Settings) -> Tensor:
    """Compute the weighted term of this rank's rows: a scalar [].

    No similarity matrix is built. With p = v + t and d = v − t::

        v_i·v_j − t_i·t_j = ½ (d_i·p_j + d_j·p_i)
        v_i·t_j − v_j·t_i = ½ (d_j·p_i − d_i·p_j)

    so both sums of squares come from A = Σ (d_i·p_j)² = tr(DᵀD PᵀP) and
    B = Σ (d_i·p_j)(d_j·p_i) = tr((DᵀP)²): they are ½ (A + B) and ½ (A − B). The products are d × d.

    Where features have collapsed, the traces are small sums of large products. So the products are
    in fp64, except on Apple's GPUs, which have none.

    The gradients by d and p are products of n × d and d × d, written out below: autograd takes 12
    products and keeps fp64 copies, this takes 7 and keeps none. A rank computes the gradients of
    all ranks' sum by its own features.
    """
    import torch

    from alignclip.losses.known_gradients import with_gradients

    image, text, count = features.image, features.text, len(features.image)
    dtype = image.dtype if image.device.type == "mps" else torch.float64

    def blocks(image: Tensor, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield D and P of some rows."""
        for v, t in zip(image.split(ROWS), text.split(ROWS), strict=True):
            yield v.to(dtype) - t.to(dtype), v.to(dtype) + t.to(dtype)

    def products(image: Tensor, text: Tensor) -> Tensor:
        """Compute DᵀD, PᵀP and DᵀP."""
        sums = image.new_zeros((3, image.shape[1], image.shape[1]), dtype=dtype)
        for d, p in blocks(image, text):
            for one, (left, right) in zip(sums, ((d, d), (p, p), (d, p)), strict=True):
                one.addmm_(left.T, right)
        return sums

    squares, mixed = (
        settings.in_modal + settings.cross_modal,
        settings.in_modal - settings.cross_modal,
    )
    with torch.no_grad():
        own = products(image, text)
        is_alone = len(features.all_image) == count
        all_dd, all_pp, all_dp = (
            own if is_alone else products(features.all_image, features.all_text)
        )
        loss = squares * (own[0] * all_pp).sum() + mixed * (own[2] * all_dp.T).sum()
        by_image, by_text = torch.empty_like(image), torch.empty_like(text)
        for (d, p), by_v, by_t in zip(
            blocks(image, text), by_image.split(ROWS), by_text.split(ROWS), strict=True
        ):
            by_d = squares * (d @ all_pp) + mixed * (p @ all_dp)
            by_p = squares * (p @ all_dd) + mixed * (d @ all_dp.T)
            by_v.copy_((by_p + by_d) / count)
            by_t.copy_((by_p - by_d) / count)
    return with_gradients((loss / (2 * count)).to(image.dtype), (image, text), (by_image, by_text))
