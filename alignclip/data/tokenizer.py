"""CLIP's byte-pair tokenizer, bounded in memory and time.

open_clip 3.3's ``SimpleTokenizer`` keeps every word that it has ever seen, in every loader
worker. It merges a word in time quadratic in its length: a caption with a base64 string in it takes
minutes. The class here gives the same tokens, remembers the latest :data:`REMEMBERED` words and
takes n log n for a word of n bytes. Plain captions take a tenth of open_clip's time.
``tests/test_tokenizer.py`` compares the two classes.
"""

from __future__ import annotations

import heapq
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import open_clip.tokenizer
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH
from torch import Tensor

REMEMBERED = 16_384  # words: most captions' are among the few thousand that are frequent
LONGEST_REMEMBERED = 64  # bytes of a word; longer ones hardly come twice
END = "</w>"  # marks a word's last token
NO_ONE = -1
# open_clip's pattern for lower-case ASCII, by Python's own ``re``, which is faster than ``regex``
PLAIN_WORDS = re.compile(
    "<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^ a-z0-9]+"
)

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

    # arguments -> what open_clip makes of them: the vocabulary, which all tokenizers share
    _made: ClassVar[dict[str, dict[str, Any]]] = {}

    def __init__(self, *args: Any, **arguments: Any) -> None:
        key = repr((args, sorted((arguments | {"context_length": None}).items())))
        if key not in self._made:
            super().__init__(*args, **arguments)
            self._made[key] = self.__dict__.copy()
        self.__dict__.update(self._made[key])
        if len(args) < 3:  # else the third is the length
            self.context_length = arguments.get("context_length", DEFAULT_CONTEXT_LENGTH)
        lowers = self.clean_fn is open_clip.tokenizer.get_clean_fn("lower")
        self._knows_plain_words = lowers and len(self.all_special_ids) == 2
        # word, as its bytes' characters -> its tokens' ids
        self.remembered: OrderedDict[str, list[int]] = OrderedDict()

    def bpe(self, token: str) -> str:
        """Split a word into CLIP's tokens, separated by spaces."""
        return " ".join(self.decoder[one] for one in self._ids(token))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's tokens, without those of its start and end."""
        ids: list[int] = []
        # open_clip mends Unicode and replaces HTML's entities first; such a text has neither
        is_plain = text.isascii() and text.isprintable() and "&" not in text
        if is_plain and self._knows_plain_words:
            for word in PLAIN_WORDS.findall(text.lower()):
                ids += self._ids(word)
            return ids
        for word in self.pat.findall(self.clean_fn(text)):
            ids += self._ids("".join(self.byte_encoder[byte] for byte in word.encode()))
        return ids

    def fill(self, rows: np.ndarray, texts: Sequence[str]) -> None:
        """Write the ids of each text into its row, cut to the row's length.

        Args:
            rows: integers, ``[n, length]``.
            texts: n texts.
        """
        length = rows.shape[1]
        rows.fill(0)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id][:length]
            ids[-1] = self.eot_token_id
            row[: len(ids)] = ids

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Return the ids of one text or of n, int64 ``[n, context_length]``."""
        if self.reduction_fn is not None:
            found: Tensor = super().__call__(texts, context_length)
            return found
        several = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        assert length, "Please set a valid context length"
        tokens = torch.empty(len(several), length, dtype=torch.long)
        self.fill(tokens.numpy(), several)
        return tokens

    def _ids(self, word: str) -> list[int]:
        """Return the ids of a word's tokens."""
        if (known := self.remembered.get(word)) is not None:
            self.remembered.move_to_end(word)
            return known
        if word in self.cache:  # the special tokens alone
            return [self.encoder[word]]
        ids = [self.encoder[token] for token in merge(word, self.bpe_ranks)]
        if len(word) <= LONGEST_REMEMBERED:
            self.remembered[word] = ids
            if len(self.remembered) > REMEMBERED:
                self.remembered.popitem(last=False)
        return ids
