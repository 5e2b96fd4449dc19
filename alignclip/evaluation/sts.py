"""Semantic textual similarity: does the text encoder rank pairs of sentences as people do?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.errors import UserError
from alignclip.evaluation.packages import library
from alignclip.storage import read_text

STS_COLUMNS = ("genre", "filename", "year", "index", "score", "sentence1", "sentence2")
# of the benchmark's splits, as published
PUBLISHED_PAIRS = {"test": 1_379, "dev": 1_500, "train": 5_749}
UNKNOWN = "a number that no split of the STS benchmark has"
SentencePairs = tuple[list[str], list[str], list[float]]


def spearman(
    features_a: Tensor, features_b: Tensor, scores: Tensor | Sequence[float]
) -> dict[str, float]:
    """Correlate the ranks of cosine similarities and of people's scores: SciPy's ``spearmanr``.

    Args:
        features_a: [N, d], of the first sentences; need not be normalised.
        features_b: [N, d], of the second ones, on the same device.
        scores: [N], any scale, greater is more similar.

    Returns:
        ``spearman`` in [−1, 1], 1 is best (publications often multiply it by 100); NaN where all
        similarities or all scores are equal.

    Raises:
        UserError: SciPy is not installed.
        ValueError: fewer than two pairs.
    """
    gold = torch.as_tensor(scores, dtype=torch.float64).cpu()
    if len(gold) < 2:
        raise ValueError(f"two pairs at least, not {len(gold)}")
    cosines = F.cosine_similarity(features_a.detach().double(), features_b.detach().double()).cpu()
    found = library("scipy.stats").spearmanr(cosines.numpy(), gold.numpy())
    return {"spearman": float(found.statistic)}


def read_sts(path: str) -> SentencePairs:
    """Read a file of the STS benchmark, such as ``sts-test.csv``, or its URL.

    Source: Cer et al. 2017, https://arxiv.org/abs/1708.00055; the columns are ``genre, filename,
    year, index, score, sentence1, sentence2``, some lines have further ones (the sources), and
    there is no header.

    Returns:
        First sentences, second sentences and scores in [0, 5], N each.

    Raises:
        UserError: the file can't be read, has no pairs, or has a line that is something else:
            which, and what.
    """
    # not split at what Unicode counts as line breaks, and what csv takes for quotes: sentences have
    # both
    lines = read_text(str(path)).split("\n")
    rows = [
        _row(line.rstrip("\r").split("\t"), f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise UserError(f"{path} holds no sentence pairs")
    first, second, scores = zip(*rows, strict=True)
    return list(first), list(second), list(scores)


def _row(fields: list[str], where: str) -> tuple[str, str, float]:
    """Return the two sentences and the score of a line.

    Raises:
        UserError: says what the line is instead.
    """
    if len(fields) < len(STS_COLUMNS):
        wanted = f"{len(STS_COLUMNS)} ({', '.join(STS_COLUMNS)})"
        raise UserError(f"{where}: {len(fields)} tab-separated columns instead of {wanted}")
    score, first, second = fields[4:7]
    try:
        number = float(score)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 5:
        raise UserError(f"{where}: the score (column 5) is '{score}', not a number from 0 to 5")
    if not first.strip() or not second.strip():
        raise UserError(f"{where}: an empty sentence (columns 6 and 7)")
    return first, second, number


def split_note(pairs: int) -> str | None:
    """Say that a file is not the STS benchmark's test split, which published figures are of.

    Args:
        pairs: how many the file has; the splits differ in that.

    Returns:
        None where the number is that of the test split.
    """
    if pairs == PUBLISHED_PAIRS["test"]:
        return None
    named = [name for name, number in PUBLISHED_PAIRS.items() if number == pairs]
    what = f"as many as the STS benchmark's {named[0]} split" if named else UNKNOWN
    test = f"published figures are of its test split, {PUBLISHED_PAIRS['test']:,} pairs"
    return f"{pairs:,} sentence pairs, {what}; {test}"


def unique(rows: SentencePairs) -> list[str]:
    """Return the sentences of all pairs, each once: what is to be encoded."""
    return list(dict.fromkeys([*rows[0], *rows[1]]))


def similarity(features: Tensor, rows: SentencePairs) -> dict[str, float]:
    """Correlate the similarities of sentence pairs with people's scores.

    Args:
        features: [M, d], of the sentences of :func:`unique` in their order.
        rows: of :func:`read_sts`.

    Returns:
        ``spearman``, see :func:`spearman`.

    Raises:
        UserError: SciPy is not installed.
        ValueError: from :func:`spearman`.
    """
    row_of = {sentence: row for row, sentence in enumerate(unique(rows))}
    first, second = (features[[row_of[one] for one in sentences]] for sentences in rows[:2])
    return spearman(first, second, rows[2])
