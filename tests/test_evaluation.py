"""Evaluation of a model on sets: features in the set's order on any number of ranks, each task against its parts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from models import EVERYTHING, small_config
from runs import jpeg
from s3 import S3Server
from streaming import MDSWriter

from alignclip.config.metrics import metrics_of
from alignclip.config.schema import EvaluatorConfig, SetConfig
from alignclip.data.shard_cache import CachedStream
from alignclip.data.transforms import center_crop, normalize
from alignclip.errors import UserError
from alignclip.evaluation.encoding import Encoder, Interrupted
from alignclip.evaluation.evaluator import Evaluator, evaluate_model
from alignclip.evaluation.retrieval import recall
from alignclip.evaluation.sets import EvaluationSet, OpenSets, read_classes
from alignclip.model.encoders import CLIP, build_encoders
from alignclip.ranks import gather_objects, rank

CLASSES = ["dog", "red car", "a tree in the snow"]
WORDS = ["red", "blue", "dog", "car", "on", "the", "left", "of", "a", "tree"]


def small_model() -> CLIP:
    torch.manual_seed(0)
    return build_encoders(
        small_config(shared=EVERYTHING, text={"context_length": 32, "vocab_size": 49408})
    )


def encoder_of(model: CLIP, batch_size: int = 4) -> Encoder:
    return Encoder(model, torch.device("cpu"), batch_size=batch_size, progress=False)


def write_labelled(
    out: str, count: int, seed: int = 0, classes: list[str] = CLASSES
) -> list[tuple[bytes, int]]:
    rng = np.random.default_rng(seed)
    samples = [(jpeg(rng), int(rng.integers(len(classes)))) for _ in range(count)]
    with MDSWriter(
        out=out, columns={"key": "str", "image": "bytes", "label": "int"}, hashes=["xxh64"]
    ) as writer:
        for i, (image, label) in enumerate(samples):
            writer.write({"key": str(i), "image": image, "label": label})
    return samples


def write_classes(folder: Path, classes: list[str] = CLASSES) -> None:
    (folder / "classes.json").write_text(
        json.dumps({"classnames": classes, "templates": ["a {c}.", "the {c}"]})
    )


def write_captioned(out: str, count: int, several: bool) -> list[tuple[bytes, Any]]:
    rng = np.random.default_rng(1)

    def caption() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 12)))

    samples: list[tuple[bytes, Any]] = [
        (jpeg(rng), [caption() for _ in range(rng.integers(1, 4))] if several else caption())
        for _ in range(count)
    ]
    columns = {"key": "str", "image": "bytes", "caption": "json" if several else "str"}
    with MDSWriter(out=out, columns=columns, hashes=["xxh64"], size_limit="20kb") as writer:
        for i, (image, captions) in enumerate(samples):
            writer.write({"key": str(i), "image": image, "caption": captions})
    return samples


@torch.no_grad()
def one_by_one(
    model: CLIP, images: list[bytes], texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features by the plainest loop."""
    model.eval()
    tokenizer = encoder_of(model).tokenizer
    size = encoder_of(model).image_size
    return (
        torch.cat(
            [
                F.normalize(model.encode_image(normalize(center_crop(i, size)[None])), dim=-1)
                for i in images
            ]
        ),
        torch.cat([F.normalize(model.encode_text(tokenizer([t])), dim=-1) for t in texts]),
    )


@pytest.mark.parametrize("count", [1, 4, 9])
def test_features_come_in_the_sets_order(tmp_path: Path, count: int) -> None:
    samples = write_labelled(str(tmp_path / "set"), count)
    model = small_model().train()
    encoder = encoder_of(model)
    dataset = EvaluationSet(
        SetConfig(local=str(tmp_path / "set")), encoder.image_size, "label", OpenSets()
    )
    features, labels = encoder.images(dataset)
    texts = [" ".join(WORDS[: 1 + i * 3 % 7]) for i in range(count)]
    expected = one_by_one(model, [image for image, _ in samples], texts)
    assert labels == [label for _, label in samples]
    torch.testing.assert_close(features, expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.texts(texts), expected[1], rtol=0, atol=1e-6)


