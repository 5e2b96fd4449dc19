"""Evaluation of a model on sets: features in the set's order on any number of ranks, each task
against its parts.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from evaluations import (
    CLASSES,
    WORDS,
    encoder_of,
    evaluator_of,
    images_of,
    one_by_one,
    small_model,
    write,
    write_captioned,
    write_classes,
    write_labelled,
)
from s3 import S3Server

from alignclip.config.metrics import metrics_of
from alignclip.config.schema import EvaluatorConfig, SetConfig
from alignclip.data.cached_stream import CachedStream
from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder, Interrupted
from alignclip.evaluation.evaluator import evaluate_model
from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.retrieval import recall
from alignclip.evaluation.sets import EvaluationSet, OpenSets, read_classes
from alignclip.evaluation.shift import max_softmax, out_of_distribution
from alignclip.evaluation.zero_shot import accuracy
from alignclip.model.encoders import CLIP
from alignclip.ranks import gather_objects, rank

STS = "\n".join(
    f"g\tf\t2012\t{i}\t{i / 2}\t{' '.join(WORDS[:i])} x\t{' '.join(WORDS[i:])} y"
    for i in range(1, 8)
)


# --- features of a set ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 9])
def test_features_come_in_the_sets_order_and_training_goes_on(tmp_path: Path, count: int) -> None:
    samples = write_labelled(tmp_path, count)
    model = small_model().train()
    texts = [" ".join(WORDS[: 1 + i * 3 % 7]) for i in range(count)]
    before = torch.get_rng_state()
    features, labels = images_of(SetConfig(local=str(tmp_path)), encoder_of(model))
    found = encoder_of(model).texts(texts)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    expected = one_by_one(model, [image for image, _ in samples], texts)
    assert labels == [label for _, label in samples]
    torch.testing.assert_close(features, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected[1], rtol=0, atol=1e-6)


def encode_on_a_rank(folder: str, count: int) -> tuple[Any, ...]:
    encoder = encoder_of(small_model(), batch_size=3)
    features, captions = images_of(SetConfig(local=folder), encoder, "caption")
    texts = encoder.texts([" ".join(WORDS[: i % 9]) for i in range(count)])
    return features, texts, captions, evaluator_of("retrieval", folder)(encoder).metrics


@pytest.mark.slow
@pytest.mark.world_size(3)
@pytest.mark.parametrize("count", [1, 2, 10, 13])
def test_several_ranks_find_what_one_finds(tmp_path: Path, count: int) -> None:
    """Whatever the size: fewer samples than ranks, shares that don't come out even."""
    write_captioned(tmp_path, count)
    alone = encode_on_a_rank(str(tmp_path), count)
    for found in processes.run(3, encode_on_a_rank, str(tmp_path), count):
        torch.testing.assert_close(found[:2], alone[:2], rtol=0, atol=1e-6)
        assert found[2:] == alone[2:]


def fail_on_a_rank(folder: str, what: str) -> str:
    """The error of an evaluation in which one rank can't read, or can't encode."""
    encoder = encoder_of(small_model(), batch_size=3)
    encoder.interrupted = lambda: bool(gather_objects([0]) is None)  # keeps step, as in training
    if what == "encode" and rank() == 1:

        def out_of_memory(tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

        encoder.model.encode_text = out_of_memory  # type: ignore[method-assign]
    if what == "finite" and rank() == 1:
        encoder.model.visual.conv1.weight.data.fill_(torch.nan)
    with pytest.raises(UserError) as error:
        evaluator_of("retrieval", folder)(encoder)
    return str(error.value)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("read", "the image of sample 6 'k6'"),
        ("finite", "e: images: features hold NaN or infinity"),
        ("encode", "e: captions: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"),
    ],
)
def test_what_one_rank_cannot_do_is_everybodys_error(tmp_path: Path, what: str, says: str) -> None:
    rows: list[dict[str, Any]] = [{"caption": "a dog"} for _ in range(9)]
    if what == "read":
        rows[6]["image"] = b"\xff\xd8\xff broken"
    write(tmp_path, rows, {"caption": "str"})
    first, second = processes.run(2, fail_on_a_rank, str(tmp_path), what)
    assert first == second
    assert says in first


