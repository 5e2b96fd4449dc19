"""Image–text retrieval: recall@k in both directions, without the whole similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from alignclip.evaluation.ranking import best_ranks, score_blocks

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
    their texts is among the k most similar texts. Ties follow the rule of
    :func:`alignclip.evaluation.ranking.best_ranks`: features that have all collapsed into one score
    chance.

    Args:
        image_features: [N, d], need not be normalised.
        text_features: [M, d], on the same device.
        image_of_text: [M] integers, the row of the image that a text belongs to; every image has a
            text.
        ks: the cut-offs, from 1; one beyond the number of items counts everything as found.
        block: rows of the similarity matrix held at a time.
        progress: show a bar.

    Returns:
        ``image_retrieval_recall@k`` and ``text_retrieval_recall@k`` for each k, in [0, 1].
    """
    images, texts = (F.normalize(one.float(), dim=-1) for one in (image_features, text_features))
    owner = image_of_text.to(images.device).long()
    ways = {
        "image": (texts, images, owner[:, None]),
        "text": (images, texts, _texts_of_images(owner, len(images))),
    }
    queries = len(texts) + len(images)
    recalls = {}
    with tqdm(total=queries, desc="recall", unit="query", leave=False, disable=not progress) as bar:
        for found, way in ways.items():
            ranks = []
            for scores, positives in score_blocks(*way, block):
                ranks.append(best_ranks(scores, positives))
                bar.update(len(scores))
            best = torch.cat(ranks)
            for k in ks:
                share = (best < k).double().mean().item()
                recalls[f"{found}_retrieval_recall@{k}"] = share
    return recalls


def recall_chance(image_of_text: Tensor, ks: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Compute recall@k of a ranking that is drawn at random, for :func:`recall`.

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


def _texts_of_images(image_of_text: Tensor, images: int) -> Tensor:
    """Return each image's texts, [images, most] rows in ascending order, filled up with -1."""
    order = image_of_text.argsort(stable=True)
    counts = image_of_text.bincount(minlength=images)
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)  # texts of earlier images
    place = torch.arange(len(order), device=order.device) - before
    texts = order.new_full((images, int(counts.max())), -1)
    texts[image_of_text[order], place] = order
    return texts