def test_the_model_goes_on_training_and_the_global_generator_stays(tmp_path: Path) -> None:
    write_labelled(str(tmp_path / "set"), 5)
    model = small_model().train()
    dataset = EvaluationSet(
        SetConfig(local=str(tmp_path / "set")), encoder_of(model).image_size, "label", OpenSets()
    )
    before = torch.get_rng_state()
    encoder_of(model).images(dataset)
    encoder_of(model).texts(["a", "b"])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def encode_on_a_rank(
    folder: str, count: int
) -> tuple[torch.Tensor, list[Any], torch.Tensor, dict[str, float]]:
    encoder = encoder_of(small_model(), batch_size=3)
    dataset = EvaluationSet(SetConfig(local=folder), encoder.image_size, "caption", OpenSets())
    features, captions = encoder.images(dataset)
    config = EvaluatorConfig(task="retrieval", local=folder, batch_size=3, num_workers=0)
    metrics = Evaluator("pairs", config, encoder.image_size, OpenSets())(encoder).metrics
    return (
        features,
        captions,
        encoder.texts([" ".join(WORDS[: i % 9]) for i in range(count)]),
        metrics,
    )


@pytest.mark.world_size(3)
@pytest.mark.parametrize("count", [1, 2, 10, 13])
def test_several_ranks_find_what_one_finds(tmp_path: Path, count: int) -> None:
    """Whatever the size: fewer samples than ranks, shares that don't come out even."""
    write_captioned(str(tmp_path / "set"), count, several=True)
    alone = encode_on_a_rank(str(tmp_path / "set"), count)
    for features, captions, texts, metrics in processes.run(
        3, encode_on_a_rank, str(tmp_path / "set"), count
    ):
        torch.testing.assert_close(features, alone[0], rtol=0, atol=1e-6)
        assert captions == alone[1]
        torch.testing.assert_close(texts, alone[2], rtol=0, atol=1e-6)
        assert metrics == alone[3]


def read_broken(folder: str) -> str:
    encoder = encoder_of(small_model(), batch_size=2)
    dataset = EvaluationSet(SetConfig(local=folder), encoder.image_size, "label", OpenSets())
    with pytest.raises(UserError) as error:
        encoder.images(dataset)
    return str(error.value)


@pytest.mark.world_size(2)
def test_a_sample_that_one_rank_cannot_read_is_everybodys_error(tmp_path: Path) -> None:
    columns = {"key": "str", "image": "bytes", "label": "int"}
    with MDSWriter(out=str(tmp_path / "set"), columns=columns, hashes=["xxh64"]) as writer:
        for i in range(9):
            image = b"\xff\xd8\xff broken" if i == 6 else jpeg(np.random.default_rng(i))
            writer.write({"key": f"k{i}", "image": image, "label": 0})
    said = processes.run(2, read_broken, str(tmp_path / "set"))
    assert said[0] == said[1]
    assert "the image of sample 6 'k6'" in said[0]


@pytest.fixture
def evaluate() -> Any:
    model = small_model()

    def evaluate(config: EvaluatorConfig) -> dict[str, float]:
        config.num_workers, config.batch_size = 2, 4
        return Evaluator("e", config, encoder_of(model).image_size, OpenSets())(
            encoder_of(model)
        ).metrics

    evaluate.model = model  # type: ignore[attr-defined]
    return evaluate


@pytest.mark.parametrize("several", [False, True])
def test_retrieval_from_a_bucket(
    s3: S3Server, tmp_path: Path, evaluate: Any, several: bool
) -> None:
    remote = f"{s3.bucket()}/coco"
    samples = write_captioned(remote, 14, several)
    found = evaluate(
        EvaluatorConfig(task="retrieval", remote=remote, local=str(tmp_path / "cache"))
    )
    captions = [[c] if isinstance(c, str) else c for _, c in samples]
    texts = [c for one in captions for c in one]
    assert (len(texts) > 14) == several
    images, features = one_by_one(evaluate.model, [image for image, _ in samples], texts)
    owner = torch.tensor([i for i, one in enumerate(captions) for _ in one])
    assert found == recall(images, features, owner)
    assert metrics_of("retrieval").keys() == found.keys()


