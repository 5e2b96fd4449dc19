"""CyCLIP's cyclic consistency (https://arxiv.org/abs/2205.14459, section 3).

With image features v and text features t of a global batch of N pairs::

    L_in_modal    = 1/N Σ_i Σ_j (v_i·v_j − t_i·t_j)²
    L_cross_modal = 1/N Σ_i Σ_j (v_i·t_j − v_j·t_i)²

The paper divides the sum over N² pairs by N, and so does this module: its weights of 0.25 each mean
what they mean in the paper. The authors' code scales the similarities by s, then divides by s²: no
logit scale is left in the paper's loss or in this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from alignclip.config.setting import setting

if TYPE_CHECKING:  # torch is imported with the first loss, and not with the settings
    from torch import Tensor

    from alignclip.losses.features import GlobalFeatures


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
    """
    import torch

    from alignclip.losses.precision import matmul_transposed

    def product(a: Tensor, b: Tensor) -> Tensor:
        return matmul_transposed(a.T, b.T, None if a.device.type == "mps" else torch.float64)

    difference, total = features.image - features.text, features.image + features.text
    all_difference = features.all_image - features.all_text
    all_total = features.all_image + features.all_text
    squares = (product(difference, difference) * product(all_total, all_total)).sum()
    products = (product(difference, total) * product(all_total, all_difference)).sum()
    weighted = settings.in_modal * (squares + products) + settings.cross_modal * (
        squares - products
    )
    return (weighted / (2 * len(features.image))).to(features.image.dtype)
