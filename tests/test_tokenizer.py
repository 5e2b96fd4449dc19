"""CLIP's tokens, the same as open_clip's, with a bound on memory and time."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from hashlib import sha256

import open_clip.tokenizer
import pytest

import alignclip.data.tokenizer
from alignclip.data.tokenizer import REMEMBERED, SimpleTokenizer, merge

# Of open_clip's source as it is without our change: where this fails, open_clip has changed its function.
SOURCE = "355e28cc25b12b9546e267508c9ff84c86d68482fb2bf586c8766a1bc9f43a84"


@cache
def theirs() -> Callable[[SimpleTokenizer, str], str]:
    """open_clip's own ``bpe``, out of its source; the class in this process has ours."""
    source = inspect.getsource(open_clip.tokenizer)
    namespace = dict(vars(open_clip.tokenizer))
    exec(compile(source.partition("\n_tokenizer = ")[0], "tokenizer", "exec"), namespace)
    return namespace["SimpleTokenizer"].bpe  # type: ignore[no-any-return]


@pytest.fixture
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=77)


def test_open_clip_has_the_function_that_is_replaced() -> None:
    source = inspect.getsource(open_clip.tokenizer)
    bpe = source[
        source.index("    def bpe(self, token):") : source.index("    def encode(self, text):")
    ]
    assert sha256(bpe.encode()).hexdigest() == SOURCE
    assert SimpleTokenizer.bpe is alignclip.data.tokenizer.bpe
    assert open_clip.SimpleTokenizer is SimpleTokenizer


def test_a_pair_has_a_higher_rank_than_what_its_tokens_were_made_by(
    tokenizer: SimpleTokenizer,
) -> None:
    """What :func:`alignclip.data.tokenizer.merge` relies on."""
    made: dict[str, int] = {}
    for pair, rank in tokenizer.bpe_ranks.items():
        assert all(made.get(token, -1) < rank for token in pair)
        assert made.setdefault("".join(pair), rank) == rank


def words(rng: random.Random, count: int) -> list[str]:
    """Words of all kinds, as their bytes' characters: random, repeated, of two letters, of real tokens."""
    tokenizer = SimpleTokenizer()
    byte_characters = list(tokenizer.byte_encoder.values())
    vocabulary = [token.removesuffix("</w>") for token in list(tokenizer.encoder)[:-2]]
    found = []
    for _ in range(count):
        kind, length = rng.randrange(6), rng.choice([1, 2, 3, 5, 8, 13, 21, 40])
        if kind == 0:
            word = "".join(rng.choices(byte_characters, k=length))
        elif kind == 1:
            word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))
        elif kind == 2:
            word = "".join(rng.choices(rng.choice(["ab", "a", "ha", "0", "!?", "lo"]), k=length))
        elif kind == 3:
            word = "".join(rng.choices(byte_characters, k=rng.randint(1, 3))) * length
        elif kind == 4:
            word = "".join(rng.choices(vocabulary, k=rng.randint(1, 6)))
        else:
            characters = [
                chr(
                    rng.choice([rng.randrange(0x20, 0x2FF), rng.randrange(0x4E00, 0x9FFF), 0x1F600])
                )
            ]
            word = "".join(tokenizer.byte_encoder[b] for b in "".join(characters * length).encode())
        found.append(word)
    return found


def test_words_have_open_clips_tokens(tokenizer: SimpleTokenizer) -> None:
    reference = SimpleTokenizer()
    for word in words(random.Random(5), 6000):
        assert " ".join(merge(word, tokenizer.bpe_ranks)) == theirs()(reference, word), word


def test_long_words_have_open_clips_tokens(tokenizer: SimpleTokenizer) -> None:
    rng, reference = random.Random(7), SimpleTokenizer()
    for length in (300, 1000):
        for letters in ("a", "ab", "abcdefghijklmnopqrstuvwxyz", "0123456789abcdef", "ha"):
            word = "".join(rng.choices(letters, k=length))
            assert tokenizer.bpe(word) == theirs()(reference, word)


TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "It's what they'll say; I'd know you've seen we're 'm",
    "<start_of_text> a <end_of_text> <START_OF_TEXT>",
    "👩‍👩‍👧‍👦 family 🇩🇪 flag ☕️ café café ﬁ ½",
    "日本語のテキスト 한국어 русский עברית العربية ไทย",
    "&lt;b&gt; &amp;amp; schÃ¶n",
    "a\tb\nc\r\n d\u00a0e\u2028f\u200bg",
    "!!!???...,,, ((([[[ #hash @at http://x.y/z?q=1&r=2",
    "\0\x01\x7f\ufffd\ud7ff\U0010ffff",
    "x" * 500 + " " + "ab" * 300,
    " ".join(f"word{i}" for i in range(200)),
]


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_texts_have_open_clips_ids(clean: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(11)
    alphabet = "".join(chr(c) for c in range(0x20, 0x180)) + "😀日本語हिन्दी   '''"
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randint(1, 120))) for _ in range(500)]
    ours = SimpleTokenizer(context_length=77, clean=clean)(texts)
    monkeypatch.setattr(SimpleTokenizer, "bpe", theirs())
    assert (SimpleTokenizer(context_length=77, clean=clean)(texts) == ours).all()


def test_memory_has_a_bound(tokenizer: SimpleTokenizer) -> None:
    rng = random.Random(3)
    seen = len(tokenizer.cache)
    for i in range(REMEMBERED + 2000):
        tokenizer.bpe(f"{i}{''.join(rng.choices('abcdefgh', k=6))}")
    assert len(tokenizer.cache) == seen
    assert len(tokenizer.remembered) == REMEMBERED
    tokenizer.bpe("x" * 10_000)
    assert max(map(len, tokenizer.remembered)) < 100
    first = next(iter(tokenizer.remembered))
    tokenizer.bpe(first)  # used again, so it is not the next to go
    tokenizer.bpe("somethingnew")
    assert first in tokenizer.remembered


@pytest.mark.parametrize("letters", ["a", "ab", "abcdefghijklmnopqrstuvwxyz"])
def test_the_work_for_a_word_grows_as_its_length(tokenizer: SimpleTokenizer, letters: str) -> None:
    class Counted(dict[tuple[str, str], int]):
        asked = 0

        def get(self, pair: object, default: object = None) -> object:  # type: ignore[override]
            self.asked += 1
            return super().get(pair, default)  # type: ignore[call-overload]

    for length in (1_000, 50_000):
        ranks = Counted(tokenizer.bpe_ranks)
        merge("".join(random.Random(1).choices(letters, k=length)), ranks)
        assert ranks.asked < 3 * length


@pytest.mark.slow
def test_importing_what_reads_captions_is_enough() -> None:
    text = "import {module}; from open_clip import SimpleTokenizer as T; exit('alignclip' not in T.bpe.__module__)"
    for module in (
        "alignclip.data.dataset",
        "alignclip.evaluation.encoding",
        "alignclip.weights.load",
    ):
        subprocess.run([sys.executable, "-c", text.format(module=module)], check=True)
