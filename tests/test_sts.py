"""Textual similarity: the benchmark's file format, SciPy's figures, and each sentence encoded
once.
"""

import pytest
import torch
import torch.nn.functional as F
from evaluations import encoder_of, evaluator_of, normal, small_model, unit

from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder
from alignclip.evaluation.sts import read_sts, spearman, split_note, unique

stats = pytest.importorskip("scipy.stats")

# As in sts-test.csv: no header, lone quotes, sources in further columns, non-ASCII, whole and
# decimal scores
MINIATURE = (
    "main-captions\tMSRvid\t2012test\t0024\t2.500\tA girl is styling her hair.\tA girl is brushing "
    "her hair.\n"
    "main-captions\tMSRvid\t2012test\t0045\t5.000\tA man plays a guitar.\tA man is playing a "
    "guitar.\n"
    'main-news\theadlines\t2015\t0110\t0.8\t"Hobbit" tops the box office\tOpposition\u2028leader: '
    '"no deal\n'
    "main-forums\tanswer-answer\t2016\t0629\t3\tThere are a few things: \tIt's Söderlund's.\t"
    "StackExchange Network: http://a.b/1 Author: X\tStackExchange Network: http://a.b/2\n"
    "main-captions\tMSRvid\t2012test\t0046\t0\tA man plays a guitar.\tA girl is styling her hair.\n"
)


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "sts-test.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_reads_the_benchmarks_layout(tmp_path, ending):
    first, second, scores = read_sts(write(tmp_path, MINIATURE.replace("\n", ending)))
    assert scores == [2.5, 5, 0.8, 3, 0]
    assert first[0] == "A girl is styling her hair."
    assert first[2] == '"Hobbit" tops the box office'
    assert second[2] == 'Opposition\u2028leader: "no deal'
    assert second[3] == "It's Söderlund's."
    assert second[4] == "A girl is styling her hair."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            MINIATURE + "a\tb\tc\td\t1\te\n",
            "line 6: 6 tab-separated columns instead of 7 (genre, filename",
        ),
        (MINIATURE.replace("\t", ","), "line 1: 1 tab-separated columns instead of 7"),
        (
            MINIATURE.replace("2.500", "5.1"),
            "line 1: the score (column 5) is '5.1', not a number from 0 to 5",
        ),
        (MINIATURE.replace("0.8", "-0.1"), "line 3: the score (column 5) is '-0.1'"),
        (MINIATURE.replace("0.8", "nan"), "line 3: the score (column 5) is 'nan'"),
        (
            "genre\tfilename\tyear\tindex\tscore\tsentence1\tsentence2\n" + MINIATURE,
            "line 1: the score (column 5)",
        ),
        (MINIATURE.replace("A man is playing a guitar.", " "), "line 2: an empty sentence"),
        ("\n\n", "holds no sentence pairs"),
    ],
)
def test_a_wrong_file_is_one_line_that_says_where(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_sts(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"can't read .*nothing.csv: No such file"):
        read_sts(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match="is no text file"):
        read_sts(write(tmp_path, MINIATURE, "utf-16"))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (1379, None),
        (
            1500,
            "1,500 sentence pairs, as many as the STS benchmark's dev split; published figures are "
            "of its test",
        ),
        (
            5749,
            "5,749 sentence pairs, as many as the STS benchmark's train split; published figures",
        ),
        (
            1378,
            "1,378 sentence pairs, a number that no split of the STS benchmark has; published "
            "figures",
        ),
    ],
)
def test_a_file_that_is_not_the_test_split_is_told(tmp_path, pairs, words):
    line = MINIATURE.splitlines(keepends=True)[0]
    note = evaluator_of("sts", write(tmp_path, line * pairs)).note
    assert note == split_note(pairs)
    assert (note is None) if words is None else note.startswith(words)


def random_pairs(count=40):
    a, b = normal(2, count, 8)
    gold = F.cosine_similarity(a, b) + 0.3 * normal(count, seed=1)
    return a, b, ((gold + 2) * 2).round() / 2  # people's scores are tied


def test_spearman_is_scipys():
    a, b, gold = random_pairs()
    expected = stats.spearmanr((unit(a) * unit(b)).sum(1), gold.numpy()).statistic
    assert 0.2 < expected < 0.95
    assert spearman(a, b, gold) == {"spearman": pytest.approx(expected)}
    assert spearman(3 * a, b / 3, gold.exp().tolist()) == spearman(a, b, gold)
    assert spearman(a, -b, gold) == {"spearman": pytest.approx(-expected)}


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_equal_scores_have_no_correlation():
    a, b, gold = random_pairs()
    assert torch.tensor(spearman(a, b, gold * 0)["spearman"]).isnan()


def test_one_pair_has_no_correlation():
    with pytest.raises(ValueError, match="two pairs at least, not 1"):
        spearman(*(one[:1] for one in random_pairs()))


def test_a_file_is_encoded_sentence_by_sentence_and_each_once(tmp_path):
    path = write(tmp_path, MINIATURE)
    first, second, scores = rows = read_sts(path)
    assert sorted(unique(rows)) == sorted({*first, *second})
    encoder = encoder_of(small_model().eval(), batch_size=3)
    with torch.no_grad():
        features = [
            [encoder.model.encode_text(encoder.tokenizer([one]))[0] for one in sentences]
            for sentences in (first, second)
        ]
    cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(*features, strict=True)]
    asked = []

    class Spy(Encoder):
        def texts(self, texts, name="texts"):
            asked.extend(texts)
            return super().texts(texts, name)

    encoder.__class__ = Spy
    found = evaluator_of("sts", path)(encoder)
    assert found.metrics["spearman"] == pytest.approx(stats.spearmanr(cosines, scores).statistic)
    assert asked == unique(rows)
    assert len(asked) == 8
