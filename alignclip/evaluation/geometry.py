"""The geometry of the shared space: separability, spectra, cosines, and a gap closed by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.evaluation.packages import library

# Total variance of unit vectors that differ by rounding only: fp32 gives about 1e-14
NO_VARIANCE = 1e-12


@torch.no_grad()
def linear_separability(image_features: Tensor, text_features: Tensor, seed: int = 0) -> float:
    """Measure how well a linear classifier tells images from texts, on pairs it has not seen.

    Source: Fahim et al. 2024, https://arxiv.org/abs/2405.18570. There 80 % of all features are for
    training; here half of the *pairs*, so that no test feature has its partner in training.
    Coordinates are standardised: those of unit vectors shrink with the width, and scikit-learn's
    default strength would regularise wide spaces more.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [N, d], row i being pair i.
        seed: of the split; the same on any device.

    Returns:
        In [0, 1]: 0.5 where the modalities can't be told apart, 1 where a plane separates them.

    Raises:
        UserError: scikit-learn is not installed.
        ValueError: fewer than two pairs.
    """
    images, texts = unit_pairs(image_features, text_features)
    probe = library("sklearn.pipeline").make_pipeline(
        library("sklearn.preprocessing").StandardScaler(),
        library("sklearn.linear_model").LogisticRegression(max_iter=1000),
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    both = torch.stack([images, texts], dim=1).cpu()
    # an image, its text, the next image, …
    train, test = (both[rows].flatten(0, 1) for rows in order.tensor_split([len(order) // 2]))
    is_text = torch.arange(2 * len(both)) % 2
    probe.fit(train, is_text[: len(train)])
    return float(probe.score(test, is_text[: len(test)]))


@torch.no_grad()
def spectrum(features: Tensor) -> Tensor:
    """Compute the share of the variance that each principal axis of normalised features has.

    Args:
        features: [N, d] of one modality, need not be normalised.

    Returns:
        [d] in descending order, summing to 1, in fp64; all 0 where the features don't vary.
    """
    unit = unit_rows(features)
    centred = unit - unit.mean(0)
    covariance = centred.T @ centred / len(unit)
    total = covariance.trace()
    if total <= NO_VARIANCE:
        return torch.zeros_like(covariance[0])
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return eigenvalues / eigenvalues.sum()


def effective_rank(features: Tensor) -> float:
    """Compute the effective rank of normalised features: exp of the entropy of the spectrum.

    Source: Roy & Vetterli 2007, https://infoscience.epfl.ch/record/110188/files/RoyV07.pdf, for the
    covariance matrix; its singular values are its eigenvalues.

    Args:
        features: [N, d] of one modality, need not be normalised.

    Returns:
        In [1, min(d, N − 1)], as many axes as variance is spread over; 0 where the features don't
        vary.
    """
    shares = spectrum(features)
    return torch.special.entr(shares).sum().exp().item() if shares.any() else 0.0


@torch.no_grad()
def close_gap(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Move the two modalities onto each other, each by half of the gap, and normalise again.

    Source: Liang et al. 2022, https://arxiv.org/abs/2203.02053, section 5, and their code,
    ``shift_features.ipynb`` of https://github.com/Weixin-Liang/Modality-Gap. Before the last
    normalisation both means are the same point; after it they are near each other where the
    modalities spread alike.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [M, d], on the same device.

    Returns:
        Image and text features, [N, d] and [M, d], L2-normalised, in at least fp32.
    """
    images, texts = unit_rows(image_features), unit_rows(text_features)
    half = (images.mean(0) - texts.mean(0)) / 2
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    return F.normalize(images - half, dim=-1).to(dtype), F.normalize(texts + half, dim=-1).to(dtype)


@torch.no_grad()
def pair_cosines(
    image_features: Tensor, text_features: Tensor, count: int = 10_000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Compute cosines of all pairs and of a sample of non-pairs, for histograms.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [N, d], row i being pair i, on the same device.
        count: how many images to draw with the text of another pair, uniformly and with
            replacement.
        seed: of that draw; the same on any device.

    Returns:
        [N] of the pairs and [count] of non-pairs, in [−1, 1], in fp64.

    Raises:
        ValueError: fewer than two pairs.
    """
    images, texts = unit_pairs(image_features, text_features)
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(len(images), (count,), generator=generator)
    text = (image + torch.randint(1, len(images), (count,), generator=generator)) % len(images)
    non_pairs = images[image.to(images.device)] * texts[text.to(images.device)]
    return (images * texts).sum(-1), non_pairs.sum(-1)


def wrong_pairs_cosine(images: Tensor, texts: Tensor) -> Tensor:
    """Compute the mean cosine of all wrong pairs i ≠ j of unit vectors, [N, d] each, as [].

    All N² cosines sum to Σx · Σy, without the N×N matrix; those of the pairs are taken off.
    """
    total = images.sum(0) @ texts.sum(0) - (images * texts).sum()
    return total / (len(images) * (len(images) - 1))


def unit_pairs(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise both features, in fp64.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(image_features) < 2:
        raise ValueError(f"two pairs at least, not {len(image_features)}")
    return unit_rows(image_features), unit_rows(text_features)


def unit_rows(features: Tensor) -> Tensor:
    """Normalise each row, in fp64."""
    return F.normalize(features.detach().double(), dim=-1)
