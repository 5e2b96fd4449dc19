"""CLIP's tokens, the same as open_clip's, with a bound on memory and time."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

import open_clip.tokenizer
import pytest

from alignclip.data.tokenizer import REMEMBERED, SimpleTokenizer, merge


@pytest.fixture(scope="module")
def theirs() -> open_clip.tokenizer.SimpleTokenizer:
    return open_clip.tokenizer.SimpleTokenizer()


@pytest.fixture
def tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer(context_length=77)


def test_a_pair_has_a_higher_rank_than_what_its_tokens_were_made_by(
    tokenizer: SimpleTokenizer,
) -> None:
    """What :func:`alignclip.data.tokenizer.merge` relies on."""
    made: dict[str, int] = {}
    for pair, rank in tokenizer.bpe_ranks.items():
        assert all(made.get(token, -1) < rank for token in pair)
        assert made.setdefault("".join(pair), rank) == rank


def words(rng: random.Random, count: int) -> list[str]:
    """Words of all kinds, as their bytes' characters: random, of few letters, of tokens,
    repeated.
    """
    tokenizer = SimpleTokenizer()
    tokens = [token.removesuffix("</w>") for token in list(tokenizer.encoder)[:-2]]
    few = ["ab", "a", "ha", "0", "!?", "lo", string.ascii_lowercase]
    alphabets: list[Sequence[str]] = [list(tokenizer.byte_encoder.values()), tokens, *few]
    found = []
    for _ in range(count):
        length = rng.choice([1, 2, 3, 5, 8, 13, 21, 40])
        word = "".join(rng.choices(rng.choice(alphabets), k=length))
        found.append(word * rng.choice([1, 1, 1, 5]))
    return found


@pytest.mark.slow
def test_words_have_open_clips_tokens(
    tokenizer: SimpleTokenizer, theirs: open_clip.tokenizer.SimpleTokenizer
) -> None:
    rng = random.Random(7)
    long = [
        "".join(rng.choices(letters, k=length))
        for length in (300, 1000)
        for letters in ("a", "ab", "abcdefghijklmnopqrstuvwxyz", "0123456789abcdef", "ha")
    ]
    for word in (*words(random.Random(5), 6000), *long):
        assert " ".join(merge(word, tokenizer.bpe_ranks)) == theirs.bpe(word), word
        assert tokenizer.bpe(word) == theirs.bpe(word)


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
def test_texts_have_open_clips_ids(clean: str) -> None:
    rng = random.Random(11)
    alphabet = "".join(chr(c) for c in range(0x20, 0x180)) + "😀日本語हिन्दी   '''"
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randint(1, 120))) for _ in range(500)]
    ours, theirs = (
        one(context_length=77, clean=clean)(texts)
        for one in (SimpleTokenizer, open_clip.tokenizer.SimpleTokenizer)
    )
    assert (ours == theirs).all()


PIECES = [
    "'s", "'S", "'ll", "'", "''ve", "<start_of_text>", "<END_OF_TEXT>", "<end_of_text", "&amp;",
    "&", "Cat", "DOG", "42", "3rd", "e-mail", "...", "--", "http://x.y", "[PERSON]", "", " ",
    "antidisestablishmentarianism", "\t", "\n", "\x1b[0m", "\x7f", "a_b",
]  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"additional_special_tokens": ["cat", "<x>"]}])
def test_plain_texts_have_open_clips_ids(more: dict[str, list[str]]) -> None:
    """Plain texts take a shorter way than others."""
    rng = random.Random(13)
    printable = [chr(c) for c in range(0x20, 0x7F)]
    texts = ["".join(rng.choices(printable, k=rng.randint(0, 90))) for _ in range(1500)]
    texts += [
        rng.choice(["", " "]).join(rng.choices([*PIECES, *printable], k=rng.randint(1, 12)))
        for _ in range(1500)
    ]
    ours, theirs = (
        one(context_length=20, **more)
        for one in (SimpleTokenizer, open_clip.tokenizer.SimpleTokenizer)
    )
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert (ours(texts) == theirs(texts)).all()
    for length in (1, 2, 3):
        assert (ours(texts[:50], length) == theirs(texts[:50], length)).all()


def test_tokenizers_share_the_vocabulary_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SimpleTokenizer, "_made", {})
    short, long, named = SimpleTokenizer(context_length=5), SimpleTokenizer(), SimpleTokenizer()
    assert long.encoder is short.encoder
    assert [one("cat").shape for one in (short, long)] == [(1, 5), (1, 77)]
    assert long.remembered
    assert not named.remembered
    special = SimpleTokenizer(additional_special_tokens=["cat"])
    assert special("cat").tolist() != long("cat").tolist()
    assert long.encode("A") == long.encode("a")
    assert SimpleTokenizer(clean="whitespace").encode("A") != long.encode("A")


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
