"""CLIP's byte-pair tokenizer, bounded in memory and time.

open_clip 3.3's ``SimpleTokenizer`` keeps every word that it has ever seen, in every loader worker, and merges a word in
time quadratic in its length: a caption with a base64 string in it takes minutes. Importing this module replaces
``SimpleTokenizer.bpe`` by one that gives the same tokens, remembers the latest :data:`REMEMBERED` words and takes
n log n for a word of n bytes. All of alignclip's tokenizers are open_clip's class, and users' scripts import that
class, too. ``tests/test_tokenizer.py`` compares the two functions, and says when open_clip's has changed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping

from open_clip.tokenizer import SimpleTokenizer

REMEMBERED = 16_384  # words: most captions' are among the few thousand that are frequent
LONGEST_REMEMBERED = 64  # bytes of a word; longer ones hardly come twice
END = "</w>"  # marks a word's last token
NO_ONE = -1

Ranks = Mapping[tuple[str, str], int]


def merge(word: str, ranks: Ranks) -> list[str]:
    """Merge a word's characters into byte pairs, the pair of the lowest rank first, as CLIP's tokenizer does.

    open_clip merges all places of one pair from left to right, then looks for the next pair. A heap of (rank, place)
    gives the same order: a pair that a merge makes has a higher rank than the pair that was merged, because its two
    tokens had to be in the vocabulary before it.

    Args:
        word: at least one character, each of which stands for a byte.
        ranks: (left token, right token) -> its place in the order of merges.

    Returns:
        the tokens, the last of which ends with ``</w>``.
    """
    tokens = [*word[:-1], word[-1] + END]
    before = list(
        range(-1, len(tokens) - 1)
    )  # the place of the token to the left; NO_ONE at the beginning
    after = [*range(1, len(tokens)), NO_ONE]
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


def bpe(self: SimpleTokenizer, token: str) -> str:
    """Split a word into CLIP's tokens, separated by spaces; in place of ``SimpleTokenizer.bpe``."""
    if token in self.cache:  # the special tokens alone
        return str(self.cache[token])
    if len(token) > LONGEST_REMEMBERED:
        return " ".join(merge(token, self.bpe_ranks))
    remembered: OrderedDict[str, str] = self.__dict__.setdefault("remembered", OrderedDict())
    if token in remembered:
        remembered.move_to_end(token)
        return remembered[token]
    remembered[token] = tokens = " ".join(merge(token, self.bpe_ranks))
    if len(remembered) > REMEMBERED:
        remembered.popitem(last=False)
    return tokens


SimpleTokenizer.bpe = bpe
