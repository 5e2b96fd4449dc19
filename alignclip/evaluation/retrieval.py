"""Image–text retrieval: recall@k in both directions, without the whole similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from alignclip.evaluation.packages import check_two_features

CUTOFFS = (1, 5, 10)


@torch.no_grad()
def recall(
    image_features: Tensor,
    text_features: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = CUTOFFS,
    block: int = 256,
    progress: bool = False,
) -> dict[str, float]:
    """Compute recall@k by cosine similarity, as clip_benchmark defines it.

    Source: https://github.com/LAION-AI/CLIP_benchmark, ``metrics/zeroshot_retrieval.py``.

    ``image_retrieval_recall@k`` is the fraction of texts whose image is among the k images most
    similar to it; ``text_retrieval_recall@k`` is the fraction of images for which at least one of
    their texts is among the k most similar texts. Ties follow one rule: an item's rank is the
    number of items with a greater similarity plus the number with an equal one and a lower index.
    Features that have all collapsed into one therefore score chance.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [M, d], on the same device.
        image_of_text: [M] integers, the row of the image that a text belongs to.
        ks: the cut-offs; one beyond the number of items counts everything as found.
        block: rows of the similarity matrix held at a time.
        progress: show a bar.

    Returns:
        ``image_retrieval_recall@k`` and ``text_retrieval_recall@k`` for each k, in [0, 1].

    Raises:
        ValueError: shapes that don't fit, an image index out of range, an image without a text,
            features that are not finite (they would compare as the best of all), a k below 1.
    """
    _check_pairs(image_features, text_features, image_of_text, ks)
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    owner = image_of_text.to(images.device).long()
    queries = len(texts) + len(images)
    bar = tqdm(total=queries, desc="recall", unit="query", leave=False, disable=not progress)
    with torch.autocast(images.device.type, enabled=False), bar:
        of_images = _texts_of_images(owner, len(images))
        ranks = {
            "image": _best_ranks(texts, images, owner[:, None], max(ks), block, bar),
            "text": _best_ranks(images, texts, of_images, max(ks), block, bar),
        }
    return {
        f"{found}_retrieval_recall@{k}": (best < k).double().mean().item()
        for found, best in ranks.items()
        for k in ks
    }


def recall_chance(image_of_text: Tensor, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Recall@k of a ranking that is drawn at random, for :func:`recall`.

    Args:
        image_of_text: [M] integers, the row of the image that a text belongs to.
        ks: the cut-offs.

    Returns:
        ``image_retrieval_recall@k`` and ``text_retrieval_recall@k`` for each k, in [0, 1].
    """
    texts_of_image = image_of_text.cpu().bincount()
    texts_of_image = texts_of_image[texts_of_image > 0].double()
    images, texts = len(texts_of_image), len(image_of_text)
    chance = {f"image_retrieval_recall@{k}": min(k, images) / images for k in ks}
    for k in ks:
        # none of k texts drawn without replacement is one of the image's
        missed = torch.ones_like(texts_of_image)
        for drawn in range(min(k, texts)):
            missed *= ((texts - texts_of_image - drawn) / (texts - drawn)).clamp(min=0)
        chance[f"text_retrieval_recall@{k}"] = (1 - missed).mean().item()
    return chance


def _best_ranks(
    queries: Tensor, items: Tensor, positives: Tensor, most: int, block: int, bar: tqdm
) -> Tensor:
    """[queries] ranks, from 0, of the best-ranked of each query's positives; exact below ``most``.

    ``positives``: [queries, any] rows of ``items`` in ascending order, filled up with -1.
    """
    ranks = []
    index = torch.arange(len(items), device=items.device)
    for rows, mine in zip(queries.split(block), positives.split(block), strict=True):
        scores = rows @ items.T
        own = scores.gather(1, mine.clamp_min(0)).masked_fill(mine < 0, -torch.inf)
        best = own.amax(1, keepdim=True)
        top = scores.topk(min(most, len(items))).values
        rank = (top > best).sum(1)
        # where others are equal, the order decides; that is rare, and only those rows are looked at
        # as a whole
        tied = (((top == best).sum(1) > 1) | (top[:, -1:] == best).squeeze(1)).nonzero().squeeze(1)
        first = mine.masked_fill(own < best, len(items))[tied].amin(1, keepdim=True)
        rank[tied] += ((scores[tied] == best[tied]) & (index < first)).sum(1)
        ranks.append(rank)
        bar.update(len(rows))
    return torch.cat(ranks)


def _texts_of_images(image_of_text: Tensor, images: int) -> Tensor:
    """[images, most] the rows of each image's texts in ascending order, filled up with -1."""
    order = image_of_text.argsort(stable=True)
    counts = image_of_text.bincount(minlength=images)
    # a text's place among those of its image: its position in the sorted list less where its image
    # begins
    place = (
        torch.arange(len(order), device=order.device)
        - (counts.cumsum(0) - counts)[image_of_text[order]]
    )
    texts = order.new_full((images, int(counts.max())), -1)
    texts[image_of_text[order], place] = order
    return texts


def _check_pairs(images: Tensor, texts: Tensor, image_of_text: Tensor, ks: Sequence[int]) -> None:
    check_two_features(images, texts)
    if image_of_text.shape != texts.shape[:1] or image_of_text.is_floating_point():
        found = list(image_of_text.shape)
        raise ValueError(f"image_of_text must hold {len(texts)} integers, one a text, not {found}")
    if not len(texts) or image_of_text.min() < 0 or image_of_text.max() >= len(images):
        raise ValueError(f"image_of_text must name rows of the {len(images)} images")
    if without := len(images) - len(image_of_text.unique()):
        raise ValueError(f"{without} of {len(images)} images have no text")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be at least 1, not {list(ks)}")
