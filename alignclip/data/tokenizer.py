"""CLIP's byte-pair tokenizer, bounded in memory and time.

open_clip 3.3's ``SimpleTokenizer`` keeps every word that it has ever seen, in every loader
worker. It
merges a word in time quadratic in its length: a caption with a base64 string in it takes minutes.
The class here gives the same tokens, remembers the latest :data:`REMEMBERED` words and takes n
log n for a word of n bytes. ``tests/test_tokenizer.py`` compares the two classes.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import open_clip.tokenizer

REMEMBERED = 16_384  # words: most captions' are among the few thousand that are frequent
LONGEST_REMEMBERED = 64  # bytes of a word; longer ones hardly come twice
END = "</w>"  # marks a word's last token
NO_ONE = -1

Ranks = Mapping[tuple[str, str], int]


def merge(word: str, ranks: Ranks) -> list[str]:
    """Merge a word's characters into byte pairs as CLIP's tokenizer does, the lowest rank first.

    open_clip merges all places of one pair from left to right, then looks for the next pair. A
    heap of (rank, place) gives the same order: a pair that a merge makes has a higher rank than
    the pair that was merged, because its two tokens had to be in the vocabulary before it.

    Args:
        word: at least one character, each of which stands for a byte.
        ranks: (left token, right token) -> its place in the order of merges.

    Returns:
        the tokens, the last of which ends with ``</w>``.
    """
    tokens = [*word[:-1], word[-1] + END]
    # the places of the tokens to the left and to the right; NO_ONE at the beginning and at the end
    before, after = [*range(-1, len(tokens) - 1)], [*range(1, len(tokens)), NO_ONE]
    waiting: list[tuple[int, int, str, str]] = []

    def add(place: int) -> None:
        if place != NO_ONE and after[place] != NO_ONE:
            pair = tokens[place], tokens[after[place]]
            if (rank := ranks.get(pair)) is not None:
                heapq.heappush(waiting, (rank, place, *pair))

    for place in range(len(tokens)):
        add(place)
    while waiting:
        _, place, left, right = heapq.heappop(waiting)
        other = after[place]
        if tokens[place] != left or other == NO_ONE or tokens[other] != right:
            continue  # one of the two is part of another token by now
        tokens[place], tokens[other] = left + right, ""
        after[place] = after[other]
        if after[place] != NO_ONE:
            before[after[place]] = place
        add(before[place])
        add(place)
    return [token for token in tokens if token]


class SimpleTokenizer(open_clip.tokenizer.SimpleTokenizer):
    """open_clip's tokenizer with a bound on memory and time; with open_clip's arguments."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.remembered: OrderedDict[str, str] = OrderedDict()

    def bpe(self, token: str) -> str:
        """Split a word into CLIP's tokens, separated by spaces."""
        if token in self.cache:  # the special tokens alone
            return str(self.cache[token])
        if len(token) > LONGEST_REMEMBERED:
            return " ".join(merge(token, self.bpe_ranks))
        if token in self.remembered:
            self.remembered.move_to_end(token)
            return self.remembered[token]
        self.remembered[token] = tokens = " ".join(merge(token, self.bpe_ranks))
        if len(self.remembered) > REMEMBERED:
            self.remembered.popitem(last=False)
        return tokens