def test_a_model_in_memory_is_measured(tmp_path: Path, evaluate: Any) -> None:
    write_captioned(str(tmp_path / "pairs"), 12, several=True)
    configs = {
        name: EvaluatorConfig(task=name, local=str(tmp_path / "pairs"), num_workers=0)
        for name in ("gap", "retrieval")
    }
    evaluate.model.train()
    found = evaluate_model(evaluate.model, configs, progress=False)
    assert evaluate.model.training
    assert found.keys() == configs.keys()
    assert found["gap"].metrics["margin"] == pytest.approx(
        found["gap"].metrics["alignment_score"] - found["gap"].metrics["wrong_pairs_cosine"]
    )
    for name, value in found["retrieval"].metrics.items():
        assert found["gap"].metrics[name] == value
        assert found["gap"].chance[name] == found["retrieval"].chance[name]
    assert found["gap"].verdict is not None
    assert "retrieval is near chance" in found["retrieval"].verdict.text  # type: ignore[union-attr]
    configs["missing"] = EvaluatorConfig(task="gap", local=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        evaluate_model(evaluate.model, configs, progress=False)


def test_zero_shot_and_shift(tmp_path: Path, evaluate: Any) -> None:
    samples = write_labelled(str(tmp_path / "set"), 12)
    write_classes(tmp_path / "set")
    known = evaluate(EvaluatorConfig(task="zero_shot", local=str(tmp_path / "set")))
    prompts = [template.format(c=c) for c in CLASSES for template in ("a {c}.", "the {c}")]
    images, texts = one_by_one(evaluate.model, [image for image, _ in samples], prompts)
    classifier = F.normalize(texts.view(3, 2, -1).mean(1), dim=-1)
    right = (images @ classifier.T).argmax(1) == torch.tensor([label for _, label in samples])
    assert known["acc1"] == pytest.approx(right.double().mean().item())
    assert known["acc5"] == 1
    assert metrics_of("zero_shot").keys() == known.keys()
    outliers = [CLASSES[2], CLASSES[0]]
    write_labelled(str(tmp_path / "out"), 6, seed=5, classes=outliers)
    write_classes(tmp_path / "out", outliers)
    config = EvaluatorConfig(task="out_of_distribution", local=str(tmp_path / "set"))
    config.outliers = SetConfig(local=str(tmp_path / "out"))
    found = evaluate(config)
    # both sides are looked at through the outliers' two classes alone
    scale = evaluate.model.logit_scale.exp()
    kept = [i for i, (_, label) in enumerate(samples) if CLASSES[label] in outliers]
    inside = (scale * images[kept] @ classifier[[2, 0]].T).softmax(1).amax(1)
    out_images = EvaluationSet(
        config.outliers, encoder_of(evaluate.model).image_size, "label", OpenSets()
    )
    outside_features, labels = encoder_of(evaluate.model).images(out_images)
    logits = outside_features @ classifier[[2, 0]].T
    outside = (scale * logits).softmax(1).amax(1)
    auroc = (inside[:, None] > outside).double().mean().item()
    assert found["auroc"] == pytest.approx(auroc, abs=1e-6)
    assert found["acc1"] == pytest.approx(
        (logits.argmax(1) == torch.tensor(labels)).double().mean().item()
    )
    assert metrics_of("out_of_distribution").keys() == found.keys()


def test_linear_probe_gap_and_sts(tmp_path: Path, evaluate: Any) -> None:
    write_labelled(str(tmp_path / "train"), 60)
    write_labelled(str(tmp_path / "test"), 20, seed=1)
    for part in ("train", "test"):
        write_classes(tmp_path / part)
    config = EvaluatorConfig(task="linear_probe", local=str(tmp_path / "test"))
    config.train = SetConfig(local=str(tmp_path / "train"))
    assert metrics_of("linear_probe").keys() == evaluate(config).keys()
    write_classes(tmp_path / "test", CLASSES[::-1])
    with pytest.raises(UserError, match=r"different classes \(label 0 is '.*' and '.*'\)"):
        evaluate(config)
    write_captioned(str(tmp_path / "pairs"), 12, several=True)
    gap = evaluate(EvaluatorConfig(task="gap", local=str(tmp_path / "pairs")))
    assert metrics_of("gap").keys() == gap.keys()
    lines = [
        f"g\tf\t2012\t{i}\t{i / 2}\t{' '.join(WORDS[:i])} x\t{' '.join(WORDS[i:])} y"
        for i in range(1, 8)
    ]
    (tmp_path / "sts-test.csv").write_text("\n".join(lines))
    found = evaluate(EvaluatorConfig(task="sts", local=str(tmp_path / "sts-test.csv")))
    assert -1 <= found["spearman"] <= 1
    assert metrics_of("sts").keys() == found.keys()


def test_sts_from_a_bucket(s3: S3Server, evaluate: Any) -> None:
    lines = [
        f"g\tf\t2012\t{i}\t{i / 2}\t{' '.join(WORDS[:i])} x\t{' '.join(WORDS[i:])} y"
        for i in range(1, 8)
    ]
    bucket = s3.bucket()
    s3.client.put_object(
        Bucket=bucket.removeprefix("s3://"), Key="sts.csv", Body="\n".join(lines).encode()
    )
    assert evaluate(EvaluatorConfig(task="sts", remote=f"{bucket}/sts.csv")).keys() == {"spearman"}
    with pytest.raises(UserError, match=r"can't read s3://.*/nothing\.csv: not found"):
        evaluate(EvaluatorConfig(task="sts", remote=f"{bucket}/nothing.csv"))


def test_the_gap_is_of_first_captions_and_closed_retrieval_of_all(
    tmp_path: Path, evaluate: Any
) -> None:
    samples = write_captioned(str(tmp_path / "pairs"), 12, several=True)
    found = evaluate(EvaluatorConfig(task="gap", local=str(tmp_path / "pairs")))
    captions = [list(c) for _, c in samples]
    images, texts = one_by_one(
        evaluate.model, [image for image, _ in samples], [c for one in captions for c in one]
    )
    owner = torch.tensor([i for i, one in enumerate(captions) for _ in one])
    first = torch.stack([texts[owner == i][0] for i in range(12)])
    assert found["alignment_score"] == pytest.approx(
        (images * first).sum(1).mean().item(), abs=1e-6
    )
    shift = (images.mean(0) - texts.mean(0)) / 2
    closed = recall(images - shift, texts + shift, owner)
    assert {f"closed_{name}": value for name, value in closed.items()}.items() <= found.items()
    assert len(texts) > 12


def test_a_download_that_fails_is_an_error_each_time_and_waits_for_nobody(
    s3: S3Server, tmp_path: Path
) -> None:
    """Several workers read one shard that is gone: none waits for another, then or at the next evaluation."""
    remote = f"{s3.bucket()}/gone"
    write_captioned(remote, 40, several=False)
    bucket = remote.removeprefix("s3://").partition("/")[0]
    shard = sorted(key for key in s3.keys(remote) if key.endswith(".mds"))[1]
    body = s3.client.get_object(Bucket=bucket, Key=shard)["Body"].read()
    s3.client.delete_object(Bucket=bucket, Key=shard)
    config = EvaluatorConfig(
        task="retrieval", remote=remote, local=str(tmp_path / "cache"), num_workers=2
    )
    encoder = encoder_of(small_model(), batch_size=2)
    evaluator = Evaluator("pairs", config, encoder.image_size, OpenSets())
    for _ in range(2):
        with pytest.raises(UserError, match=Path(shard).name):
            evaluator(encoder)
    s3.client.put_object(Bucket=bucket, Key=shard, Body=body)
    assert "image_retrieval_recall@1" in evaluator(encoder).metrics


def test_a_reader_that_hangs_ends_with_the_evaluation_and_blocks_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker's download fails while another's never answers: the next evaluation finds a set that can be read."""
    write_captioned(str(tmp_path / "set"), 40, several=False)
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
    config = EvaluatorConfig(
        task="retrieval", remote=str(tmp_path / "set"), local=str(tmp_path / "cache")
    )
    config.num_workers = 2
    encoder = encoder_of(small_model(), batch_size=16)
    evaluator = Evaluator("pairs", config, encoder.image_size, OpenSets())
    start = time.monotonic()
    with pytest.raises(UserError, match="connection reset"):
        evaluator(encoder)
    broken.unlink()
    assert "image_retrieval_recall@1" in evaluator(encoder).metrics
    assert time.monotonic() - start < 60


def out_of_memory(tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")


def encode_with_little_memory(folder: str) -> str:
    encoder = encoder_of(small_model(), batch_size=3)
    encoder.interrupted = lambda: bool(gather_objects([0]) is None)  # keeps step, as in training
    if rank() == 1:
        encoder.model.encode_text = out_of_memory  # type: ignore[method-assign]
    config = EvaluatorConfig(task="retrieval", local=folder, batch_size=3, num_workers=0)
    with pytest.raises(UserError) as error:
        Evaluator("pairs", config, encoder.image_size, OpenSets())(encoder)
    return str(error.value)


@pytest.mark.world_size(2)
def test_what_one_rank_cannot_encode_is_everybodys_error(tmp_path: Path) -> None:
    write_captioned(str(tmp_path / "set"), 20, several=True)
    said = processes.run(2, encode_with_little_memory, str(tmp_path / "set"))
    assert (
        said
        == ["pairs: captions: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"] * 2
    )


def test_an_interrupted_evaluation_stops_at_the_next_batch(tmp_path: Path) -> None:
    write_captioned(str(tmp_path / "set"), 20, several=False)
    encoder = encoder_of(small_model(), batch_size=4)
    asked: list[int] = []
    encoder.interrupted = lambda: bool(asked.append(0) or len(asked) > 2)  # type: ignore[func-returns-value]
    config = EvaluatorConfig(task="retrieval", local=str(tmp_path / "set"), num_workers=0)
    with pytest.raises(Interrupted):
        Evaluator("pairs", config, encoder.image_size, OpenSets())(encoder)
    assert len(asked) == 3


@pytest.mark.parametrize("captions", [None, "", "  ", [], ["", None], 3])
def test_an_image_without_a_caption_is_named(tmp_path: Path, evaluate: Any, captions: Any) -> None:
    with MDSWriter(
        out=str(tmp_path / "set"), columns={"key": "str", "image": "bytes", "caption": "json"}
    ) as writer:
        for i in range(3):
            text = captions if i == 1 else ["a dog", "", "the tree"]
            writer.write({"key": str(i), "image": jpeg(np.random.default_rng(i)), "caption": text})
    with pytest.raises(UserError, match=r"evaluators\.e: the image of sample 1 has no caption"):
        evaluate(EvaluatorConfig(task="gap", local=str(tmp_path / "set")))


@pytest.mark.parametrize("hashes", [[], ["sha1"], ["md5", "xxh64"]], ids=str)
def test_whatever_a_bucket_is_hashed_with(
    s3: S3Server, tmp_path: Path, evaluate: Any, hashes: list[str]
) -> None:
    remote = f"{s3.bucket()}/hashed"
    columns = {"key": "str", "image": "bytes", "caption": "str"}
    with MDSWriter(out=remote, columns=columns, hashes=hashes) as writer:
        for i in range(3):
            writer.write(
                {"key": str(i), "image": jpeg(np.random.default_rng(i)), "caption": WORDS[i]}
            )
    assert (
        evaluate(EvaluatorConfig(task="gap", remote=remote, local=str(tmp_path / "cache")))["rmg"]
        >= 0
    )


def test_another_set_in_the_cache_is_refused(s3: S3Server, tmp_path: Path) -> None:
    remote = f"{s3.bucket()}/replaced"
    write_captioned(remote, 4, several=False)
    encoder = encoder_of(small_model())
    stream = SetConfig(remote=remote, local=str(tmp_path / "cache"))
    EvaluationSet(stream, encoder.image_size, "caption", OpenSets())
    for key in s3.keys(remote):
        s3.client.delete_object(Bucket=remote.removeprefix("s3://").split("/")[0], Key=key)
    write_captioned(remote, 6, several=False)
    with pytest.raises(UserError, match="holds another set"):
        EvaluationSet(stream, encoder.image_size, "caption", OpenSets())


def test_wrong_sets_are_one_line(tmp_path: Path) -> None:
    write_labelled(str(tmp_path / "set"), 2)
    with pytest.raises(UserError, match=r"^no MDS set at .*nowhere \(no index\.json there\)$"):
        EvaluationSet(SetConfig(local=str(tmp_path / "nowhere")), 16, "label", OpenSets())
    with pytest.raises(
        UserError, match=r"lacks the columns \['caption'\]; it has \['image', 'key', 'label'\]"
    ):
        EvaluationSet(SetConfig(local=str(tmp_path / "set")), 16, "caption", OpenSets())
    with pytest.raises(UserError, match=r"can't read .*classes.json: No such file or directory"):
        read_classes(SetConfig(local=str(tmp_path / "set")))
    for text in (
        "[]",
        '{"classnames": [], "templates": ["a {c}"]}',
        '{"classnames": "cat", "templates": ["a {c}"]}',
    ):
        (tmp_path / "set" / "classes.json").write_text(text)
        with pytest.raises(UserError, match=r"convert/classification.py"):
            read_classes(SetConfig(local=str(tmp_path / "set")))
    longer = {"classes": 3, "classnames": [*CLASSES, "cat"], "templates": ["a {c}"]}
    (tmp_path / "set" / "classes.json").write_text(json.dumps(longer))
    with pytest.raises(UserError, match="has 4 classnames, and the set has 3 classes"):
        read_classes(SetConfig(local=str(tmp_path / "set")))


def test_evaluators_may_share_a_set(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks on one remote set, with one cache, as a person would write it."""
    remote = f"{s3.bucket()}/shared"
    write_captioned(remote, 8, several=True)
    opened, encoder = OpenSets(), encoder_of(small_model())
    found = {}
    encoded: list[str] = []
    encode = Encoder._encode
    monkeypatch.setattr(Encoder, "_encode", lambda *args: encoded.append(args[-1]) or encode(*args))
    for task in ("retrieval", "gap"):
        config = EvaluatorConfig(
            task=task, remote=remote, local=str(tmp_path / "cache"), num_workers=0
        )
        found[task] = Evaluator(task, config, encoder.image_size, opened)(encoder).metrics
    assert encoded == ["retrieval: images", "retrieval: captions"], "once for both"
    assert found["retrieval"].keys() <= {name.removeprefix("closed_") for name in found["gap"]}