def test_an_interrupted_evaluation_stops_at_the_next_batch(tmp_path: Path) -> None:
    write_captioned(tmp_path, 20)
    encoder = encoder_of(small_model())
    asked: list[int] = []
    encoder.interrupted = lambda: bool(asked.append(0) or len(asked) > 2)  # type: ignore[func-returns-value]
    with pytest.raises(Interrupted):
        evaluator_of("retrieval", tmp_path)(encoder)
    assert len(asked) == 3


# --- each task ------------------------------------------------------------------------------------


def features_of(
    model: CLIP, samples: list[tuple[bytes, Any]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of images and of all captions, and the image of each caption."""
    captions = [[one] if isinstance(one, str) else one for _, one in samples]
    texts = [text for several in captions for text in several]
    owner = torch.tensor([row for row, several in enumerate(captions) for _ in several])
    return *one_by_one(model, [image for image, _ in samples], texts), owner


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_retrieval_from_a_bucket(s3: S3Server, tmp_path: Path, several: bool) -> None:
    remote, model = f"{s3.bucket()}/coco", small_model()
    samples = write_captioned(remote, 14, several)
    more = {"local": str(tmp_path / "cache"), "num_workers": 2}
    found = evaluator_of("retrieval", remote, **more)(encoder_of(model)).metrics
    images, texts, owner = features_of(model, samples)
    assert (len(texts) > 14) == several
    assert found == recall(images, texts, owner)
    assert found.keys() == metrics_of("retrieval").keys()


@pytest.mark.slow
def test_the_gap_is_of_first_captions_and_closed_retrieval_of_all(tmp_path: Path) -> None:
    samples, model = write_captioned(tmp_path, 12), small_model()
    found = evaluator_of("gap", tmp_path)(encoder_of(model)).metrics
    images, texts, owner = features_of(model, samples)
    assert len(texts) > 12
    first = torch.stack([texts[owner == row][0] for row in range(12)])
    shift = (images.mean(0) - texts.mean(0)) / 2
    closed = recall(images - shift, texts + shift, owner)
    expected = modality_gap(images, first) | recall(images, texts, owner)
    expected |= {f"closed_{name}": value for name, value in closed.items()}
    assert found == pytest.approx(expected, rel=1e-3)
    assert found.keys() == metrics_of("gap").keys()


def test_a_model_in_memory_is_measured(tmp_path: Path) -> None:
    write_captioned(tmp_path / "pairs", 12)
    model = small_model().train()
    configs = {
        name: EvaluatorConfig(task=name, local=str(tmp_path / "pairs"), num_workers=0)
        for name in ("gap", "retrieval")
    }
    found = evaluate_model(model, configs, progress=False)
    assert model.training
    assert found.keys() == configs.keys()
    gap, retrieval = found["gap"], found["retrieval"]
    assert retrieval.metrics.items() <= gap.metrics.items()
    assert retrieval.chance.items() <= gap.chance.items()
    assert gap.verdict is not None
    assert "retrieval is near chance" in retrieval.verdict.text  # type: ignore[union-attr]
    configs["missing"] = EvaluatorConfig(task="gap", local=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        evaluate_model(model, configs, progress=False)


def test_zero_shot_and_shift(tmp_path: Path) -> None:
    samples, model = write_labelled(tmp_path / "a", 12), small_model()
    known = evaluator_of("zero_shot", tmp_path / "a")(encoder_of(model)).metrics
    prompts = [template.format(c=c) for c in CLASSES for template in ("a {c}.", "the {c}")]
    images, texts = one_by_one(model, [image for image, _ in samples], prompts)
    classifier = F.normalize(texts.view(3, 2, -1).mean(1), dim=-1)
    targets = torch.tensor([label for _, label in samples])
    assert known == pytest.approx(accuracy(images, classifier, targets))
    assert known.keys() == metrics_of("zero_shot").keys()
    # both sides are looked at through the outliers' two classes alone
    outliers = write_labelled(tmp_path / "out", 6, seed=5, classes=[CLASSES[2], CLASSES[0]])
    out = SetConfig(local=str(tmp_path / "out"))
    shifted = evaluator_of("out_of_distribution", tmp_path / "a", outliers=out)
    found = shifted(encoder_of(model)).metrics
    outside, _ = one_by_one(model, [image for image, _ in outliers], prompts)
    two, scale = classifier[[2, 0]], model.logit_scale.exp().detach()
    inside = max_softmax(images[targets != 1], two, scale)
    expected = out_of_distribution(inside, max_softmax(outside, two, scale))
    expected |= accuracy(outside, two, torch.tensor([label for _, label in outliers]))
    assert found == pytest.approx(expected, abs=1e-6)
    assert found.keys() == metrics_of("out_of_distribution").keys()


def test_linear_probe(tmp_path: Path) -> None:
    write_labelled(tmp_path / "train", 60)
    write_labelled(tmp_path / "test", 20, seed=1)
    train = SetConfig(local=str(tmp_path / "train"))
    probe = evaluator_of("linear_probe", tmp_path / "test", train=train)
    assert probe(encoder_of(small_model())).metrics.keys() == metrics_of("linear_probe").keys()
    write_classes(tmp_path / "test", classnames=CLASSES[::-1])
    with pytest.raises(UserError, match=r"different classes \(label 0 is '.*' and '.*'\)"):
        evaluator_of("linear_probe", tmp_path / "test", train=train)


def test_sts_from_a_folder_or_a_bucket(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "sts.csv").write_text(STS)
    bucket = s3.bucket()
    s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key="sts.csv", Body=STS.encode())
    for place in (tmp_path, bucket):
        found = evaluator_of("sts", f"{place}/sts.csv")(encoder_of(small_model())).metrics
        assert -1 <= found["spearman"] <= 1
        assert found.keys() == metrics_of("sts").keys()
    with pytest.raises(UserError, match=r"can't read s3://.*/nothing\.csv: not found"):
        evaluator_of("sts", f"{bucket}/nothing.csv")


def test_evaluators_may_share_a_set(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks on one remote set, with one cache, as a person would write it."""
    remote = f"{s3.bucket()}/shared"
    write_captioned(remote, 8)
    opened, encoder = OpenSets(), encoder_of(small_model())
    encoded: list[str] = []
    encode = Encoder._encode
    monkeypatch.setattr(Encoder, "_encode", lambda *args: encoded.append(args[-1]) or encode(*args))
    for task in ("retrieval", "gap"):
        evaluator_of(task, remote, opened, local=str(tmp_path / "cache"))(encoder)
    assert encoded == ["e: images", "e: captions"], "once for both"


# --- sets that can't be read ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_download_that_fails_is_an_error_each_time_and_waits_for_nobody(
    s3: S3Server, tmp_path: Path
) -> None:
    """Several workers read one shard that is gone: none waits for another, then or at the next
    evaluation.
    """
    remote = f"{s3.bucket()}/gone"
    write_captioned(remote, 40, several=False)
    bucket = remote.removeprefix("s3://").partition("/")[0]
    shard = sorted(key for key in s3.keys(remote) if key.endswith(".mds"))[1]
    body = s3.client.get_object(Bucket=bucket, Key=shard)["Body"].read()
    s3.client.delete_object(Bucket=bucket, Key=shard)
    encoder = encoder_of(small_model(), batch_size=2)
    more = {"local": str(tmp_path / "cache"), "num_workers": 2}
    evaluator = evaluator_of("retrieval", remote, **more)
    for _ in range(2):
        with pytest.raises(UserError, match=Path(shard).name):
            evaluator(encoder)
    s3.client.put_object(Bucket=bucket, Key=shard, Body=body)
    assert "image_retrieval_recall@1" in evaluator(encoder).metrics


@pytest.mark.slow
def test_a_reader_that_hangs_ends_with_the_evaluation_and_blocks_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker's download fails while another's never answers: the next evaluation finds a set
    that can be read.
    """
    write_captioned(tmp_path / "set", 40, several=False)
    broken = tmp_path / "broken"
    broken.touch()
    download = CachedStream.prepare_shard

    def prepare_shard(self: CachedStream, shard: Any) -> int:
        if broken.exists() and shard.file_pairs[0][0].basename == "shard.00000.mds":
            time.sleep(1)  # until the other one is at it
            raise ConnectionError("connection reset")
        if broken.exists():
            time.sleep(600)
        return download(self, shard)

    monkeypatch.setattr(CachedStream, "prepare_shard", prepare_shard)
    encoder = encoder_of(small_model(), batch_size=16)
    more = {"remote": str(tmp_path / "set"), "local": str(tmp_path / "cache"), "num_workers": 2}
    evaluator = evaluator_of("retrieval", tmp_path, batch_size=16, **more)
    start = time.monotonic()
    with pytest.raises(UserError, match="connection reset"):
        evaluator(encoder)
    broken.unlink()
    assert "image_retrieval_recall@1" in evaluator(encoder).metrics
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("captions", [None, "", "  ", [], ["", None], 3])
def test_an_image_without_a_caption_is_named(tmp_path: Path, captions: Any) -> None:
    rows = [{"caption": text} for text in (["a dog", "", "the tree"], captions, "a cat")]
    write(tmp_path, rows, {"caption": "json"})
    with pytest.raises(UserError, match=r"evaluators\.e: the image of sample 1 has no caption"):
        evaluator_of("gap", tmp_path)(encoder_of(small_model()))


@pytest.mark.parametrize("hashes", [[], ["sha1"], ["md5", "xxh64"]], ids=str)
def test_whatever_a_bucket_is_hashed_with(s3: S3Server, tmp_path: Path, hashes: list[str]) -> None:
    remote = f"{s3.bucket()}/hashed"
    write(remote, [{"caption": word} for word in WORDS[:3]], {"caption": "str"}, hashes=hashes)
    found = evaluator_of("gap", remote, local=str(tmp_path / "cache"))(encoder_of(small_model()))
    assert found.metrics["rmg"] >= 0


def test_another_set_in_the_cache_is_refused(s3: S3Server, tmp_path: Path) -> None:
    remote = f"{s3.bucket()}/replaced"
    stream = SetConfig(remote=remote, local=str(tmp_path / "cache"))
    write_captioned(remote, 4)
    EvaluationSet(stream, "caption", OpenSets())
    for key in s3.keys(remote):
        s3.client.delete_object(Bucket=remote.removeprefix("s3://").split("/")[0], Key=key)
    write_captioned(remote, 6)
    with pytest.raises(UserError, match="holds another set"):
        EvaluationSet(stream, "caption", OpenSets())


def test_wrong_sets_are_one_line(tmp_path: Path) -> None:
    stream = SetConfig(local=str(tmp_path))
    write(tmp_path, [{"label": 0}], {"label": "int"})
    with pytest.raises(UserError, match=r"^no MDS set at .*nowhere \(no index\.json there\)$"):
        EvaluationSet(SetConfig(local=str(tmp_path / "nowhere")), "label", OpenSets())
    lacks = r"lacks the columns \['caption'\]; it has \['image', 'key', 'label'\]"
    with pytest.raises(UserError, match=lacks):
        EvaluationSet(stream, "caption", OpenSets())
    with pytest.raises(UserError, match=r"can't read .*classes.json: No such file or directory"):
        read_classes(stream)
    for wrong in ({"classnames": []}, {"classnames": "cat"}, {"templates": None}):
        write_classes(tmp_path, **wrong)
        with pytest.raises(UserError, match=r"convert/classification.py"):
            read_classes(stream)
    write_classes(tmp_path, classes=3, classnames=[*CLASSES, "cat"])
    with pytest.raises(UserError, match="has 4 classnames, and the set has 3 classes"):
        read_classes(stream)
