"""Semantic textual similarity: does the text encoder rank pairs of sentences as people do?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.errors import UserError, one_line
from alignclip.evaluation.linear_probe import library
from alignclip.storage import read_text

COLUMNS = ("genre", "filename", "year", "index", "score", "sentence1", "sentence2")
PAIRS = {"test": 1_379, "dev": 1_500, "train": 5_749}  # of the benchmark's splits, as published
Rows = tuple[list[str], list[str], list[float]]


def spearman(
    features_a: Tensor, features_b: Tensor, scores: Tensor | Sequence[float]
) -> dict[str, float]:
    """Spearman's rank correlation of cosine similarities with people's scores, SciPy's ``spearmanr``.

    Args:
        features_a: [N, d], of the first sentences; need not be normalised.
        features_b: [N, d], of the second ones, on the same device.
        scores: [N], any scale, greater is more similar.

    Returns:
        ``spearman`` in [−1, 1], 1 is best (publications often multiply it by 100); NaN where all similarities or all
        scores are equal.

    Raises:
        UserError: SciPy is not installed.
        ValueError: shapes that don't fit, fewer than two pairs, values that are not finite.
    """
    gold = torch.as_tensor(scores, dtype=torch.float64).cpu()
    if (
        features_a.ndim != 2
        or features_a.shape != features_b.shape
        or gold.shape != features_a.shape[:1]
    ):
        raise ValueError(
            f"two features of [N, d] and scores of [N], not {list(features_a.shape)}, {list(features_b.shape)} "
            f"and {list(gold.shape)}"
        )
    if len(gold) < 2:
        raise ValueError(f"two pairs at least, not {len(gold)}")
    if not (features_a.isfinite().all() and features_b.isfinite().all() and gold.isfinite().all()):
        raise ValueError("features or scores hold NaN or infinity")
    cosines = F.cosine_similarity(features_a.detach().double(), features_b.detach().double()).cpu()
    return {
        "spearman": float(library("scipy.stats").spearmanr(cosines.numpy(), gold.numpy()).statistic)
    }


def read_sts(path: str | Path) -> Rows:
    """Read a file of the STS benchmark, such as ``sts-test.csv``, or its URL: tab-separated, quotes have no meaning.

    Source: Cer et al. 2017, https://arxiv.org/abs/1708.00055; the columns are ``genre, filename, year, index, score,
    sentence1, sentence2``, some lines have further ones (the sources), and there is no header.

    Returns:
        First sentences, second sentences and scores in [0, 5], N each.

    Raises:
        UserError: the file can't be read, has no pairs, or has a line that is something else: which, and what.
    """
    first, second, scores = [], [], []
    try:
        # not split at what Unicode counts as line breaks, and what csv takes for quotes: sentences have both
        text = (
            read_text(str(path)) if "://" in str(path) else Path(path).read_bytes().decode("utf-8")
        )
        lines = text.split("\n")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {one_line(error)}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) < len(COLUMNS):
            raise UserError(
                f"{path}, line {number}: {len(fields)} tab-separated columns instead of {len(COLUMNS)} "
                f"({', '.join(COLUMNS)})"
            )
        score, sentences = _number(fields[4]), fields[5:7]
        if not 0 <= score <= 5:
            raise UserError(
                f"{path}, line {number}: the score (column 5) is '{fields[4]}', not a number from 0 to 5"
            )
        if not all(sentence.strip() for sentence in sentences):
            raise UserError(f"{path}, line {number}: an empty sentence (columns 6 and 7)")
        first.append(sentences[0])
        second.append(sentences[1])
        scores.append(score)
    if not scores:
        raise UserError(f"{path} holds no sentence pairs")
    return first, second, scores


def split_note(pairs: int) -> str | None:
    """Say in a sentence that a file is not the STS benchmark's test split, which published figures are of.

    Args:
        pairs: how many the file has; the splits differ in that.

    Returns:
        None where the number is that of the test split.
    """
    if pairs == PAIRS["test"]:
        return None
    split = next(
        (f"as many as the STS benchmark's {name} split" for name, n in PAIRS.items() if n == pairs),
        None,
    )
    what = split or "a number that no split of the STS benchmark has"
    return f"{pairs:,} sentence pairs, {what}; published figures are of its test split, {PAIRS['test']:,} pairs"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def similarity(encode: Callable[[list[str]], Tensor], pairs: str | Path | Rows) -> dict[str, float]:
    """Encode each sentence of a set once, and correlate the pairs' similarities with people's scores.

    Args:
        encode: n texts -> [n, d] features, :meth:`alignclip.evaluation.encoding.Encoder.texts`.
        pairs: a file for :func:`read_sts`, or what that returns.

    Returns:
        ``spearman``, see :func:`spearman`.

    Raises:
        UserError: from :func:`read_sts`, or SciPy is not installed.
        ValueError: from :func:`spearman`, or lists of different lengths.
    """
    first, second, scores = read_sts(pairs) if isinstance(pairs, (str, Path)) else pairs
    if len(first) != len(second) or not first:
        raise ValueError(
            f"{len(first)} first and {len(second)} second sentences; two pairs at least"
        )
    sentences = unique(first, second)
    row_of = {sentence: row for row, sentence in enumerate(sentences)}
    features = encode(sentences)
    return spearman(
        features[[row_of[s] for s in first]], features[[row_of[s] for s in second]], scores
    )


def unique(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """The sentences that :func:`similarity` asks to encode, in its order: each once."""
    return list(dict.fromkeys([*first, *second]))
